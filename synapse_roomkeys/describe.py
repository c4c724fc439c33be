"""One-line descriptions of exceptions for logs and terminals, without secrets."""

import re

#: Start of libpq's message of a failed connection: quoted host, resolved address, port.
_SERVER = re.compile(
    r'connection to server (?:at|on socket) "(?:(?P<host>[\d.]+)|.*)"'
    r"(?: \((?P<address>[\da-fA-F.:%]+)\))?(?P<port>(?:, port \d+)?) failed: "
)
#: Quoted text, with the quotation marks of the languages that PostgreSQL's messages are
#: translated to: from the first mark to the last, as the text may hold marks itself, or
#: to the end of the line, as the text may hold a newline.
_QUOTED = re.compile(
    r'["«»„“”].*["«»„“”]( for connection option "\w+"$)|["«»„“”](?:.*["«»„“”]|.*)'
)


def error_line(error: BaseException) -> str:
    """Describe an exception in one line without secrets.

    Take the first line of the exception's text, because PostgreSQL puts parameters of
    statements on later lines. Without text, take the name of the class.

    In an error of a connection to PostgreSQL, replace quoted text by "...", because
    libpq quotes arguments of the connection, and takes a part of a password for a host
    if the password in a URI has an @. Errors of statements keep their quoted names of
    tables and columns: psycopg2 gives these errors an SQLSTATE (``pgcode``), and errors
    of connections None.
    """
    line = (str(error).splitlines() or [""])[0].strip() or type(error).__name__
    if getattr(error, "pgcode", "") is not None:
        return line
    server = _SERVER.match(line)
    if server is None:
        return _QUOTED.sub(r'"..."\1', line)
    address = server["host"] or server["address"] or '"..."'
    reason = _QUOTED.sub(r'"..."\1', line[server.end() :])
    return f"connection to server at {address}{server['port']} failed: {reason}"

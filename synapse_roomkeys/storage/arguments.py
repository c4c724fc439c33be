"""The arguments of a connection: timeouts, mistakes, and the address for logs."""

from collections.abc import Mapping
from typing import Any

from .engine import Engine

#: Timeouts for libpq that the operator's arguments override. libpq waits 5 seconds for
#: each host to connect. A server that loses its power vanishes without closing its
#: connections: libpq gives up after 10 seconds (tcp_user_timeout is in milliseconds)
#: without an acknowledgement of sent data or, during a query, of a keepalive probe.
#: Linux's own timeouts for these are 15 minutes and 2 hours.
LIBPQ_DEFAULTS = {
    "connect_timeout": 5,
    "tcp_user_timeout": 10_000,
    "keepalives_idle": 5,
    "keepalives_interval": 5,
}


def database_address(engine: Engine, arguments: Mapping[str, Any]) -> str:
    """Describe where a database is: hosts and ports, or the path of a file.

    Other arguments are left out, because operators put passwords in wrong places.

    Args:
        arguments: the arguments of ``psycopg2.connect`` or ``sqlite3.connect``.
    """
    if engine.name == "sqlite":
        return str(arguments["database"])
    found = dict(arguments)
    if "dsn" in found:
        from psycopg2 import ProgrammingError
        from psycopg2.extensions import parse_dsn

        try:
            found |= parse_dsn(found["dsn"])
        except ProgrammingError:
            return "of database.args.dsn"
    host = found.get("host") or found.get("hostaddr") or "a local socket"
    return f"{host}:{found.get('port', 5432)}"


def with_timeouts(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of ``psycopg2.connect`` with `LIBPQ_DEFAULTS` where they name no
    timeout.

    Arguments with a dsn are returned unchanged: libpq prefers an argument to the
    setting of the same name in a dsn, so a default would override the operator's own.
    """
    return {**({} if "dsn" in arguments else LIBPQ_DEFAULTS), **arguments}


def find_wrong_argument(arguments: Mapping[str, Any]) -> str | None:
    """Find an argument of ``psycopg2.connect`` that libpq rejects, without connecting.

    A host with an @ and a port that isn't a number are wrong too. In a URI an @ or / in
    the password ends the password, and the rest becomes host or port. Only at its start
    a host may have an @: it names a socket of Linux's abstract namespace.

    Returns:
        The name of the argument, or None: all are right, or psycopg2 isn't installed.
    """
    try:
        from psycopg2 import ProgrammingError
        from psycopg2.extensions import parse_dsn
    except ImportError:
        return None
    # psycopg2's own name for dbname.
    for name in arguments.keys() - {"dsn", "database"}:
        try:
            parse_dsn(f"{name}=''")
        except ProgrammingError:
            return name
    try:
        parsed = parse_dsn(str(arguments.get("dsn", "")))
    except ProgrammingError:
        return "dsn"
    if _find_wrong_place(parsed) is not None:
        return "dsn"
    return _find_wrong_place(arguments)


def split_dsn(dsn: str) -> Mapping[str, Any]:
    """Return a connection string as single arguments of ``psycopg2.connect``.

    Args:
        dsn: a string without a mistake that `find_wrong_argument` finds.

    Returns:
        The arguments; without psycopg2 the argument ``dsn`` alone.
    """
    try:
        from psycopg2.extensions import parse_dsn
    except ImportError:
        return {"dsn": dsn}
    arguments: Mapping[str, Any] = parse_dsn(dsn)
    return arguments


def _find_wrong_place(arguments: Mapping[str, Any]) -> str | None:
    """Return the first of "host" and "port" with an impossible value, or None."""
    hosts = str(arguments.get("host", "")).split(",")
    if any("@" in host[1:] for host in hosts):
        return "host"
    ports = str(arguments.get("port", "")).replace(",", "0")
    return None if ports.isdecimal() or not ports else "port"

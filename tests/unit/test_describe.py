"""Tests of the one-line error texts for operators."""

from __future__ import annotations

from psycopg2 import OperationalError
from psycopg2.errors import UndefinedTable
from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys.describe import error_line

SECRET = "hunter2"
#: Messages of libpq 17 and of servers that quote an argument of the connection, with
#: the expected line for each.
CONNECTION_ERRORS = {
    f'could not translate host name "{SECRET}@h" to address: Name not known': (
        'could not translate host name "..." to address: Name not known'
    ),
    f'invalid integer value "{SECRET}" for connection option "port"': (
        'invalid integer value "..." for connection option "port"'
    ),
    f'invalid sslmode value: "{SECRET}"': 'invalid sslmode value: "..."',
    f'definition of service "{SECRET}" not found': (
        'definition of service "..." not found'
    ),
    f'invalid dsn: missing "=" after "{SECRET}" in connection info string': (
        'invalid dsn: missing "..." in connection info string'
    ),
    'connection to server at "127.0.0.1", port 5432 failed: Connection refused': (
        "connection to server at 127.0.0.1, port 5432 failed: Connection refused"
    ),
    f'connection to server at "{SECRET}" (::1), port 5432 failed: FATAL:  database'
    f' "{SECRET}/db" does not exist': (
        'connection to server at ::1, port 5432 failed: FATAL:  database "..." does not'
        " exist"
    ),
    f'connection to server on socket "/{SECRET}/.s.PGSQL.1" failed: No such file': (
        'connection to server at "..." failed: No such file'
    ),
    f'connection to server at "localhost" (127.0.0.1), port 1 failed: FATAL:  Datenbank'
    f" »{SECRET}« existiert nicht": (
        'connection to server at 127.0.0.1, port 1 failed: FATAL:  Datenbank "..."'
        " existiert nicht"
    ),
    f'could not translate host name "a"{SECRET}"b" to address: x': (
        'could not translate host name "..." to address: x'
    ),
    f'could not translate host name "{SECRET}\nb" to address: x': (
        'could not translate host name "..."'
    ),
    "server closed the connection unexpectedly\n\tThis probably means": (
        "server closed the connection unexpectedly"
    ),
}


class StatementError(UndefinedTable):
    """An error of a statement, with the SQLSTATE that the server sends."""

    pgcode = "42P01"


class ErrorLineTests(SynchronousTestCase):
    """Tests of `error_line`."""

    def test_a_connection_error_quotes_no_value(self) -> None:
        """The line of a connection error names the cause and quotes no value of the
        connection."""
        for text, line in CONNECTION_ERRORS.items():
            self.assertEqual(error_line(OperationalError(text)), line)

    def test_a_statement_error_keeps_its_table_names(self) -> None:
        """The line of a statement's error is its first line with the names of tables,
        without the row on the next line."""
        text = f'relation "e2e_room_keys" does not exist\nDETAIL: {SECRET}'
        self.assertEqual(
            error_line(StatementError(text)), 'relation "e2e_room_keys" does not exist'
        )

    def test_any_other_error_is_its_first_line(self) -> None:
        """The line of any other error is the first line of its message, or the name of
        its class."""
        self.assertEqual(error_line(ValueError('a "b"\nc')), 'a "b"')
        self.assertEqual(error_line(TimeoutError()), "TimeoutError")

"""Connection arguments, addresses in logs, and causes of database errors."""

from __future__ import annotations

import sqlite3
from typing import Any
from unittest import mock

import psycopg2
from twisted.enterprise import adbapi
from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys.storage import (
    CONNECTIONS,
    LOCK,
    SCHEMA,
    SQLITE,
    database_address,
    postgres,
    postgres_database,
)
from synapse_roomkeys.storage.arguments import LIBPQ_DEFAULTS
from synapse_roomkeys.storage.causes import DISK_FULL, OTHER, READ_ONLY, UNREACHABLE

UTF8 = {"client_encoding": "UTF8"}


class PostgresArgumentsTests(SynchronousTestCase):
    """`postgres_database`."""

    def arguments(self, **given: Any) -> dict[str, Any]:
        """Return the arguments of `psycopg2.connect`."""
        database = postgres_database(given)
        self.addCleanup(database.close)
        arguments: dict[str, Any] = database._pool.connkw
        return arguments

    def test_a_server_that_vanishes_is_noticed(self) -> None:
        """The default timeouts apply unless the operator sets other timeouts."""
        self.assertEqual(
            self.arguments(host="h"), {"host": "h", **LIBPQ_DEFAULTS, **UTF8}
        )
        found = self.arguments(tcp_user_timeout=7)
        self.assertEqual(found, {**LIBPQ_DEFAULTS, "tcp_user_timeout": 7, **UTF8})

    def test_the_encoding_is_ours(self) -> None:
        """The client encoding is UTF-8, even if the operator sets another encoding."""
        found = self.arguments(client_encoding="LATIN1")
        self.assertEqual(found, {**LIBPQ_DEFAULTS, **UTF8})

    def test_a_dsn_has_the_last_word(self) -> None:
        """A dsn gets no default timeouts, which would override the dsn's timeouts."""
        dsn = "postgresql://h/db?connect_timeout=30"
        self.assertEqual(self.arguments(dsn=dsn), {"dsn": dsn, **UTF8})


class CauseTests(SynchronousTestCase):
    """The causes of a driver's errors."""

    def test_sqlite(self) -> None:
        """The text of an SQLite error decides the cause."""
        for text, cause in (
            ("database is locked", LOCK),
            ("database or disk is full", DISK_FULL),
            ("disk I/O error", DISK_FULL),
            ("attempt to write a readonly database", READ_ONLY),
            ("unable to open database file", UNREACHABLE),
            ("no such table: e2e_room_keys", SCHEMA),
            ('near "SELEC": syntax error', OTHER),
        ):
            error = sqlite3.OperationalError(text)
            self.assertIs(SQLITE.find_cause(error), cause, text)

    def test_postgresql(self) -> None:
        """The SQLSTATE decides the cause; an error without SQLSTATE is UNREACHABLE."""
        find_cause = postgres().find_cause
        for error in (psycopg2.OperationalError(), adbapi.ConnectionLost()):
            self.assertIs(find_cause(error), UNREACHABLE)
        for state, cause in (
            ("08006", UNREACHABLE),
            ("57P01", UNREACHABLE),
            ("25006", READ_ONLY),
            ("53100", DISK_FULL),
            ("58030", DISK_FULL),
            ("40P01", LOCK),
            ("55P03", LOCK),
            ("57014", LOCK),
            ("53300", CONNECTIONS),
            ("28P01", UNREACHABLE),
            ("42P01", SCHEMA),
            ("XX000", OTHER),
        ):
            error = mock.Mock(pgcode=state)
            self.assertIs(find_cause(error), cause, state)


class AddressTests(SynchronousTestCase):
    """`database_address`."""

    def test_addresses(self) -> None:
        """An address holds hosts and ports, or a file, and no other argument."""
        file = {"database": "/a/roomkeys.db"}
        self.assertEqual(database_address(SQLITE, file), "/a/roomkeys.db")
        for arguments, address in (
            ({"database": "d"}, "a local socket:5432"),
            ({"host": "h", "dbname": "d", "password": "p"}, "h:5432"),
            ({"host": "h", "port": 1, "user": "u", "database": "d"}, "h:1"),
            ({"host": "a,b", "port": "1,2", "user": "u"}, "a,b:1,2"),
            ({"user": "u", "password": "p"}, "a local socket:5432"),
            ({"dsn": "postgresql://u:p@h:7/d"}, "h:7"),
            ({"dsn": "host=h password=p s dbname=d"}, "of database.args.dsn"),
        ):
            self.assertEqual(database_address(postgres(), arguments), address)

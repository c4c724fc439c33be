"""How connections to a database are asked for."""

from __future__ import annotations

from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys.storage import postgres_database
from synapse_roomkeys.storage.database import LIBPQ_DEFAULTS

UTF8 = {"client_encoding": "UTF8"}


class PostgresArgumentsTests(SynchronousTestCase):
    """`postgres_database`."""

    def arguments(self, **given: Any) -> dict[str, Any]:
        """What psycopg2 is called with."""
        database = postgres_database(given)
        self.addCleanup(database.close)
        arguments: dict[str, Any] = database._pool.connkw
        return arguments

    def test_a_server_that_vanishes_is_noticed(self) -> None:
        """Timeouts are ours unless the operator gives others."""
        self.assertEqual(
            self.arguments(host="h"), {"host": "h", **LIBPQ_DEFAULTS, **UTF8}
        )
        found = self.arguments(tcp_user_timeout=7)
        self.assertEqual(found, {**LIBPQ_DEFAULTS, "tcp_user_timeout": 7, **UTF8})

    def test_the_encoding_is_ours(self) -> None:
        """Statements are UTF-8 also where the operator names another encoding."""
        found = self.arguments(client_encoding="LATIN1")
        self.assertEqual(found, {**LIBPQ_DEFAULTS, **UTF8})

    def test_a_dsn_has_the_last_word(self) -> None:
        """A dsn gets no timeouts of ours, which would win over the dsn's own."""
        dsn = "postgresql://h/db?connect_timeout=30"
        self.assertEqual(self.arguments(dsn=dsn), {"dsn": dsn, **UTF8})

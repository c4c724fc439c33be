"""The readiness check of the database, on each engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred, inlineCallbacks

from synapse_roomkeys.outages import Outages
from synapse_roomkeys.service.readiness import (
    LOCK_SECONDS,
    TEST_SECONDS,
    DatabaseReadiness,
    Unready,
)
from synapse_roomkeys.storage import Transaction, estimate_keys, upgrade_tables

from ..contract.base import Steps
from ..sites import Backend


class Target:
    """A database under test and the clock of its readiness check.

    Attributes:
        backend: the database and how to connect.
        database: the connection pool of the check.
        now: the clock's time, in seconds; tests advance the clock.
        readiness: the check.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.database = backend.connect()
        self.now = 0.0
        outages = Outages("Database", lambda: self.now)
        self.readiness = DatabaseReadiness(
            self.database, backend.engine, outages, lambda: self.now
        )

    def execute(self, statement: str) -> Deferred[None]:
        """Run a statement; the Deferred fires when the statement is committed."""

        def run(txn: Transaction) -> None:
            txn.execute(statement)

        return self.database.run("test", run)

    @inlineCallbacks
    def expect_unready(self, text: str) -> Steps:
        """Check that the database isn't ready, for a reason that matches `text`."""
        with pytest.raises(Unready, match=text):
            yield self.readiness.check()


@pytest.fixture
def target(
    engine: str, database: Callable[[], Mapping[str, Any] | None], tmp_path: Path
) -> Iterator[Target]:
    """A database without tables."""
    target = Target(Backend(engine, database(), tmp_path / "roomkeys.db"))
    yield target
    target.database.close()


@inlineCallbacks
def test_missing_tables(target: Target) -> Steps:
    """A missing table makes the database unready within `TEST_SECONDS`.

    The database is ready again with the first check after the table is back. Tables of
    a later version make it unready too.
    """
    engine = target.backend.engine
    yield target.expect_unready("lack a part of number")
    yield target.database.run("upgrade", upgrade_tables, engine, True)
    yield target.readiness.check()
    for table, text in (
        ("e2e_room_keys", "expected table e2e_room_keys with columns"),
        ("e2e_room_keys_versions", "expected table e2e_room_keys_versions"),
        ("roomkeys_counts", "lack a part of number"),
        ("roomkeys_numbers", "lack a part of number"),
    ):
        yield target.execute(f"ALTER TABLE {table} RENAME TO elsewhere")
        yield target.readiness.check()
        target.now += TEST_SECONDS
        yield target.expect_unready(text)
        yield target.execute(f"ALTER TABLE elsewhere RENAME TO {table}")
        yield target.readiness.check()
    yield target.execute("UPDATE roomkeys_schema SET number = 999")
    target.now += TEST_SECONDS
    yield target.expect_unready("number 999")


@inlineCallbacks
def test_a_lock_of_another_process(target: Target) -> Steps:
    """A lock on the row written by the check does not delay the check.

    An SQLite lock blocks the whole file: the file isn't ready once a lock has lasted
    `LOCK_SECONDS`. PostgreSQL stays ready.
    """
    engine = target.backend.engine
    yield target.database.run("upgrade", upgrade_tables, engine, True)
    yield target.readiness.check()
    target.now += TEST_SECONDS
    other = target.backend.connect()
    lock = (
        "BEGIN IMMEDIATE"
        if target.backend.arguments is None
        else "SELECT * FROM roomkeys_schema FOR UPDATE"
    )
    connection = other._pool.connect()
    connection.cursor().execute(lock)
    try:
        yield target.readiness.check()
        target.now += LOCK_SECONDS
        if target.backend.arguments is None:
            yield target.expect_unready("locked")
        else:
            yield target.readiness.check()
    finally:
        connection.rollback()
        other._pool.disconnect(connection)
        other.close()
    yield target.readiness.check()


@inlineCallbacks
def test_estimates(target: Target) -> Steps:
    """The estimated number of keys is right once the engine has statistics."""
    engine = target.backend.engine
    yield target.database.run("upgrade", upgrade_tables, engine, True)
    assert (yield target.database.run("estimate", estimate_keys, engine)) == 0
    if target.backend.arguments is None:
        yield target.execute("INSERT INTO roomkeys_counts VALUES ('@a', 1, 1, 5, 0, 0)")
    else:
        yield target.execute(
            "INSERT INTO e2e_room_keys (user_id, room_id, session_id, version,"
            " session_data) SELECT '@a', '!r', n, 1, '{}' FROM generate_series(1, 5) n"
        )
        yield target.execute("ANALYZE e2e_room_keys")
    assert (yield target.database.run("estimate", estimate_keys, engine)) == 5

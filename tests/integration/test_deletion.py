"""The deletion of a large backup on SQLite, and the delay of others' requests."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from pytest_twisted import blockon
from twisted.internet.defer import Deferred, inlineCallbacks

from synapse_roomkeys.storage import SQLITE, upgrade_tables
from synapse_roomkeys.storage import postgres as postgres_engine
from synapse_roomkeys.storage.sweeps import DELETE_BATCH

from ..contract import Client
from ..contract.base import accepted, key, version_path
from ..memory import StubAuth
from ..servers import PostgresServer
from ..sites import Backend, OwnSite

Steps = Generator[Deferred[Any], Any, None]
KEYS = 20 * SQLITE.swept_at_once
ADD_KEYS = """
    WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)
    INSERT INTO e2e_room_keys
    SELECT ?, '!room', i, ?, 0, 0, 0, '"' || printf('%.900c', 'x') || '"' FROM n"""


#: Stores 20,000 keys of one user, and lets PostgreSQL count them.
FILL = """
    INSERT INTO e2e_room_keys (user_id, version, room_id, session_id, session_data)
    SELECT '@u:x', 1, '!r' || i % 1000, 's' || i, '{}'
    FROM generate_series(1, 20000) AS i;
    ANALYZE e2e_room_keys"""


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[tuple[OwnSite, OwnSite]]:
    """Two servers on one SQLite file."""
    backend = Backend("sqlite", None, tmp_path / "roomkeys.db")
    auth = StubAuth()
    sites = OwnSite(backend, auth), OwnSite(backend, auth)
    for site in sites:
        blockon(site.start())
    yield sites
    for site in sites:
        blockon(site.stop())


@inlineCallbacks
def test_others_are_answered(sites: tuple[OwnSite, OwnSite]) -> Steps:
    """While a version's keys are deleted, other users of this process and of another
    one write again and again, and no write waits for long."""
    path = sites[0].backend.path
    owner = Client(sites[0].host, sites[0].host.new_user())
    version: str = yield owner.create_version()
    with closing(sqlite3.connect(path)) as connection, connection:
        parameters = (KEYS, owner.user.user_id, int(version))
        connection.execute(ADD_KEYS, parameters)
    others = [Client(site.host, site.host.new_user()) for site in sites]
    versions = []
    for other in others:
        versions.append((yield other.create_version()))
    accepted((yield owner.delete(version_path(version))))
    uploads = 0
    while count_keys(path, owner.user.user_id):
        for other, its_version in zip(others, versions, strict=True):
            began = time.monotonic()
            yield other.upload(its_version, {"!room": {f"{uploads}": key()}})
            assert time.monotonic() - began < 5, "the upload had to be tried again"
        uploads += 1
    assert uploads >= KEYS // SQLITE.swept_at_once // 2


def count_keys(path: Path, user_id: str) -> int:
    """Return the number of a user's keys in the file."""
    with closing(sqlite3.connect(path)) as connection:
        statement = "SELECT COUNT(*) FROM e2e_room_keys WHERE user_id = ?"
        ((count,),) = connection.execute(statement, (user_id,)).fetchall()
    number: int = count
    return number


def test_a_batch_is_found_by_the_index(postgres: PostgresServer) -> None:
    """PostgreSQL reads a batch of keys by the index, although nearly all keys of the
    table are the user's. Without the setting it would read the whole table."""
    engine = postgres_engine()
    batch = {"user_id": "@u:x", "version": 1, "room_id": "!r5", "session_id": "s"}
    batch |= {"last_room_id": "!r50", "last_session_id": "s"}
    plans = []
    with closing(psycopg2.connect(**postgres.create_database())) as connection:
        cursor = connection.cursor()
        upgrade_tables(engine.prepare(cursor), engine, True)
        cursor.execute(FILL)
        # As a large table: its index is read at random, a table of one user in order.
        cursor.execute("SET random_page_cost TO 100")
        for begin in (lambda txn: None, engine.begin_batch):
            txn = engine.prepare(cursor)
            begin(txn)
            txn.execute(f"EXPLAIN {DELETE_BATCH}", batch)
            plans.append("".join(line for (line,) in txn.fetchall()))
    assert "Seq Scan" in plans[0]
    assert "Seq Scan" not in plans[1] and "Index" in plans[1]

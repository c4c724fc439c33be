"""Databases that really fail under the service: what clients are told meanwhile, and
that all is well afterwards.

Faults that no database can be brought to at will are in test_fault_injection.py.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from twisted.internet.defer import inlineCallbacks

from ..contract import Answer
from ..contract.base import key, tally, wrapped
from ..servers import PostgresServer
from ..servers.processes import make_directory, remove_directory
from . import SOAK
from .faults import (
    KEYS,
    WITHIN,
    Backup,
    Serve,
    Steps,
    connected,
    later,
    together,
)
from .network_partition import FAR, PORT, can_make_networks, new_link

#: A fault this long is over before a request gives up, in seconds.
SHORT_FAULT = 1.0
#: How long an answer may take while PostgreSQL doesn't even say that it is gone: until
#: its connections are given up, and one more try. Seconds.
PARTITION_TIMEOUT = 20.0
#: How many users there are where several meet a fault at once.
USERS = 6
LOCKS = ("IMMEDIATE", "EXCLUSIVE") if SOAK else ("EXCLUSIVE",)
LOCK_ROW = "SELECT 1 FROM e2e_room_keys_versions WHERE user_id = %s FOR UPDATE"


@contextmanager
def uncommitted(database: Mapping[str, Any]) -> Iterator[Any]:
    """A cursor of somebody else's, in a transaction that comes to nothing."""
    with closing(psycopg2.connect(**database)) as connection:
        yield connection.cursor()


@inlineCallbacks
def wait_for_lock_wait(database: Mapping[str, Any]) -> Steps:
    """Wait until somebody waits for a lock."""
    end = time.monotonic() + WITHIN
    with connected(database) as cursor:
        while True:
            cursor.execute("SELECT 1 FROM pg_locks WHERE NOT granted")
            if cursor.fetchone():
                return
            assert time.monotonic() < end
            yield later(0.02, lambda: None)


@contextmanager
def locked(path: Path, how: str) -> Iterator[Callable[[], object]]:
    """A file that another connection has locked; gives what ends that."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"BEGIN {how}")
        yield lambda: connection.execute("ROLLBACK")


@pytest.mark.parametrize("how", LOCKS)
@inlineCallbacks
def test_a_locked_file(serve: Serve, tmp_path: Path, how: str) -> Steps:
    """Another process writes to the SQLite file: for a moment, which nobody sees, and
    for long, which writers are told while readers are served."""
    served = serve()
    path = tmp_path / "service" / "roomkeys.db"
    backups: list[Backup] = yield served.new_backups(USERS)
    with locked(path, how) as unlock:
        ending = later(SHORT_FAULT, unlock)
        yield together([backup.upload() for backup in backups])
        yield ending
    with locked(path, how):
        writers = [
            b.refuse("DELETE" if n % 2 else "PUT") for n, b in enumerate(backups)
        ]
        readers = [backup.check() for backup in backups]
        start = time.monotonic()
        yield together(writers + readers)
        print(f"503 within {time.monotonic() - start:.1f} s")
    yield together([backup.check() for backup in backups])
    yield together([backup.upload() for backup in backups])
    yield together([backup.check() for backup in backups])
    assert "database is locked" in served.service.log()


@inlineCallbacks
def test_a_statement_timeout(postgres: PostgresServer, serve: Serve) -> Steps:
    """PostgreSQL cancels what waits for another session's lock: for a moment, which
    nobody sees, and for long, which that user is told while others are served."""
    database = postgres.create_database()
    served = serve({**database, "options": "-c statement_timeout=300"})
    backups: list[Backup] = yield served.new_backups(2)
    victim, other = backups
    with uncommitted(database) as cursor:
        cursor.execute(LOCK_ROW, (victim.client.user.user_id,))
        ending = later(SHORT_FAULT, cursor.connection.rollback)
        yield together([victim.upload(), other.upload()])
        yield ending
    with uncommitted(database) as cursor:
        cursor.execute(LOCK_ROW, (victim.client.user.user_id,))
        yield together([victim.refuse(), victim.check(), other.upload()])
    yield together([victim.upload(), other.check()])
    yield victim.check()
    assert "giving up: QueryCanceled" in served.service.log()


@inlineCallbacks
def test_a_deadlock(postgres: PostgresServer, serve: Serve) -> Steps:
    """Another session takes a key and its version in the opposite order; PostgreSQL
    ends the upload, which is then tried again."""
    database = postgres.create_database()
    # Sooner than our lock timeout, which ends the upload as well.
    served = serve({**database, "options": "-c deadlock_timeout=200"})
    backups: list[Backup] = yield served.new_backups(1)
    [backup] = backups
    [room_id] = backup.rooms
    user_id = backup.client.user.user_id
    better = {room_id: {"0": key(verified=True)}}
    with uncommitted(database) as cursor:
        # Whoever waits for so long looks for a deadlock: not this one.
        cursor.execute("SET deadlock_timeout TO '1min'")
        cursor.execute("SELECT 1 FROM e2e_room_keys WHERE session_id = '0' FOR UPDATE")
        upload = backup.send("PUT", wrapped(better))
        yield wait_for_lock_wait(database)
        # It blocks until the deadlock is found.
        cursor.execute(LOCK_ROW, (user_id,))
        cursor.connection.commit()
        answer: Answer = yield upload
    backup.acknowledge(better)
    assert tally(answer) == (backup.etag, KEYS)
    yield backup.check()
    assert "trying again: DeadlockDetected" in served.service.log()


@inlineCallbacks
def test_an_exhausted_pool(postgres: PostgresServer, serve: Serve) -> Steps:
    """The only connection waits for another session's lock, but only until the lock
    timeout: others are served between the tries."""
    database = postgres.create_database()
    served = serve({**database, "cp_max": 1})
    backups: list[Backup] = yield served.new_backups(USERS)
    victim, *others = backups
    with uncommitted(database) as cursor:
        cursor.execute(LOCK_ROW, (victim.client.user.user_id,))
        refused = victim.refuse()
        yield wait_for_lock_wait(database)
        yield together(
            [b.check() if n % 2 else b.upload() for n, b in enumerate(others)]
        )
        yield refused
    yield together([backup.upload() for backup in backups])
    yield together([backup.check() for backup in backups])


@inlineCallbacks
def test_a_restarted_server(tmp_path: Path, serve: Serve) -> Steps:
    """A request that comes alone after a restart doesn't meet the dead connections one
    by one: the first that is found dead has all of them replaced."""
    with PostgresServer(tmp_path / "own") as server:
        served = serve(server.create_database())
        backups: list[Backup] = yield served.new_backups(USERS)
        yield together([backup.check() for backup in backups])
        yield later(SHORT_FAULT, lambda: None)
        server.restart()
        start = time.monotonic()
        yield backups[0].check()
        assert time.monotonic() - start < SHORT_FAULT
        assert served.service.log().count("trying again") == 1
        served.service.stop()


@inlineCallbacks
def test_no_connection_is_left(tmp_path: Path, serve: Serve) -> Steps:
    """Others have all the connections that PostgreSQL allows, and ours are ended."""
    settings = {"max_connections": "12"}
    with (
        PostgresServer(tmp_path / "own", settings=settings) as server,
        ExitStack() as s,
    ):
        database = server.create_database()
        served = serve(database)
        backups: list[Backup] = yield served.new_backups(3)
        connections: list[Any] = []
        with connected(database) as cursor:
            end_ours = (
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE"
                " backend_type = 'client backend' AND pid <> ALL(%s)"
            )
            cursor.execute(end_ours, ([cursor.connection.info.backend_pid],))
            with pytest.raises(psycopg2.OperationalError, match="too many clients"):
                while True:
                    connections.append(psycopg2.connect(**database))
                    s.callback(connections[-1].close)
            yield together(
                [b.refuse("GET" if n % 2 else "PUT") for n, b in enumerate(backups)]
            )
        s.close()
        yield together([backup.check() for backup in backups])
        yield together([backup.upload() for backup in backups])
        yield together([backup.check() for backup in backups])
        assert "too many clients" in served.service.log()
        served.service.stop()


@inlineCallbacks
def test_queued_writes_in_an_outage(tmp_path: Path, serve: Serve) -> Steps:
    """One user's writes wait for each other, but not to find one by one that PostgreSQL
    is away."""
    with PostgresServer(tmp_path / "own") as server:
        served = serve(server.create_database())
        [backup] = yield served.new_backups(1)
        server.stop()
        start = time.monotonic()
        yield together([backup.refuse() for _ in range(20)])
        seconds = time.monotonic() - start
        print(f"20 writes: 503 within {seconds:.1f} s")
        assert seconds < WITHIN
        server.start()
        yield backup.upload()
        yield backup.check()
        served.service.stop()


@pytest.mark.skipif(not can_make_networks(), reason="it takes root")
@inlineCallbacks
def test_a_network_partition(tmp_path: Path, serve: Serve) -> Steps:
    """PostgreSQL's machine says nothing any more, so no connection is known to end."""
    sockets = make_directory("sockets-")
    settings = {"unix_socket_directories": str(sockets)}
    with ExitStack() as stack:
        stack.callback(remove_directory, sockets)
        server = PostgresServer(tmp_path / "own", settings=settings)
        server.take_ownership(sockets)
        stack.enter_context(server)
        path = sockets / f".s.PGSQL.{server.port}"
        link = stack.enter_context(new_link(path, tmp_path / "link.log"))
        there = {"host": FAR, "port": PORT}
        served = serve({**server.create_database(), **there})
        backups: list[Backup] = yield served.new_backups(4)
        link.cut()
        yield together(
            [
                b.refuse("GET" if n % 2 else "PUT", PARTITION_TIMEOUT)
                for n, b in enumerate(backups)
            ]
        )
        link.restore()
        yield together([backup.upload() for backup in backups])
        yield together([backup.check() for backup in backups])
        served.service.stop()

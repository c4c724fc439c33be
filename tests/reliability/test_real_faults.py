"""Real database failures under the service: answers meanwhile, and recovery afterwards.

Faults that can't be provoked in a real database are in test_fault_injection.py.
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

#: Duration of a short fault, in seconds: the service still retries at the end.
SHORT_FAULT = 1.0
#: Longest answer while packets to PostgreSQL vanish, in seconds: the time until the
#: service gives up the connections, plus another try.
PARTITION_TIMEOUT = 20.0
#: Number of users with requests during a fault.
USERS = 6
LOCKS = ("IMMEDIATE", "EXCLUSIVE") if SOAK else ("EXCLUSIVE",)
LOCK_ROW = "SELECT 1 FROM e2e_room_keys_versions WHERE user_id = %s FOR UPDATE"


@contextmanager
def uncommitted(database: Mapping[str, Any]) -> Iterator[Any]:
    """Yield a cursor of an independent transaction, rolled back at the end."""
    with closing(psycopg2.connect(**database)) as connection:
        yield connection.cursor()


@inlineCallbacks
def wait_for_lock_wait(database: Mapping[str, Any]) -> Steps:
    """Wait until a session waits for a lock."""
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
    """Lock an SQLite file with another connection; yield a function to unlock the
    file."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"BEGIN {how}")
        yield lambda: connection.execute("ROLLBACK")


@pytest.mark.parametrize("how", LOCKS)
@inlineCallbacks
def test_a_locked_file(serve: Serve, tmp_path: Path, how: str) -> Steps:
    """While another process holds the lock of the SQLite file for a second, uploads
    wait and succeed; if the lock stays, writers get 503 and readers are served."""
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
    """An upload whose statements time out behind another session's lock is retried and
    succeeds if the lock is short; if the lock stays, its user gets 503 and others are
    served."""
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
    """If PostgreSQL ends an upload to resolve a deadlock, the upload is retried and
    succeeds."""
    database = postgres.create_database()
    # Find the deadlock before the service's lock timeout (1 s) ends the upload as well.
    served = serve({**database, "options": "-c deadlock_timeout=200"})
    backups: list[Backup] = yield served.new_backups(1)
    [backup] = backups
    [room_id] = backup.rooms
    user_id = backup.client.user.user_id
    better = {room_id: {"0": key(verified=True)}}
    with uncommitted(database) as cursor:
        # PostgreSQL ends the session whose deadlock_timeout expires first: the
        # service's session.
        cursor.execute("SET deadlock_timeout TO '1min'")
        cursor.execute("SELECT 1 FROM e2e_room_keys WHERE session_id = '0' FOR UPDATE")
        upload = backup.send("PUT", wrapped(better))
        yield wait_for_lock_wait(database)
        # Blocks until PostgreSQL has ended the upload's transaction.
        cursor.execute(LOCK_ROW, (user_id,))
        cursor.connection.commit()
        answer: Answer = yield upload
    backup.acknowledge(better)
    assert tally(answer) == (backup.etag, KEYS)
    yield backup.check()
    assert "trying again: DeadlockDetected" in served.service.log()


@inlineCallbacks
def test_an_exhausted_pool(postgres: PostgresServer, serve: Serve) -> Steps:
    """If the pool's only connection waits for another session's lock, other users are
    served between the retries, because each try ends at the lock timeout."""
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
    """After a restart of PostgreSQL, the first dead connection makes the service
    replace all connections, however new they are: a single request needs one retry."""
    with PostgresServer(tmp_path / "own") as server:
        served = serve(server.create_database())
        backups: list[Backup] = yield served.new_backups(USERS)
        yield together([backup.check() for backup in backups])
        server.restart()
        start = time.monotonic()
        yield backups[0].check()
        assert time.monotonic() - start < SHORT_FAULT
        assert served.service.log().count("trying again") == 1
        served.service.stop()


@inlineCallbacks
def test_no_connection_is_left(tmp_path: Path, serve: Serve) -> Steps:
    """While other clients hold all connections allowed by PostgreSQL, requests get 503;
    afterwards requests succeed."""
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
    """Queued writes of a user all fail with the first write that finds PostgreSQL away,
    within 10 seconds, not after a retry timeout each."""
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


@pytest.mark.skipif(not can_make_networks(), reason="needs root")
@inlineCallbacks
def test_a_network_partition(tmp_path: Path, serve: Serve) -> Steps:
    """While packets to PostgreSQL's machine vanish without an error, requests get 503
    within PARTITION_TIMEOUT; afterwards requests succeed."""
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

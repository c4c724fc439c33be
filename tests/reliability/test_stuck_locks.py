"""Row locks without end: the locked users get 503, and all others are served."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import attrs
import psycopg2
import pytest
from pytest_twisted import blockon
from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults, inlineCallbacks

from ..client import HttpHost
from ..contract import Answer, Client, Host
from ..contract.base import (
    PREFIX,
    encoded,
    key,
    keys_path,
    new_backup,
    refused,
    wrapped,
)
from ..integration.conftest import host_of
from ..servers import PostgresServer, Synapse
from ..servers.fake_homeserver import Homeserver
from ..servers.service import Service
from .faults import Steps, connected, later, together

#: Number of users whose rows are locked: as many as the pool has connections.
USERS = 10
#: Duration of the locked users' uploads in a loop, in seconds: two rounds of the
#: service's retries.
SECONDS = 6.0
#: Longest answer to a user whose rows are free, in seconds: a few lock timeouts.
SERVED_WITHIN = 4.0
#: Longest answer to a user whose row is locked, in seconds.
REFUSED_WITHIN = 15.0
LOCK = "SELECT 1 FROM e2e_room_keys_versions WHERE user_id = ANY(%s) FOR UPDATE"
ROOM = {"!room": {"s": key()}}


@attrs.frozen
class Server:
    """A host under test with USERS database connections, and the database."""

    host: HttpHost
    database: Mapping[str, Any]


@pytest.fixture(scope="module")
def servers(
    postgres: PostgresServer,
    homeserver: Homeserver,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[list[Server]]:
    """The service and a Synapse. The tests lock rows of both at the same time, because
    most of a test is the wait for lock timeouts."""
    databases = [postgres.create_database() for _ in range(2)]
    directory = tmp_path_factory.mktemp("stuck")
    with (
        Service(
            directory / "service", homeserver.url, database=databases[0]
        ) as service,
        Synapse(
            directory / "synapse", database={**databases[1], "cp_max": USERS}
        ) as synapse,
    ):
        hosts = [
            HttpHost(service.url, homeserver.new_user, homeserver.new_guest),
            host_of(synapse),
        ]
        yield [Server(*both) for both in zip(hosts, databases, strict=True)]
        for host in hosts:
            blockon(host.close())
    for process in (service, synapse):
        assert "Traceback" not in process.log()


@contextmanager
def locking(database: Mapping[str, Any], clients: list[Client]) -> Iterator[None]:
    """Lock the versions of some users, as an operator's forgotten transaction does."""
    with closing(psycopg2.connect(**database)) as connection:
        connection.cursor().execute(LOCK, ([c.user.user_id for c in clients],))
        yield


def put(client: Client, version: str, rooms: Any) -> Deferred[Answer]:
    """Upload keys; fire with the answer, even if refused."""
    return client.host.request(
        "PUT",
        PREFIX + keys_path(version),
        token=client.user.access_token,
        body=encoded(wrapped(rooms)),
    )


@inlineCallbacks
def upload_in_a_loop(client: Client, version: str, end: float) -> Steps:
    """Upload until a time of the monotonic clock; each answer must be a timely 503."""
    while time.monotonic() < end:
        start = time.monotonic()
        answer: Answer = yield put(client, version, ROOM)
        refused(answer, 503, "M_UNKNOWN")
        assert time.monotonic() - start < REFUSED_WITHIN


@inlineCallbacks
def unlocked_user(host: Host, end: float) -> Steps:
    """Read and write in an unlocked backup until a time; each answer must be prompt."""
    client, version = yield new_backup(host)
    number = 0
    slowest = 0.0
    while time.monotonic() < end:
        start = time.monotonic()
        answer: Answer = yield client.get("/version")
        assert answer.status == 200, answer
        read = time.monotonic()
        number += 1
        answer = yield put(client, version, {"!room": {f"{number}": key()}})
        assert answer.status == 200, answer
        assert read - start < SERVED_WITHIN / 2
        slowest = max(slowest, time.monotonic() - start)
        yield later(0.05, lambda: None)
    print(f"{number} rounds, the slowest took {slowest:.2f} s")
    assert slowest < SERVED_WITHIN


def test_other_users_are_served(servers: list[Server]) -> Deferred[Any]:
    """While as many users as there are connections wait for locks without end, other
    users read and write in time, also after the locked users gave up. The locked users
    succeed as soon as their rows are free."""
    return together([lock_all_connections(server) for server in servers])


@inlineCallbacks
def lock_all_connections(server: Server) -> Steps:
    """Check the rule of `test_other_users_are_served` on one server."""
    host = server.host
    backups: list[tuple[Client, str]] = []
    for _ in range(USERS):
        backups.append((yield new_backup(host)))
    with locking(server.database, [client for client, _ in backups]):
        end = time.monotonic() + SECONDS
        locked = [upload_in_a_loop(*backup, end) for backup in backups]
        yield gatherResults([*locked, *(unlocked_user(host, end) for _ in range(3))])
        yield unlocked_user(host, time.monotonic() + 0.5)
    answers: list[Answer] = yield gatherResults([put(*b, ROOM) for b in backups])
    assert {answer.status for answer in answers} == {200}


def test_queued_writes_behind_a_lock(servers: list[Server]) -> Deferred[Any]:
    """If a user's write waits for a lock and is refused, the user's queued writes are
    refused at the same time, not after a lock timeout each; the user's reads are
    served."""
    return together([queue_writes(server) for server in servers])


@inlineCallbacks
def queue_writes(server: Server) -> Steps:
    """Check the rule of `test_queued_writes_behind_a_lock` on one server."""
    client, version = yield new_backup(server.host)
    with locking(server.database, [client]):
        start = time.monotonic()
        writes = [put(client, version, ROOM) for _ in range(12)]
        answer: Answer = yield client.get("/version")
        assert answer.status == 200
        for answer in (yield gatherResults(writes)):
            refused(answer, 503, "M_UNKNOWN")
        assert time.monotonic() - start < REFUSED_WITHIN


@inlineCallbacks
def wait_for_session(database: Mapping[str, Any], condition: str) -> Steps:
    """Wait until a session of the database fulfils an SQL condition."""
    statement = (
        "SELECT 1 FROM pg_stat_activity WHERE datname = current_database()"
        f" AND pid <> pg_backend_pid() AND {condition}"
    )
    end = time.monotonic() + SERVED_WITHIN
    with connected(database) as cursor:
        while True:
            cursor.execute(statement)
            if cursor.fetchone():
                return
            assert time.monotonic() < end, condition
            yield later(0.01, lambda: None)


@inlineCallbacks
def test_a_process_stopped_during_an_upload(
    postgres: PostgresServer, homeserver: Homeserver, tmp_path: Path
) -> Steps:
    """When a process is stopped (SIGSTOP) with a user's version locked, PostgreSQL ends
    the process's transaction. Until then another process answers the user 503 in time;
    afterwards that process serves the user."""
    database = postgres.create_database()
    first = Service(tmp_path / "first", homeserver.url, database=database)
    second = Service(tmp_path / "second", homeserver.url, database=database)
    with first, second, closing(psycopg2.connect(**database)) as other:
        hosts = [
            HttpHost(s.url, homeserver.new_user, homeserver.new_guest)
            for s in (first, second)
        ]
        client, version = yield new_backup(hosts[0])
        # An upload of the same key locks the version and then waits for this row.
        other.cursor().execute(
            "INSERT INTO e2e_room_keys VALUES (%s, '!room', 's', %s, 0, 0, false, '1')",
            (client.user.user_id, version),
        )
        abandoned = put(client, version, ROOM)
        yield wait_for_session(database, "wait_event_type = 'Lock'")
        first.send(signal.SIGSTOP)
        other.rollback()
        yield wait_for_session(database, "state LIKE 'idle in transaction%'")
        begin = time.monotonic()
        same_user = Client(hosts[1], client.user)
        statuses: list[int] = []
        while 200 not in statuses:
            start = time.monotonic()
            answer: Answer = yield put(same_user, version, {"!room": {"t": key()}})
            assert time.monotonic() - start < REFUSED_WITHIN
            statuses.append(answer.status)
            assert time.monotonic() - begin < 2 * REFUSED_WITHIN
        print(f"{statuses} in {time.monotonic() - begin:.1f} s")
        assert set(statuses[:-1]) == {503}
        first.send(signal.SIGCONT)
        # The stopped process resumes after the time for retries is over.
        answer = yield abandoned.addTimeout(REFUSED_WITHIN, reactor)
        refused(answer, 503, "M_UNKNOWN")
        answer = yield put(client, version, ROOM)
        assert answer.json == {"etag": "2", "count": 2}
        for host in hosts:
            yield host.close()

"""Concurrent writes to a user's backup through two processes of a homeserver."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import attrs
import pytest
from pytest_twisted import blockon
from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults, inlineCallbacks
from twisted.internet.task import deferLater

from ..client import HttpHost
from ..contract import Answer, Client
from ..contract.base import (
    ALGORITHM,
    AUTH_DATA,
    NO_VERSION,
    Rooms,
    Steps,
    accepted,
    key,
    keys_path,
    refused,
    same,
    tally,
    version_path,
    wrapped,
)
from ..servers import PostgresServer, RedisServer, Synapse, Worker
from .conftest import host_of
from .test_synapse import DEADLINE, count_rows, problem_lines, query

ROUNDS = 5
UPLOADS = 16
SHARED = 48
SHARED_IN_AN_UPLOAD = 24
UPLOADS_PER_VERSION = 8
NEW_VERSION = {"algorithm": ALGORITHM, "auth_data": AUTH_DATA}


@attrs.frozen
class Processes:
    """Two processes of a homeserver.

    Attributes:
        main: the first process.
        second: the other process.
        hosts: both processes as servers under test.
    """

    main: Synapse
    second: Synapse | Worker
    hosts: Sequence[HttpHost]

    def clients(self) -> tuple[Client, Client]:
        """Return two clients of a new user, one for each process."""
        user = self.hosts[0].new_user()
        first, second = (Client(host, user) for host in self.hosts)
        return first, second

    def keys(self, client: Client, version: str) -> int:
        """Return the number of a version's keys in the database."""
        counted = "SELECT COUNT(*) FROM e2e_room_keys WHERE user_id = ? AND version = ?"
        ((count,),) = query(self.main, counted, client.user.user_id, int(version))
        number: int = count
        return number


def processes_of(main: Synapse, second: Synapse | Worker) -> Iterator[Processes]:
    """Yield the two processes, and check afterwards that their logs have no errors."""
    hosts = [host_of(main), host_of(main, second.url)]
    yield Processes(main, second, hosts)
    for host in hosts:
        blockon(host.close())
    for server in (main, second):
        assert not problem_lines(server.log())


@pytest.fixture(scope="module")
def mains(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Processes]:
    """Two main processes on one database.

    The second starts when the first has finished the background updates, because
    concurrent background updates would fail in both.
    """
    directory = tmp_path_factory.mktemp("mains")
    database = postgres.create_database()
    extra = {"background_updates": {"sleep_enabled": False}}
    with Synapse(directory / "1", database=database, extra_config=extra) as first:
        wait_for_log(first, "No more background updates to do")
        with Synapse(directory / "2", database=database) as second:
            yield from processes_of(first, second)


def wait_for_log(server: Synapse, text: str) -> None:
    """Wait until a server has logged a text."""
    deadline = time.monotonic() + DEADLINE
    while text not in server.log():
        assert time.monotonic() < deadline, f"nothing logged of {text!r}"


@pytest.fixture(scope="module")
def main_and_worker(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Processes]:
    """A main process and a worker, as in an operator's deployment."""
    directory = tmp_path_factory.mktemp("worker")
    database = postgres.create_database()
    with (
        RedisServer(directory / "redis") as redis,
        Synapse(directory / "main", database=database, redis=redis) as main,
        Worker(main, "worker") as worker,
    ):
        yield from processes_of(main, worker)


@pytest.fixture(scope="module", params=["mains", "main_and_worker"])
def processes(request: pytest.FixtureRequest) -> Processes:
    """Two processes: two main processes, and then a main process and a worker."""
    processes: Processes = request.getfixturevalue(request.param)
    return processes


# Keys


def rank(room_key: dict[str, Any]) -> tuple[bool, int, int]:
    """Return a key's rank in the specification's order; the best key has the lowest."""
    verified, forwarded = room_key["is_verified"], room_key["forwarded_count"]
    return not verified, room_key["first_message_index"], forwarded


def best(uploads: Iterable[Rooms]) -> Rooms:
    """Return the best key of each session in some uploads."""
    merged: Rooms = {}
    for rooms in uploads:
        for room, sessions in rooms.items():
            held = merged.setdefault(room, {})
            for session, new in sessions.items():
                held[session] = min(held.get(session, new), new, key=rank)
    return merged


def overlapping(number: int) -> Rooms:
    """Build an upload of sessions that other uploads contain as well.

    No two uploads have keys of equal rank for the same session.
    """
    rooms: Rooms = {}
    for n in range(SHARED_IN_AN_UPLOAD):
        session = (3 * number + n) % SHARED
        index = (7 * number + 5 * session) % UPLOADS
        verified = (number + session) % 2 == 0
        new = key(index, number % 3, verified, f"{number}/{session}")
        rooms.setdefault(f"!{session % 3}:h", {})[f"s{session}"] = new
    return rooms


def with_a_new_session(number: int) -> Rooms:
    """Build the upload of `overlapping`, plus a session unique to the upload."""
    return {**overlapping(number), f"!own{number}:h": {"own": key(number)}}


def size(rooms: Rooms) -> int:
    """Return the number of keys."""
    return sum(map(len, rooms.values()))


def upload_concurrently(
    clients: Sequence[Client], version: str, uploads: Sequence[Rooms]
) -> list[Deferred[Answer]]:
    """Upload through both processes alternately, without waiting for answers."""
    path = keys_path(version)
    return [clients[n % 2].put(path, wrapped(rooms)) for n, rooms in enumerate(uploads)]


@inlineCallbacks
def check_contents(
    processes: Processes, clients: Sequence[Client], version: str, want: Rooms
) -> Generator[Deferred[Any], Any, int]:
    """Check that both processes return the given keys, and the same etag and exact
    count.

    Returns:
        A Deferred that fires with the etag.
    """
    tallies = []
    for client in clients:
        same((yield client.download(version)), want)
        tallies.append((yield client.tally(version)))
    assert tallies[0] == tallies[1]
    etag, count = tallies[0]
    assert count == size(want) == processes.keys(clients[0], version)
    return int(etag)


# Uploads


@inlineCallbacks
def test_uploads(processes: Processes) -> Steps:
    """Concurrent uploads lose no key, and the best key of each session is stored.

    Each upload with a new key increments the etag.
    """
    clients = processes.clients()
    version = yield clients[0].create_version()
    start, _ = yield clients[1].tally(version)
    uploads = [with_a_new_session(number) for number in range(UPLOADS)]
    answers = yield gatherResults(upload_concurrently(clients, version, uploads))
    tallies = sorted(tally(answer) for answer in answers)
    assert [etag for etag, _ in tallies] == [start + n for n in range(1, UPLOADS + 1)]
    counts = [count for _, count in tallies]
    assert counts == sorted(set(counts)), "each upload adds a key at least"
    etag = yield check_contents(processes, clients, version, best(uploads))
    assert (etag, counts[-1]) == tallies[-1]


@inlineCallbacks
def test_uploads_without_changes(processes: Processes) -> Steps:
    """The etag increments once for each upload that changes a key, and for no other."""
    clients = processes.clients()
    version = yield clients[0].create_version()
    start, _ = yield clients[0].tally(version)
    uploads = [overlapping(number) for number in range(UPLOADS)] * 2
    answers = yield gatherResults(upload_concurrently(clients, version, uploads))
    etags = {tally(answer)[0] for answer in answers}
    final = yield check_contents(processes, clients, version, best(uploads))
    assert etags - {start} == set(range(start + 1, final + 1))
    assert final - start <= len(uploads)
    answers = yield gatherResults(upload_concurrently(clients, version, uploads))
    assert {tally(answer)[0] for answer in answers} == {final}
    yield check_contents(processes, clients, version, best(uploads))


@inlineCallbacks
def test_uploads_and_deletions(processes: Processes) -> Steps:
    """Deletions during uploads leave an exact count."""
    for _ in range(ROUNDS):
        clients = processes.clients()
        version = yield clients[0].create_version()
        start, _ = yield clients[0].tally(version)
        sent = upload_concurrently(clients, version, [overlapping(n) for n in range(6)])
        sent[3:3] = [client.delete(keys_path(version, "!1:h")) for client in clients]
        answers = yield gatherResults(sent)
        etags = {tally(answer)[0] for answer in answers}
        rooms = yield clients[0].download(version)
        final = yield check_contents(processes, clients, version, rooms)
        assert etags - {start} == set(range(start + 1, final + 1))
        merged = best(overlapping(n) for n in range(6))
        same({**rooms, "!1:h": {}}, {**merged, "!1:h": {}})


# Versions


@inlineCallbacks
def test_new_versions(processes: Processes) -> Steps:
    """Concurrently created versions all differ, and the highest is current."""
    clients = processes.clients()
    numbers: list[str] = []
    for _ in range(2):
        numbers += yield gatherResults(
            [client.create_version() for client in clients * 8]
        )
    assert len(set(numbers)) == 32
    assert min(map(int, numbers[16:])) > max(map(int, numbers[:16]))
    user_id = clients[0].user.user_id
    assert count_rows(processes.main, "e2e_room_keys_versions", user_id) == 32
    for client in clients:
        assert (yield client.info())["version"] == max(numbers, key=int)


@inlineCallbacks
def test_uploads_and_a_deleted_version(processes: Processes) -> Steps:
    """An upload after the version's deletion is answered 404.

    The sweeper leaves no key of the version in the database.
    """
    for number in range(ROUNDS):
        clients = processes.clients()
        version = yield clients[0].create_version()
        uploads = [with_a_new_session(n) for n in range(UPLOADS_PER_VERSION)]
        sent = upload_concurrently(clients, version, uploads)
        position = number % UPLOADS_PER_VERSION
        sent.insert(position, clients[number % 2].delete(version_path(version)))
        answers = yield gatherResults(sent)
        accepted(answers.pop(position))
        for answer in answers:
            if answer.status != 200:
                refused(answer, 404, "M_NOT_FOUND", error=NO_VERSION)
        end = time.monotonic() + DEADLINE
        while processes.keys(clients[0], version):
            assert time.monotonic() < end
            yield deferLater(reactor, 0.05)
        for client in clients:
            refused((yield client.get(keys_path(version))), 404, "M_NOT_FOUND")
            refused((yield client.get("/version")), 404, "M_NOT_FOUND")
        user_id = clients[0].user.user_id
        assert count_rows(processes.main, "roomkeys_counts", user_id) == 0


@inlineCallbacks
def test_uploads_and_a_new_version(processes: Processes) -> Steps:
    """An upload is stored in its version, or refused with the current version.

    Uploads are refused once a newer version exists.
    """
    for number in range(ROUNDS):
        clients = processes.clients()
        version = yield clients[0].create_version()
        start, _ = yield clients[0].tally(version)
        uploads = [with_a_new_session(n) for n in range(UPLOADS_PER_VERSION)]
        sent = upload_concurrently(clients, version, uploads)
        position = number % UPLOADS_PER_VERSION
        sent.insert(position, clients[number % 2].post("/version", NEW_VERSION))
        answers = yield gatherResults(sent)
        current = accepted(answers.pop(position))["version"]
        stored: list[Rooms] = []
        for answer, rooms in zip(answers, uploads, strict=True):
            if answer.status == 200:
                stored.append(rooms)
                continue
            body = refused(answer, 403, "M_WRONG_ROOM_KEYS_VERSION")
            assert body["current_version"] == current
        etag = yield check_contents(processes, clients, version, best(stored))
        assert etag == start + len(stored)
        yield check_contents(processes, clients, current, {})


# Workers


def test_worker_start(main_and_worker: Processes) -> None:
    """A worker replaces Synapse's endpoints as the main process does, and logs one
    line."""
    for server in (main_and_worker.main, main_and_worker.second):
        assert server.log().count("answers /room_keys in Synapse") == 1


@inlineCallbacks
def test_worker_answers(main_and_worker: Processes) -> Steps:
    """A worker answers 400 where Synapse's own endpoints would answer 405."""
    for client in main_and_worker.clients():
        answer = yield client.put("/version", NEW_VERSION)
        refused(answer, 400, "M_MISSING_PARAM")


@inlineCallbacks
def test_worker_shares(main_and_worker: Processes) -> Steps:
    """Writes through one process are immediately visible through the other."""
    for clients in (main_and_worker.clients(), main_and_worker.clients()[::-1]):
        writer, reader = clients
        version = yield writer.create_version()
        assert (yield reader.info())["version"] == version
        etag_and_count = yield writer.upload(version, overlapping(0))
        assert (yield reader.tally()) == etag_and_count
        same((yield reader.download(version)), overlapping(0))
        tally((yield writer.delete(keys_path(version, "!0:h"))))
        same(accepted((yield reader.get(keys_path(version, "!0:h")))), {"sessions": {}})
        accepted((yield writer.delete(version_path(version))))
        refused((yield reader.get("/version")), 404, "M_NOT_FOUND")

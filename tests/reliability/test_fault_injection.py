"""Databases that fail and clocks that jump: the right answer, and nothing half done.

What happens while the homeserver is away is in tests/integration/test_whoami.py.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import attrs
import psycopg2.errors
import pytest
from pytest_twisted import blockon
from twisted.internet.defer import Deferred, gatherResults, inlineCallbacks

from synapse_roomkeys.storage import SQLITE, EndToEndRoomKeyStore
from synapse_roomkeys.storage.sql import COUNT_LIFETIME
from synapse_roomkeys.types import BackupInfo, Limits

from ..contract import Answer, Client
from ..contract.base import ALGORITHM, PREFIX, encoded, key, keys_path, wrapped
from ..memory import ImmediateDatabase
from ..servers import PostgresServer
from ..sites import Backend, OwnSite

Steps = Generator[Deferred[Any], Any, None]
When = Literal["begin", "end", "committed"]

FAULTS: dict[str, list[Exception]] = {
    "sqlite": [
        sqlite3.OperationalError("database is locked"),
        sqlite3.OperationalError("database or disk is full"),
    ],
    "postgres": [
        psycopg2.errors.DeadlockDetected(),
        psycopg2.errors.SerializationFailure(),
        psycopg2.errors.QueryCanceled(),
        psycopg2.errors.DiskFull(),
    ],
}
ROOM = {"!room": {"new": key(), "better": key(index=0)}}


@pytest.fixture(params=FAULTS)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OwnSite]:
    """The plugin's own site on each engine."""
    arguments = None
    if request.param == "postgres":
        server: PostgresServer = request.getfixturevalue("postgres")
        arguments = server.create_database()
    site = OwnSite(Backend(request.param, arguments, tmp_path / "roomkeys.db"))
    blockon(site.start())
    yield site
    blockon(site.stop())


@attrs.define
class FailingRun:
    """A database's ``run`` that fails some times: when a transaction begins, when it
    has done all but its commit, or when it is committed and the answer is lost.

    Attributes:
        times: how many times more.
    """

    run: Callable[..., Deferred[Any]]
    error: Exception
    times: int
    when: When

    @inlineCallbacks
    def __call__(
        self, desc: str, function: Callable[..., Any], *args: Any
    ) -> Generator[Deferred[Any], Any, Any]:
        fails = self.times > 0
        self.times -= 1

        def fail(txn: Any, *args: Any) -> Any:
            if fails and self.when == "begin":
                raise self.error
            result = function(txn, *args)
            if fails and self.when == "end":
                raise self.error
            return result

        result = yield self.run(desc, fail, *args)
        if fails:
            raise self.error
        return result


def failing(site: OwnSite, error: Exception, times: int, when: When) -> Any:
    """The fault, while it is entered."""
    run = FailingRun(site.database.run, error, times, when)
    return mock.patch.object(site.database, "run", run)


@pytest.mark.parametrize("when", ["begin", "end", "committed"])
@inlineCallbacks
def test_a_failed_transaction_is_retried(site: OwnSite, when: When) -> Steps:
    """After a fault nothing is lost or counted twice, and the client sees none, be it
    that the transaction came to nothing or that only its answer did."""
    for error in FAULTS[site.backend.name]:
        client = Client(site.host, site.host.new_user())
        version: str = yield client.create_version()
        yield client.upload(version, {"!room": {"better": key(index=1)}})
        with failing(site, error, 1, when):
            assert (yield client.upload(version, ROOM)) == (2, 2)
        with failing(site, error, 1, when):
            answer: Answer = yield client.delete(keys_path(version, "!room", "new"))
        assert answer.json == {"etag": "3", "count": 1}
        with failing(site, error, 1, when):
            newer: str = yield client.create_version()
        assert int(newer) > int(version)
        assert (yield client.info())["version"] == newer
        assert (yield client.download(version)) == {"!room": {"better": key(index=0)}}


@inlineCallbacks
def test_a_permanent_failure_is_503(site: OwnSite) -> Steps:
    """The client is told when to come again, nothing is half done, and afterwards the
    same requests are served."""
    client = Client(site.host, site.host.new_user())
    version: str = yield client.create_version()
    yield client.upload(version, {"!room": {"better": key(index=1)}})
    path = keys_path(version)
    one = keys_path(version, "!room", "better")
    error = FAULTS[site.backend.name][0]
    moments: list[tuple[When, str]] = [("begin", path), ("end", one)]
    for when, read in moments:
        requests = [("PUT", path, wrapped(ROOM)), ("DELETE", path, None)]
        requests += [("GET", read, None), ("GET", "/version", None)]
        with failing(site, error, 10**6, when):
            answers: list[Answer] = yield gatherResults(
                [
                    site.host.request(
                        method,
                        PREFIX + where,
                        token=client.user.access_token,
                        body=encoded(body),
                    )
                    for method, where, body in requests
                ]
            )
        for answer in answers:
            assert answer.status == 503, answer
            assert int(answer.headers["retry-after"]) > 0
    with failing(site, error, 10**6, "end"):
        # What is read of a download before it fails is what is there.
        assert (yield client.download(version)) == {"!room": {"better": key(index=1)}}
    assert (yield client.tally(version)) == (1, 1)
    assert (yield client.upload(version, ROOM)) == (2, 2)
    assert (yield client.download(version)) == ROOM


@inlineCallbacks
def test_a_clock_that_jumps_back() -> Steps:
    """Versions stay new, and counts stay right, also where keys go past the plugin."""
    times = [2_000_000_000.0]
    database = ImmediateDatabase()
    store = EndToEndRoomKeyStore(database, SQLITE.dialect, lambda: times[-1], Limits())
    numbers: list[int] = []
    for now in (2_000_000_000, 1_000_000_000, 10, 2_000_000_000):
        times.append(now)
        number: int = yield store.create_version("@a:b", ALGORITHM, "{}")
        numbers.append(number)
        database.connection.execute(
            "INSERT INTO e2e_room_keys SELECT user_id, '!r', 's', version, 0, 0, 0,"
            " '{}' FROM e2e_room_keys_versions WHERE version = ?",
            (number,),
        )
        times.append(now + COUNT_LIFETIME + 1)
        info: BackupInfo | None = yield store.get_info("@a:b", number)
        assert info is not None and info.count == 1
        database.connection.execute("DELETE FROM e2e_room_keys")
        times.append(now - 1)
        info = yield store.get_info("@a:b", number)
        assert info is not None and info.count == 0
    assert numbers == sorted(set(numbers))

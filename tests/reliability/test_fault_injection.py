"""Injected database errors and clock jumps lead to right answers and whole writes.

The tests of an unreachable homeserver are in tests/integration/test_whoami.py.
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

from synapse_roomkeys.storage import SQLITE, EndToEndRoomKeyStore, retries
from synapse_roomkeys.storage.counts import COUNT_LIFETIME
from synapse_roomkeys.types import Actor, BackupInfo, Limits, Retention

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
    """The plugin's own site, on each database engine."""
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
    """Replacement of a database's ``run`` in which the next transactions fail.

    Attributes:
        run: the original function.
        times: number of further transactions that fail.
        when: moment of the error: at the begin of the transaction, at the end before
            the commit, or after the commit (only the answer is lost).
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
    """Return a context manager; inside, the site's transactions fail."""
    run = FailingRun(site.database.run, error, times, when)
    return mock.patch.object(site.database, "run", run)


@pytest.mark.parametrize("when", ["begin", "end", "committed"])
@inlineCallbacks
def test_a_failed_transaction_is_retried(site: OwnSite, when: When) -> Steps:
    """A single failed transaction is retried: the client sees no error, and no key is
    lost or counted twice, whether the transaction was rolled back or only the answer to
    the commit was lost."""
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
def test_a_permanent_failure_is_503(
    site: OwnSite, monkeypatch: pytest.MonkeyPatch
) -> Steps:
    """While all transactions fail, requests get a 503 with Retry-After and no write is
    applied in part; afterwards the same requests succeed."""
    # As many retries as by default, in a tenth of the time.
    short = tuple(delay / 10 for delay in retries._RETRY_DELAYS)
    monkeypatch.setattr(retries, "_RETRY_DELAYS", short)
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
        # The transaction fails after the download's only page was read, so the answer
        # has all stored keys.
        assert (yield client.download(version)) == {"!room": {"better": key(index=1)}}
    assert (yield client.tally(version)) == (1, 1)
    assert (yield client.upload(version, ROOM)) == (2, 2)
    assert (yield client.download(version)) == ROOM


@inlineCallbacks
def test_a_clock_that_jumps_back() -> Steps:
    """After the clock jumps back, new versions still get new, higher numbers, and
    counts stay right even for keys written and deleted without the plugin."""
    times = [2_000_000_000.0]
    database = ImmediateDatabase()
    store = EndToEndRoomKeyStore(
        database, SQLITE, lambda: times[-1], Limits(), Retention()
    )
    numbers: list[int] = []
    for now in (2_000_000_000, 1_000_000_000, 10, 2_000_000_000):
        times.append(now)
        number: int = yield store.create_version("@a:b", ALGORITHM, "{}", Actor(None))
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

"""Concurrent clients of two servers on a shared database see a linearizable history."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
from twisted.internet.defer import Deferred, gatherResults, inlineCallbacks

from ..contract import User
from ..memory import StubAuth
from ..servers import PostgresServer
from ..servers.processes import Process
from ..sites import Backend, OwnSite
from . import SOAK
from .clients import record
from .linearizability import Event, NotLinearizable, linearize
from .mutations import PLAIN, RACES, RECORD
from .record_check import RecordError, check_record

Steps = Generator[Deferred[Any], Any, None]

HISTORIES = 40 if SOAK else 3
CLIENTS = 8
#: Number of operations of each client in a history.
OPERATIONS = 60 if SOAK else 25
#: Fraction of requests whose connections are cut, in the histories with cuts.
CUT_FRACTION = 0.05
#: Largest number of histories until a planted fault must be detected.
MAX_HISTORIES = 10
_ROOT = Path(__file__).parents[2]
_TIMEOUT = 30.0


@attrs.frozen
class Servers:
    """Addresses of servers on a shared database, and users known to all servers."""

    urls: Sequence[str]
    users: Iterator[User]


def users() -> Iterator[User]:
    """Return the users known to a server process, in the order of their creation."""
    auth = StubAuth()
    return iter([auth.new_user() for _ in range(2 * HISTORIES)])


def is_listening(process: Process) -> bool:
    """Whether a server process has printed an address."""
    return "http://" in process.output()


@pytest.fixture(scope="module")
def processes(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Servers]:
    """Two server processes on a shared PostgreSQL database."""
    directory = tmp_path_factory.mktemp("processes")
    database = json.dumps(postgres.create_database())
    arguments = ["-m", f"{__package__}.server", database, str(2 * HISTORIES)]
    running = [
        Process(
            [sys.executable, *arguments],
            output=directory / f"{number}.log",
            cwd=_ROOT,
            environment=os.environ,
        )
        for number in range(2)
    ]
    try:
        for process in running:
            process.wait_until(partial(is_listening, process), _TIMEOUT)
        urls = [process.output().split()[-1] for process in running]
        yield Servers(urls, users())
    finally:
        for process in running:
            process.kill()


@pytest.fixture(scope="module")
def backend(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Backend:
    """A PostgreSQL database for sites in this process."""
    path = tmp_path_factory.mktemp("sites") / "unused"
    return Backend("postgres", postgres.create_database(), path)


@pytest.mark.parametrize("cut", [0, CUT_FRACTION])
@inlineCallbacks
def test_every_history_is_linearizable(processes: Servers, cut: float) -> Steps:
    """Answers, etags, counts and downloads of concurrent clients match some sequential
    order of the requests, with and without lost answers."""
    lost = total = 0
    for seed in range(HISTORIES):
        events: list[Event] = yield record(
            processes.urls, next(processes.users), CLIENTS, OPERATIONS, seed, cut
        )
        linearize(events)
        total += len(events)
        lost += sum(event.is_lost for event in events)
    print(f"{total} operations, {lost} answers lost")
    assert total == HISTORIES * (CLIENTS * OPERATIONS + 2 * len(processes.urls))
    assert bool(lost) == bool(cut)


@pytest.mark.parametrize("fault", [*PLAIN, *RACES])
@inlineCallbacks
def test_a_planted_fault_is_detected(backend: Backend, fault: str) -> Steps:
    """With a planted fault in their store, two sites produce a history that is not
    linearizable."""
    with {**PLAIN, **RACES}[fault]():
        one = OwnSite(backend)
        two = OwnSite(backend, one.auth)
        yield gatherResults([one.start(), two.start()])
        try:
            tries: int = yield histories_until_detected([one, two])
        finally:
            yield gatherResults([one.stop(), two.stop()])
    print(f"{fault}: found in history {tries}")


@pytest.mark.parametrize("engine", ["sqlite", "postgres"])
@inlineCallbacks
def test_each_change_is_recorded_once(
    backend: Backend, engine: str, tmp_path: Path
) -> Steps:
    """The record of concurrent clients of two sites holds each acknowledged change
    once, with etag, numbers and sessions, and no change that wasn't made. A change
    whose answer was lost is recorded if it was made."""
    if engine == "sqlite":
        backend = Backend("sqlite", None, tmp_path / "roomkeys.db")
    one = OwnSite(backend)
    two = OwnSite(backend, one.auth)
    yield gatherResults([one.start(), two.start()])
    try:
        for seed in range(HISTORIES):
            yield compare_record([one, two], seed, CUT_FRACTION if seed else 0)
    finally:
        yield gatherResults([one.stop(), two.stop()])


@pytest.mark.parametrize("fault", RECORD)
@inlineCallbacks
def test_a_planted_fault_of_the_record_is_detected(
    backend: Backend, fault: str
) -> Steps:
    """With a planted fault in their store, two sites answer as ever, but the record
    isn't the history."""
    with RECORD[fault]():
        one = OwnSite(backend)
        two = OwnSite(backend, one.auth)
        yield gatherResults([one.start(), two.start()])
        try:
            tries: int = yield histories_until_detected([one, two], RecordError)
        finally:
            yield gatherResults([one.stop(), two.stop()])
    print(f"{fault}: found in history {tries}")


@inlineCallbacks
def compare_record(sites: Sequence[OwnSite], seed: int, cut: float = 0) -> Steps:
    """Record a history of concurrent clients, linearize it, and compare it with the
    record in the database.

    Args:
        seed, cut: as for `record`.

    Raises:
        NotLinearizable: no order of the operations explains the answers.
        RecordError: the record isn't the history.
    """
    user = sites[0].host.new_user()
    urls = [site.host.url for site in sites]
    events = yield record(urls, user, CLIENTS, OPERATIONS, seed, cut)
    linearize(events)
    changes = yield sites[0].store.get_user_record(user.user_id, 0)
    # Other tests of this database have used the user's name, but no later version.
    newest = max(change.version for change in changes)
    check_record(events, [c for c in changes if c.version == newest])


@inlineCallbacks
def histories_until_detected(
    sites: Sequence[OwnSite], error: type[AssertionError] = NotLinearizable
) -> Generator[Deferred[Any], Any, int]:
    """Record histories until one is not linearizable, or isn't the record's.

    Args:
        error: the expected error of `compare_record`.

    Returns:
        A Deferred that fires with the number of histories.

    Raises:
        AssertionError: MAX_HISTORIES histories are all linearizable and recorded.
    """
    for number in range(MAX_HISTORIES):
        try:
            yield compare_record(sites, number)
        except error:
            return number + 1
    raise AssertionError(f"{MAX_HISTORIES} histories without an error")

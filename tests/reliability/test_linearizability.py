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
from .mutations import PLAIN, RACES

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


@inlineCallbacks
def histories_until_detected(
    sites: Sequence[OwnSite],
) -> Generator[Deferred[Any], Any, int]:
    """Record histories until one is not linearizable.

    Returns:
        A Deferred that fires with the number of histories.

    Raises:
        AssertionError: MAX_HISTORIES histories are all linearizable.
    """
    urls = [site.host.url for site in sites]
    for number in range(MAX_HISTORIES):
        user = sites[0].host.new_user()
        events = yield record(urls, user, CLIENTS, OPERATIONS, number)
        try:
            linearize(events)
        except NotLinearizable:
            return number + 1
    raise AssertionError(f"{MAX_HISTORIES} histories are linearizable")

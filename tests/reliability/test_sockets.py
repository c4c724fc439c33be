"""The service process withstands clients that break the rules of HTTP."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain, islice
from operator import le
from pathlib import Path

import attrs
import pytest

from synapse_roomkeys.service.logs import MAX_LINE

from ..contract.base import PREFIX
from ..servers.fake_homeserver import Homeserver
from ..servers.processes import HOST
from ..servers.service import Service
from . import SOAK
from .attacks import ATTACKS, IDLE, Target, random_requests
from .sockets import DEADLINE, exchange, new_version, request, upload

#: Longest round (an upload and a download) of a well-behaved client during an attack,
#: in seconds.
MAX_ROUND_SECONDS = 3.0
#: Largest growth of memory from the first to the last round of all attacks, in bytes.
GROWTH = 4 * 1024 * 1024
#: Largest growth of memory in one attack, in bytes; the first large bodies make the
#: process grow for good.
GROWTH_OF_ONE = 32 * 1024 * 1024
ROUNDS = 3 if SOAK else 1


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A service on an SQLite file, whose log is checked at the end."""
    directory = tmp_path_factory.mktemp("service")
    with Homeserver() as homeserver:
        service = Service(
            directory,
            homeserver.url,
            settings={
                "log": {"level": "DEBUG"},
                "trusted_proxies": [HOST],
                # Each attack makes two versions for the same user.
                "limits": {"max_user_versions": 1_000_000},
            },
        )
        # Backlog for all idle clients: the kernel delays connections beyond the backlog
        # by a second.
        listener = f"tcp:{service.port}:interface={HOST}:backlog={IDLE}"
        service.environment = {
            "ROOMKEYS_LISTENERS": listener,
            # Fixed threshold: blocks over 128 KiB return to the kernel when freed. By
            # default, malloc raises the threshold and keeps such blocks.
            "MALLOC_MMAP_THRESHOLD_": "131072",
        }
        with service:
            bystander, attacker = (homeserver.new_user().access_token for _ in range(2))
            yield Target(service, bystander, attacker)
        check_log(service)


def check_log(service: Service) -> None:
    """Check that the log has no traceback, error or token, and no line over MAX_LINE
    bytes."""
    longest = number = 0
    # Read line by line: the log may have hundreds of megabytes.
    with (service.directory / "output.txt").open("rb") as log:
        for line in log:
            for word in (b"Traceback", b"Unhandled", b"ERROR", b"CRITICAL", b"token_"):
                assert word not in line, line + b"".join(islice(log, 50))
            longest, number = max(longest, len(line) - 1), number + 1
    print(f"{number} lines in the log, the longest one of {longest} bytes")
    assert 0 < longest <= MAX_LINE


class GoodClient(threading.Thread):
    """A thread that uploads a key and reads the key back, in a loop.

    Used as a context manager; at the end, the client must have got every answer in
    time.

    Attributes:
        slowest: duration of the slowest round, in seconds.
    """

    def __init__(self, port: int, token: str) -> None:
        super().__init__()
        self.slowest = 0.0
        self._port = port
        self._token = token
        self._version = new_version(port, token)
        self._end = threading.Event()
        self._fault: BaseException | None = None

    def run(self) -> None:
        """Run rounds until the context manager ends."""
        try:
            self._ask()
            while not self._end.wait(0.05):
                self._ask()
        except BaseException as error:
            self._fault = error

    def __enter__(self) -> GoodClient:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self.join()
        assert self._fault is None, repr(self._fault)
        assert self.slowest < MAX_ROUND_SECONDS, self.slowest

    def _ask(self) -> None:
        start = time.monotonic()
        path = f"{PREFIX}/keys/!a:h/s?version={self._version}"
        read = request("GET", path, self._token, b"", "Connection: close")
        sent = upload(self._version, self._token, "right")
        put, got = exchange(self._port, sent + read).replies
        assert put.status == got.status == 200, (put, got)
        assert got.json["session_data"] == "right", got
        self.slowest = max(self.slowest, time.monotonic() - start)


@pytest.fixture(scope="module")
def made() -> set[Callable[[Target], int]]:
    """The attacks already run on the service."""
    return set()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_attack(
    attack: Callable[[Target], int],
    target: Target,
    made: set[Callable[[Target], int]],
) -> None:
    """During an attack a well-behaved client is served in time, and afterwards the
    memory is within its bound."""
    made.add(attack)
    before = use_of(target.service)
    most = attrs.evolve(before, bytes=before.bytes + GROWTH_OF_ONE)
    with GoodClient(target.port, target.bystander) as good:
        number = attack(target)
    after = settled(target.service, most)
    print(
        f"{number} inputs; the good client's slowest round: {good.slowest:.3f} s;"
        f" {before.bytes >> 20} MB before, {after.bytes >> 20} after"
    )
    assert after.bytes <= most.bytes, (before, after)


@attrs.frozen
class Use:
    """Resources used by a process: open files, threads and bytes of memory."""

    files: int
    threads: int
    bytes: int


def use_of(service: Service) -> Use:
    """Measure the resources used by the service now."""
    process = Path(f"/proc/{service.pid}")
    return Use(
        len(os.listdir(process / "fd")),
        len(os.listdir(process / "task")),
        service.rss_bytes(),
    )


def settled(service: Service, most: Use) -> Use:
    """Wait until the service uses at most `most`, or until DEADLINE; return the last
    measurement."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        use = use_of(service)
        if all(map(le, attrs.astuple(use), attrs.astuple(most))):
            break
        time.sleep(0.05)
    return use


def test_no_resource_leaks(target: Target, made: set[Callable[[Target], int]]) -> None:
    """Once the service has seen every attack, repeated attacks leave open files and
    threads at the idle level, and memory at the level after the first round."""
    new_version(target.port, target.bystander)
    idle = use_of(target.service)
    cheap = [attack for attack in ATTACKS if attack is not random_requests]
    for attack in cheap:
        if attack not in made:
            attack(target)
    most = attrs.evolve(idle, bytes=idle.bytes + GROWTH_OF_ONE)
    first = settled(target.service, most)
    most = attrs.evolve(idle, bytes=first.bytes + GROWTH)
    uses = [first]
    for attack in chain(*[cheap] * ROUNDS):
        attack(target)
        if attack is cheap[-1]:
            uses.append(settled(target.service, most))
    print(uses)
    for use in uses:
        assert use.files <= most.files and use.threads <= most.threads, uses
    assert uses[-1].bytes <= most.bytes, uses

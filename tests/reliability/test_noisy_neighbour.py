"""One user who does the worst there is, and nine who behave and hardly notice.

The service, its database and all clients share the processors of one machine, so what
the nine wait for the bad one's client counts as well.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
import pytest

from ..contract.base import PREFIX, key, keys_path, wrapped
from ..servers import PostgresServer
from ..servers.fake_homeserver import Homeserver
from ..servers.processes import Process
from ..servers.service import Service
from . import SOAK
from .abusive_client import BEHAVIOURS, ROOM, SESSION, UNTHROTTLED, real_keys
from .sockets import exchange, new_version, request

USERS = 9
#: How much longer the slowest hundredth of their requests may take.
RATIO = 3.0
#: For how long they are measured, each time, in seconds.
SECONDS = 30 if SOAK else 4
#: How long the service may take to end what the bad one has begun, in seconds.
SETTLE_SECONDS = 10 if SOAK else 1
#: How many uploads a bad one's backup is made of: more than what the system takes in
#: for those who read slowly.
ROOMS = 8
#: What the bad one does, by itself and all together.
ATTACKS = [*([name] for name in BEHAVIOURS if SOAK), list(BEHAVIOURS)]


@attrs.frozen
class ResponseTimes:
    """How long requests have taken, in seconds, in order."""

    seconds: Sequence[float]

    def quantile(self, fraction: float) -> float:
        """What a part of them has taken at most."""
        return self.seconds[int(len(self.seconds) * fraction)]

    def __str__(self) -> str:
        figures = (self.quantile(0.5), self.quantile(0.99), self.seconds[-1])
        p50, p99, longest = (1000 * figure for figure in figures)
        return (
            f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {longest:.1f} ms"
            f" of {len(self.seconds)}"
        )


@attrs.frozen
class Deployment:
    """The service, and those who behave.

    Attributes:
        good: the process of the nine.
    """

    homeserver: Homeserver
    service: Service
    directory: Path
    paced: Process

    def measure_alone(self) -> ResponseTimes:
        """What requests take with the bad one away."""
        time.sleep(SETTLE_SECONDS)
        start = time.monotonic()
        time.sleep(SECONDS)
        return self._response_times(start)

    def measure_beside(self, names: Sequence[str]) -> ResponseTimes:
        """What they take while a bad one does some things, and is answered."""
        port = self.service.port
        token = self.homeserver.new_user().access_token
        version = new_version(port, token)
        fill_backup(port, token, version)
        abusive = run_module(
            *("abusive_client", self.directory / f"{'-'.join(names)}.txt"),
            *(str(port), token, version, str(SECONDS)),
            *names,
        )
        abusive.wait_until(lambda: "begins" in abusive.output(), timeout=30)
        start = time.monotonic()
        assert abusive.wait(SECONDS + 30) == 0, abusive.output()
        answers = json.loads(abusive.output().splitlines()[1])
        print(answers)
        assert {answer.split()[0] for answer in answers} == {*names}
        return self._response_times(start)

    def _response_times(self, start: float) -> ResponseTimes:
        """What the requests have taken that were due from then on, all answered."""
        rows = [line.split() for line in self.paced.output().splitlines()[:-1]]
        found = [row for row in rows if start <= float(row[0]) < start + SECONDS]
        assert {status for _, _, status in found} == {"200"}
        return ResponseTimes(sorted(float(seconds) for _, seconds, _ in found))


@pytest.fixture(scope="module")
def deployment(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """With the nine at it already."""
    directory = tmp_path_factory.mktemp("deployment")
    database = postgres.create_database()
    with (
        Homeserver() as homeserver,
        Service(directory, homeserver.url, database=database) as service,
    ):
        users = []
        for _ in range(USERS):
            token = homeserver.new_user().access_token
            users.append(f"{new_version(service.port, token)}:{token}")
        paced = run_module(
            "paced_users", directory / "paced.txt", str(service.port), *users
        )
        yield Deployment(homeserver, service, directory, paced)
        assert paced.poll() is None, paced.output()
        paced.kill()
        assert "Traceback" not in service.log()


def run_module(module: str, output: Path, *arguments: str) -> Process:
    """Have a module of this package run in a process of its own."""
    command = [sys.executable, "-m", f"{__package__}.{module}", *arguments]
    return Process(command, output=output, cwd=Path(__file__).parents[2])


def fill_backup(port: int, token: str, version: str) -> None:
    """Make a bad one's backup: many keys, and the one that is asked for."""
    bodies = [
        real_keys(UNTHROTTLED).replace(ROOM.encode(), b"!room%d:h" % number)
        for number in range(ROOMS)
    ]
    sessions = wrapped({ROOM: {SESSION: key()}})
    for body in (*bodies, json.dumps(sessions).encode()):
        path = PREFIX + keys_path(version)
        sent = request("PUT", path, token, body, "Connection: close")
        [reply] = exchange(port, sent).replies
        assert reply.status == 200, reply


@pytest.mark.parametrize("names", ATTACKS, ids="-".join)
def test_an_abusive_user(deployment: Deployment, names: Sequence[str]) -> None:
    """The nine see no error; in the soak, which is to run alone on its machine, they
    also wait not much longer than without that user."""
    alone = deployment.measure_alone()
    beside = deployment.measure_beside(names)
    ratio = beside.quantile(0.99) / alone.quantile(0.99)
    text = f"{', '.join(names)}: {beside}; without that user {alone}: {ratio:.1f} times"
    print(text)
    if SOAK:
        assert ratio <= RATIO, text

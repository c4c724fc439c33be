"""An abusive user hardly slows down nine well-behaved users.

The service, the database and all clients share the CPUs of one machine. The CPU time of
the abusive client therefore delays the nine users as well.
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
#: Largest ratio of the nine users' 99th percentiles, with and without the abusive user.
RATIO = 3.0
#: Duration of each measurement, in seconds.
SECONDS = 30 if SOAK else 4
#: Pause before a measurement without the abusive user, in seconds. During the pause the
#: service ends the requests of the previous abusive user.
SETTLE_SECONDS = 10 if SOAK else 1
#: Number of uploads that fill the abusive user's backup: more data than the kernel's
#: socket buffers hold for slow readers.
ROOMS = 8
#: Sets of behaviours of the abusive user: each alone (in the soak), and all together.
ATTACKS = [*([name] for name in BEHAVIOURS if SOAK), list(BEHAVIOURS)]


@attrs.frozen
class ResponseTimes:
    """Response times of the well-behaved users.

    Attributes:
        seconds: all response times in ascending order.
    """

    seconds: Sequence[float]

    def quantile(self, fraction: float) -> float:
        """Return the response time that this fraction of the requests did not
        exceed."""
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
    """The service under test and the processes of its clients.

    Attributes:
        paced: process of the nine well-behaved users.
    """

    homeserver: Homeserver
    service: Service
    directory: Path
    paced: Process

    def measure_alone(self) -> ResponseTimes:
        """Measure the nine users' response times without the abusive user."""
        time.sleep(SETTLE_SECONDS)
        start = time.monotonic()
        time.sleep(SECONDS)
        return self._response_times(start)

    def measure_beside(self, names: Sequence[str]) -> ResponseTimes:
        """Measure the nine users' response times beside an abusive user.

        Args:
            names: behaviours of the abusive user; the service must answer each.
        """
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
        """Return the response times of the requests due from a time on; all must be
        200."""
        rows = [line.split() for line in self.paced.output().splitlines()[:-1]]
        found = [row for row in rows if start <= float(row[0]) < start + SECONDS]
        assert {status for _, _, status in found} == {"200"}
        return ResponseTimes(sorted(float(seconds) for _, seconds, _ in found))


@pytest.fixture(scope="module")
def deployment(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """The service, under load by nine well-behaved users."""
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
    """Start a module of this package in a new process."""
    command = [sys.executable, "-m", f"{__package__}.{module}", *arguments]
    return Process(command, output=output, cwd=Path(__file__).parents[2])


def fill_backup(port: int, token: str, version: str) -> None:
    """Upload the abusive user's backup: many keys, and a key for downloads by id."""
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
    """The nine users get no error beside an abusive user. In the soak, on an otherwise
    idle machine, their 99th percentile is at most RATIO times the percentile without
    the abusive user."""
    alone = deployment.measure_alone()
    beside = deployment.measure_beside(names)
    ratio = beside.quantile(0.99) / alone.quantile(0.99)
    text = f"{', '.join(names)}: {beside}; without that user {alone}: {ratio:.1f} times"
    print(text)
    if SOAK:
        assert ratio <= RATIO, text

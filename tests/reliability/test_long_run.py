"""A server under mixed load uses no more resources at the end than at the beginning.

ROOMKEYS_SOAK_SECONDS in the environment sets the duration in seconds.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import attrs
import psycopg2
import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults, inlineCallbacks
from twisted.internet.task import deferLater

from ..contract import Answer, User
from ..contract.base import (
    ALGORITHM,
    NO_KEY,
    accepted,
    key,
    keys_path,
    version_path,
    wrapped,
)
from ..servers import PostgresServer, Synapse
from ..servers.fake_homeserver import Homeserver
from ..servers.service import Service
from . import SOAK
from .clients import LOST, Connection

Steps = Generator[Deferred[Any], Any, None]
#: Method, path and body.
Request = tuple[str, str, Any]

SECONDS = float(os.environ.get("ROOMKEYS_SOAK_SECONDS", 3600 if SOAK else 10))
SAMPLES = 120
#: Number of clients per backup.
CLIENTS = 2
USERS = 6
#: Pause of a client between two requests, in seconds.
PAUSE = 0.01
#: Fraction of the requests whose clients disconnect before the answer, and the longest
#: delay until then, in seconds.
VANISH_FRACTION = 0.05
MAX_VANISH_DELAY = 0.02
#: Fraction of the steps in which a client deletes the version, and fraction of these
#: deletions after which a new user replaces the old user.
RESET_FRACTION = 0.005
LEAVE_FRACTION = 0.3
#: Size of the service's token cache. The load uses more tokens before the comparison
#: begins, to fill the cache.
TOKENS = 10
#: All rooms and sessions of a backup: the fixed set bounds the backup's size.
ROOMS = ("!a:h", "!b:h", "!c:h")
SESSIONS = range(500)
MAX_KEYS = 100
KEY_BYTES = 900
#: Largest growth of memory, in bytes: less than twenty bytes a request in an hour-long
#: run. In a short run the process still grows to a working size.
GROWTH = (8 if SOAK else 32) * 1024 * 1024
#: Tolerance for open files: the clients' connections may all be open at one sample and
#: closed at another.
FILES = USERS * CLIENTS
#: Default size of the database connection pool, in the service and in Synapse.
POOL = 10


@attrs.frozen
class Use:
    """Resources used by a process.

    Attributes:
        bytes: resident memory.
        files: open files.
        threads: threads.
        connections: connections to the database.
    """

    bytes: int
    files: int
    threads: int
    connections: int


def use_of(pid: int, cursor: Any) -> Use:
    """Measure the resources that a server uses now.

    Args:
        cursor: cursor of a connection to the server's database. The function doesn't
            count this connection.
    """
    process = Path(f"/proc/{pid}")
    cursor.execute(
        "SELECT COUNT(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
    )
    return Use(
        int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        len(os.listdir(process / "fd")),
        len(os.listdir(process / "task")),
        cursor.fetchone()[0],
    )


def median(uses: Sequence[Use]) -> Use:
    """Return the median of each figure."""
    rows = zip(*map(attrs.astuple, uses), strict=True)
    return Use(*(int(statistics.median(row)) for row in rows))


@attrs.define
class Backup:
    """A user's backup and the requests of the clients sharing the backup.

    Attributes:
        new_user: registers a new user.
        answers: numbers of answers by method and status, and of other outcomes.
        connection: connection of the current user.
        version: number of the current version; empty while there is none.
    """

    url: str
    new_user: Callable[[], User]
    random: Random
    answers: Counter[str]
    connection: Connection = attrs.field(init=False)
    version: str = ""

    @inlineCallbacks
    def act(self, end: float) -> Steps:
        """Run one client until a time of the monotonic clock."""
        while time.monotonic() < end:
            if self.version and self.random.random() < RESET_FRACTION:
                yield self.reset()
            elif self.version:
                yield self.send(*self.any_request())
            yield deferLater(reactor, PAUSE)

    @inlineCallbacks
    def start(self) -> Steps:
        """Switch to a new user and create a version."""
        self.connection = Connection(self.url, self.new_user())
        yield self.make_version()

    @inlineCallbacks
    def reset(self) -> Steps:
        """Delete the version, then create a version for the same or a new user, at
        random."""
        version, self.version = self.version, ""
        path = version_path(version)
        answer: Answer = yield self.connection.request("DELETE", path)
        accepted(answer)
        self.answers["reset"] += 1
        if self.random.random() < LEAVE_FRACTION:
            yield self.start()
        else:
            yield self.make_version()

    @inlineCallbacks
    def make_version(self) -> Steps:
        """Create a version and make the new version the current one."""
        body = {"algorithm": ALGORITHM, "auth_data": {}}
        answer: Answer = yield self.connection.request("POST", "/version", body)
        self.version = accepted(answer)["version"]

    @inlineCallbacks
    def send(self, method: str, path: str, body: Any) -> Steps:
        """Send a request; disconnect before the answer if drawn.

        Raises:
            AssertionError: the request was refused although no client deleted the
                version.
        """
        version = self.version
        answered = self.connection.request(method, path, body)
        if self.random.random() < VANISH_FRACTION:
            delay = self.random.random() * MAX_VANISH_DELAY
            # Keep the original exception instead of a TimeoutError: LOST has the
            # original.
            answered.addTimeout(delay, reactor, lambda failure, _: failure)
            try:
                yield answered
            except LOST:
                self.answers["vanished"] += 1
            return
        try:
            answer: Answer = yield answered
        except LOST:
            # The server ends a download early if its version is deleted meanwhile.
            assert method == "GET" and version != self.version, f"{method} {path}"
            self.answers["broken off"] += 1
            return
        self.answers[f"{method} {answer.status}"] += 1
        if answer.status == 200 or version != self.version:
            assert answer.status in (200, 403, 404), f"{method} {path}: {answer}"
        else:
            assert answer.status == 404, f"{method} {path}: {answer}"
            assert answer.json["error"] == NO_KEY, f"{method} {path}: {answer}"

    def any_request(self) -> Request:
        """Return a random request of a client."""
        random, version = self.random, self.version
        room, session = random.choice(ROOMS), str(random.choice(SESSIONS))
        kind = random.random()
        if kind < 0.5:
            sessions = random.sample(SESSIONS, random.randint(1, MAX_KEYS))
            keys = {str(n): self.any_key() for n in sessions}
            return "PUT", keys_path(version), wrapped({room: keys})
        if kind < 0.55:
            return "DELETE", keys_path(version, room, session), None
        if kind < 0.56:
            return "DELETE", keys_path(version, room), None
        if kind < 0.58:
            return "GET", keys_path(version), None
        if kind < 0.62:
            return "GET", keys_path(version, room), None
        if kind < 0.8:
            return "GET", keys_path(version, room, session), None
        return "GET", version_path(version), None

    def any_key(self) -> dict[str, Any]:
        """Return a key of random rank: better or worse than the stored key, or
        equal."""
        return key(self.random.randrange(4), data="x" * KEY_BYTES)


@inlineCallbacks
def sample(
    pid: int, cursor: Any, end: float
) -> Generator[Deferred[Any], Any, list[Use]]:
    """Fire with samples of a server's resources, taken until a time of the monotonic
    clock."""
    uses: list[Use] = []
    while time.monotonic() < end:
        uses.append(use_of(pid, cursor))
        yield deferLater(reactor, SECONDS / SAMPLES)
    return uses


Place = tuple[Service | Synapse, Callable[[], User], dict[str, Any]]


@pytest.fixture(params=["service", "synapse"] if SOAK else ["service"])
def place(
    request: pytest.FixtureRequest, postgres: PostgresServer, tmp_path: Path
) -> Iterator[Place]:
    """A server on PostgreSQL, a function that registers users, and the database's
    arguments."""
    database = postgres.create_database()
    if request.param == "synapse":
        with Synapse(tmp_path, database=database) as synapse:
            names = (f"user{n}" for n in range(10**6))
            yield synapse, lambda: registered(synapse, next(names)), database
        return
    with Homeserver() as homeserver:
        options = {"url": homeserver.url, "cache_entries": TOKENS}
        settings = {"homeserver": options}
        with Service(
            tmp_path, homeserver.url, database=database, settings=settings
        ) as service:
            yield service, homeserver.new_user, database


def registered(synapse: Synapse, name: str) -> User:
    """Register a user in Synapse."""
    user = synapse.register(name)
    return User(user.user_id, user.access_token)


@inlineCallbacks
def test_mixed_load(place: Place) -> Steps:
    """Under mixed load with disconnecting clients no client gets an unexpected error,
    and memory, files, threads and connections in the last sixth of the run stay at the
    level of the second sixth."""
    server, new_user, database = place
    answers: Counter[str] = Counter()
    backups = [
        Backup(server.url, new_user, Random(number), answers) for number in range(USERS)
    ]
    for backup in backups:
        yield backup.start()
    end = time.monotonic() + SECONDS
    clients = [backup.act(end) for backup in backups for _ in range(CLIENTS)]
    with closing(psycopg2.connect(**database)) as connection:
        connection.autocommit = True
        sampled = sample(server.pid, connection.cursor(), end)
        uses: list[Use] = (
            yield gatherResults([sampled, *clients], consumeErrors=True)
        )[0]
    sixth = len(uses) // 6
    before, after = median(uses[sixth : 2 * sixth]), median(uses[-sixth:])
    print(f"{sum(answers.values())} requests: {dict(answers)}; {before}, then {after}")
    for kind in ("vanished", "reset", "PUT 200", "GET 200", "DELETE 200"):
        assert answers[kind], answers
    # Compare a count: with `not in`, pytest would print the whole log on a failure.
    assert server.log().count("Traceback") == 0
    assert max(use.connections for use in uses) <= POOL
    # A database connection opened after the first samples adds a thread and a file.
    late = after.connections - before.connections
    assert after.threads <= before.threads + late
    assert after.files < before.files + late + FILES
    assert after.bytes < before.bytes + GROWTH

"""A server under mixed load for a long time: it needs no more at the end than before.

ROOMKEYS_SOAK_SECONDS says how long that is.
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
#: Those who share a backup.
CLIENTS = 2
USERS = 6
#: How long a client waits between two requests, in seconds.
PAUSE = 0.01
#: The part of the requests whose clients vanish, and how soon, in seconds at most.
VANISH_FRACTION = 0.05
MAX_VANISH_DELAY = 0.02
#: The part of the steps that are resets, and the part of these after which the user
#: never comes again.
RESET_FRACTION = 0.005
LEAVE_FRACTION = 0.3
#: How many tokens the service remembers: it has met more when the comparison begins.
TOKENS = 10
#: A backup has no other sessions, so it doesn't grow without end.
ROOMS = ("!a:h", "!b:h", "!c:h")
SESSIONS = range(500)
MAX_KEYS = 100
KEY_BYTES = 900
#: By how much the memory may grow, in bytes: in an hour, by less than twenty for each
#: request. In a short run the process still takes what it will go on with.
GROWTH = (8 if SOAK else 32) * 1024 * 1024
#: As many connections of clients may be open at one time, and none at another.
FILES = USERS * CLIENTS
#: The service and Synapse have this many connections to their databases, by default.
POOL = 10


@attrs.frozen
class Use:
    """What a process has of the system's.

    Attributes:
        bytes: its memory.
        connections: to the database.
    """

    bytes: int
    files: int
    threads: int
    connections: int


def use_of(pid: int, cursor: Any) -> Use:
    """What a server has now.

    Args:
        cursor: of a connection to its database, which doesn't count.
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
    """The middle of each figure."""
    rows = zip(*map(attrs.astuple, uses), strict=True)
    return Use(*(int(statistics.median(row)) for row in rows))


@attrs.define
class Backup:
    """A user's backup, and what its clients do.

    Attributes:
        new_user: somebody whom the server hasn't met.
        answers: how often each method has had each status.
        connection: the user's.
        version: the current one, empty while there is none.
    """

    url: str
    new_user: Callable[[], User]
    random: Random
    answers: Counter[str]
    connection: Connection = attrs.field(init=False)
    version: str = ""

    @inlineCallbacks
    def act(self, end: float) -> Steps:
        """Be one of the clients until a time of the monotonic clock."""
        while time.monotonic() < end:
            if self.version and self.random.random() < RESET_FRACTION:
                yield self.reset()
            elif self.version:
                yield self.send(*self.any_request())
            yield deferLater(reactor, PAUSE)

    @inlineCallbacks
    def start(self) -> Steps:
        """Begin, as somebody new."""
        self.connection = Connection(self.url, self.new_user())
        yield self.make_version()

    @inlineCallbacks
    def reset(self) -> Steps:
        """Delete the version, and make another one or come never again."""
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
        """Make a version."""
        body = {"algorithm": ALGORITHM, "auth_data": {}}
        answer: Answer = yield self.connection.request("POST", "/version", body)
        self.version = accepted(answer)["version"]

    @inlineCallbacks
    def send(self, method: str, path: str, body: Any) -> Steps:
        """Send a request, and vanish perhaps.

        Raises:
            AssertionError: it was refused, and not for a reset.
        """
        version = self.version
        answered = self.connection.request(method, path, body)
        if self.random.random() < VANISH_FRACTION:
            patience = self.random.random() * MAX_VANISH_DELAY
            # The exception is one of `LOST` already.
            answered.addTimeout(patience, reactor, lambda failure, _: failure)
            try:
                yield answered
            except LOST:
                self.answers["vanished"] += 1
            return
        try:
            answer: Answer = yield answered
        except LOST:
            # A download is broken off when its version is deleted.
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
        """What a client may do next."""
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
        """A key that is better than another of its session, worse, or equal."""
        return key(self.random.randrange(4), data="x" * KEY_BYTES)


@inlineCallbacks
def sample(
    pid: int, cursor: Any, end: float
) -> Generator[Deferred[Any], Any, list[Use]]:
    """What a server has, again and again until a time of the monotonic clock."""
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
    """A server on PostgreSQL, a source of users, and its database."""
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
    """Somebody new."""
    user = synapse.register(name)
    return User(user.user_id, user.access_token)


@inlineCallbacks
def test_mixed_load(place: Place) -> Steps:
    """The last sixth needs what the second sixth did, and nobody sees an error."""
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
    # The log is too long to be shown.
    assert server.log().count("Traceback") == 0
    assert max(use.connections for use in uses) <= POOL
    # A connection that is made late comes with a thread and a file.
    late = after.connections - before.connections
    assert after.threads <= before.threads + late
    assert after.files < before.files + late + FILES
    assert after.bytes < before.bytes + GROWTH

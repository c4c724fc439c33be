"""Backups on a service whose database fails, and checks of acknowledged uploads."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import attrs
import psycopg2
from pytest_twisted import blockon
from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults, inlineCallbacks
from twisted.internet.task import deferLater

from ..client import HttpHost
from ..contract import Answer, Client
from ..contract.base import (
    PREFIX,
    Rooms,
    encoded,
    key,
    keys_path,
    new_backup,
    refused,
    tally,
    wrapped,
)
from ..servers.fake_homeserver import Homeserver
from ..servers.service import Service

Steps = Generator[Deferred[Any], Any, None]

#: Longest answer while the database fails, in seconds.
WITHIN = 10.0
KEYS = 60
#: Length of a key's data, in hexadecimal digits.
DIGITS = 4000

_numbers = count()


@attrs.define
class Backup:
    """A user's backup as the acknowledged uploads leave the backup.

    Attributes:
        rooms: all acknowledged keys.
        etag: the etag after the last acknowledged upload.
    """

    client: Client
    version: str
    rooms: Rooms = attrs.field(factory=dict)
    etag: int = 0

    @inlineCallbacks
    def upload(self) -> Steps:
        """Upload new keys; the service must acknowledge the upload."""
        rooms = new_keys()
        answer: Answer = yield self.send("PUT", wrapped(rooms))
        self.acknowledge(rooms)
        assert tally(answer) == (self.etag, len(self.rooms) * KEYS)

    def acknowledge(self, rooms: Rooms) -> None:
        """Add keys of an acknowledged upload to the expected backup."""
        for room_id, sessions in rooms.items():
            self.rooms.setdefault(room_id, {}).update(sessions)
        self.etag += 1

    @inlineCallbacks
    def refuse(self, method: str = "PUT", within: float = WITHIN) -> Steps:
        """Send a request; the answer must be a 503 with Retry-After."""
        body = wrapped(new_keys()) if method == "PUT" else None
        answer: Answer = yield self.send(method, body, within)
        refused(answer, 503, "M_UNKNOWN")
        assert int(answer.headers["retry-after"]) > 0

    @inlineCallbacks
    def check(self) -> Steps:
        """Check that keys, etag and count on the server match the acknowledged
        uploads."""
        start = time.monotonic()
        rooms: Rooms = yield self.client.download(self.version)
        assert rooms == self.rooms
        found: tuple[int, int] = yield self.client.tally(self.version)
        assert found == (self.etag, len(self.rooms) * KEYS)
        assert time.monotonic() - start < WITHIN

    def send(self, method: str, body: Any, within: float = WITHIN) -> Deferred[Answer]:
        """Send a request for all keys of the backup.

        Returns:
            A Deferred that fires with the answer, or fails after `within` seconds.
        """
        answered = self.client.host.request(
            method,
            PREFIX + keys_path(self.version),
            token=self.client.user.access_token,
            body=encoded(body),
        )
        return answered.addTimeout(within, reactor)


def new_keys() -> Rooms:
    """Return keys of a new room, different for each call."""
    data = secrets.token_hex(DIGITS // 2)
    return {f"!{next(_numbers)}": {f"{n}": key(data=data) for n in range(KEYS)}}


@attrs.frozen
class Served:
    """A running process of the service, and a client host for the process's API."""

    service: Service
    host: HttpHost

    @inlineCallbacks
    def new_backups(self, number: int) -> Generator[Deferred[Any], Any, list[Backup]]:
        """Fire with this number of backups of new users, each with some keys."""
        backups = []
        for _ in range(number):
            client, version = yield new_backup(self.host)
            backups.append(Backup(client, version))
            yield backups[-1].upload()
        return backups

    @inlineCallbacks
    def ask_if_ready(self) -> Generator[Deferred[Any], Any, dict[str, str]]:
        """Query ``/ready`` as a load balancer does.

        Returns:
            A Deferred that fires with the state of each part. The status must be 200 if
            all are "ok" and 503 otherwise.
        """
        answer: Answer = yield self.host.request("GET", "/ready", token=None)
        parts: dict[str, str] = answer.json
        is_ready = set(parts.values()) == {"ok"}
        assert answer.status == (200 if is_ready else 503), answer
        return parts

    @inlineCallbacks
    def wait_until_ready(self) -> Steps:
        """Poll ``/ready`` until all parts are ready; fail after WITHIN seconds."""
        end = time.monotonic() + WITHIN
        while True:
            parts: dict[str, str] = yield self.ask_if_ready()
            if set(parts.values()) == {"ok"}:
                return
            assert time.monotonic() < end, parts
            yield later(0.1, lambda: None)


Serve = Callable[..., Served]


def together(steps: list[Deferred[None]]) -> Deferred[Any]:
    """Return a Deferred that fires when all have fired, or fails with the first
    failure."""
    return gatherResults(steps, consumeErrors=True)


def later(seconds: float, call: Callable[[], object]) -> Deferred[Any]:
    """Return a Deferred that fires with the result of a delayed call."""
    return deferLater(reactor, seconds, call)


@contextmanager
def serving(homeserver: Homeserver, directory: Path) -> Iterator[Serve]:
    """Yield a function that starts the service on a database (SQLite by default).

    At the end, stop all started services and check their logs for tracebacks.
    """
    services: list[Service] = []
    with ExitStack() as stack:

        def serve(
            database: Mapping[str, Any] | None = None,
            path: Path | None = None,
            environment: Mapping[str, str] | None = None,
        ) -> Served:
            settings = {}
            if path is not None:
                args = {"database": str(path)}
                settings["database"] = {"name": "sqlite3", "args": args}
            service = Service(
                directory,
                homeserver.url,
                database=database,
                settings=settings,
                environment=environment or {},
            )
            services.append(stack.enter_context(service))
            host = HttpHost(service.url, homeserver.new_user, homeserver.new_guest)
            stack.callback(lambda: blockon(host.close()))
            return Served(service, host)

        yield serve
    for service in services:
        assert "Traceback" not in service.log()


@contextmanager
def connected(database: Mapping[str, Any]) -> Iterator[Any]:
    """Yield a cursor of an independent connection in autocommit mode."""
    with closing(psycopg2.connect(**database)) as connection:
        connection.autocommit = True
        yield connection.cursor()

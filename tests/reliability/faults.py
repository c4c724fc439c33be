"""Backups at a service whose database is about to fail."""

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

#: How long an answer may take while the database fails, in seconds.
WITHIN = 10.0
KEYS = 60
#: What a key's data has, in hexadecimal digits.
DIGITS = 4000

_numbers = count()


@attrs.define
class Backup:
    """A user's backup, and what of it was acknowledged."""

    client: Client
    version: str
    rooms: Rooms = attrs.field(factory=dict)
    etag: int = 0

    @inlineCallbacks
    def upload(self) -> Steps:
        """Upload new keys, which is answered."""
        rooms = new_keys()
        answer: Answer = yield self.send("PUT", wrapped(rooms))
        self.acknowledge(rooms)
        assert tally(answer) == (self.etag, len(self.rooms) * KEYS)

    def acknowledge(self, rooms: Rooms) -> None:
        """Note that an upload was acknowledged."""
        for room_id, sessions in rooms.items():
            self.rooms.setdefault(room_id, {}).update(sessions)
        self.etag += 1

    @inlineCallbacks
    def refuse(self, method: str = "PUT", within: float = WITHIN) -> Steps:
        """Have a request refused for the moment."""
        body = wrapped(new_keys()) if method == "PUT" else None
        answer: Answer = yield self.send(method, body, within)
        refused(answer, 503, "M_UNKNOWN")
        assert int(answer.headers["retry-after"]) > 0

    @inlineCallbacks
    def check(self) -> Steps:
        """See that it is what was acknowledged, no more and no less."""
        start = time.monotonic()
        rooms: Rooms = yield self.client.download(self.version)
        assert rooms == self.rooms
        found: tuple[int, int] = yield self.client.tally(self.version)
        assert found == (self.etag, len(self.rooms) * KEYS)
        assert time.monotonic() - start < WITHIN

    def send(self, method: str, body: Any, within: float = WITHIN) -> Deferred[Answer]:
        """The answer to a request for all keys, which has to come in time."""
        answered = self.client.host.request(
            method,
            PREFIX + keys_path(self.version),
            token=self.client.user.access_token,
            body=encoded(body),
        )
        return answered.addTimeout(within, reactor)


def new_keys() -> Rooms:
    """Keys of a room that was never used."""
    data = secrets.token_hex(DIGITS // 2)
    return {f"!{next(_numbers)}": {f"{n}": key(data=data) for n in range(KEYS)}}


@attrs.frozen
class Served:
    """A process of the service."""

    service: Service
    host: HttpHost

    @inlineCallbacks
    def new_backups(self, number: int) -> Generator[Deferred[Any], Any, list[Backup]]:
        """Backups of as many users, each with some keys."""
        backups = []
        for _ in range(number):
            client, version = yield new_backup(self.host)
            backups.append(Backup(client, version))
            yield backups[-1].upload()
        return backups

    @inlineCallbacks
    def ask_if_ready(self) -> Generator[Deferred[Any], Any, dict[str, str]]:
        """Each part of the status, as a load balancer asks for it."""
        answer: Answer = yield self.host.request("GET", "/ready", token=None)
        parts: dict[str, str] = answer.json
        is_ready = set(parts.values()) == {"ok"}
        assert answer.status == (200 if is_ready else 503), answer
        return parts

    @inlineCallbacks
    def wait_until_ready(self) -> Steps:
        """Wait until a load balancer would send requests."""
        end = time.monotonic() + WITHIN
        while True:
            parts: dict[str, str] = yield self.ask_if_ready()
            if set(parts.values()) == {"ok"}:
                return
            assert time.monotonic() < end, parts
            yield later(0.1, lambda: None)


Serve = Callable[..., Served]


def together(steps: list[Deferred[None]]) -> Deferred[Any]:
    """Fires when all are done, or fails with the first that does."""
    return gatherResults(steps, consumeErrors=True)


def later(seconds: float, call: Callable[[], object]) -> Deferred[Any]:
    """A call in a while."""
    return deferLater(reactor, seconds, call)


@contextmanager
def serving(homeserver: Homeserver, directory: Path) -> Iterator[Serve]:
    """Gives what starts the service on a database, and looks at its log in the end."""
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
    """A cursor of somebody else's, whose statements are transactions."""
    with closing(psycopg2.connect(**database)) as connection:
        connection.autocommit = True
        yield connection.cursor()

"""Clients of a shared backup, with a record of their operations and answers."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Mapping, Sequence
from random import Random
from typing import Any

import attrs
from twisted.internet import reactor
from twisted.internet.defer import (
    CancelledError,
    Deferred,
    gatherResults,
    inlineCallbacks,
)
from twisted.internet.error import (
    ConnectError,
    ConnectingCancelledError,
    ConnectionClosed,
    DNSLookupError,
)
from twisted.web.client import (
    RequestGenerationFailed,
    RequestTransmissionFailed,
    ResponseFailed,
)

from ..client import HttpClient
from ..contract import Answer, User
from ..contract.base import (
    ALGORITHM,
    NO_KEY,
    PREFIX,
    Rooms,
    accepted,
    encoded,
    keys_path,
    refused,
    tally,
    version_path,
    wrapped,
)
from .linearizability import Delete, Download, Event, GetInfo, Operation, Upload
from .model import Ids, Key

ROOMS = ("!a:h", "!b:h", "!c:h")
SESSIONS = ("1", "2", "3", "4")
KEYS_IN_AN_UPLOAD = 6
#: Longest delay before a connection is cut, in seconds: about the time of a request.
#: Some requests are therefore answered before the cut and some are under way.
MAX_CUT_DELAY = 0.03

#: Exceptions of a request without an answer: the server may have run the operation or
#: not.
LOST = (
    CancelledError,
    ConnectError,
    ConnectingCancelledError,
    ConnectionClosed,
    DNSLookupError,
    RequestGenerationFailed,
    RequestTransmissionFailed,
    ResponseFailed,
)


@attrs.frozen
class Connection:
    """A user at one server.

    Each request opens a new TCP connection, because the HTTP client silently resends a
    request if a kept connection fails.
    """

    url: str
    user: User

    def request(self, method: str, path: str, body: Any = None) -> Deferred[Answer]:
        """Send a request.

        Args:
            path: path below the endpoints' prefix.

        Returns:
            A Deferred that fires with the answer.
        """
        client = HttpClient(self.url, is_persistent=False)
        token = self.user.access_token
        return client.request(method, PREFIX + path, token=token, body=encoded(body))


@attrs.frozen
class Recorder:
    """A backup version and the operations performed by the version's clients.

    Attributes:
        events: all operations, in the order of their end.
    """

    version: str
    events: list[Event] = attrs.field(factory=list)

    @inlineCallbacks
    def perform(
        self, connection: Connection, operation: Operation, cut: float | None = None
    ) -> Generator[Deferred[Any], Any, None]:
        """Send an operation, wait for the answer and append an event to `events`.

        A failed connection and a status of 500 or more are recorded as a lost answer.

        Args:
            cut: delay in seconds after which the connection is cut if no answer has
                arrived; None for never.
        """
        start = time.monotonic()
        answered: Deferred[Answer] = connection.request(
            *request_of(self.version, operation)
        )
        if cut is not None:
            # Keep the original exception instead of a TimeoutError: LOST has the
            # original.
            answered.addTimeout(cut, reactor, lambda failure, _: failure)
        try:
            answer = yield answered
        except LOST:
            answer = None
        if answer is None or answer.status >= 500:
            self.events.append(Event(operation, start))
            return
        seen = answer_of(operation, answer)
        self.events.append(Event(operation, start, time.monotonic(), seen))


def request_of(version: str, operation: Operation) -> tuple[str, str, Any]:
    """Return the method, path and body of an operation's request."""
    if isinstance(operation, Upload):
        return "PUT", keys_path(version), wrapped(as_rooms(operation.keys))
    if isinstance(operation, GetInfo):
        return "GET", version_path(version), None
    method = "DELETE" if isinstance(operation, Delete) else "GET"
    path = keys_path(version, operation.room_id, operation.session_id)
    return method, path, None


def answer_of(operation: Operation, answer: Answer) -> Any:
    """Convert an HTTP answer to the value that the operation's ``apply`` would
    return."""
    if isinstance(operation, Upload | Delete):
        return tally(answer)
    if isinstance(operation, GetInfo):
        info = accepted(answer)
        return int(info["etag"]), info["count"]
    if operation.session_id is not None and answer.status == 404:
        refused(answer, 404, "M_NOT_FOUND", error=NO_KEY)
        return {}
    return dict(as_keys(operation, accepted(answer)))


def as_rooms(keys: Mapping[Ids, Key]) -> Rooms:
    """Convert keys to the nested rooms and sessions of an upload."""
    rooms: Rooms = {}
    for (room_id, session_id), key in keys.items():
        rooms.setdefault(room_id, {})[session_id] = key.json()
    return rooms


def as_keys(read: Download, body: Any) -> Generator[tuple[Ids, Key], None, None]:
    """Yield ids and key for each key in the body of a download."""
    room_id, session_id = read.room_id, read.session_id
    if room_id is None:
        rooms = {name: room["sessions"] for name, room in body["rooms"].items()}
    elif session_id is None:
        rooms = {room_id: body["sessions"]}
    else:
        rooms = {room_id: {session_id: body}}
    for room, sessions in rooms.items():
        for session, value in sessions.items():
            yield (
                (room, session),
                Key(
                    value["is_verified"],
                    value["first_message_index"],
                    value["forwarded_count"],
                    json.dumps(value["session_data"]),
                ),
            )


def any_operation(random: Random, mark: str) -> Operation:
    """Return a random operation.

    Args:
        mark: text stored in uploaded keys, unique for each upload.
    """
    room_id = random.choice(ROOMS)
    session_id = random.choice(SESSIONS)
    scopes = [(None, None), (room_id, None), (room_id, session_id)]
    kind = random.random()
    if kind < 0.55:
        every = [(room_id, session_id) for room_id in ROOMS for session_id in SESSIONS]
        chosen = random.sample(every, random.randint(1, KEYS_IN_AN_UPLOAD))
        return Upload({ids: any_key(random, mark) for ids in chosen})
    if kind < 0.75:
        return Delete(*random.choices(scopes, (1, 4, 5))[0])
    if kind < 0.85:
        return GetInfo()
    return Download(*random.choice(scopes))


def any_key(random: Random, mark: str) -> Key:
    """Return a random valid key, of 16 possible ranks, with `mark` as the key's
    data."""
    verified = random.random() < 0.5
    return Key(verified, random.randrange(4), random.randrange(2), json.dumps(mark))


@inlineCallbacks
def _act(
    recorder: Recorder, connection: Connection, random: Random, count: int, cut: float
) -> Generator[Deferred[Any], Any, None]:
    """Perform random operations one after the other.

    Args:
        count: number of operations.
        cut: fraction of the operations whose connections are cut.
    """
    mark = random.getrandbits(32)
    for number in range(count):
        after = random.random() * MAX_CUT_DELAY if random.random() < cut else None
        operation = any_operation(random, f"{mark:x}/{number}")
        yield recorder.perform(connection, operation, after)


@inlineCallbacks
def record(
    urls: Sequence[str], user: User, clients: int, count: int, seed: int, cut: float = 0
) -> Generator[Deferred[Any], Any, list[Event]]:
    """Let clients write to a new backup at the same time, then read it on each server.

    Args:
        urls: addresses of the servers; client number n uses server n modulo their
            number.
        count: number of operations of each client.
        seed: seed of the operations; their timing differs from run to run.
        cut: fraction of the operations whose connections are cut.

    Returns:
        A Deferred that fires with all events.
    """
    connections = [Connection(url, user) for url in urls]
    body = {"algorithm": ALGORITHM, "auth_data": {}}
    answer: Answer = yield connections[0].request("POST", "/version", body)
    recorder = Recorder(accepted(answer)["version"])
    yield gatherResults(
        [
            _act(
                recorder,
                connections[n % len(urls)],
                Random(f"{seed}/{n}"),
                *(count, cut),
            )
            for n in range(clients)
        ],
        consumeErrors=True,
    )
    for connection in connections:
        yield recorder.perform(connection, Download())
        yield recorder.perform(connection, GetInfo())
    return recorder.events

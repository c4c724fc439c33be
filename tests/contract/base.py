"""The host protocol, the client and the checks that all scenarios use."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from typing import Any, Protocol, TypeAlias
from urllib.parse import quote

import attrs
from twisted.internet.defer import Deferred, inlineCallbacks

Steps: TypeAlias = Generator["Deferred[Any]", Any, None]
Rooms: TypeAlias = dict[str, dict[str, dict[str, Any]]]
"""Keys by room id and session id, without the members `rooms` and `sessions`."""

PREFIX = "/_matrix/client/v3/room_keys"
ALGORITHM = "m.megolm_backup.v1.curve25519-aes-sha2"
AUTH_DATA = {"public_key": "abc", "signatures": {"@a:b": {"ed25519:c": "d"}}}
NO_VERSION = "Unknown backup version"
NO_KEY = "No room_keys found"


@attrs.frozen
class User:
    """A user of the server. The access token is too long to occur by chance."""

    user_id: str
    access_token: str = attrs.field(repr=False)


@attrs.frozen
class Answer:
    """A received answer. Header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, parsed as JSON."""
        return json.loads(self.body)

    def __str__(self) -> str:
        return f"{self.status} {self.body[:400]!r}"


class Requests(Protocol):
    """An address that answers requests."""

    def request(
        self,
        method: str,
        path: str,
        *,
        token: str | None,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Deferred[Answer]:
        """Send a request and fire with the answer.

        Args:
            path: the path with its query, percent-encoded already and sent unchanged.
            token: the access token, or None for a request without a token.
        """


class Host(Requests, Protocol):
    """A server under test."""

    def new_user(self) -> User:
        """Create a user that no other caller gets."""

    def new_guest(self) -> User:
        """Create a guest that no other caller gets."""


class OperatorHost(Requests, Protocol):
    """The interface for operators of a server under test, which keeps deleted versions
    for a day."""

    @property
    def clients(self) -> Host:
        """The same server for clients."""

    def new_operator(self) -> User:
        """Create or return an operator."""

    def wait(self) -> Deferred[None]:
        """Fire with None after a moment in which the server's background work goes
        on."""


Scenario: TypeAlias = Callable[[Host], "Deferred[None]"]
SCENARIOS: dict[str, Scenario] = {}
OperatorScenario: TypeAlias = Callable[[OperatorHost], "Deferred[None]"]
OPERATOR_SCENARIOS: dict[str, OperatorScenario] = {}


def scenario(function: Callable[[Host], Steps]) -> Scenario:
    """Add a generator function to `SCENARIOS` under its name.

    Returns:
        The function, decorated with `inlineCallbacks`.
    """
    name = function.__name__
    assert name not in SCENARIOS, f"two scenarios are called {name}"
    SCENARIOS[name] = inlineCallbacks(function)
    return SCENARIOS[name]


def operator_scenario(function: Callable[[OperatorHost], Steps]) -> OperatorScenario:
    """Add a generator function to `OPERATOR_SCENARIOS`, as `scenario` does to
    `SCENARIOS`."""
    name = function.__name__
    assert name not in OPERATOR_SCENARIOS, f"two scenarios are called {name}"
    OPERATOR_SCENARIOS[name] = inlineCallbacks(function)
    return OPERATOR_SCENARIOS[name]


# Paths, below a prefix


def quoted(text: str) -> str:
    """Percent-encode a text for use as one segment of a path."""
    return quote(text, safe="")


def keys_path(
    version: str | None, room: str | None = None, session: str | None = None
) -> str:
    """The path of a version's keys: all keys, the keys of a room, or one key."""
    path = "/keys"
    for segment in (room, session):
        if segment is not None:
            path += "/" + quoted(segment)
    return path if version is None else f"{path}?version={quoted(version)}"


def version_path(version: str) -> str:
    """The path of a version."""
    return "/version/" + quoted(version)


# Bodies


def key(
    index: Any = 0, forwarded: Any = 0, verified: Any = False, data: Any = "secret"
) -> dict[str, Any]:
    """The key of one session, as JSON members."""
    return {
        "first_message_index": index,
        "forwarded_count": forwarded,
        "is_verified": verified,
        "session_data": data,
    }


def wrapped(rooms: Rooms) -> dict[str, Any]:
    """The body of an upload or download of all rooms."""
    return {"rooms": {room: {"sessions": keys} for room, keys in rooms.items()}}


def encoded(body: Any) -> bytes | None:
    """A body as sent: bytes are sent unchanged, any other value as JSON."""
    if body is None or isinstance(body, bytes):
        return body
    return json.dumps(body).encode()


# Checks


def same(got: Any, want: Any, row: str = "") -> None:
    """Check that two JSON values are equal.

    `1` is not equal to `true`, and the order of members is ignored.

    Raises:
        AssertionError: The values differ. The message begins with `row`.
    """
    texts = [json.dumps(value, sort_keys=True) for value in (got, want)]
    assert texts[0] == texts[1], f"{row}: got {texts[0][:900]}, want {texts[1][:900]}"


def accepted(answer: Answer, row: str = "") -> Any:
    """Check that an answer is a 200, and return its body parsed as JSON.

    Raises:
        AssertionError: The status is another. The message begins with `row`.
    """
    assert answer.status == 200, f"{row}: want 200, got {answer}"
    return answer.json


def refused(
    answer: Answer,
    status: int,
    *errcodes: str,
    error: str | None = None,
    names: tuple[str, ...] = (),
    row: str = "",
) -> dict[str, Any]:
    """Check an error answer, and return its body parsed as JSON.

    Args:
        status: the expected status.
        errcodes: the accepted errcodes.
        error: the expected message, or None for any message that is not empty.
        names: texts that the message must contain.
        row: the beginning of the message of a failed check.

    Raises:
        AssertionError: The answer is another.
    """
    assert answer.status == status, f"{row}: want {status} {errcodes}, got {answer}"
    body: dict[str, Any] = answer.json
    assert body["errcode"] in errcodes, f"{row}: want {errcodes}, got {answer}"
    text = body["error"]
    assert isinstance(text, str) and text, f"{row}: no message: {answer}"
    assert error is None or text == error, f"{row}: want {error!r}, got {text!r}"
    for name in names:
        assert name in text, f"{row}: the message doesn't name {name!r}: {text!r}"
    return body


def tally(answer: Answer, row: str = "") -> tuple[int, int]:
    """Check the answer of an upload or deletion: a 200 with a string etag and an
    integer count.

    Returns:
        The etag, as a number, and the count.
    """
    body = accepted(answer, row)
    assert body.keys() == {"etag", "count"}, f"{row}: {answer}"
    assert isinstance(body["etag"], str), f"{row}: the etag is no string: {answer}"
    assert type(body["count"]) is int, f"{row}: the count is no integer: {answer}"
    return int(body["etag"]), body["count"]


@attrs.frozen
class Client:
    """The client of one user. Paths begin after the prefix."""

    host: Requests
    user: User
    prefix: str = PREFIX

    @inlineCallbacks
    def request(
        self, method: str, path: str, body: Any = None
    ) -> Generator[Deferred[Any], Any, Answer]:
        """Send a request and fire with the answer.

        Raises:
            AssertionError: The answer is a 5xx, or holds a traceback or the token.
        """
        token = self.user.access_token
        answer: Answer = yield self.host.request(
            method, self.prefix + path, token=token, body=encoded(body)
        )
        where = f"{method} {path[:200]}: {answer}"
        assert answer.status < 500, where
        assert b"Traceback" not in answer.body, where
        assert token.encode() not in answer.body, f"{method} {path[:200]}: the token"
        return answer

    def get(self, path: str) -> Deferred[Answer]:
        """Send a GET request and fire with the answer."""
        return self.request("GET", path)

    def put(self, path: str, body: Any) -> Deferred[Answer]:
        """Send a PUT request and fire with the answer."""
        return self.request("PUT", path, body)

    def post(self, path: str, body: Any) -> Deferred[Answer]:
        """Send a POST request and fire with the answer."""
        return self.request("POST", path, body)

    def delete(self, path: str) -> Deferred[Answer]:
        """Send a DELETE request and fire with the answer."""
        return self.request("DELETE", path)

    @inlineCallbacks
    def create_version(
        self, auth_data: Any = AUTH_DATA, algorithm: str = ALGORITHM
    ) -> Generator[Deferred[Any], Any, str]:
        """Create a backup version and fire with its number."""
        body = {"algorithm": algorithm, "auth_data": auth_data}
        answer: Answer = yield self.post("/version", body)
        version: str = accepted(answer, "POST /version")["version"]
        return version

    @inlineCallbacks
    def info(
        self, version: str | None = None
    ) -> Generator[Deferred[Any], Any, dict[str, Any]]:
        """Read a version, or the current version by default, and fire with the body."""
        path = "/version" if version is None else version_path(version)
        answer: Answer = yield self.get(path)
        body: dict[str, Any] = accepted(answer, path)
        return body

    @inlineCallbacks
    def tally(
        self, version: str | None = None
    ) -> Generator[Deferred[Any], Any, tuple[int, int]]:
        """Read a version and fire with its etag, as a number, and its count."""
        info: dict[str, Any] = yield self.info(version)
        return int(info["etag"]), info["count"]

    @inlineCallbacks
    def upload(
        self, version: str, rooms: Rooms
    ) -> Generator[Deferred[Any], Any, tuple[int, int]]:
        """Upload keys, and fire with the etag, as a number, and the count
        afterwards."""
        answer: Answer = yield self.put(keys_path(version), wrapped(rooms))
        return tally(answer, "PUT /keys")

    @inlineCallbacks
    def download(self, version: str) -> Generator[Deferred[Any], Any, Rooms]:
        """Fire with all keys of a version.

        Raises:
            AssertionError: The answer has members other than the keys.
        """
        answer: Answer = yield self.get(keys_path(version))
        body = accepted(answer, "GET /keys")
        rooms: Rooms = {name: room["sessions"] for name, room in body["rooms"].items()}
        same(body, wrapped(rooms), "GET /keys")
        return rooms


@inlineCallbacks
def new_backup(host: Host) -> Generator[Deferred[Any], Any, tuple[Client, str]]:
    """Fire with the client of a new user and the version of their only, empty
    backup."""
    client = Client(host, host.new_user())
    version: str = yield client.create_version()
    return client, version

"""What the scenarios of the contract are written with."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from typing import Any, Protocol, TypeAlias
from urllib.parse import quote

import attrs
from twisted.internet.defer import Deferred, inlineCallbacks

Steps: TypeAlias = Generator["Deferred[Any]", Any, None]
Rooms: TypeAlias = dict[str, dict[str, dict[str, Any]]]
"""Keys by room id and session id, without the wrapping that goes on the wire."""

PREFIX = "/_matrix/client/v3/room_keys"
ALGORITHM = "m.megolm_backup.v1.curve25519-aes-sha2"
AUTH_DATA = {"public_key": "abc", "signatures": {"@a:b": {"ed25519:c": "d"}}}
NO_VERSION = "Unknown backup version"
NO_KEY = "No room_keys found"


@attrs.frozen
class User:
    """Somebody the server knows; the token is too long to occur by chance."""

    user_id: str
    access_token: str = attrs.field(repr=False)


@attrs.frozen
class Answer:
    """What came back: header names are lower-case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def __str__(self) -> str:
        return f"{self.status} {self.body[:400]!r}"


class Host(Protocol):
    """A server under test."""

    def new_user(self) -> User:
        """A fresh user whom nobody else uses."""

    def new_guest(self) -> User:
        """A fresh guest."""

    def request(
        self,
        method: str,
        path: str,
        *,
        token: str | None,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Deferred[Answer]:
        """Send `path` as it is: it is percent-encoded already."""


Scenario: TypeAlias = Callable[[Host], "Deferred[None]"]
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Callable[[Host], Steps]) -> Scenario:
    """Add a function, with `inlineCallbacks`, to the contract under its name."""
    name = function.__name__
    assert name not in SCENARIOS, f"two scenarios are called {name}"
    SCENARIOS[name] = inlineCallbacks(function)
    return SCENARIOS[name]


# Paths, below a prefix


def quoted(text: str) -> str:
    return quote(text, safe="")


def keys_path(
    version: str | None, room: str | None = None, session: str | None = None
) -> str:
    """The path of a backup's keys: of all, of a room's or of one session."""
    path = "/keys"
    for segment in (room, session):
        if segment is not None:
            path += "/" + quoted(segment)
    return path if version is None else f"{path}?version={quoted(version)}"


def version_path(version: str) -> str:
    return "/version/" + quoted(version)


# Bodies


def key(
    index: Any = 0, forwarded: Any = 0, verified: Any = False, data: Any = "secret"
) -> dict[str, Any]:
    """One session's key."""
    return {
        "first_message_index": index,
        "forwarded_count": forwarded,
        "is_verified": verified,
        "session_data": data,
    }


def wrapped(rooms: Rooms) -> dict[str, Any]:
    """Keys as a whole upload or download has them."""
    return {"rooms": {room: {"sessions": keys} for room, keys in rooms.items()}}


def encoded(body: Any) -> bytes | None:
    """A body as sent: bytes are sent as they are, all else as JSON."""
    if body is None or isinstance(body, bytes):
        return body
    return json.dumps(body).encode()


# Checks


def same(got: Any, want: Any, row: str = "") -> None:
    """Equal as JSON values: `1` is not `true`, the order of members is nothing."""
    texts = [json.dumps(value, sort_keys=True) for value in (got, want)]
    assert texts[0] == texts[1], f"{row}: got {texts[0][:900]}, want {texts[1][:900]}"


def accepted(answer: Answer, row: str = "") -> Any:
    """The body of a 200."""
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
    """The body of an error that has one of `errcodes` and says all of `names`."""
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
    """The etag, as a number, and the count of an upload's or deletion's answer."""
    body = accepted(answer, row)
    assert body.keys() == {"etag", "count"}, f"{row}: {answer}"
    assert isinstance(body["etag"], str), f"{row}: the etag is no string: {answer}"
    assert type(body["count"]) is int, f"{row}: the count is no integer: {answer}"
    return int(body["etag"]), body["count"]


@attrs.frozen
class Client:
    """One user's client; paths start below the prefix."""

    host: Host
    user: User
    prefix: str = PREFIX

    @inlineCallbacks
    def request(
        self, method: str, path: str, body: Any = None
    ) -> Generator[Deferred[Any], Any, Answer]:
        """Any request; no answer may be a crash, a traceback or hold the token."""
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
        return self.request("GET", path)

    def put(self, path: str, body: Any) -> Deferred[Answer]:
        return self.request("PUT", path, body)

    def post(self, path: str, body: Any) -> Deferred[Answer]:
        return self.request("POST", path, body)

    def delete(self, path: str) -> Deferred[Answer]:
        return self.request("DELETE", path)

    @inlineCallbacks
    def create_version(
        self, auth_data: Any = AUTH_DATA, algorithm: str = ALGORITHM
    ) -> Generator[Deferred[Any], Any, str]:
        body = {"algorithm": algorithm, "auth_data": auth_data}
        answer: Answer = yield self.post("/version", body)
        version: str = accepted(answer, "POST /version")["version"]
        return version

    @inlineCallbacks
    def info(
        self, version: str | None = None
    ) -> Generator[Deferred[Any], Any, dict[str, Any]]:
        """What the server says of a backup, the current one by default."""
        path = "/version" if version is None else version_path(version)
        answer: Answer = yield self.get(path)
        body: dict[str, Any] = accepted(answer, path)
        return body

    @inlineCallbacks
    def tally(
        self, version: str | None = None
    ) -> Generator[Deferred[Any], Any, tuple[int, int]]:
        """The etag, as a number, and the count that a backup has now."""
        info: dict[str, Any] = yield self.info(version)
        return int(info["etag"]), info["count"]

    @inlineCallbacks
    def upload(
        self, version: str, rooms: Rooms
    ) -> Generator[Deferred[Any], Any, tuple[int, int]]:
        """Upload keys; the etag, as a number, and the count afterwards."""
        answer: Answer = yield self.put(keys_path(version), wrapped(rooms))
        return tally(answer, "PUT /keys")

    @inlineCallbacks
    def download(self, version: str) -> Generator[Deferred[Any], Any, Rooms]:
        """All keys of a backup; nothing but the keys may be in the answer."""
        answer: Answer = yield self.get(keys_path(version))
        body = accepted(answer, "GET /keys")
        rooms: Rooms = {name: room["sessions"] for name, room in body["rooms"].items()}
        same(body, wrapped(rooms), "GET /keys")
        return rooms


@inlineCallbacks
def new_backup(host: Host) -> Generator[Deferred[Any], Any, tuple[Client, str]]:
    """A fresh user's client and the version of its only, empty backup."""
    client = Client(host, host.new_user())
    version: str = yield client.create_version()
    return client, version

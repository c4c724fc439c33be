"""A homeserver for tests in memory that knows tokens and fails on demand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
from twisted.web.http import Request
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET
from twisted.web.test.requesthelper import DummyChannel

WHOAMI = "/_matrix/client/v3/account/whoami"
VERSIONS = "/_matrix/client/versions"

#: A function that answers a request instead of the homeserver.
Fault = Callable[[Request], "int | bytes"]


@attrs.frozen
class ReceivedRequest:
    """A request as the homeserver received it.

    Attributes:
        forwarded_for: values of ``X-Forwarded-For``.
        user_agent: values of ``User-Agent``.
    """

    path: str
    token: str | None
    query: Mapping[str, str]
    cookie: str | None
    forwarded_for: Sequence[bytes]
    user_agent: Sequence[bytes]


class FaultyHomeserver(Resource):
    """The endpoints whoami and versions of a homeserver, with faults to inject.

    Attributes:
        answers: status and JSON value of whoami by access token.
        fault: the function that answers every request while it is set, or None.
        asked: the received requests, in order.
        peers: the client addresses of the connections.
    """

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.answers: dict[str, tuple[int, Any]] = {}
        self.fault: Fault | None = None
        self.asked: list[ReceivedRequest] = []
        self.peers: set[object] = set()

    def render(self, request: Request) -> int | bytes:
        """Answer a request; `Resource` calls this method."""
        path = request.path.decode()
        bearer = request.getHeader("Authorization")
        token = bearer and bearer.removeprefix("Bearer ")
        args = request.args or {}
        query = {name.decode(): values[0].decode() for name, values in args.items()}
        cookie = request.getHeader("Cookie")
        self.peers.add(request.getClientAddress())
        forwarded_for = request.requestHeaders.getRawHeaders(b"X-Forwarded-For", [])
        user_agent = request.requestHeaders.getRawHeaders(b"User-Agent", [])
        self.asked.append(
            ReceivedRequest(path, token, query, cookie, forwarded_for, user_agent)
        )
        if self.fault is not None:
            return self.fault(request)
        if path == VERSIONS:
            return answering(200, {"versions": ["v1.11"]})(request)
        unknown = 401, {"errcode": "M_UNKNOWN_TOKEN", "error": f"No token {token}"}
        return answering(*self.answers.get(token or "", unknown))(request)


def client_request(
    token: str | None, header: str | None = None, **query: str
) -> Request:
    """Return a request as a client of the plugin sends it.

    Args:
        header: the value of ``Authorization``, by default made of the token.
        query: parameters of the query.
    """
    channel: Any = DummyChannel()
    request = Request(channel, False)
    request.args = {name.encode(): [v.encode()] for name, v in query.items()}
    if header is None and token is not None:
        header = f"Bearer {token}"
    if header is not None:
        request.requestHeaders.addRawHeader(b"Authorization", header.encode("latin-1"))
    return request


def answering(code: int, value: Any, **headers: str) -> Fault:
    """Return a fault that answers with a status and a body.

    Args:
        value: the body, as bytes or as a JSON value.
        headers: headers of the answer, with underscores for hyphens.
    """

    def answer(request: Request) -> bytes:
        request.setResponseCode(code)
        for name, content in headers.items():
            request.setHeader(name.replace("_", "-").encode(), content.encode())
        return value if isinstance(value, bytes) else json.dumps(value).encode()

    return answer


class TokenBucket:
    """A rate limiter in front of another fault: requests over the rate are answered
    429.

    Attributes:
        refused: number of requests that were answered 429.
    """

    def __init__(
        self, seconds: Callable[[], float], rate: float, answer: Fault, **headers: str
    ) -> None:
        """Begin with a full bucket.

        Args:
            seconds: returns the current time in seconds.
            rate: requests a second, and the size of the largest burst.
            answer: answers the requests within the rate.
            headers: headers of each 429.
        """
        self.refused = 0
        self._seconds = seconds
        self._rate = rate
        self._answer = answer
        self._headers = headers
        self._tokens = rate
        self._filled = seconds()

    def __call__(self, request: Request) -> int | bytes:
        """Answer a request."""
        now = self._seconds()
        passed = now - self._filled
        self._tokens = min(self._rate, self._tokens + passed * self._rate)
        self._filled = now
        if self._tokens >= 1:
            self._tokens -= 1
            return self._answer(request)
        self.refused += 1
        wait = math.ceil((1 - self._tokens) / self._rate * 1000)
        body = {"errcode": "M_LIMIT_EXCEEDED", "retry_after_ms": wait}
        return answering(429, body, **self._headers)(request)


def stall(request: Request) -> int:
    """Never answer."""
    return NOT_DONE_YET


def stall_in_body(request: Request) -> int:
    """Send half of the body and never the rest."""
    request.setHeader(b"Content-Length", b"100")
    request.write(b'{"user_id": "@half')
    return NOT_DONE_YET


def cut_in_body(request: Request) -> int:
    """Send half of the body and close the connection."""
    stall_in_body(request)
    channel: Any = request.channel
    channel.loseConnection()
    return NOT_DONE_YET


def hang_up(request: Request) -> int:
    """Abort the connection without an answer."""
    channel: Any = request.channel
    channel.transport.abortConnection()
    return NOT_DONE_YET


#: Faulty answers of a homeserver, or of a reverse proxy in front of a homeserver.
FAULTS: dict[str, Fault] = {
    "500": answering(500, {"errcode": "M_UNKNOWN"}),
    "502": answering(502, b"<html>Bad Gateway</html>"),
    "404": answering(404, {"errcode": "M_UNRECOGNIZED", "error": "Unrecognized"}),
    "404 without JSON": answering(404, b"<html>Not Found</html>"),
    "301": answering(301, b"", Location="/elsewhere"),
    "308 without a target": answering(308, b""),
    "401 as 200": answering(200, {"errcode": "M_UNKNOWN_TOKEN", "error": "Unknown"}),
    "a guest, perhaps": answering(200, {"user_id": "@a:b.c", "is_guest": "false"}),
    "401 of a proxy": answering(401, b"<html>Unauthorized</html>"),
    "403 of a proxy": answering(403, {"detail": "Forbidden"}),
    "404 as 401": answering(401, {"errcode": ["M_UNKNOWN_TOKEN"]}),
    "rubbish": answering(200, b"<html>Welcome</html>"),
    "not UTF-8": answering(200, b'{"user_id": "@\xff:test.example"}'),
    "not an object": answering(200, ["@user:test.example"]),
    "nothing": answering(200, b""),
    "no user": answering(200, {"device_id": "DEVICE"}),
    "a number": answering(200, {"user_id": 5}),
    "null": answering(200, {"user_id": None}),
    "no user id": answering(200, {"user_id": "user:test.example"}),
    "10 MB": answering(200, b" " * 10_000_000 + b'{"user_id": "@a:test.example"}'),
    "cut": cut_in_body,
    "hang up": hang_up,
}

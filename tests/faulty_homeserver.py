"""A homeserver that knows tokens, and can be told to fail in many ways."""

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

#: Answers a request in the place of the homeserver.
Fault = Callable[[Request], "int | bytes"]


@attrs.frozen
class Asked:
    """A request as it came to the homeserver.

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


class FakeHomeserver(Resource):
    """The two endpoints that tell who a token belongs to, and whether it's there.

    Attributes:
        answers: what is answered to a token: a status and a JSON value.
        fault: what answers everything instead, while it is set.
        asked: the requests that came.
        peers: the other ends of the connections that they came over.
    """

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.answers: dict[str, tuple[int, Any]] = {}
        self.fault: Fault | None = None
        self.asked: list[Asked] = []
        self.peers: set[object] = set()

    def render(self, request: Request) -> int | bytes:
        """Answer a request; `Resource` calls it."""
        path = request.path.decode()
        bearer = request.getHeader("Authorization")
        token = bearer and bearer.removeprefix("Bearer ")
        args = request.args or {}
        query = {name.decode(): values[0].decode() for name, values in args.items()}
        cookie = request.getHeader("Cookie")
        self.peers.add(request.getClientAddress())
        forwarded_for = request.requestHeaders.getRawHeaders(b"X-Forwarded-For", [])
        user_agent = request.requestHeaders.getRawHeaders(b"User-Agent", [])
        self.asked.append(Asked(path, token, query, cookie, forwarded_for, user_agent))
        if self.fault is not None:
            return self.fault(request)
        if path == VERSIONS:
            return answering(200, {"versions": ["v1.11"]})(request)
        unknown = 401, {"errcode": "M_UNKNOWN_TOKEN", "error": f"No token {token}"}
        return answering(*self.answers.get(token or "", unknown))(request)


def client_request(
    token: str | None, header: str | None = None, **query: str
) -> Request:
    """A request as a client sends it to be authenticated.

    Args:
        header: ``Authorization``, the one with the token unless it is given.
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
    """Answers with a status, and a JSON value or these bytes."""

    def answer(request: Request) -> bytes:
        request.setResponseCode(code)
        for name, content in headers.items():
            request.setHeader(name.replace("_", "-").encode(), content.encode())
        return value if isinstance(value, bytes) else json.dumps(value).encode()

    return answer


class TokenBucket:
    """Answers 429 to requests over a rate, as rate limiters do, and else by another
    fault.

    Attributes:
        refused: number of requests that were answered 429.
    """

    def __init__(
        self, seconds: Callable[[], float], rate: float, answer: Fault, **headers: str
    ) -> None:
        """
        Args:
            seconds: the time.
            rate: requests a second, and the most that may come at once.
            headers: those of a 429.
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
    """Never answers."""
    return NOT_DONE_YET


def stall_in_body(request: Request) -> int:
    """Answers half and never the rest."""
    request.setHeader(b"Content-Length", b"100")
    request.write(b'{"user_id": "@half')
    return NOT_DONE_YET


def cut_in_body(request: Request) -> int:
    """Answers half and closes the connection."""
    stall_in_body(request)
    channel: Any = request.channel
    channel.loseConnection()
    return NOT_DONE_YET


def hang_up(request: Request) -> int:
    """Closes the connection without an answer."""
    channel: Any = request.channel
    channel.transport.abortConnection()
    return NOT_DONE_YET


#: What a homeserver, or a proxy before it, may answer when it is not well.
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

"""HTTP requests to the homeserver, with limits of number, time and size, and with a
pause after each 429."""

import logging
from collections.abc import Mapping
from typing import Annotated, NoReturn, cast

import attrs
import msgspec
from treq.client import HTTPClient
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.interfaces import IReactorTime, ITransport
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.web.client import Agent, HTTPConnectionPool, ResponseDone
from twisted.web.http import PotentialDataLoss, stringToDatetime
from twisted.web.http_headers import Headers
from twisted.web.iweb import IResponse

from . import metrics
from .clock import Clock
from .inline import Inline
from .request_queue import MAX_CONNECTIONS, RequestQueue, UnusableResponseError
from .types import Boolean, PositiveInt

logger = logging.getLogger(__name__)

#: Limit of a response's body in bytes. Real bodies have some hundred bytes, the body
#: of ``/versions`` some thousand.
MAX_BODY_BYTES = 64 * 1024
#: Seconds of the pause after a 429 without a time: the unit of ``Retry-After``.
DEFAULT_PAUSE = 1.0
#: Path of the client-server API below the homeserver's address.
CLIENT_API = "/_matrix/client"
#: HTTP address with an optional port and path, and without a user or a query.
Address = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^https?://([\w.-]+|\[[0-9a-fA-F:.]+\])(:\d+)?(/[^\s?#@]*)?\Z",
        description="an address such as https://matrix.example.org",
    ),
]


@attrs.frozen
class HomeserverOptions:
    """Options of the homeserver whose users have their backups here.

    Attributes:
        url: address of the client-server API, without ``/_matrix``.
        has_guests: whether ``is_guest`` in a response is believed. Conduit and derived
            servers set ``is_guest`` for each user without a password.
        timeout_seconds: limit of the time of a single request.
        retry_seconds: limit of the time in which a failed or throttled request is
            repeated.
        cache_seconds: time for which a known access token is accepted without another
            request. A revoked token is accepted for as long.
        refused_cache_seconds: time for which an unknown access token is refused without
            another request.
        cache_entries: number of answers in memory.
    """

    url: Address
    has_guests: Boolean = True
    timeout_seconds: PositiveInt = 10
    retry_seconds: PositiveInt = 5
    cache_seconds: PositiveInt = 60
    refused_cache_seconds: PositiveInt = 10
    cache_entries: PositiveInt = 10000


@attrs.frozen
class Response:
    """Status, headers and body of a complete response."""

    code: int
    headers: Headers
    body: bytes

    def header(self, name: str) -> str:
        """The first value of a header, or an empty string."""
        values = self.headers.getRawHeaders(name.encode()) or [b""]
        return values[0].decode("latin-1")


class HomeserverClient:
    """Sends requests to the homeserver's client-server API."""

    def __init__(
        self, reactor: IReactorTime, clock: Clock, options: HomeserverOptions
    ) -> None:
        """
        Args:
            reactor: makes the connections.
        """
        self._reactor = reactor
        self._clock = clock
        self._timeout = options.timeout_seconds
        self._url = options.url.rstrip("/")
        self._pool = HTTPConnectionPool(reactor)
        self._pool.maxPersistentPerHost = MAX_CONNECTIONS
        self._agent = Agent(reactor, pool=self._pool)
        self._queue = RequestQueue(reactor, options.timeout_seconds)

    def is_paused(self) -> bool:
        """Whether a pause after a 429 is under way."""
        return self._queue.is_paused()

    def close(self) -> "Deferred[None]":
        """Close idle connections."""
        closed: Deferred[None] = self._pool.closeCachedConnections()
        return closed

    @inlineCallbacks
    def get(
        self, path: str, headers: Headers, params: Mapping[str, str], deadline: float
    ) -> Inline[Response]:
        """Send a GET request, repeat the request after each 429, and fire with the
        first other response.

        Args:
            path: path below the homeserver's address, such as `CLIENT_API`.
            deadline: the reactor's time after which a throttled request fails.

        Raises:
            ThrottledError: the request wasn't sent by the deadline because of a 429.
            UnusableResponseError: no connection was free or no response came in
                ``timeout_seconds``, or the body is over `MAX_BODY_BYTES`.
            Exception: the connection failed.
        """
        while True:
            yield self._clock.wait(self._queue.enter(deadline))
            asked = self._reactor.seconds()
            try:
                sent = self._exchange(path, headers, params)
                sent.addTimeout(self._timeout, self._reactor, _raise_timeout)
                response: Response = yield self._clock.wait(sent)
            finally:
                self._queue.leave()
            if response.code != 429:
                self._queue.speed_up()
                return response
            metrics.whoami_requests.labels("throttled").inc()
            self._queue.slow_down(asked, pause_of(response))

    @inlineCallbacks
    def _exchange(
        self, path: str, headers: Headers, params: Mapping[str, str]
    ) -> Inline[Response]:
        # A new client each time: treq keeps cookies, and users must not share any.
        answer: IResponse = yield HTTPClient(self._agent).get(
            self._url + path,
            headers=headers,
            params=dict(params),
            allow_redirects=False,
            unbuffered=True,
        )
        body = _Body()
        answer.deliverBody(body)
        content: bytes = yield body.done
        return Response(answer.code, answer.headers, content)


class _Body(Protocol):
    """Gathers the body of a response.

    Attributes:
        done: fires with the body, or fails when the body is cut off or too long.
            Cancelling closes the connection.
    """

    def __init__(self) -> None:
        self.done: Deferred[bytes] = Deferred(lambda _: self._hang_up())
        self._content = b""

    def dataReceived(self, data: bytes) -> None:
        """As `Protocol.dataReceived`."""
        if self.done.called:
            return
        self._content += data
        if len(self._content) > MAX_BODY_BYTES:
            self.done.errback(UnusableResponseError(f"over {MAX_BODY_BYTES} bytes"))
            self._hang_up()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """As `Protocol.connectionLost`."""
        if self.done.called:
            return
        # A body without a Content-Length may be cut off: the decoder notices.
        if reason.check(ResponseDone, PotentialDataLoss):
            self.done.callback(self._content)
        else:
            self.done.errback(reason)

    def _hang_up(self) -> None:
        cast(ITransport, self.transport).loseConnection()


class _LimitBody(msgspec.Struct):
    retry_after_ms: int | float


def pause_of(response: Response) -> float:
    """Seconds of the pause after a 429: ``Retry-After`` as a number or a date (RFC
    9110, 10.2.3). Without the header, ``retry_after_ms`` of the body. Without either,
    `DEFAULT_PAUSE`."""
    text = response.header("Retry-After")
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        # Relative to the homeserver's own time: our system's may differ.
        sent = stringToDatetime(response.header("Date").encode())
        return max(0.0, float(stringToDatetime(text.encode()) - sent))
    except (ValueError, IndexError):
        pass
    try:
        body = msgspec.json.decode(response.body, type=_LimitBody)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return DEFAULT_PAUSE
    return max(0.0, body.retry_after_ms / 1000)


def _raise_timeout(result: object, seconds: float) -> NoReturn:
    raise UnusableResponseError(f"no response in {seconds} seconds")

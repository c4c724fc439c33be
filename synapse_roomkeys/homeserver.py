"""HTTP requests to the homeserver, with limits of number, time and size, and with a
pause after each 429."""

import logging
import math
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
from .types import Boolean, PositiveInt

logger = logging.getLogger(__name__)

#: Number of requests under way at once. A request takes milliseconds, so 20 are far
#: more than a homeserver answers in parallel.
MAX_CONNECTIONS = 20
#: Limit of a response's body in bytes. Real bodies have some hundred bytes, the body
#: of ``/versions`` some thousand.
MAX_BODY_BYTES = 64 * 1024
#: Seconds of the pause after a 429 without a time: the unit of ``Retry-After``.
DEFAULT_PAUSE = 1.0
#: Limit of a pause in seconds. Longer times in a 429 are a penalty for a single
#: misbehaving client; here they would stop all users.
MAX_PAUSE = 60.0
#: Seconds between two requests after the first 429: the `MAX_CONNECTIONS` requests that
#: were under way together are sent again within one second.
FIRST_INTERVAL = 1 / MAX_CONNECTIONS
#: Limit of the interval in seconds: with the default of `retry_seconds`, 5 users of a
#: long queue are still served.
MAX_INTERVAL = 1.0
#: Factor of the interval after each response other than a 429. The rate doubles within
#: 35 responses: a homeserver with a limit of 20 a second sends a 429 every few seconds
#: at most.
RECOVERY = 0.98
#: Seconds below which the interval becomes 0: a single request takes about as long.
MIN_INTERVAL = 0.001
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


class UnusableResponseError(Exception):
    """The homeserver sent no response, or a response from which no user can be read.
    The text describes the response and, where possible, names the option to change."""


class ThrottledError(Exception):
    """A request was not sent by its deadline because of a 429.

    Attributes:
        retry_after: whole seconds after which a new request can be sent, 1 at least.
    """

    def __init__(self, seconds: float) -> None:
        # Rounding: 6 s must not become 7 s by the inexact sum of two floats.
        self.retry_after = max(1, math.ceil(round(seconds, 3)))
        super().__init__(f"throttled for {self.retry_after} s")


class RequestQueue:
    """Admits requests to the homeserver in order, `MAX_CONNECTIONS` at once. After a
    429 all requests pause for the time in the 429, and are then admitted singly.

    The interval between two requests doubles after each 429 and shrinks after each
    other response: the rate settles a little below the homeserver's limit. Before the
    first 429 the interval is 0.
    """

    def __init__(self, reactor: IReactorTime, timeout: float) -> None:
        """
        Args:
            timeout: seconds for which a request waits for another to end, at least.
        """
        self._reactor = reactor
        self._timeout = timeout
        self._under_way = 0
        #: Seconds between two requests.
        self._interval = 0.0
        #: Times of the reactor: of the next request, of the end of the last pause, of
        #: the last doubling of the interval, and of the last call of `_now`.
        self._next = self._paused_until = self._slowed = self._latest = -math.inf
        #: Deadlines of the waiting requests, in order.
        self._waiting: dict[Deferred[None], float] = {}
        self._is_scheduled = False

    def is_paused(self) -> bool:
        """Whether a pause after a 429 is under way."""
        return self._now() < self._paused_until

    def enter(self, deadline: float) -> "Deferred[None]":
        """Fire with None when a request may be sent. `leave` must be called after the
        request.

        Args:
            deadline: the reactor's time after which a throttled request fails.

        Raises:
            ThrottledError: a pause ends after the deadline (the Deferred fails at
                once), or too many requests were first in the queue after a pause.
            UnusableResponseError: `MAX_CONNECTIONS` other requests were under way all
                the time.
        """
        waiter: Deferred[None] = Deferred(self._forget)
        self._waiting[waiter] = deadline
        if len(self._waiting) == 1:
            self._admit()
        self._refuse_late()
        self._schedule()
        if not waiter.called:
            seconds = max(self._timeout, deadline - self._now())
            waiter.addTimeout(seconds, self._reactor, self._raise_late)
        return waiter

    def leave(self) -> None:
        """Note the end of an admitted request."""
        self._under_way -= 1
        self._schedule()

    def slow_down(self, asked: float, seconds: float) -> None:
        """Begin a pause after a 429.

        Args:
            asked: the reactor's time at which the refused request was sent. The
                interval doubles once for all requests sent before the last pause.
            seconds: the time in the 429.
        """
        now = self._now()
        if asked > self._slowed:
            doubled = max(2 * self._interval, FIRST_INTERVAL)
            self._interval = min(doubled, MAX_INTERVAL)
            self._slowed = now
            logger.warning(
                "The homeserver answers 429: all requests to it pause for %.3f s, and"
                " are then sent %.3f s apart. Exempt this service from its rate limit.",
                seconds,
                self._interval,
            )
        end = now + min(max(seconds, self._interval), MAX_PAUSE)
        self._paused_until = max(self._paused_until, end)
        self._next = max(self._next, end)
        self._refuse_late()

    def speed_up(self) -> None:
        """Shorten the interval after a response other than a 429."""
        self._interval *= RECOVERY
        if self._interval < MIN_INTERVAL:
            self._interval = 0.0

    def _now(self) -> float:
        """The reactor's time. If the system's time was set back, the pause ends."""
        now = self._reactor.seconds()
        if now < self._latest:
            self._paused_until = self._next = self._slowed = now
        self._latest = now
        return now

    def _is_full(self) -> bool:
        return self._under_way >= MAX_CONNECTIONS

    def _schedule(self) -> None:
        """Call `_release` at the time of the next request: in the reactor's next turn
        or later, because admitting a long queue from `leave` would recurse deeply."""
        if self._waiting and not self._is_scheduled and not self._is_full():
            self._is_scheduled = True
            delay = max(0.0, self._next - self._now())
            self._reactor.callLater(delay, self._release)

    def _release(self) -> None:
        self._is_scheduled = False
        self._admit()
        self._schedule()

    def _admit(self) -> None:
        """Admit requests until the queue, the time or the connections are used up."""
        self._refuse_late()
        now = self._now()
        while self._waiting and self._next <= now and not self._is_full():
            self._next = now + self._interval
            self._under_way += 1
            waiter = next(iter(self._waiting))
            del self._waiting[waiter]
            waiter.callback(None)

    def _refuse_late(self) -> None:
        """Fail the requests with a deadline in the past or before the end of the pause,
        unless the homeserver is merely busy."""
        now = self._now()
        start = max(self._paused_until, now if self._interval else -math.inf)
        for waiter, deadline in list(self._waiting.items()):
            if deadline < start:
                del self._waiting[waiter]
                waiter.errback(self._throttled())

    def _throttled(self) -> ThrottledError:
        """The error for a request at the end of the queue. Its time includes the rest
        of the queue: requests that fail together are repeated at different times."""
        line = len(self._waiting) * self._interval
        return ThrottledError(self._next - self._now() + line)

    def _forget(self, waiter: "Deferred[None]") -> None:
        del self._waiting[waiter]

    def _raise_late(self, result: object, seconds: float) -> NoReturn:
        msg = f"none of {MAX_CONNECTIONS} requests ended in {seconds:.1f} seconds"
        raise UnusableResponseError(msg)


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

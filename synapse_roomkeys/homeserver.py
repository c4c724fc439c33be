"""HTTP requests to the homeserver: bounded in number, time and size, and throttled when
it says so."""

import logging
import math
from collections.abc import Generator, Mapping
from typing import Any, NoReturn, cast

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

logger = logging.getLogger(__name__)

#: Number of requests under way at once. One takes the homeserver milliseconds, so this
#: is far more than it answers in parallel.
MAX_CONNECTIONS = 20
#: Bytes of a response's body. A real one has some hundred, that of ``/versions`` some
#: thousand.
MAX_BODY_BYTES = 64 * 1024
#: Seconds to pause after a 429 that names no time: the unit of ``Retry-After``.
DEFAULT_PAUSE = 1.0
#: Longest pause in seconds, whatever a 429 names. Longer ones are for a single client
#: that misbehaves; here they would stop all users.
MAX_PAUSE = 60.0
#: Seconds between two requests after the first 429: the `MAX_CONNECTIONS` requests that
#: may have met it together leave over one second.
FIRST_INTERVAL = 1 / MAX_CONNECTIONS
#: Longest seconds between two requests, however many 429s came: the rate of one a
#: second is a user's answer in `HomeserverOptions.retry_seconds` at the least.
MAX_INTERVAL = 1.0
#: Factor of the interval after each response that isn't a 429. It takes 35 responses to
#: double the rate: a homeserver that limits to 20 a second answers for some seconds
#: before it refuses the next one.
RECOVERY = 0.98
#: An interval below this many seconds is none: one request alone takes about as long.
MIN_INTERVAL = 0.001


@attrs.frozen
class HomeserverOptions:
    """Options of the homeserver whose users have their backups here.

    Attributes:
        url: address of its client-server API, without ``/_matrix``.
        has_guests: whether ``is_guest`` in its answers is believed. Conduit and its
            forks say it of each user without a password.
        timeout_seconds: time that it has to answer one request.
        retry_seconds: time for which a request is retried while it is away or
            throttles.
        cache_seconds: time for which an access token that it knew is accepted without
            another request, so the longest time after it was revoked.
        refused_cache_seconds: time for which an unknown access token is refused without
            another request.
        cache_entries: number of answers in memory.
    """

    url: str
    has_guests: bool = True
    timeout_seconds: int = 10
    retry_seconds: int = 5
    cache_seconds: int = 60
    refused_cache_seconds: int = 10
    cache_entries: int = 10000


@attrs.frozen
class Response:
    """Status, headers and body of a response that came whole."""

    code: int
    headers: Headers
    body: bytes

    def header(self, name: str) -> str:
        """The first value of a header, or an empty string."""
        values = self.headers.getRawHeaders(name.encode()) or [b""]
        return values[0].decode("latin-1")


class UnusableResponseError(Exception):
    """The homeserver sent no response, or one that says nothing of the user. The text
    names the response and, where it can, the option to change."""


class ThrottledError(Exception):
    """The homeserver answers 429, and its pause ends after the request's deadline.

    Attributes:
        retry_after: whole seconds after which it can be asked, 1 at least.
    """

    def __init__(self, seconds: float) -> None:
        # Times are floats: a pause of 6 s isn't 7 s for a few microseconds.
        self.retry_after = max(1, math.ceil(round(seconds, 3)))
        super().__init__(f"throttled for {self.retry_after} s")


class RequestQueue:
    """Admits requests to the homeserver in order: `MAX_CONNECTIONS` at once, and after
    a 429 none during the pause that it named, and then one at a time.

    The interval between two requests doubles with each 429 and shrinks with each other
    response, so the rate settles a little below the homeserver's limit. Without a 429
    there is none.
    """

    def __init__(self, reactor: IReactorTime) -> None:
        self._reactor = reactor
        self._under_way = 0
        #: Seconds between two requests.
        self._interval = 0.0
        #: The reactor's time at which the next request may leave, at which the last
        #: pause ends, at which the interval was doubled, and that was seen last.
        self._next = self._paused_until = self._slowed = self._latest = -math.inf
        #: Requests that wait, in order, and their deadlines.
        self._waiting: dict[Deferred[None], float] = {}
        self._is_scheduled = False

    def is_paused(self) -> bool:
        """Whether no request is admitted now because of a 429."""
        return self._now() < self._paused_until

    def enter(self, deadline: float) -> "Deferred[None]":
        """Fire with None when a request may leave. It must be followed by `leave`.

        Args:
            deadline: the reactor's time after which the request shall not leave.

        Raises:
            ThrottledError: a pause ends later, then the Deferred fails at once; or too
                many requests were before this one.
            UnusableResponseError: no other request ended by then.
        """
        waiter: Deferred[None] = Deferred(self._forget)
        self._waiting[waiter] = deadline
        if len(self._waiting) == 1:
            self._admit()
        self._refuse_late()
        self._schedule()
        if not waiter.called:
            seconds = max(0.0, deadline - self._now())
            waiter.addTimeout(seconds, self._reactor, self._raise_late)
        return waiter

    def leave(self) -> None:
        """Note the end of a request that was admitted."""
        self._under_way -= 1
        self._schedule()

    def slow_down(self, asked: float, seconds: float) -> None:
        """Begin a pause after a 429.

        Args:
            asked: the reactor's time at which the refused request left. The interval
                doubles once for all requests that left before the last pause.
            seconds: time that the 429 named.
        """
        now = self._now()
        if asked > self._slowed:
            doubled = max(2 * self._interval, FIRST_INTERVAL)
            self._interval = min(doubled, MAX_INTERVAL)
            self._slowed = now
            logger.warning(
                "The homeserver answers 429: all requests to it pause for %.3f s, then"
                " leave %.3f s apart. Exempt this service from its rate limit.",
                *(seconds, self._interval),
            )
        end = now + min(max(seconds, self._interval), MAX_PAUSE)
        self._paused_until = max(self._paused_until, end)
        self._next = max(self._next, end)
        self._refuse_late()

    def speed_up(self) -> None:
        """Shorten the interval after a response that isn't a 429."""
        self._interval *= RECOVERY
        if self._interval < MIN_INTERVAL:
            self._interval = 0.0

    def _now(self) -> float:
        """The reactor's time. If it was set back, all times in the future are void."""
        now = self._reactor.seconds()
        if now < self._latest:
            self._paused_until = self._next = self._slowed = now
        self._latest = now
        return now

    def _is_full(self) -> bool:
        return self._under_way >= MAX_CONNECTIONS

    def _schedule(self) -> None:
        """Have requests admitted when the next one may leave. That is in the reactor's
        next turn at the soonest, so that a long queue isn't a deep recursion."""
        if self._waiting and not self._is_scheduled and not self._is_full():
            self._is_scheduled = True
            delay = max(0.0, self._next - self._now())
            self._reactor.callLater(delay, self._release)

    def _release(self) -> None:
        self._is_scheduled = False
        self._admit()
        self._schedule()

    def _admit(self) -> None:
        """Let the requests leave that may."""
        now = self._now()
        while self._waiting and self._next <= now and not self._is_full():
            self._next = now + self._interval
            self._under_way += 1
            waiter = next(iter(self._waiting))
            del self._waiting[waiter]
            waiter.callback(None)

    def _refuse_late(self) -> None:
        """Fail the requests whose deadline is before the end of the pause."""
        for waiter, deadline in list(self._waiting.items()):
            if deadline < self._paused_until:
                del self._waiting[waiter]
                waiter.errback(self._throttled())

    def _throttled(self) -> ThrottledError:
        """The error for a request that came too late. Of many that are refused
        together, each is told another time to come back: that of its place in line."""
        line = len(self._waiting) * self._interval
        return ThrottledError(self._next - self._now() + line)

    def _forget(self, waiter: "Deferred[None]") -> None:
        del self._waiting[waiter]

    def _raise_late(self, result: object, seconds: float) -> NoReturn:
        if self._interval > 0 and not self._is_full():
            raise self._throttled()
        msg = f"none of {MAX_CONNECTIONS} requests ended in {seconds:.1f} seconds"
        raise UnusableResponseError(msg)


class HomeserverClient:
    """Sends requests to the homeserver's client-server API."""

    def __init__(
        self, reactor: IReactorTime, clock: Clock, options: HomeserverOptions
    ) -> None:
        """
        Args:
            reactor: what connections are made with.
        """
        self._reactor = reactor
        self._clock = clock
        self._timeout = options.timeout_seconds
        self._api = options.url.rstrip("/") + "/_matrix/client"
        self._pool = HTTPConnectionPool(reactor)
        self._pool.maxPersistentPerHost = MAX_CONNECTIONS
        self._agent = Agent(reactor, pool=self._pool)
        self._queue = RequestQueue(reactor)

    def is_paused(self) -> bool:
        """Whether the homeserver answered 429 and the time that it named isn't over."""
        return self._queue.is_paused()

    def close(self) -> "Deferred[None]":
        """Close the connections that are kept for another request."""
        closed: Deferred[None] = self._pool.closeCachedConnections()
        return closed

    @inlineCallbacks
    def get(
        self, path: str, headers: Headers, params: Mapping[str, str], deadline: float
    ) -> "Generator[Deferred[Any], Any, Response]":
        """Send a GET request, again after each 429, and fire with any other response.

        Args:
            path: what follows ``/_matrix/client``.
            deadline: the reactor's time after which the request isn't sent.

        Raises:
            ThrottledError: the homeserver's pause ends after the deadline.
            UnusableResponseError: no connection was free by the deadline, or there was
                no response in ``timeout_seconds``, or a long one.
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
    ) -> "Generator[Deferred[Any], Any, Response]":
        # A client of treq keeps cookies: one user's are not for the next.
        answer: IResponse = yield HTTPClient(self._agent).get(
            self._api + path,
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
        done: fires with the body, or fails when it is cut off or too long. Cancelled,
            it closes the connection.
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
        # A response without a length is cut off if it isn't JSON.
        if reason.check(ResponseDone, PotentialDataLoss):
            self.done.callback(self._content)
        else:
            self.done.errback(reason)

    def _hang_up(self) -> None:
        cast(ITransport, self.transport).loseConnection()


class _LimitBody(msgspec.Struct):
    retry_after_ms: int | float


def pause_of(response: Response) -> float:
    """Seconds that a 429 names: those of ``Retry-After``, a number or a date (RFC 9110,
    10.2.3), else ``retry_after_ms`` of the body, else `DEFAULT_PAUSE`."""
    text = response.header("Retry-After")
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        # Against the homeserver's own time, which may differ from ours.
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

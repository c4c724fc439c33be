"""The queue of requests to the homeserver: a limit of their number, and a pause after
each 429."""

import logging
import math
from typing import NoReturn

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime

logger = logging.getLogger(__name__)

#: Number of requests under way at once. A request takes milliseconds, so 20 are far
#: more than a homeserver answers in parallel.
MAX_CONNECTIONS = 20
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

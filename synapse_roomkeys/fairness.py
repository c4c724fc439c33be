"""Queues, lanes and permits, so that one user's requests can't starve others."""

import math
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import attrs
from twisted.internet.defer import Deferred, inlineCallbacks, succeed

from . import metrics
from .clock import Clock, DelayedCall
from .errors import BUSY_RETRY_AFTER, LimitExceededError, OutageError, UnavailableError
from .inline import Inline

T = TypeVar("T")
P = ParamSpec("P")


@attrs.define
class _Queue:
    """A user's calls: one that runs, and those that wait.

    Attributes:
        outage: when the last call began that found an outage, in seconds of a clock
            that nobody sets.
    """

    waiting: deque[Deferred[None]] = attrs.Factory(deque)
    outage: float = -math.inf


class UserQueues:
    """Lets one of each user's calls run at a time, and the others wait in order.

    Waiting calls hold nothing but their own memory: no thread and no connection.
    """

    def __init__(self, clock: Clock, max_waiting: int) -> None:
        """
        Args:
            max_waiting: how many of one user's calls may wait; the next one is refused.
        """
        self._clock = clock
        self._max_waiting = max_waiting
        #: Of each user who has a call that runs.
        self._queues: dict[str, _Queue] = {}

    @inlineCallbacks
    def run(
        self,
        user_id: str,
        call: "Callable[P, Deferred[T]]",
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Inline[T]:
        """Make the call when it is the user's turn, and fire with its result.

        Raises:
            LimitExceededError: too many calls of this user are waiting.
            UnavailableError: another call of the user failed with `OutageError`, and
                this one was waiting before that call began. A try of its own would
                take some seconds and meet the same outage or lock.
        """
        came = time.monotonic()
        queue = self._queues.get(user_id)
        if queue is None:
            queue = self._queues[user_id] = _Queue()
        elif len(queue.waiting) < self._max_waiting:
            turn: Deferred[None] = Deferred()
            queue.waiting.append(turn)
            with metrics.waiting_requests.track_inprogress():
                yield self._clock.wait(turn)
        else:
            msg = "Too many requests of this user are waiting"
            raise LimitExceededError(msg, BUSY_RETRY_AFTER)
        began = time.monotonic()
        try:
            if came < queue.outage:
                raise UnavailableError(BUSY_RETRY_AFTER)
            result: T = yield call(*args, **kwargs)
            return result
        except OutageError:
            queue.outage = began
            raise
        finally:
            self._end_turn(user_id, queue)

    def _end_turn(self, user_id: str, queue: _Queue) -> None:
        """Let the user's next call run, if there is one."""
        if queue.waiting:
            self._clock.fire(queue.waiting.popleft())
        else:
            del self._queues[user_id]


class Lane:
    """Limits how many transactions run at once; the others wait in order of arrival.

    A transaction that waits holds neither a thread nor a connection.
    """

    def __init__(self, clock: Clock, width: int) -> None:
        """
        Args:
            width: number of transactions that may run at once.
        """
        self._clock = clock
        self._free = width
        self._waiting: deque[tuple[Deferred[None], DelayedCall]] = deque()

    def enter(self, seconds: float) -> "Deferred[None] | None":
        """Take a place, which the caller gives back with `leave`.

        Args:
            seconds: longest wait for a place.

        Returns:
            None if a place was free. Else a Deferred that fires with None when the
            caller has one, or fails with `UnavailableError` if none was free in time.
        """
        if self._free:
            self._free -= 1
            return None
        turn: Deferred[None] = Deferred()
        timer = self._clock.call_later(seconds, lambda: self._give_up(entry))
        entry = turn, timer
        self._waiting.append(entry)
        return self._clock.wait(turn)

    def leave(self) -> None:
        """Give the place to the transaction that has waited longest, if any waits."""
        if self._waiting:
            turn, timer = self._waiting.popleft()
            timer.cancel()
            self._clock.fire(turn)
        else:
            self._free += 1

    def _give_up(self, entry: tuple[Deferred[None], DelayedCall]) -> None:
        self._waiting.remove(entry)
        entry[0].errback(UnavailableError(BUSY_RETRY_AFTER))


class FairSemaphore:
    """A counting semaphore, shared between users in turn (round robin).

    A user holds `permits_per_user` permits at most, so one user alone never takes them
    all. Where several users wait, a released permit goes to the user who was served
    least recently. Requests of one user are served in the order of their arrival.
    """

    def __init__(
        self, clock: Clock, permits: int, permits_per_user: int, max_waiting: int
    ) -> None:
        """
        Args:
            permits: how many permits there are in the process.
            permits_per_user: how many permits one user may hold at once.
            max_waiting: how many of one user's requests may wait; `acquire` refuses
                the next one.
        """
        self._clock = clock
        self._free = permits
        self._permits_per_user = permits_per_user
        self._max_waiting = max_waiting
        #: Number of permits that each user holds.
        self._held: Counter[str] = Counter()
        #: Requests that wait, by user. The first user is served next.
        self._waiting: dict[str, deque[Deferred[None]]] = {}

    @property
    def is_contended(self) -> bool:
        """Whether a request waits for a permit."""
        return bool(self._waiting)

    def acquire(self, user_id: str) -> "Deferred[None]":
        """Take a permit, which has to be given back by `release`.

        Returns:
            A Deferred that fires with None when the permit is taken. It fires at once
            if a permit is free and the user may hold one more.

        Raises:
            LimitExceededError: `max_waiting` requests of this user wait already.
        """
        if self._may_take(user_id):
            self._take(user_id)
            return succeed(None)
        queue = self._waiting.setdefault(user_id, deque())
        if len(queue) >= self._max_waiting:
            msg = "Too many downloads of this user are waiting"
            raise LimitExceededError(msg, BUSY_RETRY_AFTER)
        turn: Deferred[None] = Deferred()
        queue.append(turn)
        metrics.waiting_requests.inc()
        return self._clock.wait(turn)

    def release(self, user_id: str) -> None:
        """Give a permit back. The request whose turn it is gets it at once."""
        self._free += 1
        self._held[user_id] -= 1
        if not self._held[user_id]:
            del self._held[user_id]
        # One permit was released, so one request at most can go on.
        chosen = next(filter(self._may_take, self._waiting), None)
        if chosen is None:
            return
        queue = self._waiting.pop(chosen)
        self._take(chosen)
        metrics.waiting_requests.dec()
        self._clock.fire(queue.popleft())
        if queue:
            self._waiting[chosen] = queue

    def _may_take(self, user_id: str) -> bool:
        return self._free > 0 and self._held[user_id] < self._permits_per_user

    def _take(self, user_id: str) -> None:
        self._free -= 1
        self._held[user_id] += 1

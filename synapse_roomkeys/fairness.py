"""Queues, lanes and permits that keep one user's requests from starving others."""

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
    """One user's calls: the running call and the waiting calls.

    Attributes:
        waiting: a Deferred for each waiting call, in order of arrival; firing the
            Deferred starts the call.
        outage: start time of the most recent call that failed with `OutageError`, in
            seconds of the monotonic clock.
    """

    waiting: deque[Deferred[None]] = attrs.Factory(deque)
    outage: float = -math.inf


class UserQueues:
    """Queues that run a single call per user at a time; further calls wait in order.

    A waiting call holds only its own memory: no thread and no connection.
    """

    def __init__(self, clock: Clock, max_waiting: int) -> None:
        """
        Args:
            max_waiting: number of one user's calls that may wait; a further call is
                refused.
        """
        self._clock = clock
        self._max_waiting = max_waiting
        #: By user id. A user is in the dictionary while a call of this user runs.
        self._queues: dict[str, _Queue] = {}

    @inlineCallbacks
    def run(
        self,
        user_id: str,
        call: "Callable[P, Deferred[T]]",
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Inline[T]:
        """Make the call after the user's earlier calls, and fire with its result.

        Raises:
            LimitExceededError: too many calls of this user are waiting.
            UnavailableError: this call was waiting already when another call of the
                user began, and the other call failed with `OutageError`. This call is
                not made: an attempt would take some seconds and fail on the same
                outage or lock.
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
        """Start the user's next waiting call; without any, remove the queue."""
        if queue.waiting:
            self._clock.fire(queue.waiting.popleft())
        else:
            del self._queues[user_id]


class Lane:
    """Limit on concurrent transactions; further ones wait in order of arrival.

    A waiting transaction holds neither a thread nor a connection.
    """

    def __init__(self, clock: Clock, width: int) -> None:
        """
        Args:
            width: number of transactions that may run concurrently.
        """
        self._clock = clock
        self._free = width
        self._waiting: deque[tuple[Deferred[None], DelayedCall]] = deque()

    def enter(self, seconds: float) -> "Deferred[None] | None":
        """Take a place in the lane. The caller must return the place with `leave`.

        Args:
            seconds: longest wait for a place.

        Returns:
            None if a place was free. Otherwise a Deferred: the Deferred fires with None
            when the caller has a place, or fails with `UnavailableError` if no place
            became free within `seconds`.
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
        """Pass the place to the transaction that has waited longest, or free the place
        if no transaction waits."""
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
    """Counting semaphore with permits shared between users in turn (round robin).

    A user holds at most `permits_per_user` permits, so a single user never holds all
    permits. If several users wait, a released permit goes to the user who was served
    least recently. Requests of the same user are served in order of arrival.
    """

    def __init__(
        self, clock: Clock, permits: int, permits_per_user: int, max_waiting: int
    ) -> None:
        """
        Args:
            permits: number of permits in the process.
            permits_per_user: number of permits a user may hold at the same time.
            max_waiting: number of a user's requests that may wait; `acquire` refuses
                a further request.
        """
        self._clock = clock
        self._free = permits
        self._permits_per_user = permits_per_user
        self._max_waiting = max_waiting
        #: Number of permits held, by user id.
        self._held: Counter[str] = Counter()
        #: Waiting requests, by user id. The first user of the dictionary is served
        #: next.
        self._waiting: dict[str, deque[Deferred[None]]] = {}

    @property
    def is_contended(self) -> bool:
        """Whether a request waits for a permit."""
        return bool(self._waiting)

    def acquire(self, user_id: str) -> "Deferred[None]":
        """Take a permit. The caller must return the permit with `release`.

        Returns:
            A Deferred that fires with None when the permit is taken. The Deferred has
            fired already if a permit is free and the user may hold another permit.

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
        """Return a permit. The next waiting request whose user may hold another permit
        gets the permit immediately."""
        self._free += 1
        self._held[user_id] -= 1
        if not self._held[user_id]:
            del self._held[user_id]
        # Only a single permit was released: at most a single waiting request can run.
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

"""One user's requests wait for each other, so that they can't starve others."""

from collections import deque
from collections.abc import Callable, Generator
from typing import Any, ParamSpec, TypeVar

from twisted.internet.defer import Deferred, inlineCallbacks

from . import metrics
from .clock import Clock
from .errors import LimitExceededError

T = TypeVar("T")
P = ParamSpec("P")

#: What a client that was refused is told to wait, in seconds.
RETRY_AFTER = 5


class UserQueues:
    """Lets a number of each user's calls run at once, and the others wait in order.

    Waiting calls hold nothing but their own memory: no thread and no connection.
    """

    def __init__(self, clock: Clock, slots: int, max_waiting: int) -> None:
        """
        Args:
            slots: how many calls of one user run at once.
            max_waiting: how many more may wait; the next one is refused.
        """
        self._clock = clock
        self._slots = slots
        self._max_waiting = max_waiting
        self._running: dict[str, int] = {}
        self._waiting: dict[str, deque[Deferred[None]]] = {}

    @inlineCallbacks
    def run(
        self,
        user_id: str,
        call: "Callable[P, Deferred[T]]",
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> "Generator[Deferred[Any], Any, T]":
        """Make the call when it is the user's turn, and fire with its result.

        Raises:
            LimitExceededError: too many calls of this user are waiting.
        """
        if self._running.get(user_id, 0) < self._slots:
            self._running[user_id] = self._running.get(user_id, 0) + 1
        else:
            turn = self._turn(user_id)
            with metrics.waiting_requests.track_inprogress():
                yield self._clock.wait(turn)
        try:
            result: T = yield call(*args, **kwargs)
            return result
        finally:
            self._release(user_id)

    def _turn(self, user_id: str) -> "Deferred[None]":
        """A Deferred that fires when a slot has been handed over."""
        waiting = self._waiting.setdefault(user_id, deque())
        if len(waiting) >= self._max_waiting:
            raise LimitExceededError(RETRY_AFTER)
        turn: Deferred[None] = Deferred()
        waiting.append(turn)
        return turn

    def _release(self, user_id: str) -> None:
        """Hand the slot to the user's next call, or give it back."""
        waiting = self._waiting.get(user_id)
        if waiting:
            self._clock.fire(waiting.popleft())
            if not waiting:
                del self._waiting[user_id]
            return
        self._running[user_id] -= 1
        if not self._running[user_id]:
            del self._running[user_id]

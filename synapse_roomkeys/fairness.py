"""One user's requests wait for each other, so that they can't starve others."""

from collections import deque
from collections.abc import Callable, Generator
from typing import Any, ParamSpec, TypeVar

from twisted.internet.defer import Deferred, inlineCallbacks

from . import metrics
from .clock import Clock
from .errors import LimitExceededError, UnavailableError

T = TypeVar("T")
P = ParamSpec("P")

#: What a client that was refused is told to wait, in seconds.
RETRY_AFTER = 5


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
        #: The calls that wait, of each user who has one that runs.
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
            UnavailableError: the call has waited for one that has found the database
                away. Each would take some seconds to find it, one after the other.
        """
        waiting = self._waiting.get(user_id)
        if waiting is None:
            self._waiting[user_id] = deque()
        elif len(waiting) < self._max_waiting:
            turn: Deferred[None] = Deferred()
            waiting.append(turn)
            with metrics.waiting_requests.track_inprogress():
                yield self._clock.wait(turn)
        else:
            raise LimitExceededError(RETRY_AFTER)
        try:
            result: T = yield call(*args, **kwargs)
            return result
        except UnavailableError as error:
            self._refuse_waiting(user_id, error)
            raise
        finally:
            self._end_turn(user_id)

    def _refuse_waiting(self, user_id: str, error: UnavailableError) -> None:
        """Have the user's calls that wait fail as the one before them has."""
        waiting = self._waiting[user_id]
        while waiting:
            self._clock.fail(waiting.popleft(), UnavailableError(error.retry_after))

    def _end_turn(self, user_id: str) -> None:
        """Let the user's next call run, if there is one."""
        waiting = self._waiting[user_id]
        if waiting:
            self._clock.fire(waiting.popleft())
        else:
            del self._waiting[user_id]

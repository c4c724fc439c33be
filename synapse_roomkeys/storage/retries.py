"""Transactions that are retried, and how many of them may wait for a lock."""

import math
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

from twisted.internet.defer import Deferred, inlineCallbacks

from .. import metrics
from ..clock import Clock
from ..describe import error_line
from ..errors import OutageError, UnavailableError
from ..fairness import Lane
from ..outages import Cause, Outages
from .causes import CONNECTIONS, RETRY_AFTER
from .engine import Engine
from .faults import Fault
from .transactions import ConflictError, Database, LockedError, Transaction

T = TypeVar("T")
P = ParamSpec("P")

#: Longest wait of a transaction for a place in its lane, in seconds.
_WAIT_SECONDS = 5
#: Share of the connections that writes may hold at the same time, without retries after
#: a lock timeout. The remaining connections serve reads while every write waits for a
#: lock.
_WRITE_SHARE = 0.7
#: Maximum number of retries after a lock timeout that run at the same time.
_LOCKED_WIDTH = 1
#: Longest wait of `Transactions.attempt` for a place in its lane, in seconds. The wait
#: is short because the request's answer doesn't depend on the attempt.
_ATTEMPT_WAIT = 0.5

#: Seconds before each retry of a transaction while the database is unreachable.
_RETRY_DELAYS = (0.1, 0.2, 0.4, 0.8, 1.6)
#: Seconds after the first try during which a retry may begin. The transaction may end
#: later, because a retry can take some seconds itself.
_TRY_SECONDS = 4


class RetryingDatabase:
    """A database whose transactions are retried for some seconds before a 503.

    Transactions must be safe to repeat. Merging is idempotent; repeating
    create_version leaves an unused version.

    On PostgreSQL, a transaction waits for a lock for a second at most
    (`postgres_settings.LOCK_SECONDS`). Two lanes keep waiting transactions from
    taking every connection: writes share some of the connections, and retries after a
    lock timeout run one after the other. An SQLite file has one connection and one
    lock, and no lanes.
    """

    def __init__(
        self, database: Database, engine: Engine, clock: Clock, outages: Outages
    ) -> None:
        """
        Args:
            outages: log of failed tries.
        """
        self._database = database
        self._engine = engine
        self._clock = clock
        self._outages = outages
        self._writes = self._locked = None
        if database.connections > 1:
            width = max(1, int(database.connections * _WRITE_SHARE))
            self._writes = Lane(clock, width)
            self._locked = Lane(clock, _LOCKED_WIDTH)

    def run(
        self,
        desc: str,
        function: Callable[Concatenate[Transaction, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> "Deferred[T]":
        """Run a transaction that takes no row lock, as `Database.run`.

        Raises:
            UnavailableError: all tries have failed; the last error is the cause.
            OutageError: all tries have failed, and the user's other requests would fail
                as well; the last error is the cause.
            ConflictError: a row exists that the transaction could not see.
        """
        return self._retry(None, _RETRY_DELAYS, desc, function, *args, **kwargs)

    def write(
        self,
        desc: str,
        function: Callable[Concatenate[Transaction, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> "Deferred[T]":
        """Run a transaction that may wait for a row lock.

        Raises:
            UnavailableError, OutageError, ConflictError: as `run`.
        """
        lane = self._writes
        return self._retry(lane, _RETRY_DELAYS, desc, function, *args, **kwargs)

    @inlineCallbacks
    def attempt(
        self,
        desc: str,
        function: Callable[Concatenate[Transaction, P], object],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> "Generator[Deferred[Any], Any, None]":
        """Run a transaction once, for a request whose answer doesn't depend on success.

        If the database is locked, full, read-only or unreachable, log the error and
        fire with None.
        """
        try:
            yield self._retry(self._locked, (), desc, function, *args, **kwargs)
        except UnavailableError:
            # `_refuse` has logged the error.
            return

    @inlineCallbacks
    def _retry(
        self,
        lane: Lane | None,
        delays: Sequence[float],
        desc: str,
        function: Callable[Concatenate[Transaction, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> "Generator[Deferred[Any], Any, T]":
        """Retry a transaction until a try succeeds, an error isn't passing, or
        `_TRY_SECONDS` are over.

        Args:
            lane: limit of how many such tries run at the same time.
            delays: seconds before each retry.
        """
        end = time.monotonic() + _TRY_SECONDS
        wait: float = _WAIT_SECONDS if delays else _ATTEMPT_WAIT
        failure: Exception | None = None
        fault = Fault.PASSING
        for delay in (*delays, math.inf):
            try:
                turn = lane.enter(wait) if lane else None
                if turn is not None:
                    yield turn
                try:
                    result: T = yield self._database.run(
                        desc, self._in_thread, function, *args, **kwargs
                    )
                    self._outages.note_success()
                    return result
                finally:
                    if lane is not None:
                        lane.leave()
            except UnavailableError:
                # No place in the lane, or no connection, was free in time.
                if failure is None:
                    what = f"no connection was free (for {desc})"
                    self._refuse(CONNECTIONS, what, is_needed=bool(delays))
                    raise
                break
            except Exception as error:
                failure, fault = self._judge(error)
                if fault is Fault.DEFECT:
                    raise
                if fault is Fault.CONFLICT:
                    raise ConflictError(desc) from failure
                cause = self._engine.find_cause(failure)
                what = f"{brief(failure)} (in {desc})"
            if fault is Fault.LOCKED and lane is not None:
                lane = self._locked
            wait = end - time.monotonic() - delay
            if wait < 0:
                break
            self._outages.note_failure(cause, what)
            metrics.transaction_retries.labels(cause.name).inc()
            yield self._clock.sleep(delay)
        assert failure is not None
        self._refuse(cause, what, is_needed=bool(delays))
        kind = UnavailableError if fault is Fault.PASSING else OutageError
        raise kind(RETRY_AFTER) from failure

    def _in_thread(
        self,
        txn: Transaction,
        function: Callable[Concatenate[Transaction, P], T],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Call a function with a transaction that the engine has prepared."""
        try:
            return function(self._engine.prepare(txn), *args, **kwargs)
        except self._engine.error as error:
            if self._engine.judge(error) is Fault.LOCKED:
                raise LockedError from error
            raise

    def _judge(self, error: Exception) -> tuple[Exception, Fault]:
        """Return the driver's error behind an exception, and its kind."""
        if isinstance(error, LockedError) and isinstance(error.__cause__, Exception):
            error = error.__cause__
        return error, self._engine.judge(error)

    def _refuse(self, cause: Cause, what: str, is_needed: bool) -> None:
        """Count and log a transaction that failed and isn't retried.

        Args:
            is_needed: Whether the request is answered 503.
        """
        if is_needed:
            self._outages.note_refusal(cause, what)
            metrics.transaction_failures.labels(cause.name).inc()
        else:
            self._outages.note_failure(cause, what)


def brief(error: Exception) -> str:
    """Return an exception's class and its line for operators."""
    return f"{type(error).__name__}: {error_line(error)}"

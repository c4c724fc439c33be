"""Background work that one process at a time does, in small transactions."""

import logging
import secrets
from collections.abc import Callable
from typing import TypeVar

from prometheus_client import Counter
from twisted.internet.defer import Deferred, inlineCallbacks

from .clock import Clock, DelayedCall
from .errors import UnavailableError
from .inline import Inline
from .storage import LEASE_SECONDS, Leases, Place

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Starts a call in the background after some seconds, outside any request.
Start = Callable[[float, "Callable[[], Deferred[None]]"], DelayedCall]

#: Seconds between two passes of a process.
INTERVAL = 60.0
#: Seconds until the next pass if `LeasedLoop.wake` was called while another process had
#: the lease.
_RETRY = 5.0
#: Seconds after which the lease is renewed.
_RENEWAL = LEASE_SECONDS / 6
#: Pause after a transaction, as a multiple of the transaction's own time: a loop uses a
#: fifth of one connection's time at most.
_PAUSE_FACTOR = 4


class InterruptedPassError(Exception):
    """This process stops, or another process has taken the lease."""


class LeasedLoop:
    """A loop of passes over background work. A lease in the database lets one process
    work at a time. The work consists of small transactions, so a process may end at any
    moment: the next one with the lease continues.

    Subclasses define `make_pass`.
    """

    def __init__(
        self,
        name: str,
        leases: Leases,
        clock: Clock,
        start: Start,
        failures: Counter,
    ) -> None:
        """
        Args:
            name: the name of the lease, and of the work in the log.
            start: the host's way to start background work.
            failures: metric of the passes that failed.
        """
        self.clock = clock
        self._name = name
        self._leases = leases
        self._start_later = start
        self._failures = failures
        self._owner = secrets.token_hex(8)
        #: The next pass; None while a pass runs, before `start`, and after `stop`.
        self._next: DelayedCall | None = None
        self._is_awake = False
        self._has_stopped = False
        self._has_failed = False
        #: Reactor's time at which to renew the lease.
        self._renewal = 0.0

    def make_pass(self) -> "Deferred[bool]":
        """Do the work that is due, under `hold`. Fire with False if another process has
        the lease."""
        raise NotImplementedError

    def start(self) -> None:
        """Begin the first pass soon."""
        self._schedule(0)

    def wake(self) -> None:
        """Begin a pass soon, because there is work."""
        self._is_awake = True
        if self._next is not None:
            self._next.cancel()
            self._schedule(0)

    def stop(self) -> None:
        """Begin no transaction of the work any more."""
        self._has_stopped = True
        if self._next is not None:
            self._next.cancel()
            self._next = None

    def _schedule(self, seconds: float) -> None:
        self._next = self._start_later(seconds, self.run)

    @inlineCallbacks
    def run(self) -> Inline[None]:
        """Make a pass, and schedule the next one."""
        self._next = None
        was_awake, self._is_awake = self._is_awake, False
        pause = INTERVAL
        try:
            has_lease = yield self.make_pass()
            self._has_failed = False
            if was_awake and not has_lease:
                # The process with the lease may have looked for work before the call of
                # `wake`.
                self._is_awake, pause = True, _RETRY
            elif self._is_awake:
                pause = 0
        except InterruptedPassError:
            pass
        except UnavailableError:
            # The retries have logged the outage.
            self._failures.inc()
        except Exception:
            self._failures.inc()
            if not self._has_failed:
                logger.exception(
                    "The %s failed; it is repeated every minute", self._name
                )
            self._has_failed = True
        if not self._has_stopped:
            self._schedule(pause)

    @inlineCallbacks
    def hold(self, work: "Callable[[], Deferred[None]]") -> Inline[bool]:
        """Do some work under the lease, unless another process has the lease. Fire with
        whether this process had the lease."""
        has_lease: bool = yield self._leases.take(self._name, self._owner)
        if has_lease:
            self._renewal = self.clock.seconds() + _RENEWAL
            yield work()
            # After an error the lease ends by itself.
            yield self._leases.end(self._name, self._owner)
        return has_lease

    @inlineCallbacks
    def repeat(
        self,
        pause: float,
        transaction: "Callable[[T, Place], Deferred[Place | None]]",
        subject: T,
    ) -> Inline[None]:
        """Repeat a transaction for each batch of a subject, with a pause after each.

        Args:
            pause: shortest pause in seconds.

        Raises:
            InterruptedPassError: this process stops, or has lost the lease.
        """
        place: Place | None = Place()
        while place is not None:
            yield self.check_lease()
            before = self.clock.seconds()
            place = yield transaction(subject, place)
            yield self.rest(self.clock.seconds() - before, pause)

    def rest(self, taken: float, pause: float) -> "Deferred[None]":
        """Pause after a transaction, so that others have their turn.

        Args:
            taken: seconds of the transaction.
            pause: shortest pause in seconds.
        """
        return self.clock.sleep(max(pause, _PAUSE_FACTOR * taken))

    @inlineCallbacks
    def check_lease(self) -> Inline[None]:
        """Renew the lease in time.

        Raises:
            InterruptedPassError: this process stops, or has lost the lease.
        """
        if self._has_stopped:
            raise InterruptedPassError
        if self.clock.seconds() < self._renewal:
            return
        if not (yield self._leases.take(self._name, self._owner)):
            raise InterruptedPassError
        self._renewal = self.clock.seconds() + _RENEWAL

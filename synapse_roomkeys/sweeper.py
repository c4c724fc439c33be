"""The sweeper: deletes in the background what clients have deleted, and what has been
kept for long enough."""

import logging
import secrets
from collections.abc import Callable
from typing import TypeVar

from twisted.internet.defer import Deferred, inlineCallbacks

from . import metrics
from .clock import Clock, DelayedCall
from .errors import UnavailableError
from .inline import Inline
from .storage import LEASE_SECONDS, Place, Queue, Sweeps
from .types import BackupId

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Starts a call in the background after some seconds, outside any request.
Start = Callable[[float, "Callable[[], Deferred[None]]"], DelayedCall]

#: Seconds between two passes of a process.
INTERVAL = 60.0
#: Seconds until the next pass if a version was deleted while another process had the
#: lease.
_RETRY = 5.0
#: Seconds after which the lease is renewed.
_RENEWAL = LEASE_SECONDS / 6
#: Pause after a transaction, as a multiple of the transaction's own time: the sweeper
#: uses a fifth of one connection's time at most.
_PAUSE_FACTOR = 4
#: Shortest pause after a batch of keys, in seconds. Another process that waits for the
#: lock of an SQLite file retries every 0.1 s.
_PAUSE = 0.1


#: Sorts before each version.
_FIRST = BackupId("", -1)


class _InterruptedError(Exception):
    """This process stops, or another process has taken the lease."""


class Sweeper:
    """The background process that deletes keys of deleted versions and old records.

    A lease in the database lets one process sweep at a time. Each batch is a small
    transaction, so a process may end at any moment: the next sweeper continues.
    """

    def __init__(self, sweeps: Sweeps, clock: Clock, start: Start) -> None:
        """
        Args:
            start: the host's way to start background work.
        """
        self._sweeps = sweeps
        self._clock = clock
        self._start_later = start
        self._owner = secrets.token_hex(8)
        #: The next pass; None while a pass runs, before `start`, and after `stop`.
        self._next: DelayedCall | None = None
        self._is_awake = False
        self._has_stopped = False
        self._has_failed = False
        #: Whether a pass has measured the queue since the start of the process.
        self._has_measured = False
        #: Reactor's time at which to renew the lease.
        self._renewal = 0.0
        #: The version whose keys are being deleted, or `_FIRST`.
        self._version = _FIRST
        #: The user whose old records were deleted last, or "" between two expiries.
        self._user_id = ""

    def start(self) -> None:
        """Begin the first pass soon."""
        self._schedule(0)

    def wake(self) -> None:
        """Begin a pass soon, because a version was deleted."""
        self._is_awake = True
        if self._next is not None:
            self._next.cancel()
            self._schedule(0)

    def stop(self) -> None:
        """Begin no batch any more."""
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
            has_lease = yield self._sweep()
            self._has_failed = False
            if was_awake and not has_lease:
                # The holder of the lease may have listed the queue before the deletion.
                self._is_awake, pause = True, _RETRY
            elif self._is_awake:
                pause = 0
        except _InterruptedError:
            pass
        except UnavailableError:
            # The retries have logged the outage.
            metrics.sweep_failures.inc()
        except Exception:
            metrics.sweep_failures.inc()
            if not self._has_failed:
                logger.exception("The sweep failed; it is repeated every minute")
            self._has_failed = True
        if not self._has_stopped:
            self._schedule(pause)

    @inlineCallbacks
    def _sweep(self) -> Inline[bool]:
        """Delete what is due, unless another process has the lease, and measure the
        queue. Fire with whether this process had the lease."""
        has_lease: bool = yield self._sweeps.take_lease(self._owner)
        if has_lease:
            self._renewal = self._clock.seconds() + _RENEWAL
            yield self._delete_due()
            if (yield self._sweeps.is_expiry_due()):
                yield self._expire()
            # After an error the lease ends by itself.
            yield self._sweeps.end_lease(self._owner)
        queue: Queue = yield self._sweeps.measure_queue()
        if queue.keys and not self._has_measured:
            logger.info(
                "%d keys of deleted versions wait for their deletion. Before you take"
                " synapse_roomkeys out, delete them: see README.rst, Take it out",
                queue.keys,
            )
        self._has_measured = True
        metrics.waiting_keys.set(queue.keys)
        metrics.deletion_delay.set(queue.delay)
        return has_lease

    @inlineCallbacks
    def _delete_due(self) -> Inline[None]:
        """Delete the keys of all queued versions whose time has come.

        If the last pass failed at a version, begin after the version, so that it
        doesn't keep the others waiting.
        """
        failed, self._version = self._version, _FIRST
        yield self._delete_after(failed)
        if failed != _FIRST:
            yield self._delete_after(_FIRST)

    @inlineCallbacks
    def _delete_after(self, last: BackupId) -> Inline[None]:
        """Delete the keys of the queued versions that follow a version."""
        while page := (yield self._sweeps.list_deleted(last)):
            for backup in page:
                self._version = backup
                yield self._repeat(_PAUSE, self._sweeps.delete_batch, backup)
            last = page[-1]
        self._version = _FIRST

    @inlineCallbacks
    def _expire(self) -> Inline[None]:
        """Delete all users' old records, and between two pages of users the keys of
        versions that were deleted meanwhile. If the last pass failed at a user, begin
        after the user."""
        while page := (yield self._sweeps.list_users(self._user_id)):
            for user_id in page:
                self._user_id = user_id
                yield self._repeat(0, self._sweeps.expire, user_id)
            yield self._delete_due()
        self._user_id = ""
        yield self._sweeps.note_expiry()

    @inlineCallbacks
    def _repeat(
        self,
        pause: float,
        transaction: "Callable[[T, Place], Deferred[Place | None]]",
        subject: T,
    ) -> Inline[None]:
        """Repeat a transaction for each batch of a subject, with a pause after each.

        Args:
            pause: shortest pause in seconds.

        Raises:
            _InterruptedError: this process stops, or has lost the lease.
        """
        place: Place | None = Place()
        while place is not None:
            yield self._check_lease()
            before = self._clock.seconds()
            place = yield transaction(subject, place)
            taken = self._clock.seconds() - before
            yield self._clock.sleep(max(pause, _PAUSE_FACTOR * taken))

    @inlineCallbacks
    def _check_lease(self) -> Inline[None]:
        """Renew the lease in time.

        Raises:
            _InterruptedError: this process stops, or has lost the lease.
        """
        if self._has_stopped:
            raise _InterruptedError
        if self._clock.seconds() < self._renewal:
            return
        if not (yield self._sweeps.take_lease(self._owner)):
            raise _InterruptedError
        self._renewal = self._clock.seconds() + _RENEWAL

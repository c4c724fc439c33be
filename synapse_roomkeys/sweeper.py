"""The sweeper: deletes in the background what clients have deleted, and what has been
kept for long enough."""

import logging

from twisted.internet.defer import inlineCallbacks

from . import metrics
from .background import LeasedLoop, Start
from .clock import Clock
from .inline import Inline
from .storage import Queue, Sweeps
from .types import BackupId

logger = logging.getLogger(__name__)

#: Shortest pause after a batch of keys, in seconds. Another process that waits for the
#: lock of an SQLite file retries every 0.1 s.
_PAUSE = 0.1
#: Sorts before each version.
_FIRST = BackupId("", -1)


class Sweeper(LeasedLoop):
    """The background process that deletes keys of deleted versions and old records."""

    def __init__(self, sweeps: Sweeps, clock: Clock, start: Start) -> None:
        """
        Args:
            start: the host's way to start background work.
        """
        super().__init__("sweep", sweeps.leases, clock, start, metrics.sweep_failures)
        self._sweeps = sweeps
        #: Whether a pass has measured the queue since the start of the process.
        self._has_measured = False
        #: The version whose keys are being deleted, or `_FIRST`.
        self._version = _FIRST
        #: The user whose old records were deleted last, or "" between two expiries.
        self._user_id = ""

    @inlineCallbacks
    def make_pass(self) -> Inline[bool]:
        """Delete what is due, unless another process has the lease, and measure the
        queue. Fire with whether this process had the lease."""
        has_lease: bool = yield self.hold(self._sweep)
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
    def _sweep(self) -> Inline[None]:
        """Delete what is due."""
        yield self._delete_due()
        if (yield self._sweeps.is_expiry_due()):
            yield self._expire()

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
                yield self.repeat(_PAUSE, self._sweeps.delete_batch, backup)
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
                yield self.repeat(0, self._sweeps.expire, user_id)
            yield self._delete_due()
        self._user_id = ""
        yield self._sweeps.note_expiry()

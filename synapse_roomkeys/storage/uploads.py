"""Uploads: keys are merged into a version, all of them or none."""

from collections.abc import Sequence
from itertools import islice

import attrs

from ..errors import RoomKeysVersionError, unknown_version
from ..merge import MergePlan, merge, size
from ..types import Actor, BackupId, BackupState, Limits, RoomKey, UploadResult
from .counts import KeyCounts
from .engine import Engine, not_json_errors
from .record import UPLOAD, Change, Record, name_sessions
from .rows import batches, read_snapshot
from .transactions import Transaction
from .values import KeyInsert, KeyWrite, Snapshot

#: How many groups of users the guess tells apart, at most.
_SLOTS = 1 << 16


class InsertGuess:
    """A guess, for each user, of whether all keys of the next upload are new.

    It is true unless the user's last upload met sessions that were stored already. Some
    users share a slot; a wrong guess costs a statement, nothing else.
    """

    def __init__(self) -> None:
        #: 1 in the slot of a user whose last upload met stored sessions.
        self._met_stored = bytearray(_SLOTS)

    def is_all_new(self, user_id: str) -> bool:
        """Return whether the user's next upload likely holds new keys only."""
        return not self._met_stored[hash(user_id) % _SLOTS]

    def note(self, user_id: str, result: UploadResult) -> None:
        """Remember whether an upload met stored sessions of the user."""
        met_stored = bool(result.unchanged or result.replaced)
        self._met_stored[hash(user_id) % _SLOTS] = met_stored


@attrs.frozen
class Upload:
    """Keys to merge into a version.

    Attributes:
        actor: who uploads the keys.
        checks_data: read the ``session_data`` of stored keys too, check that it is
            JSON, and recount the keys.
    """

    backup: BackupId
    keys: Sequence[RoomKey]
    actor: Actor
    checks_data: bool


class Uploads:
    """The transaction of an upload."""

    def __init__(
        self,
        engine: Engine,
        counts: KeyCounts,
        limits: Limits,
        guess: InsertGuess,
        record: Record,
    ) -> None:
        self._engine = engine
        self._counts = counts
        self._limits = limits
        self._guess = guess
        self._record = record

    def upload(self, txn: Transaction, upload: Upload) -> UploadResult:
        """Merge keys in the cheapest way that succeeds.

        1. If the keys are likely to be new, lock the version and insert them all.
        2. Else, or if one is stored, read without a lock, merge, and write by a
           compare-and-set on the etag.
        3. If another upload won, the compare-and-set has waited for the lock and holds
           it: read, merge and write once more, which other uploads can't prevent.

        Raises:
            NotFoundError: there is no such version.
            RoomKeysVersionError: it isn't the current one.
            UserLimitError: the user's backups would exceed a limit.
            NotJsonError: a stored key isn't JSON; the upload must check the data.
        """
        self._engine.begin_write(txn)
        has_lock = self._may_insert(upload)
        if has_lock:
            inserted = self.insert(txn, upload)
            if inserted is not None:
                return UploadResult(inserted, len(upload.keys), (), 0)
        result = self._merge(txn, upload, has_lock)
        # With the lock, one repetition is enough against uploads of the plugin. Only
        # Synapse's own endpoints create a version without that lock: then the write
        # fails again, and the read after it raises RoomKeysVersionError.
        while result is None:
            result = self._merge(txn, upload, has_lock=True)
        return result

    def _may_insert(self, upload: Upload) -> bool:
        """Return whether to insert before anything is known of the keys: they are
        likely to be new, one statement takes them, and no limit has to be checked."""
        limits = self._limits
        is_limited = (limits.max_user_keys, limits.max_user_bytes) != (None, None)
        return (
            self._engine.has_insert
            and not upload.checks_data
            and not is_limited
            and self._guess.is_all_new(upload.backup.user_id)
            and len(list(islice(batches(upload.keys), 2))) == 1
        )

    def insert(self, txn: Transaction, upload: Upload) -> BackupState | None:
        """Lock the version until the commit, and insert the keys if all are new.

        Returns:
            The backup's state afterwards; None if nothing was inserted.
        """
        backup, counts = upload.backup, self._counts
        added_bytes = sum(size(key.session_data) for key in upload.keys)
        change = Change(
            UPLOAD,
            upload.actor,
            stored=len(upload.keys),
            sessions=name_sessions(upload.keys, ()),
        )
        note = self._record.parameters(change)
        insert = KeyInsert(backup, upload.keys, added_bytes, note)
        inserted = self._engine.insert_if_all_new(txn, insert, counts.window())
        if inserted is None:
            return None
        if inserted.count is None:
            return counts.recount(txn, backup).state
        return BackupState(inserted.etag, inserted.count)

    def _merge(
        self, txn: Transaction, upload: Upload, has_lock: bool
    ) -> UploadResult | None:
        """Read the stored keys, merge, and write by a compare-and-set.

        Args:
            has_lock: the transaction has locked the version.

        Returns:
            None if another upload was committed between the read and the write. Then
            the version is locked.
        """
        while True:
            before = self.find(txn, upload)
            plan = merge(before.stored, upload.keys)
            if plan.writes:
                break
            state = self._counts.unchanged_state(txn, upload.backup, before)
            # An upload that writes nothing holds no lock, so a concurrent DELETE may
            # change the backup during the recount. Retry if the etag moved.
            if state.etag == before.etag:
                return self._result(txn, upload, plan, state)
        if not self._write(txn, upload, before.etag, plan, has_lock):
            return None
        added = len(plan.new)
        state = self._counts.state_after(txn, upload.backup, before, added)
        return self._result(txn, upload, plan, state)

    def _result(
        self, txn: Transaction, upload: Upload, plan: MergePlan, state: BackupState
    ) -> UploadResult:
        """Return an upload's result, once the user's limits are checked."""
        if plan.new or plan.added_bytes > 0:
            self._counts.check_user(txn, upload.backup.user_id)
        return UploadResult(state, len(plan.new), plan.replaced, plan.unchanged)

    def find(self, txn: Transaction, upload: Upload) -> Snapshot:
        """Read the version and the stored ones of the upload's sessions.

        Without a lock: `_write` is a compare-and-set on the etag that is read here.

        Raises:
            NotFoundError, RoomKeysVersionError, NotJsonError: as `upload`.
        """
        snapshot = find_sessions(self._engine, self._counts, txn, upload)
        if snapshot.current != upload.backup.version:
            raise RoomKeysVersionError(str(snapshot.current))
        return attrs.evolve(snapshot, count=None) if upload.checks_data else snapshot

    def _write(
        self,
        txn: Transaction,
        upload: Upload,
        etag: int,
        plan: MergePlan,
        has_lock: bool,
    ) -> bool:
        """Write the keys of a plan, keep replaced keys, record the change, and lock the
        version until the commit.

        Args:
            etag: the version's etag that the plan was made for.
            has_lock: the transaction has locked the version.

        Returns:
            False if nothing was written because the etag has moved or a newer version
            exists. The version is locked all the same.
        """
        change = Change(
            UPLOAD,
            upload.actor,
            stored=len(plan.new),
            replaced=len(plan.replaced),
            unchanged=plan.unchanged,
            sessions=name_sessions(plan.new, plan.replaced),
        )
        write = KeyWrite(
            backup=upload.backup,
            expected_etag=etag,
            new_etag=etag + 1,
            added_keys=len(plan.new),
            added_bytes=plan.added_bytes,
            keys=(),
            kept=self._record.choose_kept(plan.replaced),
            now_ms=self._record.now_ms(),
            note=self._record.parameters(change),
        )
        for keys in batches(plan.writes):
            write = attrs.evolve(write, keys=keys)
            if not self._engine.compare_and_write(txn, write, has_lock):
                return False
            # The first batch has moved the etag and the count, kept the replaced keys
            # and recorded the change; the others only write keys.
            write = attrs.evolve(
                write,
                expected_etag=etag + 1,
                added_keys=0,
                added_bytes=0,
                kept=(),
                note=None,
            )
            has_lock = True
        return True


def find_sessions(
    engine: Engine, counts: KeyCounts, txn: Transaction, upload: Upload
) -> Snapshot:
    """Read a version and the stored ones of some keys' sessions, without a lock.

    Raises:
        NotFoundError: there is no such version.
        NotJsonError: the ``session_data`` of a session isn't JSON, which is no error if
            the data are checked.
    """
    with_data = upload.checks_data
    with not_json_errors(engine):
        rows = engine.find_sessions(
            txn, upload.backup, upload.keys, counts.window(), with_data
        )
    if not rows:
        raise unknown_version()
    return read_snapshot(rows, with_data)

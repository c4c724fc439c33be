"""The versions of users' backups, and deletions: one function a transaction."""

import attrs

from ..errors import (
    InvalidParamError,
    NotFoundError,
    UserLimitError,
    unknown_version,
)
from ..merge import size
from ..types import Actor, BackupId, BackupInfo, BackupState, Limits
from . import statements
from .counts import KeyCounts
from .engine import Engine
from .record import (
    CREATE_VERSION,
    DELETE_KEYS,
    DELETE_VERSION,
    RESTORE_VERSION,
    UPDATE_VERSION,
    Change,
    Record,
)
from .transactions import Transaction
from .uploads import Upload, find_sessions
from .values import DeletedKeys, Snapshot, names

#: Number of a user's newest deleted versions whose rows are kept. Older rows are
#: deleted; else each POST and DELETE of a version would leave a row for ever.
DELETED_VERSIONS = 100


@attrs.frozen
class FoundInfo:
    """A version that was read.

    Attributes:
        info: the version; None if there is none.
        is_cached: Whether the count was read from the cache, not counted.
    """

    info: BackupInfo | None
    is_cached: bool


@attrs.frozen
class Deletion:
    """The outcome of one transaction that deletes keys.

    Attributes:
        state: the backup afterwards.
        deleted: number of deleted keys.
        is_complete: Whether all keys are deleted that the request names. If not, the
            deletion has to be repeated.
    """

    state: BackupState
    deleted: int
    is_complete: bool


class Versions:
    """The transactions of versions and of deletions."""

    def __init__(
        self, engine: Engine, counts: KeyCounts, limits: Limits, record: Record
    ) -> None:
        self._engine = engine
        self._counts = counts
        self._limits = limits
        self._record = record

    def create(
        self,
        txn: Transaction,
        user_id: str,
        algorithm: str,
        auth_data: str,
        actor: Actor,
    ) -> int:
        """Insert a version and return its number, which the user never had before.

        Raises:
            UserLimitError: the user's backups would exceed a limit.
        """
        self._engine.begin_write(txn)
        lock_current(self._engine, txn, user_id)
        is_inserted = False
        while not is_inserted:
            txn.execute(statements.VERSION_NUMBERS, {"user_id": user_id})
            saved, highest, versions, deleted = txn.fetchone()
            most = self._limits.max_user_versions
            if versions - deleted >= most:
                raise UserLimitError(
                    f"A user may have {most} versions at most: delete one first"
                )
            now = self._counts.now()
            number = max((saved or 0) + 1, (highest or 0) + 1, now)
            backup = BackupId(user_id, number)
            is_inserted = self._engine.insert_version(txn, backup, algorithm, auth_data)
        txn.execute(statements.SAVE_NUMBER, names(backup))
        count = {"etag": 0, "key_count": 0, "key_bytes": 0, "now": self._counts.now()}
        txn.execute(statements.SAVE_COUNT, {**names(backup), **count})
        if deleted > DELETED_VERSIONS:
            parameters = {"user_id": user_id, "most": DELETED_VERSIONS}
            txn.execute(statements.DROP_DELETED_VERSIONS, parameters)
        if self._limits.max_user_bytes is not None:
            self._counts.check_user(txn, user_id)
        self._record.note(txn, backup, Change(CREATE_VERSION, actor))
        return number

    def find(self, txn: Transaction, user_id: str, version: int | None) -> FoundInfo:
        """Read a version, or the current version, and count the keys if no valid count
        is cached. The transaction stays read-only: `cache_count` caches the count."""
        parameters = {"user_id": user_id, **attrs.asdict(self._counts.window())}
        while True:
            if version is None:
                txn.execute(statements.CURRENT_INFO, parameters)
            else:
                parameters["version"] = version
                txn.execute(statements.VERSION_INFO, parameters)
            row = txn.fetchone()
            if row is None:
                return FoundInfo(None, is_cached=True)
            number, algorithm, auth_data, *_, count = row
            if count is not None:
                return FoundInfo(BackupInfo(*row), is_cached=True)
            txn.execute(statements.FIND_COUNT, names(BackupId(user_id, number)))
            counted = txn.fetchone()
            if counted is not None:
                info = BackupInfo(number, algorithm, auth_data, *counted)
                return FoundInfo(info, is_cached=False)
            # The version was deleted between the two statements.

    def cache_count(self, txn: Transaction, user_id: str, info: BackupInfo) -> None:
        """Cache a count that was read without a lock, unless the etag has moved."""
        parameters = {
            **names(BackupId(user_id, info.version)),
            "etag": info.etag,
            "key_count": info.count,
            "key_bytes": None,
            "now": self._counts.now(),
        }
        txn.execute(statements.KEEP_COUNT, parameters)

    def update(
        self,
        txn: Transaction,
        backup: BackupId,
        algorithm: str,
        auth_data: str,
        actor: Actor,
    ) -> None:
        """Replace the ``auth_data`` of a version.

        Raises:
            NotFoundError: there is no such version.
            InvalidParamError: it has another algorithm.
            UserLimitError: the user's backups would exceed a limit.
        """
        self._engine.begin_write(txn)
        if self._lock(txn, backup) != algorithm:
            raise InvalidParamError("The algorithm of a version can't be changed")
        before: str | None = None
        if self._limits.max_user_bytes is not None:
            txn.execute(statements.AUTH_DATA, names(backup))
            (before,) = txn.fetchone()
        parameters = {**names(backup), "auth_data": auth_data}
        txn.execute(statements.SET_AUTH_DATA, parameters)
        if before is not None and size(auth_data) > size(before):
            self._counts.check_user(txn, backup.user_id)
        self._record.note(txn, backup, Change(UPDATE_VERSION, actor))

    def _lock(self, txn: Transaction, backup: BackupId) -> str:
        """Lock a version until the commit, and return its algorithm.

        Raises:
            NotFoundError: there is no such version.
        """
        version = self._engine.lock_version(txn, backup)
        if version is None or version.is_deleted:
            raise unknown_version()
        return version.algorithm

    def delete(self, txn: Transaction, backup: BackupId, actor: Actor) -> bool:
        """Mark a version deleted, and queue it for the deletion of its keys.

        Returns:
            Whether this call marked the version; False if it was deleted before.

        Raises:
            NotFoundError: there never was such a version.
        """
        self._engine.begin_write(txn)
        version = self._engine.lock_version(txn, backup)
        if version is None:
            raise unknown_version()
        queued = {**names(backup), "now_ms": self._record.now_ms()}
        if version.is_deleted:
            # The version may have keys, if the homeserver or an older version of the
            # plugin was killed during the deletion.
            txn.execute(statements.QUEUE_DELETION, queued)
            return False
        note = self._record.parameters(Change(DELETE_VERSION, actor))
        recorded = () if note is None else (statements.NOTE_DELETION,)
        self._engine.execute_all(
            (
                statements.QUEUE_DELETION,
                *recorded,
                # Synapse's own endpoints may have created the version.
                statements.SAVE_NUMBER,
                statements.MARK_DELETED,
                statements.FORGET_COUNT,
            ),
            txn,
            {**queued, **(note or {})},
        )
        return True

    def restore(self, txn: Transaction, backup: BackupId, actor: Actor) -> None:
        """Make a deleted version readable again, with all of its keys. If the user has
        no newer version, it is the current version again.

        Raises:
            NotFoundError: the version isn't kept: it never existed, isn't deleted, or
                some of its keys are deleted already.
        """
        self._engine.begin_write(txn)
        lock_current(self._engine, txn, backup.user_id)
        self._engine.lock_version(txn, backup)
        txn.execute(statements.UNMARK_DELETED, names(backup))
        if not txn.rowcount:
            raise NotFoundError("The version isn't kept, or its deletion has begun")
        txn.execute(statements.LEAVE_QUEUE, names(backup))
        self._record.note(txn, backup, Change(RESTORE_VERSION, actor))

    def delete_keys(
        self,
        txn: Transaction,
        backup: BackupId,
        room_id: str | None,
        session_id: str | None,
        actor: Actor,
    ) -> Deletion:
        """Delete keys of a version, of a room, or of a session, as many as one
        transaction may. If a key was deleted, move the etag.

        Raises:
            NotFoundError: there is no such version.
        """
        self._engine.begin_write(txn)
        self._lock(txn, backup)
        nothing = Upload(backup, (), actor, checks_data=False)
        before = find_sessions(self._engine, self._counts, txn, nothing)
        if session_id is None:
            deleted = self._engine.delete_keys(txn, backup, room_id)
        else:
            ids = {"room_id": room_id, "session_id": session_id}
            txn.execute(statements.DELETE_ROOM_KEY, {**names(backup), **ids})
            deleted = DeletedKeys(txn.rowcount, is_complete=True)
        if deleted.count:
            state = self._note_deleted(txn, backup, before, deleted.count)
            change = Change(DELETE_KEYS, actor, deleted=deleted.count)
            self._record.note(txn, backup, change)
        else:
            state = self._counts.unchanged_state(txn, backup, before)
        return Deletion(state, deleted.count, deleted.is_complete)

    def _note_deleted(
        self, txn: Transaction, backup: BackupId, before: Snapshot, deleted: int
    ) -> BackupState:
        """Move the etag and the cached count of a version that the transaction has
        locked. The deleted keys weren't measured, so the cached bytes become NULL."""
        parameters = {
            **names(backup),
            "expected_etag": before.etag,
            "new_etag": before.etag + 1,
            "added_keys": -deleted,
            "added_bytes": None,
        }
        txn.execute(statements.SET_ETAG, parameters)
        txn.execute(statements.MOVE_COUNT, parameters)
        return self._counts.state_after(txn, backup, before, -deleted)

    def forget_user(self, txn: Transaction, user_id: str) -> None:
        """Save the last number of a user's versions, and delete the user's cached
        counts, records, and kept keys."""
        txn.execute(statements.SAVE_LAST_NUMBER, {"user_id": user_id})
        for statement in (
            statements.FORGET_USER,
            statements.FORGET_CHANGES,
            statements.FORGET_REPLACED,
            statements.FORGET_DELETED,
        ):
            txn.execute(statement, {"user_id": user_id})


def lock_current(engine: Engine, txn: Transaction, user_id: str) -> int | None:
    """Lock the current version, so that an upload ends before a new version takes its
    place. If another process creates a newer version during the wait for the lock, lock
    the newer version as well.

    Returns:
        The number of the current version; None if the user has no version.
    """
    locked: int | None = None
    while (current := _find_current(txn, user_id)) != locked:
        if current is not None:
            engine.lock_version(txn, BackupId(user_id, current))
        locked = current
    return locked


def _find_current(txn: Transaction, user_id: str) -> int | None:
    txn.execute(statements.CURRENT_VERSION, {"user_id": user_id})
    row = txn.fetchone()
    return None if row is None else row[0]

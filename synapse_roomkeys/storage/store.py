"""The backups in the database: one transaction for each operation."""

from collections.abc import Callable, Generator, Sequence
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks

from ..errors import InvalidParamError, RoomKeysVersionError, unknown_version
from ..merge import merge
from ..types import (
    BackupInfo,
    BackupState,
    KeyMetadata,
    RoomKey,
    StoredKey,
    UploadResult,
)
from . import sql
from .database import Database, Transaction

#: How many keys a page of a download holds: about half a MiB of real ones.
PAGE_KEYS = 500


class EndToEndRoomKeyStore:
    """What the homeserver's two tables, and the plugin's own, hold of the backups.

    The methods return Deferreds, which may fail with whatever the `Database` fails
    with besides the errors that each method names.
    """

    def __init__(
        self, database: Database, dialect: sql.Dialect, now: Callable[[], float]
    ) -> None:
        """
        Args:
            now: the Unix time in seconds.
        """
        self._database = database
        self._dialect = dialect
        self._now = now

    def upload_keys(
        self, user_id: str, version: int, keys: Sequence[RoomKey]
    ) -> "Deferred[UploadResult]":
        """Merge keys into the current version, all of them or none.

        Raises:
            NotFoundError: there is no such version.
            RoomKeysVersionError: it isn't the current one.
        """
        return self._database.run(
            "roomkeys_upload_keys", self._upload_txn, user_id, version, keys
        )

    def get_page(
        self,
        user_id: str,
        version: int,
        room_id: str | None,
        session_id: str | None,
        after: RoomKey | None,
    ) -> "Deferred[list[RoomKey]]":
        """The next keys of a version, of a room, or of a session, ordered by id.

        Args:
            after: the last key of the page before, None for the first page.

        Returns:
            A Deferred that fires with `PAGE_KEYS` keys, or fewer when they are the
            last.

        Raises:
            NotFoundError: there is no such version, or no longer.
        """
        return self._database.run(
            "roomkeys_get_page",
            self._page_txn,
            *(user_id, version, room_id, session_id, after),
        )

    def delete_keys(
        self,
        user_id: str,
        version: int,
        room_id: str | None,
        session_id: str | None,
    ) -> "Deferred[tuple[BackupState, int]]":
        """Delete the keys of a version, of a room, or of a session.

        Returns:
            A Deferred that fires with the backup's state afterwards, and how many keys
            were deleted.

        Raises:
            NotFoundError: there is no such version.
        """
        return self._database.run(
            "roomkeys_delete_keys",
            self._delete_keys_txn,
            *(user_id, version, room_id, session_id),
        )

    def create_version(
        self, user_id: str, algorithm: str, auth_data: str
    ) -> "Deferred[int]":
        """Make a version and fire with its number, one that no other ever had.

        It is the Unix time, or one more than the last number where that is larger:
        so it is new even when the user's older versions have been forgotten.
        """
        return self._database.run(
            "roomkeys_create_version",
            self._create_version_txn,
            *(user_id, algorithm, auth_data),
        )

    @inlineCallbacks
    def get_info(
        self, user_id: str, version: int | None
    ) -> "Generator[Deferred[Any], Any, BackupInfo | None]":
        """A version, or the current one; None when there is none."""
        row = yield self._database.run(
            "roomkeys_get_info", self._info_txn, user_id, version
        )
        if row is None:
            return None
        number, algorithm, auth_data, etag, count = row
        if count is None:
            state: BackupState = yield self._database.run(
                "roomkeys_count_keys", self._count_txn, user_id, number
            )
            etag, count = state.etag, state.count
        return BackupInfo(number, algorithm, auth_data, etag, count)

    def update_version(
        self, user_id: str, version: int, algorithm: str, auth_data: str
    ) -> "Deferred[None]":
        """Change a version's ``auth_data``.

        Raises:
            NotFoundError: there is no such version.
            InvalidParamError: it has another algorithm.
        """
        return self._database.run(
            "roomkeys_update_version",
            self._update_version_txn,
            *(user_id, version, algorithm, auth_data),
        )

    def delete_version(self, user_id: str, version: int) -> "Deferred[bool]":
        """Delete a version and its keys.

        Returns:
            A Deferred that fires with False when it was deleted before.

        Raises:
            NotFoundError: there never was such a version.
        """
        return self._database.run(
            "roomkeys_delete_version", self._delete_version_txn, user_id, version
        )

    def forget_user(self, user_id: str) -> "Deferred[None]":
        """Drop what the plugin's own tables hold of a user."""
        return self._database.run(
            "roomkeys_forget_user", self._forget_user_txn, user_id
        )

    def _upload_txn(
        self, txn: Transaction, user_id: str, version: int, keys: Sequence[RoomKey]
    ) -> UploadResult:
        etag = self._lock(txn, user_id, version)
        current, count, stored = self._find(txn, user_id, version, etag, keys)
        if current != version:
            raise RoomKeysVersionError(str(current))
        plan = merge(stored, keys)
        if plan.writes:
            self._write(txn, user_id, version, plan.writes)
            etag += 1
            txn.execute(sql.SET_ETAG, (etag, user_id, version))
        if count is not None:
            count += plan.stored
        state = self._settle(txn, user_id, version, etag, count, bool(plan.writes))
        return UploadResult(state, plan.stored, plan.replaced, plan.kept)

    def _lock(self, txn: Transaction, user_id: str, version: int) -> int:
        """Lock a version until the commit; its etag."""
        txn.execute(self._dialect.begin_write)
        txn.execute(self._dialect.lock_version, (user_id, version))
        row = txn.fetchone()
        if row is None or row[2]:
            raise unknown_version()
        etag: int = row[1]
        return etag

    def _find(
        self,
        txn: Transaction,
        user_id: str,
        version: int,
        etag: int,
        keys: Sequence[RoomKey],
    ) -> tuple[int, int | None, dict[tuple[str, str], StoredKey]]:
        """The current version, the cached count, and what is stored of some keys."""
        ids = [(key.room_id, key.session_id) for key in keys]
        sessions = self._dialect.pack(ids, 2)
        parameters = [user_id, user_id, version, etag, *self._count_times()]
        parameters += [*sessions, user_id, version]
        txn.execute(self._dialect.find_sessions, parameters)
        rows = txn.fetchall()
        stored = {
            (row[2], row[3]): StoredKey(_metadata(row[4:7]), bool(row[7]))
            for row in rows
            if row[2] is not None
        }
        return rows[0][0], rows[0][1], stored

    def _write(
        self, txn: Transaction, user_id: str, version: int, keys: Sequence[RoomKey]
    ) -> None:
        rows = [
            (
                key.room_id,
                key.session_id,
                key.metadata.first_message_index,
                key.metadata.forwarded_count,
                key.metadata.is_verified,
                key.session_data,
            )
            for key in keys
        ]
        txn.execute(
            self._dialect.write_keys, (user_id, version, *self._dialect.pack(rows, 6))
        )

    def _settle(
        self,
        txn: Transaction,
        user_id: str,
        version: int,
        etag: int,
        count: int | None,
        changed: bool,
    ) -> BackupState:
        """What a backup is like after a write, with its count cached.

        Args:
            count: of the keys now, None when no count was cached.
        """
        if count is None:
            return self._count_anew(txn, user_id, version)
        if changed:
            txn.execute(sql.MOVE_COUNT, (etag, count, user_id, version))
        return BackupState(etag, count)

    def _count_anew(self, txn: Transaction, user_id: str, version: int) -> BackupState:
        """Count the keys of a version and cache the count.

        Raises:
            NotFoundError: there is no such version, or no longer.
        """
        txn.execute(sql.COUNT_KEYS, (user_id, version, user_id, version))
        row = txn.fetchone()
        if row is None:
            raise unknown_version()
        now = int(self._now())
        txn.execute(sql.SAVE_COUNT, (user_id, version, row[0], row[1], now))
        return BackupState(row[0], row[1])

    def _count_times(self) -> tuple[int, int]:
        """The oldest and the newest time that a count may be of."""
        now = int(self._now())
        return now - sql.COUNT_LIFETIME, now

    def _page_txn(
        self,
        txn: Transaction,
        user_id: str,
        version: int,
        room_id: str | None,
        session_id: str | None,
        after: RoomKey | None,
    ) -> list[RoomKey]:
        statement, ids = _page_statement(room_id, session_id, after)
        txn.execute(statement, (user_id, version, user_id, version, *ids, PAGE_KEYS))
        rows = txn.fetchall()
        if not rows:
            raise unknown_version()
        return [
            RoomKey(row[0], row[1], _metadata(row[2:5]), row[5])
            for row in rows
            if row[0] is not None
        ]

    def _delete_keys_txn(
        self,
        txn: Transaction,
        user_id: str,
        version: int,
        room_id: str | None,
        session_id: str | None,
    ) -> tuple[BackupState, int]:
        etag = self._lock(txn, user_id, version)
        _, count, _ = self._find(txn, user_id, version, etag, ())
        if room_id is None:
            txn.execute(sql.DELETE_KEYS, (user_id, version))
        elif session_id is None:
            txn.execute(sql.DELETE_ROOM_KEYS, (user_id, version, room_id))
        else:
            txn.execute(sql.DELETE_ROOM_KEY, (user_id, version, room_id, session_id))
        deleted = txn.rowcount
        if deleted:
            etag += 1
            txn.execute(sql.SET_ETAG, (etag, user_id, version))
        if count is not None:
            count -= deleted
        state = self._settle(txn, user_id, version, etag, count, bool(deleted))
        return state, deleted

    def _create_version_txn(
        self, txn: Transaction, user_id: str, algorithm: str, auth_data: str
    ) -> int:
        txn.execute(self._dialect.begin_write)
        self._lock_current(txn, user_id)
        while True:
            txn.execute(sql.LAST_VERSION, (user_id,))
            version = max((txn.fetchone()[0] or 0) + 1, int(self._now()))
            txn.execute(sql.INSERT_VERSION, (user_id, version, algorithm, auth_data))
            if txn.rowcount:
                return version

    def _lock_current(self, txn: Transaction, user_id: str) -> None:
        """Lock the version that is current, so that no upload to it is under way when
        another takes its place."""
        locked: int | None = None
        while True:
            txn.execute(sql.CURRENT_VERSION, (user_id,))
            current: int | None = txn.fetchone()[0]
            if current == locked:
                return
            txn.execute(self._dialect.lock_version, (user_id, current))
            locked = current

    def _info_txn(self, txn: Transaction, user_id: str, version: int | None) -> Any:
        """A version's row: the fields of a `BackupInfo`, the count None where no
        count is cached."""
        parameters = (user_id, *self._count_times(), user_id)
        if version is None:
            txn.execute(sql.CURRENT_INFO, parameters)
        else:
            txn.execute(sql.VERSION_INFO, (*parameters, version))
        return txn.fetchone()

    def _count_txn(self, txn: Transaction, user_id: str, version: int) -> BackupState:
        txn.execute(self._dialect.begin_write)
        return self._count_anew(txn, user_id, version)

    def _update_version_txn(
        self,
        txn: Transaction,
        user_id: str,
        version: int,
        algorithm: str,
        auth_data: str,
    ) -> None:
        txn.execute(self._dialect.begin_write)
        txn.execute(self._dialect.lock_version, (user_id, version))
        row = txn.fetchone()
        if row is None or row[2]:
            raise unknown_version()
        if row[0] != algorithm:
            raise InvalidParamError("The algorithm of a version can't be changed")
        txn.execute(sql.SET_AUTH_DATA, (auth_data, user_id, version))

    def _delete_version_txn(self, txn: Transaction, user_id: str, version: int) -> bool:
        txn.execute(self._dialect.begin_write)
        txn.execute(self._dialect.lock_version, (user_id, version))
        row = txn.fetchone()
        if row is None:
            raise unknown_version()
        if row[2]:
            return False
        txn.execute(sql.DELETE_KEYS, (user_id, version))
        txn.execute(sql.MARK_DELETED, (user_id, version))
        txn.execute(sql.FORGET_COUNT, (user_id, version))
        return True

    def _forget_user_txn(self, txn: Transaction, user_id: str) -> None:
        txn.execute(sql.FORGET_USER, (user_id,))


def _page_statement(
    room_id: str | None, session_id: str | None, after: RoomKey | None
) -> tuple[str, tuple[Any, ...]]:
    """The statement that gets a page, and the ids it takes."""
    if room_id is None:
        if after is None:
            return sql.FIRST_PAGE, ()
        return sql.NEXT_PAGE, (after.room_id, after.session_id)
    if session_id is not None:
        return sql.ONE_KEY, (room_id, session_id)
    if after is None:
        return sql.FIRST_ROOM_PAGE, (room_id,)
    return sql.NEXT_ROOM_PAGE, (room_id, after.session_id)


def _metadata(row: Sequence[Any]) -> KeyMetadata:
    """The three fields of a row; SQLite may hold any value in any of them."""
    index, forwarded, verified = row
    return KeyMetadata(
        index if isinstance(index, int) else None,
        forwarded if isinstance(forwarded, int) else None,
        None if verified is None else bool(verified),
    )

"""The backups in the database: one transaction for each operation."""

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import attrs
from twisted.internet.defer import Deferred, inlineCallbacks

from .. import metrics
from ..errors import (
    InvalidParamError,
    NotFoundError,
    RoomKeysVersionError,
    UserLimitError,
    unknown_version,
)
from ..merge import MergePlan, merge, size
from ..types import (
    BackupInfo,
    BackupState,
    KeyPage,
    Limits,
    Position,
    RoomKey,
    UploadResult,
)
from ..wire import is_json, shown
from . import sql
from .database import ConflictError, Transaction, Transactions
from .rows import (
    Found,
    chunks,
    found_of,
    ids_of,
    key_pages,
    keys_after,
    metadata,
    page_statement,
)

logger = logging.getLogger(__name__)

#: How many users are told apart by what their last upload met, at most.
_SLOTS = 1 << 16
#: How many of a user's deleted versions keep their row, the newest ones: so that each
#: POST and DELETE of a version doesn't leave a row for ever.
_DELETED_VERSIONS = 100


class _NotJsonError(Exception):
    """The database has met the data of a key that aren't JSON."""


class EndToEndRoomKeyStore:
    """What the homeserver's two tables, and the plugin's own, hold of the backups.

    The methods return Deferreds, which may fail with whatever the `Transactions` fail
    with besides the errors that each method names.
    """

    def __init__(
        self,
        database: Transactions,
        dialect: sql.Dialect,
        now: Callable[[], float],
        limits: Limits,
    ) -> None:
        """
        Args:
            now: the Unix time in seconds.
        """
        self._database = database
        self._dialect = dialect
        self._now = now
        self._limits = limits
        #: Whether the last upload of some users held sessions that were there already.
        self._met_old = bytearray(_SLOTS)

    @inlineCallbacks
    def upload_keys(
        self, user_id: str, version: int, keys: Sequence[RoomKey]
    ) -> "Generator[Deferred[Any], Any, UploadResult]":
        """Merge keys into the current version, all of them or none.

        Raises:
            NotFoundError: there is no such version.
            RoomKeysVersionError: it isn't the current one.
            UserLimitError: the user's backups would get too large.
        """
        write, upload = self._database.write, self._upload_txn
        desc, arguments = "roomkeys_upload_keys", (user_id, version, keys)
        result: UploadResult
        try:
            result = yield write(desc, upload, *arguments)
        except (ConflictError, _NotJsonError):
            # Somebody who takes no lock has just added one of the keys, or the data of
            # a stored one aren't JSON.
            result = yield write(desc, upload, *arguments, trusts_nothing=True)
        self._met_old[_slot(user_id)] = bool(result.kept or result.replaced)
        return result

    def get_key(
        self, user_id: str, version: int, room_id: str, session_id: str
    ) -> "Deferred[RoomKey | None]":
        """A key, or None.

        Raises:
            NotFoundError: there is no such version.
        """
        return self._database.run(
            "roomkeys_get_key", self._key_txn, user_id, version, room_id, session_id
        )

    def get_pages(
        self,
        user_id: str,
        version: int,
        room_id: str | None,
        after: Position | None,
        take: Callable[[KeyPage], bool],
    ) -> "Deferred[None]":
        """Give keys of a version or of a room, ordered by id.

        Args:
            after: where the first page begins.
            take: is given page after page, at least one, in a thread, and says whether
                to go on. Few pages are given until the connection is left to others,
                even if it says so.

        Raises:
            NotFoundError: there is no such version, or no longer.
        """
        backup = user_id, version
        is_wanted = True

        def read(txn: Transaction) -> None:
            # It may be run again, and takes up where it was.
            nonlocal after, is_wanted
            left = self._dialect.pages_at_once
            has_cursor = False
            while is_wanted and left > 0:
                after, is_wanted, given = self._give_pages(
                    *(txn, backup, room_id, after, has_cursor, left, take)
                )
                left -= given
                has_cursor = self._dialect.next_page is not None

        return self._database.run("roomkeys_get_pages", read)

    def delete_keys(
        self,
        user_id: str,
        version: int,
        room_id: str | None,
        session_id: str | None,
    ) -> "Deferred[tuple[BackupState, int, bool]]":
        """Delete keys of a version, of a room, or of a session, as many as one
        transaction may.

        Returns:
            A Deferred that fires with the backup's state afterwards, how many keys were
            deleted, and whether these were all. If not, the call has to be repeated.

        Raises:
            NotFoundError: there is no such version.
        """
        return self._database.write(
            "roomkeys_delete_keys",
            self._delete_keys_txn,
            *(user_id, version, room_id, session_id),
        )

    def create_version(
        self, user_id: str, algorithm: str, auth_data: str
    ) -> "Deferred[int]":
        """Make a version and fire with its number, which the user never had before.

        The number is the Unix time in seconds, or the user's last number plus one where
        that is larger. The last number is kept when the user's versions are erased.

        Raises:
            UserLimitError: the user would have too many versions, or too many bytes.
        """
        return self._database.write(
            "roomkeys_create_version",
            self._create_version_txn,
            *(user_id, algorithm, auth_data),
        )

    @inlineCallbacks
    def get_info(
        self, user_id: str, version: int | None
    ) -> "Generator[Deferred[Any], Any, BackupInfo | None]":
        """A version, or the current one; None when there is none."""
        info: BackupInfo | None
        info, is_cached = yield self._database.run(
            "roomkeys_get_info", self._info_txn, user_id, version
        )
        if info is not None and not is_cached:
            # A database that is full, read-only or locked still answers.
            yield self._database.attempt(
                "roomkeys_keep_count", self._keep_count_txn, user_id, info
            )
        return info

    def update_version(
        self, user_id: str, version: int, algorithm: str, auth_data: str
    ) -> "Deferred[None]":
        """Change a version's ``auth_data``.

        Raises:
            NotFoundError: there is no such version.
            InvalidParamError: it has another algorithm.
            UserLimitError: the user's backups would get too large.
        """
        return self._database.write(
            "roomkeys_update_version",
            self._update_version_txn,
            *(user_id, version, algorithm, auth_data),
        )

    def delete_version(
        self, user_id: str, version: int
    ) -> "Deferred[tuple[bool, bool]]":
        """Delete a version, and as many of its keys as one transaction may.

        From the first call on the version and its keys are gone for every client.

        Returns:
            A Deferred that fires with whether this call deleted the version (False: it
            was deleted before), and whether none of its keys is left. If some are, the
            call has to be repeated.

        Raises:
            NotFoundError: there never was such a version.
        """
        return self._database.write(
            "roomkeys_delete_version", self._delete_version_txn, user_id, version
        )

    def forget_user(self, user_id: str) -> "Deferred[None]":
        """Drop all that the plugin's own tables hold of a user, but the last number of
        a version."""
        return self._database.write(
            "roomkeys_forget_user", self._forget_user_txn, user_id
        )

    def _upload_txn(
        self,
        txn: Transaction,
        user_id: str,
        version: int,
        keys: Sequence[RoomKey],
        trusts_nothing: bool = False,
    ) -> UploadResult:
        """Add keys that are likely to be new, or look first.

        What is found needn't be locked: the etag moves from what it was then, or the
        upload looks again. It has the lock by then, so that is the last time.

        Args:
            trusts_nothing: look first, also at the data of stored keys, and count anew.
        """
        self._begin(txn)
        has_lock = False
        rows = None if trusts_nothing else self._rows_to_add(user_id, keys)
        if rows is not None:
            state = self._add(txn, user_id, version, keys, rows)
            if state is not None:
                return UploadResult(state, len(keys), (), 0)
            has_lock = True
        while True:
            found = self._find(txn, user_id, version, keys, trusts_nothing)
            if found.current != version:
                raise RoomKeysVersionError(str(found.current))
            if trusts_nothing:
                found = attrs.evolve(found, count=None)
            plan = merge(found.stored, keys)
            if plan.writes and not self._write(
                txn, user_id, version, found.etag, plan, has_lock
            ):
                has_lock = True
                continue
            state = self._state(
                txn, user_id, version, found, bool(plan.writes), plan.stored
            )
            # Kept keys are locked by nobody, and may go while keys are counted.
            if plan.writes or state.etag == found.etag:
                break
        if plan.stored or plan.added_bytes > 0:
            self._check_user(txn, user_id)
        return UploadResult(state, plan.stored, plan.replaced, plan.kept)

    def _rows_to_add(
        self, user_id: str, keys: Sequence[RoomKey]
    ) -> list[tuple[Any, ...]] | None:
        """Keys as rows to add before anything is known of them, if they are likely to
        be new and one statement takes them."""
        limits = self._limits
        is_limited = (limits.max_user_keys, limits.max_user_bytes) != (None, None)
        if not self._dialect.add_keys or is_limited or self._met_old[_slot(user_id)]:
            return None
        parts = list(islice(chunks(keys), 2))
        return parts[0] if len(parts) == 1 else None

    def _add(
        self,
        txn: Transaction,
        user_id: str,
        version: int,
        keys: Sequence[RoomKey],
        rows: list[tuple[Any, ...]],
    ) -> BackupState | None:
        """Lock the version until the commit, and add keys if they are all new.

        Returns:
            The backup's state afterwards, or None if nothing was added: the upload has
            to look first.
        """
        backup = user_id, version
        added = len(keys), sum(size(key.session_data) for key in keys)
        parameters = [*backup, *added, *backup, user_id]
        parameters += self._dialect.pack_ids([ids_of(key) for key in keys])
        parameters += [*backup, *backup, *backup, *self._dialect.pack_keys(rows)]
        txn.execute(self._dialect.add_keys, [*parameters, *self._count_times()])
        row = txn.fetchone()
        if row is None:
            return None
        etag, count = row
        if count is None:
            return self._count_anew(txn, user_id, version)[0]
        return BackupState(etag, count)

    def _begin(self, txn: Transaction) -> None:
        """Begin a transaction that reads and then writes."""
        if self._dialect.begin_write is not None:
            txn.execute(self._dialect.begin_write)

    def _lock(self, txn: Transaction, user_id: str, version: int) -> str:
        """Lock a version until the commit; its algorithm.

        Raises:
            NotFoundError: there is no such version.
        """
        txn.execute(self._dialect.lock_version, (user_id, version))
        row = txn.fetchone()
        if row is None or row[1]:
            raise unknown_version()
        algorithm: str = row[0]
        return algorithm

    def _find(
        self,
        txn: Transaction,
        user_id: str,
        version: int,
        keys: Sequence[RoomKey],
        with_data: bool = False,
    ) -> Found:
        """What a version holds of some sessions, and what it is like.

        Args:
            with_data: read the data of the sessions, and see whether they are JSON.

        Raises:
            NotFoundError: there is no such version.
            _NotJsonError: the data of a session aren't JSON.
        """
        parameters = [user_id, user_id, *self._count_times(), user_id, version]
        parameters += self._dialect.pack_ids([ids_of(key) for key in keys])
        parameters += [user_id, version]
        dialect = self._dialect
        with self._noticing_data():
            if with_data:
                txn.execute(dialect.find_sessions_with_data, parameters)
            else:
                txn.execute(dialect.find_sessions, parameters)
            rows = txn.fetchall()
        if not rows:
            raise unknown_version()
        return found_of(rows, with_data)

    @contextmanager
    def _noticing_data(self) -> Iterator[None]:
        """Turn the driver's error for data that aren't JSON, which shows them, into
        `_NotJsonError`."""
        try:
            yield
        except Exception as error:
            if self._dialect.is_not_json(error):
                raise _NotJsonError from None
            raise

    def _write(
        self,
        txn: Transaction,
        user_id: str,
        version: int,
        etag: int,
        plan: MergePlan,
        has_lock: bool,
    ) -> bool:
        """Write what an upload changes, and lock the version until the commit.

        Args:
            etag: what it was when the plan was made.
            has_lock: whether it is locked already.

        Returns:
            Whether that was done. Else the etag is another by now, or the version isn't
            the current one any more; it is locked, though.
        """
        steps = self._dialect.write_more_keys if has_lock else self._dialect.write_keys
        seen, added = etag, (plan.stored, plan.added_bytes)
        for rows in chunks(plan.writes):
            write = sql.Write(
                backup=(user_id, version),
                seen=(seen,),
                moved=(etag + 1,),
                added=added,
                keys=self._dialect.pack_keys(rows),
            )
            first, *others = steps
            txn.execute(first.statement, first.parameters(write))
            if not txn.rowcount:
                return False
            for step in others:
                txn.execute(step.statement, step.parameters(write))
            steps = self._dialect.write_more_keys
            seen, added = etag + 1, (0, 0)
        return True

    def _current(self, txn: Transaction, user_id: str) -> int | None:
        txn.execute(sql.CURRENT_VERSION, (user_id,))
        row = txn.fetchone()
        return None if row is None else row[0]

    def _state(
        self,
        txn: Transaction,
        user_id: str,
        version: int,
        found: Found,
        changed: bool,
        added: int,
    ) -> BackupState:
        """What a version is like after a write, with its count cached.

        Args:
            found: what it was like before.
            changed: whether the etag has moved, and a cached count with it.
            added: how many keys more it holds now.
        """
        if found.count is None:
            return self._count_anew(txn, user_id, version)[0]
        return BackupState(found.etag + changed, found.count + added)

    def _count_anew(
        self, txn: Transaction, user_id: str, version: int
    ) -> tuple[BackupState, int | None]:
        """Count the keys of a version, and their bytes if these are limited, and cache
        what was found.

        Raises:
            NotFoundError: there is no such version, or no longer.
        """
        measures = self._limits.max_user_bytes is not None
        statement = self._dialect.measure_keys if measures else sql.COUNT_KEYS
        now = int(self._now())
        txn.execute(statement, (now, user_id, version, user_id, version))
        rows = txn.fetchall()
        if not rows:
            raise unknown_version()
        ((etag, count, size),) = rows
        return BackupState(etag, count), size

    def _check_user(self, txn: Transaction, user_id: str) -> None:
        """Count and measure a user's backups where the operator limits them.

        Raises:
            UserLimitError: they are over a limit.
        """
        max_keys, max_bytes = self._limits.max_user_keys, self._limits.max_user_bytes
        if max_keys is None and max_bytes is None:
            return
        txn.execute(self._dialect.user_sizes, (user_id, *self._count_times(), user_id))
        keys = size = 0
        for version, auth_data_size, its_keys, its_size in txn.fetchall():
            if its_keys is None or (its_size is None and max_bytes is not None):
                try:
                    state, its_size = self._count_anew(txn, user_id, version)
                except NotFoundError:
                    # It was deleted meanwhile.
                    continue
                its_keys = state.count
            keys += its_keys
            size += (its_size or 0) + auth_data_size
        if max_keys is not None and keys > max_keys:
            raise UserLimitError(f"A user may back up {max_keys} keys at most")
        if max_bytes is not None and size > max_bytes:
            raise UserLimitError(f"A user may back up {max_bytes} bytes at most")

    def _count_times(self) -> tuple[int, int]:
        """The oldest and the newest time that a count may be of."""
        now = int(self._now())
        return now - sql.COUNT_LIFETIME, now

    def _give_pages(
        self,
        txn: Transaction,
        backup: tuple[str, int],
        room_id: str | None,
        after: Position | None,
        by_cursor: bool,
        most: int,
        take: Callable[[KeyPage], bool],
    ) -> tuple[Position | None, bool, int]:
        """Read some keys and give them away, with nothing left of them here.

        Args:
            by_cursor: whether the transaction has a cursor that goes on after the keys
                before them. It has no more rows at the end; without one, the version
                has been deleted where there are none.
            most: how many pages to give. Keys that it doesn't reach are read again.

        Returns:
            Where the next page begins, whether it is wanted, and how many were given.
        """
        statement, parameters = page_statement(
            self._dialect, backup, room_id, after, by_cursor
        )
        txn.execute(statement, parameters)
        found = txn.fetchall()
        if not (found or by_cursor):
            raise unknown_version()
        given = 0
        is_wanted = True
        for page in islice(key_pages(found, keys_after(after)), most):
            given += 1
            after, is_wanted = page.last, take(page)
            if not is_wanted:
                break
        return after, is_wanted, given

    def _key_txn(
        self,
        txn: Transaction,
        user_id: str,
        version: int,
        room_id: str,
        session_id: str,
    ) -> RoomKey | None:
        backup = user_id, version
        txn.execute(sql.GET_KEY, (*backup, room_id, session_id, *backup))
        row = txn.fetchone()
        if row is None:
            raise unknown_version()
        *fields, session_data = row
        if session_data is None:
            return None
        if not is_json(session_data):
            report_broken_row(backup, room_id, session_id)
            return None
        return RoomKey(room_id, session_id, metadata(fields), session_data)

    def _delete_keys_txn(
        self,
        txn: Transaction,
        user_id: str,
        version: int,
        room_id: str | None,
        session_id: str | None,
    ) -> tuple[BackupState, int, bool]:
        self._begin(txn)
        self._lock(txn, user_id, version)
        found = self._find(txn, user_id, version, ())
        if session_id is None:
            deleted, is_complete = self._delete_some(txn, user_id, version, room_id)
        else:
            txn.execute(sql.DELETE_ROOM_KEY, (user_id, version, room_id, session_id))
            deleted, is_complete = txn.rowcount, True
        if deleted:
            seen, moved = found.etag, found.etag + 1
            txn.execute(sql.CLAIM, (moved, user_id, version, seen))
            txn.execute(sql.MOVE_COUNT, (moved, -deleted, None, user_id, version, seen))
        state = self._state(txn, user_id, version, found, bool(deleted), -deleted)
        return state, deleted, is_complete

    def _delete_some(
        self, txn: Transaction, user_id: str, version: int, room_id: str | None
    ) -> tuple[int, bool]:
        """Delete keys of a version or of a room, as many as a transaction may: how many
        that was, and whether none is left."""
        dialect = self._dialect
        most = dialect.deleted_at_once
        where: tuple[Any, ...] = (user_id, version)
        if most is not None:
            where = (user_id, *where)
        if room_id is None:
            txn.execute(dialect.delete_keys, where)
        else:
            txn.execute(dialect.delete_room_keys, (*where, room_id))
        return txn.rowcount, most is None or txn.rowcount < most

    def _create_version_txn(
        self, txn: Transaction, user_id: str, algorithm: str, auth_data: str
    ) -> int:
        self._begin(txn)
        self._lock_current(txn, user_id)
        while True:
            txn.execute(sql.VERSION_NUMBERS, (user_id, user_id))
            kept, highest, versions, deleted = txn.fetchone()
            if versions - deleted >= self._limits.max_user_versions:
                most = self._limits.max_user_versions
                raise UserLimitError(
                    f"A user may have {most} versions at most: delete one first"
                )
            version = max((kept or 0) + 1, (highest or 0) + 1, int(self._now()))
            txn.execute(
                self._dialect.insert_version, (user_id, version, algorithm, auth_data)
            )
            if txn.rowcount:
                break
        txn.execute(sql.SAVE_NUMBER, (user_id, version))
        txn.execute(sql.SAVE_COUNT, (user_id, version, 0, 0, 0, int(self._now())))
        if deleted > _DELETED_VERSIONS:
            parameters = (user_id, user_id, _DELETED_VERSIONS, user_id)
            txn.execute(sql.DROP_DELETED_VERSIONS, parameters)
        if self._limits.max_user_bytes is not None:
            self._check_user(txn, user_id)
        return version

    def _lock_current(self, txn: Transaction, user_id: str) -> None:
        """Lock the version that is current, so that no upload to it is under way when
        another takes its place."""
        locked: int | None = None
        while (current := self._current(txn, user_id)) != locked:
            txn.execute(self._dialect.lock_version, (user_id, current))
            locked = current

    def _info_txn(
        self, txn: Transaction, user_id: str, version: int | None
    ) -> tuple[BackupInfo | None, bool]:
        """Find a version or the current one, and count its keys if no count is cached.

        Returns:
            The version, None when there is none, and whether its count was cached.
        """
        parameters = (user_id, *self._count_times(), user_id)
        while True:
            if version is None:
                txn.execute(sql.CURRENT_INFO, parameters)
            else:
                txn.execute(sql.VERSION_INFO, (*parameters, version))
            row = txn.fetchone()
            if row is None:
                return None, True
            number, algorithm, auth_data, *_, count = row
            if count is not None:
                return BackupInfo(*row), True
            txn.execute(sql.FIND_COUNT, (user_id, number, user_id, number))
            counted = txn.fetchone()
            if counted is not None:
                return BackupInfo(number, algorithm, auth_data, *counted), False
            # The version was deleted between the two statements.

    def _keep_count_txn(self, txn: Transaction, user_id: str, info: BackupInfo) -> None:
        """Cache a count that was found without a lock, if the etag hasn't moved."""
        backup = user_id, info.version
        txn.execute(sql.KEEP_COUNT, (info.count, int(self._now()), *backup, info.etag))

    def _update_version_txn(
        self,
        txn: Transaction,
        user_id: str,
        version: int,
        algorithm: str,
        auth_data: str,
    ) -> None:
        self._begin(txn)
        if self._lock(txn, user_id, version) != algorithm:
            raise InvalidParamError("The algorithm of a version can't be changed")
        before: str | None = None
        if self._limits.max_user_bytes is not None:
            txn.execute(sql.AUTH_DATA, (user_id, version))
            (before,) = txn.fetchone()
        txn.execute(sql.SET_AUTH_DATA, (auth_data, user_id, version))
        if before is not None and size(auth_data) > size(before):
            self._check_user(txn, user_id)

    def _delete_version_txn(
        self, txn: Transaction, user_id: str, version: int
    ) -> tuple[bool, bool]:
        self._begin(txn)
        txn.execute(self._dialect.lock_version, (user_id, version))
        row = txn.fetchone()
        if row is None:
            raise unknown_version()
        is_first = not row[1]
        if is_first:
            # Synapse's own endpoints may have made the version.
            txn.execute(sql.SAVE_NUMBER, (user_id, version))
            txn.execute(sql.MARK_DELETED, (user_id, version))
            txn.execute(sql.FORGET_COUNT, (user_id, version))
        _, is_complete = self._delete_some(txn, user_id, version, None)
        return is_first, is_complete

    def _forget_user_txn(self, txn: Transaction, user_id: str) -> None:
        txn.execute(sql.SAVE_LAST_NUMBER, (user_id, user_id))
        txn.execute(sql.FORGET_USER, (user_id,))


def report_broken_row(backup: tuple[str, int], room_id: str, session_id: str) -> None:
    """Log and count a stored key that no client could read.

    Args:
        backup: a user and a version.
    """
    metrics.broken_rows.inc()
    logger.error(
        "Left out a key: its session_data isn't JSON:"
        " user=%s version=%s room=%s session=%s",
        *(*backup, shown(room_id), shown(session_id)),
    )


def _slot(user_id: str) -> int:
    """Where what a user's last upload met is kept. Some users share it: a wrong guess
    costs time, nothing else."""
    return hash(user_id) % _SLOTS

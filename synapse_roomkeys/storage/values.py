"""The values of an engine's methods."""

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from ..types import BackupId, Position, Replacement, RoomKey, StoredKey


def names(backup: BackupId) -> dict[str, Any]:
    """Return a backup's ids as parameters of a statement."""
    return {"user_id": backup.user_id, "version": backup.version}


@attrs.frozen
class TableStatements:
    """An engine's statements about its tables and sessions. Without another word, a
    statement has no parameters.

    Attributes:
        find_read_only: returns 1 if the session can't write, else 0.
        find_encoding: returns the name of the database's encoding.
        find_tables: returns the names of those of `ALL_TABLES` that exist. The
            transaction's next statement sees tables that others commit.
        lock: keeps other processes from creating tables until the commit, which is on
            disk when it returns.
        touch: writes a row without a change, to test that the database accepts writes.
            A row that another process has locked is skipped without a wait.
        estimate_keys: returns the approximate number of keys in all backups, without
            counting them: the sum of the cached counts (SQLite), which lacks backups
            that were never counted, or the server's statistics (PostgreSQL), kept by
            its autovacuum.
        measure_keys: returns the user, the version, the number of keys and the bytes of
            ``session_data`` of each version that has keys, of the users from ``first``
            to ``last``.
        measure_tables: returns the name of a table and its bytes, with its indexes.
    """

    find_read_only: str
    find_encoding: str
    find_tables: str
    lock: str
    touch: str
    estimate_keys: str
    measure_keys: str
    measure_tables: str


@attrs.frozen
class DownloadStatements:
    """The four statements that begin a download, ordered by room and session id.

    Each row has the room id of a key, the key's text as a member of a JSON object
    (``"session_id":{...,"session_data":``) up to the data, and the data, which may not
    be JSON. A version without keys gives one row of NULLs. A missing version gives no
    row.

    Attributes:
        backup: reads a backup from its first key.
        backup_after: reads a backup after the key ``room_id``, ``session_id``.
        room: reads a room from its first key.
        room_after: reads a room after the key ``session_id``.
    """

    backup: str
    backup_after: str
    room: str
    room_after: str


@attrs.frozen
class PageQuery:
    """The part of a backup that a download reads next.

    Attributes:
        room_id: only the keys of this room; None for all rooms.
        after: the last key of the page before; None for the first page.
        limit: maximum number of keys that the cursor returns in all.
        count: maximum number of keys that the query itself returns.
    """

    backup: BackupId
    room_id: str | None
    after: Position | None
    limit: int
    count: int

    def select(self, statements: DownloadStatements) -> str:
        """Return the statement for this room and this place."""
        if self.room_id is None:
            return statements.backup if self.after is None else statements.backup_after
        return statements.room if self.after is None else statements.room_after

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters of the selected statement."""
        parameters = {**names(self.backup), "limit": self.limit, "count": self.count}
        if self.after is not None:
            parameters["room_id"] = self.after.room_id
            parameters["session_id"] = self.after.session_id
        if self.room_id is not None:
            parameters["room_id"] = self.room_id
        return parameters


@attrs.frozen
class CountWindow:
    """The time window in which a cached count must have been counted, in Unix
    seconds."""

    oldest: int
    newest: int


@attrs.frozen
class Snapshot:
    """The state of a version that one query read.

    Attributes:
        current: the number of the user's current version.
        count: the cached number of keys; None if no valid count is cached.
        stored: the stored sessions, by their positions among the queried keys.
    """

    etag: int
    current: int
    count: int | None
    stored: dict[int, StoredKey]


@attrs.frozen
class LockedVersion:
    """A version's row that is locked until the commit."""

    algorithm: str
    is_deleted: bool


@attrs.frozen
class KeyInsert:
    """Keys to insert if all of them are new.

    Attributes:
        added_bytes: total size of the keys' ``session_data`` in bytes.
        note: the change as parameters of the record's row; None for no row.
    """

    backup: BackupId
    keys: Sequence[RoomKey]
    added_bytes: int
    note: Mapping[str, Any] | None


@attrs.frozen
class KeyWrite:
    """Keys to write if the version's etag is the expected etag.

    Attributes:
        new_etag: the etag of the version afterwards.
        added_keys: change of the version's number of keys.
        added_bytes: change of the total size of ``session_data``, in bytes.
        keys: the keys, which replace stored keys of the same ids.
        kept: the replaced keys to keep, so that they can be given back.
        now_ms: Unix time in milliseconds, at which the keys are replaced.
        note: the change as parameters of the record's row; None for no row.
    """

    backup: BackupId
    expected_etag: int
    new_etag: int
    added_keys: int
    added_bytes: int
    keys: Sequence[RoomKey]
    kept: Sequence[Replacement]
    now_ms: int
    note: Mapping[str, Any] | None


@attrs.frozen
class ReplacedKey:
    """A replaced key that is kept, identified by its replacement.

    Attributes:
        replaced_ms: Unix time of the replacement, in milliseconds.
        etag: the etag of the version after the replacement.
    """

    room_id: str
    session_id: str
    replaced_ms: int
    etag: int


@attrs.frozen
class KeyRestore:
    """Replaced keys to write over the stored keys of their sessions.

    Attributes:
        new_etag: the etag of the version afterwards.
        now_ms: Unix time in milliseconds, at which the stored keys are replaced.
        rows: the keys, one for a session at most.
    """

    backup: BackupId
    new_etag: int
    now_ms: int
    rows: Sequence[ReplacedKey]


@attrs.frozen
class InsertedKeys:
    """A version after all keys of a `KeyInsert` were inserted.

    Attributes:
        count: the number of keys; None if the cached count has expired.
    """

    etag: int
    count: int | None


@attrs.frozen
class DeletedKeys:
    """The outcome of one deletion.

    Attributes:
        count: number of deleted keys.
        is_complete: Whether all keys are deleted that the call names.
    """

    count: int
    is_complete: bool

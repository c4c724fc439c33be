"""The port of the store to a database engine, and the values of its methods."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import attrs

from ..outages import Cause
from ..types import BackupId, Position, Replacement, RoomKey, StoredKey
from .citus import Cluster
from .faults import Fault
from .transactions import Transaction


class NotJsonError(Exception):
    """The ``session_data`` of a stored key isn't JSON."""


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


class Engine(Protocol):
    """A database engine: its statements, and the meaning of its driver's errors.

    Attributes:
        name: the engine's name in metrics.
        error: base class of the driver's exceptions.
        count_keys_and_bytes: `COUNT_KEYS` that measures ``session_data`` as well; None
            if keys are measured in batches, by `key_sizes`.
        key_sizes: returns the room id, the session id and the bytes of ``session_data``
            of a version's keys, ordered by the ids. The rows begin with the key
            ``room_id``, ``session_id``, or the next key if that key isn't stored. There
            are at most ``limit`` rows. None if `count_keys_and_bytes` is a statement.
        user_sizes: returns a row for each of a user's versions that isn't deleted: its
            version number, bytes of ``auth_data``, cached count and bytes of the keys.
            The cached values are NULL if their etag isn't the version's or if they were
            counted outside of the `CountWindow`.
        pages_at_once: maximum number of pages that a download reads in one transaction.
        swept_at_once: maximum number of sessions whose keys the sweeper deletes in one
            transaction.
        has_insert: Whether `insert_if_all_new` is implemented.
        is_distributed: Whether the tables are distributed over several nodes. False
            until `find_cluster` has found distributed tables.
    """

    name: str
    error: type[Exception]
    count_keys_and_bytes: str | None
    key_sizes: str | None
    user_sizes: str
    pages_at_once: int
    swept_at_once: int
    has_insert: bool
    is_distributed: bool

    @property
    def tables(self) -> TableStatements:
        """Statements about tables and sessions."""

    @property
    def has_cursor(self) -> bool:
        """Whether `next_page` is implemented: within a transaction, it continues after
        `read_page`."""

    def prepare(self, txn: Transaction) -> Transaction:
        """Return a transaction that accepts named parameters (``:name``) and sets the
        engine's timeouts."""

    def judge(self, error: Exception) -> Fault:
        """Return the kind of an exception; DEFECT if the driver didn't raise it."""

    def find_cause(self, error: Exception) -> Cause:
        """Return the cause of a driver's error, for metrics and logs."""

    def is_not_json(self, error: Exception) -> bool:
        """Return whether an error says that ``session_data`` isn't JSON."""

    def find_cluster(self, txn: Transaction) -> Cluster | None:
        """Return the database's Citus cluster, or None, and set `is_distributed`. Each
        process calls the method at the start."""

    def begin_write(self, txn: Transaction) -> None:
        """Begin a transaction that reads and then writes.

        In each transaction, a statement sees all commits before the statement.
        """

    def begin_batch(self, txn: Transaction) -> None:
        """As `begin_write`, for a transaction that deletes a batch of keys. The engine
        finds the batch by an index, however much of the table the user's keys are."""

    def execute_all(
        self, statements: Sequence[str], txn: Transaction, parameters: Any
    ) -> None:
        """Run statements with the same parameters, in one round trip. Their results are
        lost."""

    def lock_version(self, txn: Transaction, backup: BackupId) -> LockedVersion | None:
        """Lock a version's row until the commit. The commit returns once it is on disk.

        Returns:
            The version, deleted or not; None if there is no row.
        """

    def insert_version(
        self, txn: Transaction, backup: BackupId, algorithm: str, auth_data: str
    ) -> bool:
        """Insert a version, unless its number is taken. The commit returns once it is
        on disk.

        Returns:
            Whether it was inserted.
        """

    def find_sessions(
        self,
        txn: Transaction,
        backup: BackupId,
        keys: Sequence[RoomKey],
        window: CountWindow,
        with_data: bool,
    ) -> list[tuple[Any, ...]]:
        """Read a version and the stored sessions among some keys, with one query and
        without a lock.

        Args:
            with_data: return the ``session_data`` of each session, JSON or not. If
                False, return whether the ``session_data`` is other than JSON null.

        Returns:
            Rows for `read_snapshot`; an empty list if there is no such version.

        Raises:
            Exception: without ``with_data``, the ``session_data`` of a session isn't
                JSON. The driver's error, which `is_not_json` recognizes.
        """

    def insert_if_all_new(
        self, txn: Transaction, insert: KeyInsert, window: CountWindow
    ) -> InsertedKeys | None:
        """Lock a version until the commit, insert keys unless a key is stored, and
        record the change. The commit returns once it is on disk.

        Returns:
            None if no key was inserted: a key is stored, the version isn't current, or
            no count of the version's etag is cached, valid or expired.

        Raises:
            Exception: a process that takes no lock inserts one of the keys at the same
                time. The driver's error, which `judge` calls `Fault.CONFLICT`.
        """

    def compare_and_write(
        self, txn: Transaction, write: KeyWrite, has_lock: bool
    ) -> bool:
        """Lock a version until the commit, move the etag and the cached count, keep
        replaced keys, write keys, and record the change. The commit returns once it is
        on disk.

        Args:
            has_lock: Whether the transaction has locked the version already.

        Returns:
            True if the keys are written. False if no row was written, because the etag
            isn't the expected etag or a newer version exists; the version is locked
            all the same.
        """

    def restore_keys(self, txn: Transaction, restored: KeyRestore) -> None:
        """Keep the stored keys of some sessions, and write replaced keys over them. The
        transaction has locked the version."""

    def delete_keys(
        self, txn: Transaction, backup: BackupId, room_id: str | None
    ) -> DeletedKeys:
        """Delete keys of a version or of a room, as many as one transaction may."""

    def read_page(self, txn: Transaction, query: PageQuery) -> list[tuple[Any, ...]]:
        """Read the first keys of a query.

        Returns:
            The rows that `DownloadStatements` describes.
        """

    def next_page(self, txn: Transaction, count: int) -> list[tuple[Any, ...]]:
        """Read the keys after the last `read_page` or `next_page`.

        Returns:
            The rows; an empty list at the end of the cursor.
        """


def names(backup: BackupId) -> dict[str, Any]:
    """Return a backup's ids as parameters of a statement."""
    return {"user_id": backup.user_id, "version": backup.version}


@contextmanager
def not_json_errors(engine: Engine) -> Iterator[None]:
    """Turn the driver's error for ``session_data`` that isn't JSON into
    `NotJsonError`, because the driver's message quotes the data."""
    try:
        yield
    except Exception as error:
        if engine.is_not_json(error):
            raise NotJsonError from None
        raise

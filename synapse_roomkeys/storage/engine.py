"""The port of the store to a database engine."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from ..outages import Cause
from ..types import BackupId, RoomKey
from .citus import Cluster
from .faults import Fault
from .transactions import Transaction
from .values import (
    CountWindow,
    DeletedKeys,
    InsertedKeys,
    KeyInsert,
    KeyRestore,
    KeyWrite,
    LockedVersion,
    PageQuery,
    TableStatements,
)


class NotJsonError(Exception):
    """The ``session_data`` of a stored key isn't JSON."""


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
        """Return whether an error says that ``session_data`` isn't JSON, or isn't
        UTF-8."""

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

"""PostgreSQL: the class that sends the statements and judges the driver's errors."""

import math
import re
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

from twisted.enterprise import adbapi

from ..outages import Cause
from ..types import BackupId, RoomKey
from . import postgres_settings as settings
from . import postgres_statements as sql
from .causes import find_postgres_cause
from .citus import Cluster, find_cluster
from .faults import Fault, judge_sqlstate
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
    names,
)

#: Number of pages that a download reads in one transaction, while holding one of the
#: connections for about 50 ms.
PAGES_AT_ONCE = 25
#: How many sessions' keys the sweeper deletes in one transaction. The transaction locks
#: the row of the deleted version, for which no other request waits.
SWEPT_AT_ONCE = 2000

#: SQLSTATEs of a cast to JSON that fails: invalid_text_representation, and
#: statement_too_complex for a text that is nested too deeply.
_NOT_JSON = ("22P02", "54001")
#: SQLSTATE of a statement after its statement_timeout.
_STATEMENT_TIMEOUT = "57014"
#: SQLSTATEs, by their beginning, of a statement for which Citus got no answer of the
#: node with the user's keys: connection exceptions, and the timeout.
_NODE_FAULTS = ("08", _STATEMENT_TIMEOUT)
#: A named parameter. A colon of a cast (``::text``) stands beside another one.
_PARAMETER = re.compile(r"(?<!:):([a-z_]+)")


@cache
def to_pyformat(statement: str) -> str:
    """Translate a statement's named parameters (``:name``) for psycopg2
    (``%(name)s``), in which a literal ``%`` is doubled."""
    return _PARAMETER.sub(r"%(\1)s", statement.replace("%", "%%"))


class PostgresTransaction:
    """A transaction that accepts named parameters, and sends settings in one message
    with the first statement."""

    def __init__(self, txn: Transaction, limits: str) -> None:
        """
        Args:
            limits: the settings, each with a semicolon.
        """
        self._txn = txn
        self._limits = limits
        self.fetchone = txn.fetchone
        self.fetchall = txn.fetchall

    @property
    def rowcount(self) -> int:
        """As `Transaction.rowcount`."""
        return self._txn.rowcount

    @property
    def description(self) -> Any:
        """As `Transaction.description`."""
        return self._txn.description

    def execute(self, statement: str, parameters: Any = ()) -> Any:
        """As `Transaction.execute`."""
        limits, self._limits = self._limits, ""
        return self._txn.execute(limits + to_pyformat(statement), parameters)


class PostgresEngine:
    """PostgreSQL, as `Engine` describes it.

    Raises:
        ImportError: psycopg2 isn't installed.
    """

    name = "postgresql"
    error: type[Exception]
    count_keys_and_bytes: str | None = sql.COUNT_KEYS_AND_BYTES
    key_sizes: str | None = None
    user_sizes = sql.USER_SIZES
    pages_at_once = PAGES_AT_ONCE
    swept_at_once = SWEPT_AT_ONCE
    has_insert = True

    def __init__(self) -> None:
        import psycopg2

        self.is_distributed = False
        #: Monotonic time of the last statement timeout, in seconds. Written by the
        #: reactor thread and by database threads, read by database threads.
        self._last_stall = -math.inf
        self.error = psycopg2.Error
        # Errors without a SQLSTATE are libpq's, for a connection that failed or broke,
        # or, of these classes, psycopg2's own, for a wrong call.
        self._wrong_calls = (
            psycopg2.DataError,
            psycopg2.IntegrityError,
            psycopg2.NotSupportedError,
            psycopg2.ProgrammingError,
        )

    @property
    def tables(self) -> TableStatements:
        """As `Engine.tables`."""
        if self.is_distributed:
            return sql.DISTRIBUTED_TABLE_STATEMENTS
        return sql.TABLE_STATEMENTS

    @property
    def has_cursor(self) -> bool:
        """As `Engine.has_cursor`. Citus fetches all rows of a cursor to the node of the
        service's connection before the first page."""
        return not self.is_distributed

    def prepare(self, txn: Transaction) -> Transaction:
        """As `Engine.prepare`."""
        if not self.is_distributed:
            return PostgresTransaction(txn, settings.LIMITS)
        suspicious = time.monotonic() - self._last_stall < settings.SUSPICION_SECONDS
        if suspicious:
            return PostgresTransaction(txn, settings.SUSPICIOUS_LIMITS)
        return PostgresTransaction(txn, settings.DISTRIBUTED_LIMITS)

    def judge(self, error: Exception) -> Fault:
        """As `Engine.judge`."""
        if isinstance(error, adbapi.ConnectionLost):
            return Fault.OUTAGE
        if not isinstance(error, self.error):
            return Fault.DEFECT
        code = getattr(error, "pgcode", None)
        if code and self.is_distributed and code.startswith(_NODE_FAULTS):
            # Retries run in the lane of locked transactions, one after the other:
            # retries for users of a hanging node hold a single connection.
            if code == _STATEMENT_TIMEOUT:
                self._last_stall = time.monotonic()
            return Fault.LOCKED
        if code:
            return judge_sqlstate(code)
        return Fault.DEFECT if isinstance(error, self._wrong_calls) else Fault.OUTAGE

    def find_cause(self, error: Exception) -> Cause:
        """As `Engine.find_cause`."""
        return find_postgres_cause(error)

    def is_not_json(self, error: Exception) -> bool:
        """As `Engine.is_not_json`."""
        return getattr(error, "pgcode", None) in _NOT_JSON

    def find_cluster(self, txn: Transaction) -> Cluster | None:
        """As `Engine.find_cluster`."""
        cluster = find_cluster(txn)
        if cluster is not None and cluster.is_distributed:
            self.is_distributed = True
        return cluster

    def begin_write(self, txn: Transaction) -> None:
        """Do nothing: the driver begins the transaction, in READ COMMITTED."""

    def begin_batch(self, txn: Transaction) -> None:
        """As `Engine.begin_batch`."""
        txn.execute(settings.NO_TABLE_SCAN)

    def execute_all(
        self, statements: Sequence[str], txn: Transaction, parameters: Any
    ) -> None:
        """As `Engine.execute_all`."""
        statement = ";".join(statements)
        txn.execute(statement, parameters)

    def lock_version(self, txn: Transaction, backup: BackupId) -> LockedVersion | None:
        """As `Engine.lock_version`."""
        txn.execute(sql.LOCK_VERSION, names(backup))
        row = txn.fetchone()
        return None if row is None else LockedVersion(row[0], bool(row[1]))

    def insert_version(
        self, txn: Transaction, backup: BackupId, algorithm: str, auth_data: str
    ) -> bool:
        """As `Engine.insert_version`."""
        values = {"algorithm": algorithm, "auth_data": auth_data}
        txn.execute(sql.INSERT_VERSION, {**names(backup), **values})
        return bool(txn.rowcount)

    def find_sessions(
        self,
        txn: Transaction,
        backup: BackupId,
        keys: Sequence[RoomKey],
        window: CountWindow,
        with_data: bool,
    ) -> list[tuple[Any, ...]]:
        """As `Engine.find_sessions`."""
        parameters = {
            **names(backup),
            "oldest": window.oldest,
            "newest": window.newest,
            "room_ids": pack_array([key.room_id for key in keys]),
            "session_ids": pack_array([key.session_id for key in keys]),
        }
        if with_data:
            txn.execute(sql.FIND_SESSIONS_WITH_DATA, parameters)
        else:
            txn.execute(sql.FIND_SESSIONS, parameters)
        return txn.fetchall()

    def insert_if_all_new(
        self, txn: Transaction, insert: KeyInsert, window: CountWindow
    ) -> InsertedKeys | None:
        """As `Engine.insert_if_all_new`."""
        parameters = {
            **names(insert.backup),
            "added_keys": len(insert.keys),
            "added_bytes": insert.added_bytes,
            "oldest": window.oldest,
            "newest": window.newest,
            **_pack_keys(insert.keys),
            **(insert.note or {}),
        }
        note = "" if insert.note is None else f"{sql.NOTE_INSERT};"
        txn.execute(
            f"{sql.LOCK_VERSION}; {sql.CLAIM_INSERT}; {sql.INSERT_KEYS};"
            f"{note} {sql.SETTLE_INSERT}",
            parameters,
        )
        row = txn.fetchone()
        return None if row is None else InsertedKeys(*row)

    def compare_and_write(
        self, txn: Transaction, write: KeyWrite, has_lock: bool
    ) -> bool:
        """As `Engine.compare_and_write`."""
        parameters = {
            **names(write.backup),
            "expected_etag": write.expected_etag,
            "new_etag": write.new_etag,
            "added_keys": write.added_keys,
            "added_bytes": write.added_bytes,
            **_pack_keys(write.keys),
            **(write.note or {}),
        }
        if write.kept:
            parameters["replaced_ms"] = write.now_ms
            parameters["kept_room_ids"] = pack_array([k.room_id for k in write.kept])
            parameters["kept_session_ids"] = pack_array(
                [key.session_id for key in write.kept]
            )
        lock = "" if has_lock else f"{sql.LOCK_VERSION};"
        keep = f"{sql.KEEP_REPLACED};" if write.kept else ""
        note = "" if write.note is None else f"{sql.NOTE_WRITE};"
        txn.execute(
            f"{lock} {sql.CLAIM_WRITE};{keep} {sql.WRITE_KEYS};"
            f"{note} {sql.SETTLE_WRITE}",
            parameters,
        )
        return bool(txn.rowcount)

    def restore_keys(self, txn: Transaction, restored: KeyRestore) -> None:
        """As `Engine.restore_keys`."""
        rows = restored.rows
        parameters = {
            **names(restored.backup),
            "replaced_ms": restored.now_ms,
            "etag": restored.new_etag,
            "room_ids": pack_array([row.room_id for row in rows]),
            "session_ids": pack_array([row.session_id for row in rows]),
            "times": pack_array([row.replaced_ms for row in rows]),
            "etags": pack_array([row.etag for row in rows]),
        }
        txn.execute(sql.KEEP_KEYS, parameters)
        txn.execute(sql.RESTORE_KEYS, parameters)

    def delete_keys(
        self, txn: Transaction, backup: BackupId, room_id: str | None
    ) -> DeletedKeys:
        """As `Engine.delete_keys`; one transaction deletes all keys."""
        if self.is_distributed:
            txn.execute(settings.DELETION_LIMIT)
        if room_id is None:
            txn.execute(sql.DELETE_KEYS, names(backup))
        else:
            txn.execute(sql.DELETE_ROOM_KEYS, {**names(backup), "room_id": room_id})
        return DeletedKeys(txn.rowcount, is_complete=True)

    def read_page(self, txn: Transaction, query: PageQuery) -> list[tuple[Any, ...]]:
        """As `Engine.read_page`."""
        downloads = sql.DISTRIBUTED_DOWNLOADS if self.is_distributed else sql.DOWNLOADS
        txn.execute(query.select(downloads), query.parameters)
        return txn.fetchall()

    def next_page(self, txn: Transaction, count: int) -> list[tuple[Any, ...]]:
        """As `Engine.next_page`."""
        txn.execute(sql.FETCH_PAGE, {"count": count})
        return txn.fetchall()


def postgres() -> PostgresEngine:
    """Return the engine PostgreSQL.

    Raises:
        ImportError: psycopg2 isn't installed.
    """
    return PostgresEngine()


def pack_array(values: Sequence[Any]) -> str:
    """Return values as the literal of a PostgreSQL array.

    psycopg2 would write an array of its own as an expression, which PostgreSQL takes
    twice as long to read.
    """
    if not values or not isinstance(values[0], str):
        return "{" + ",".join(map(str, values)) + "}"
    escaped = (v.replace("\\", "\\\\").replace('"', '\\"') for v in values)
    return '{"' + '","'.join(escaped) + '"}'


def _pack_keys(keys: Sequence[RoomKey]) -> dict[str, str]:
    """Return keys as the parameters of `_KEYS`: an array a column, except session_data,
    which is one text."""
    metadata = [key.metadata for key in keys]
    return {
        "room_ids": pack_array([key.room_id for key in keys]),
        "session_ids": pack_array([key.session_id for key in keys]),
        "first_message_indexes": pack_array([m.first_message_index for m in metadata]),
        "forwarded_counts": pack_array([m.forwarded_count for m in metadata]),
        "are_verified": pack_array([m.is_verified for m in metadata]),
        "session_data": sql.SEPARATOR.join([key.session_data for key in keys]),
    }

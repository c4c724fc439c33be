"""SQLite: the class that sends the statements and judges the driver's errors."""

import json
import logging
import sqlite3
from collections.abc import Sequence
from typing import Any

from ..identifiers import is_utf8
from ..json_text import are_valid_json, is_valid_json
from ..outages import Cause
from ..types import BackupId, RoomKey
from . import sqlite_statements as sql
from .causes import find_sqlite_cause
from .citus import Cluster
from .faults import Fault, judge_sqlite
from .statements import MOVE_COUNT, NOTE_CHANGE
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
    names,
)

logger = logging.getLogger(__name__)

#: First words of the driver's error about text that isn't UTF-8. The error quotes the
#: text.
_NOT_UTF8 = "Could not decode to UTF-8"
#: SQLite's error about a BLOB as session id.
_BLOB_ID = "JSON cannot hold BLOB values"
#: How many pages a download reads in one transaction. A process has one connection to
#: an SQLite file, for all its users: three pages take some 5 ms.
PAGES_AT_ONCE = 3
#: How many sessions' keys the sweeper deletes in one transaction. All requests of a
#: process wait meanwhile. The rows are scattered, one a page: with 200, each fourth
#: commit fills the write-ahead log and copies its 1,000 pages to the file, which takes
#: 25 ms, and a sweep raised the 99th percentile of the requests' time from 5.5 to 34
#: ms. With 50, one commit in twelve does, and the percentile rose from 6.9 to 14.5 ms.
SWEPT_AT_ONCE = 50


class SqliteEngine:
    """The methods of `Engine` for SQLite.

    A writing transaction holds the write lock of the whole file, in place of the lock
    of a version.
    """

    name = "sqlite"
    error: type[Exception] = sqlite3.Error
    tables = sql.TABLE_STATEMENTS
    #: SQLite reads the data to measure them: 1,000,000 keys of 900 bytes took 6 seconds
    #: with the file in the system's cache, and 13 seconds without.
    count_keys_and_bytes: str | None = None
    key_sizes: str | None = sql.KEY_SIZES
    user_sizes = sql.USER_SIZES
    pages_at_once = PAGES_AT_ONCE
    swept_at_once = SWEPT_AT_ONCE
    #: Without a server, there is no round trip that an insert could save.
    has_insert = False
    is_distributed = False
    has_cursor = False

    def prepare(self, txn: Transaction) -> Transaction:
        """Return the transaction unchanged: SQLite accepts named parameters."""
        return txn

    def judge(self, error: Exception) -> Fault:
        """As `Engine.judge`."""
        return judge_sqlite(error)

    def find_cause(self, error: Exception) -> Cause:
        """As `Engine.find_cause`."""
        return find_sqlite_cause(error)

    def is_not_json(self, error: Exception) -> bool:
        """As `Engine.is_not_json`."""
        return str(error).startswith(_NOT_UTF8)

    def find_cluster(self, txn: Transaction) -> Cluster | None:
        """Return None."""
        return None

    def begin_write(self, txn: Transaction) -> None:
        """As `Engine.begin_write`."""
        txn.execute(sql.BEGIN_WRITE)

    def begin_batch(self, txn: Transaction) -> None:
        """As `Engine.begin_batch`. SQLite always uses the index."""
        txn.execute(sql.BEGIN_WRITE)

    def execute_all(
        self, statements: Sequence[str], txn: Transaction, parameters: Any
    ) -> None:
        """As `Engine.execute_all`."""
        for statement in statements:
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
            "ids": json.dumps([(key.room_id, key.session_id) for key in keys]),
        }
        txn.execute(sql.FIND_SESSIONS, parameters)
        read = _as_text if with_data else _is_whole
        rows = txn.fetchall()
        if rows[:1] and rows[0][-1] is None:
            return [(*rows[0], None)]
        return [(*row[:-1], read(row[-1]), len(row[-1])) for row in rows]

    def insert_if_all_new(
        self, txn: Transaction, insert: KeyInsert, window: CountWindow
    ) -> InsertedKeys | None:
        """Raise: an upload reads first."""
        raise NotImplementedError

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
            "keys": _pack_keys(write.keys),
        }
        txn.execute(sql.SET_ETAG_OF_CURRENT, parameters)
        if not txn.rowcount:
            return False
        if write.kept:
            kept = [(key.room_id, key.session_id) for key in write.kept]
            values = {"replaced_ms": write.now_ms, "etag": write.new_etag}
            ids = {**names(write.backup), "ids": json.dumps(kept)}
            txn.execute(sql.KEEP_KEYS, {**ids, **values})
        txn.execute(sql.WRITE_KEYS, parameters)
        txn.execute(MOVE_COUNT, parameters)
        if write.note is not None:
            txn.execute(NOTE_CHANGE, {**names(write.backup), **write.note})
        return True

    def restore_keys(self, txn: Transaction, restored: KeyRestore) -> None:
        """As `Engine.restore_keys`."""
        rows = [(r.room_id, r.session_id, r.replaced_ms, r.etag) for r in restored.rows]
        parameters = {
            **names(restored.backup),
            "replaced_ms": restored.now_ms,
            "etag": restored.new_etag,
            "ids": json.dumps([row[:2] for row in rows]),
            "rows": json.dumps(rows),
        }
        txn.execute(sql.KEEP_KEYS, parameters)
        txn.execute(sql.RESTORE_KEYS, parameters)

    def delete_keys(
        self, txn: Transaction, backup: BackupId, room_id: str | None
    ) -> DeletedKeys:
        """As `Engine.delete_keys`."""
        if room_id is None:
            txn.execute(sql.DELETE_SOME_KEYS, names(backup))
        else:
            txn.execute(
                sql.DELETE_SOME_ROOM_KEYS, {**names(backup), "room_id": room_id}
            )
        return DeletedKeys(txn.rowcount, txn.rowcount < sql.DELETED_AT_ONCE)

    def read_page(self, txn: Transaction, query: PageQuery) -> list[tuple[Any, ...]]:
        """As `Engine.read_page`. A key whose id isn't UTF-8 has no data, and a key
        whose id is a BLOB is left out."""
        try:
            txn.execute(query.select(sql.DOWNLOADS), query.parameters)
            rows = txn.fetchall()
            if not rows or not isinstance(rows[-1][0], bytes):
                return rows
        except sqlite3.OperationalError as error:
            if not str(error).startswith((_NOT_UTF8, _BLOB_ID)):
                raise
        except UnicodeEncodeError:
            # The id of the last page's last key isn't UTF-8.
            pass
        return self._read_damaged_page(txn, query)

    def _read_damaged_page(
        self, txn: Transaction, query: PageQuery
    ) -> list[tuple[Any, ...]]:
        """Read a page with a row that another program has written: a text isn't UTF-8,
        or an id is a BLOB."""
        logger.error(
            "A backup has text that isn't UTF-8, or an id that is a BLOB. Downloads"
            " leave such keys out, and the command verify names them:"
            " user=%s version=%s",
            query.backup.user_id,
            query.backup.version,
        )
        parameters = query.parameters
        for name in {"room_id", "session_id"} & parameters.keys():
            parameters[name] = parameters[name].encode(errors="surrogateescape")
        txn.execute(query.select(sql.DAMAGED_DOWNLOADS), parameters)
        return [
            row if row[0] is None else _read_damaged_row(*row) for row in txn.fetchall()
        ]

    def next_page(self, txn: Transaction, count: int) -> list[tuple[Any, ...]]:
        """Raise: there is no cursor. `read_page` goes on after the last key."""
        raise NotImplementedError


def _as_text(data: bytes) -> str:
    """Return the session_data of a stored key as a text; "", which isn't JSON, if the
    data aren't UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return ""


def _is_whole(data: bytes) -> bool:
    """Return whether the session_data of a stored key can be sent to clients."""
    text = _as_text(data)
    return text != "null" and (are_valid_json((text,)) or is_valid_json(text))


def _read_damaged_row(room_id: bytes, head: bytes, data: bytes) -> tuple[str, str, str]:
    """Return a row of a download. Bytes that aren't UTF-8 become lone surrogates in the
    ids, so that the next page can begin after the key, and the data become "", which
    isn't JSON: the download leaves the key out."""
    room, text = (ids.decode(errors="surrogateescape") for ids in (room_id, head))
    return room, text, _as_text(data) if is_utf8(room + text) else ""


def _pack_keys(keys: Sequence[RoomKey]) -> str:
    """Return keys as a JSON array of arrays of `WRITE_KEYS`'s columns."""
    return json.dumps(
        [
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
    )


SQLITE = SqliteEngine()

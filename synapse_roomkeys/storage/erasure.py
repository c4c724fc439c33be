"""The operator's deletions: keys of no version, and all rows of a user.

A transaction deletes a batch of keys at most, so other requests wait for a short time.
"""

from typing import Any

import attrs
from twisted.internet.defer import Deferred

from ..types import BackupId
from . import statements
from .engine import Engine
from .sweeps import BATCH_END, DELETE_BATCH, DELETE_REST, EXPIRE_CHANGES, Place
from .transactions import Transaction, Transactions
from .values import names

#: Marks all versions of a user as deleted: no client can read or write them any more.
MARK_USER_DELETED = """
    UPDATE e2e_room_keys_versions SET deleted = 1, auth_data = '{}'
    WHERE user_id = :user_id AND deleted = 0"""
#: Deletes the rows of a user's deleted versions. A version that the user has made since
#: the erasure began stays.
DROP_VERSIONS = """
    DELETE FROM e2e_room_keys_versions WHERE user_id = :user_id AND deleted = 1"""
#: By table, the statement that deletes a user's rows. The order has no meaning.
DELETE_ROWS = {
    "e2e_room_keys_versions": DROP_VERSIONS,
    "roomkeys_changes": statements.FORGET_CHANGES,
    "roomkeys_counts": statements.FORGET_USER,
    "roomkeys_deleted": statements.FORGET_DELETED,
    "roomkeys_replaced": statements.FORGET_REPLACED,
}


@attrs.frozen
class Batch:
    """The outcome of a transaction that deletes a batch of keys.

    Attributes:
        deleted: number of deleted keys.
        next: the place of the next batch; None after the last batch.
    """

    deleted: int
    next: Place | None


class Erasure:
    """The operator's deletions, one method a transaction. The Deferreds fail as the
    `Transactions` do."""

    def __init__(self, database: Transactions, engine: Engine) -> None:
        self._database = database
        self._engine = engine

    def mark_deleted(self, user_id: str) -> "Deferred[None]":
        """Mark all versions of a user as deleted."""

        def mark(txn: Transaction) -> None:
            self._engine.begin_write(txn)
            txn.execute(statements.SAVE_LAST_NUMBER, {"user_id": user_id})
            txn.execute(MARK_USER_DELETED, {"user_id": user_id})

        return self._database.write("roomkeys_erase_mark", mark)

    def delete_batch(
        self, backup: BackupId, after: Place, most: int | None
    ) -> "Deferred[Batch]":
        """Delete a batch of the keys of a version that is deleted or has no row. If
        clients can read the version, delete nothing: it was made meanwhile.

        Args:
            most: maximum number of keys; None for `Engine.swept_at_once`, which is
                never exceeded.
        """
        size = min(most or self._engine.swept_at_once, self._engine.swept_at_once)
        return self._database.write(
            "roomkeys_erase_keys", self._delete_batch, backup, after, size
        )

    def _delete_batch(
        self, txn: Transaction, backup: BackupId, after: Place, size: int
    ) -> Batch:
        self._engine.begin_batch(txn)
        version = self._engine.lock_version(txn, backup)
        if version is not None and not version.is_deleted:
            return Batch(0, None)
        values: dict[str, Any] = {
            **names(backup),
            "room_id": after.room_id,
            "session_id": after.session_id,
            "skipped": size - 1,
        }
        txn.execute(BATCH_END, values)
        last = txn.fetchone()
        if last is None:
            txn.execute(DELETE_REST, values)
            return Batch(txn.rowcount, None)
        values |= {"last_room_id": last[0], "last_session_id": last[1]}
        txn.execute(DELETE_BATCH, values)
        return Batch(txn.rowcount, Place(backup.version, *last))

    def delete_rows(self, user_id: str) -> "Deferred[dict[str, int]]":
        """Delete a user's rows in all tables but the keys, which `delete_batch` deletes
        before, and except the user's last version number. Fire with the numbers of
        deleted rows by table."""

        def delete(txn: Transaction) -> dict[str, int]:
            self._engine.begin_write(txn)
            deleted = {}
            for table, statement in DELETE_ROWS.items():
                txn.execute(statement, {"user_id": user_id})
                deleted[table] = txn.rowcount
            return deleted

        return self._database.write("roomkeys_erase_rows", delete)

    def delete_changes(self, user_id: str, before_ms: int) -> "Deferred[int]":
        """Delete a user's recorded changes before a Unix time in milliseconds. Fire
        with their number."""

        def delete(txn: Transaction) -> int:
            self._engine.begin_write(txn)
            values = {"user_id": user_id, "record_ms": before_ms}
            txn.execute(EXPIRE_CHANGES, values)
            return int(txn.rowcount)

        return self._database.write("roomkeys_delete_changes", delete)

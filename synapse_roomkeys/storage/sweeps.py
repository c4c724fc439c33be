"""The sweeper's transactions: the deletion of keys whose version is deleted, and of
records that have been kept for long enough.

Each transaction is small and concerns one user. Only the lists of users read rows of
several users, a page at a time.
"""

from collections.abc import Callable
from typing import Any

import attrs
from twisted.internet.defer import Deferred

from ..types import BackupId, Retention
from .engine import Engine
from .leases import Leases
from .statements import LEAVE_QUEUE
from .transactions import Transaction, Transactions
from .values import names

#: Maximum number of versions or users on a page of a list.
PAGE = 100
_DAY_MS = 24 * 60 * 60 * 1000

#: Returns the time at which old records were last deleted.
LAST_EXPIRY = "SELECT expired_ms FROM roomkeys_leases WHERE name = 'sweep'"
#: Saves that time.
SAVE_EXPIRY = "UPDATE roomkeys_leases SET expired_ms = :now_ms WHERE name = 'sweep'"

#: Returns the queued versions whose keys may be deleted, in the order of users, from a
#: version on. A deletion that an operator began, and a kill interrupted, is finished
#: without a wait. No user is named: the sweeper lists all users.
LIST_DELETED = """
    SELECT user_id, version FROM roomkeys_deleted
    WHERE (user_id, version) > (:user_id, :version)
    AND (deleted_ms <= :due_ms OR is_started = 1)
    ORDER BY user_id, version LIMIT :page"""
#: Returns the approximate number of keys of the queued versions, and the time of the
#: oldest deletion in the queue, or NULL. It names no user.
MEASURE_QUEUE = """
    SELECT COALESCE(SUM(key_count), 0), MIN(deleted_ms) FROM roomkeys_deleted"""
#: Returns users in order, from a user on. It names no user: the sweeper lists all.
LIST_USERS = """
    SELECT user_id FROM (SELECT user_id FROM roomkeys_numbers
        WHERE user_id > :user_id ORDER BY user_id LIMIT :page) AS n
    UNION SELECT user_id FROM (SELECT user_id FROM e2e_room_keys_versions
        WHERE user_id > :user_id ORDER BY user_id LIMIT :page) AS v
    ORDER BY user_id LIMIT :page"""

#: Notes that the deletion of a queued version's keys has begun. Writes no row if the
#: version isn't queued any more.
START_DELETION = """
    UPDATE roomkeys_deleted SET is_started = 1
    WHERE user_id = :user_id AND version = :version
    AND (deleted_ms <= :due_ms OR is_started = 1)"""
#: Returns the last session of the next batch, which begins after a session; no row for
#: the last batch.
BATCH_END = """
    SELECT room_id, session_id FROM e2e_room_keys
    WHERE user_id = :user_id AND version = :version
    AND (room_id, session_id) > (:room_id, :session_id)
    ORDER BY room_id, session_id LIMIT 1 OFFSET :skipped"""
#: Deletes the keys of a batch. The search begins after the last batch: else PostgreSQL
#: would step over the index entries of all deleted keys again.
DELETE_BATCH = """
    DELETE FROM e2e_room_keys WHERE user_id = :user_id AND version = :version
    AND (room_id, session_id) > (:room_id, :session_id)
    AND (room_id, session_id) <= (:last_room_id, :last_session_id)"""
#: Deletes the replaced keys of a batch's sessions.
DELETE_REPLACED_BATCH = """
    DELETE FROM roomkeys_replaced WHERE user_id = :user_id AND version = :version
    AND (room_id, session_id) > (:room_id, :session_id)
    AND (room_id, session_id) <= (:last_room_id, :last_session_id)"""
#: Subtracts the keys of a batch from the queued version's number of keys.
COUNT_BATCH = """
    UPDATE roomkeys_deleted SET key_count = key_count - :deleted
    WHERE user_id = :user_id AND version = :version"""
#: Deletes the remaining keys of a version.
DELETE_REST = """
    DELETE FROM e2e_room_keys WHERE user_id = :user_id AND version = :version"""
#: Deletes the remaining replaced keys of a version.
DELETE_REPLACED_REST = """
    DELETE FROM roomkeys_replaced WHERE user_id = :user_id AND version = :version"""

#: Deletes a user's rows of the record that are older than a time.
EXPIRE_CHANGES = """
    DELETE FROM roomkeys_changes
    WHERE user_id = :user_id AND changed_ms < :record_ms"""
#: Returns the last row of the next batch of a user's replaced keys, which begins after
#: a row; no row for the last batch.
REPLACED_BATCH_END = """
    SELECT version, room_id, session_id FROM roomkeys_replaced
    WHERE user_id = :user_id
    AND (version, room_id, session_id) > (:version, :room_id, :session_id)
    ORDER BY version, room_id, session_id LIMIT 1 OFFSET :skipped"""
#: Deletes those replaced keys of a batch that are older than a time.
EXPIRE_REPLACED_BATCH = """
    DELETE FROM roomkeys_replaced
    WHERE user_id = :user_id AND replaced_ms < :replaced_ms
    AND (version, room_id, session_id) > (:version, :room_id, :session_id)
    AND (version, room_id, session_id) <= (:last_version, :last_room_id,
        :last_session_id)"""
#: Deletes those replaced keys of the last batch.
EXPIRE_REPLACED_REST = """
    DELETE FROM roomkeys_replaced
    WHERE user_id = :user_id AND replaced_ms < :replaced_ms
    AND (version, room_id, session_id) > (:version, :room_id, :session_id)"""


@attrs.frozen
class Place:
    """The session after which a batch begins. The default begins with the first."""

    version: int = -1
    room_id: str = ""
    session_id: str = ""


@attrs.frozen
class Queue:
    """The deleted versions whose keys wait.

    Attributes:
        keys: approximate number of their keys.
        delay: seconds for which the keys of the oldest of them could have been deleted;
            0 if no version waits for longer than the operator wants.
    """

    keys: int
    delay: float


class Sweeps:
    """The sweeper's transactions, one method each.

    The Deferreds fail as the `Transactions` do.

    Attributes:
        leases: the leases in the same database.
    """

    def __init__(
        self,
        database: Transactions,
        engine: Engine,
        now: Callable[[], float],
        retention: Retention,
    ) -> None:
        """
        Args:
            now: returns the Unix time in seconds.
        """
        self.leases = Leases(database, now)
        self._database = database
        self._engine = engine
        self._now = now
        self._retention = retention

    def measure_queue(self) -> "Deferred[Queue]":
        """Fire with the `Queue` of deleted versions."""

        def measure(txn: Transaction) -> Queue:
            txn.execute(MEASURE_QUEUE)
            keys, oldest_ms = txn.fetchone()
            due_ms = self._due_ms()
            late_ms = 0 if oldest_ms is None else max(0, due_ms - oldest_ms)
            return Queue(int(keys), late_ms / 1000)

        return self._database.run("roomkeys_sweep_measure", measure)

    def list_deleted(self, after: BackupId) -> "Deferred[list[BackupId]]":
        """Fire with a page of the versions whose keys may be deleted now, ordered by
        user and version; an empty list after the last one.

        Args:
            after: the last version of the page before.
        """

        def read(txn: Transaction) -> list[BackupId]:
            values = {**names(after), "due_ms": self._due_ms(), "page": PAGE}
            txn.execute(LIST_DELETED, values)
            return [BackupId(*row) for row in txn.fetchall()]

        return self._database.run("roomkeys_sweep_list", read)

    def delete_batch(self, backup: BackupId, after: Place) -> "Deferred[Place | None]":
        """Delete a batch of a queued version's keys; after the last batch, remove the
        version from the queue.

        Returns:
            A Deferred that fires with the place of the next batch; with None if no key
            is left, or if the version isn't queued any more.
        """
        return self._database.write(
            "roomkeys_sweep_delete", self._delete_batch, backup, after
        )

    def _delete_batch(
        self, txn: Transaction, backup: BackupId, after: Place
    ) -> Place | None:
        self._engine.begin_batch(txn)
        version = self._engine.lock_version(txn, backup)
        if version is not None and not version.is_deleted:
            # Without the plugin, Synapse deactivated the user, and gave the number to a
            # new version after a reactivation.
            txn.execute(LEAVE_QUEUE, names(backup))
            return None
        txn.execute(START_DELETION, {**names(backup), "due_ms": self._due_ms()})
        if not txn.rowcount:
            return None
        values: dict[str, Any] = {
            **names(backup),
            "room_id": after.room_id,
            "session_id": after.session_id,
            "skipped": self._engine.swept_at_once - 1,
        }
        txn.execute(BATCH_END, values)
        last = txn.fetchone()
        if last is None:
            for statement in (DELETE_REST, DELETE_REPLACED_REST, LEAVE_QUEUE):
                txn.execute(statement, values)
            return None
        values |= {"last_room_id": last[0], "last_session_id": last[1]}
        txn.execute(DELETE_BATCH, values)
        txn.execute(COUNT_BATCH, {**names(backup), "deleted": txn.rowcount})
        txn.execute(DELETE_REPLACED_BATCH, values)
        return Place(backup.version, *last)

    def is_expiry_due(self) -> "Deferred[bool]":
        """Fire with whether old records were last deleted a day ago or longer."""

        def read(txn: Transaction) -> bool:
            txn.execute(LAST_EXPIRY)
            ((last,),) = txn.fetchall()
            return bool(last <= self._now_ms() - _DAY_MS)

        return self._database.run("roomkeys_sweep_due", read)

    def note_expiry(self) -> "Deferred[None]":
        """Save that all users' old records are deleted now."""

        def save(txn: Transaction) -> None:
            txn.execute(SAVE_EXPIRY, {"now_ms": self._now_ms()})

        return self._database.write("roomkeys_sweep_due", save)

    def list_users(self, after: str) -> "Deferred[list[str]]":
        """Fire with a page of users in order; an empty list after the last one.

        Args:
            after: the last user of the page before.
        """

        def read(txn: Transaction) -> list[str]:
            txn.execute(LIST_USERS, {"user_id": after, "page": PAGE})
            return [user_id for (user_id,) in txn.fetchall()]

        return self._database.run("roomkeys_sweep_users", read)

    def expire(self, user_id: str, after: Place) -> "Deferred[Place | None]":
        """Delete a user's old rows of the record, and the old ones of a batch of
        replaced keys.

        Returns:
            A Deferred that fires with the place of the next batch; None after the last.
        """
        return self._database.write(
            "roomkeys_sweep_expire", self._expire, user_id, after
        )

    def _expire(self, txn: Transaction, user_id: str, after: Place) -> Place | None:
        self._engine.begin_batch(txn)
        now, days = self._now_ms(), self._retention
        values: dict[str, Any] = {
            "user_id": user_id,
            **attrs.asdict(after),
            "record_ms": now - days.record_days * _DAY_MS,
            "replaced_ms": now - days.replaced_keys_days * _DAY_MS,
            "skipped": self._engine.swept_at_once - 1,
        }
        txn.execute(EXPIRE_CHANGES, values)
        txn.execute(REPLACED_BATCH_END, values)
        row = txn.fetchone()
        if row is None:
            txn.execute(EXPIRE_REPLACED_REST, values)
            return None
        last = Place(*row)
        values |= {f"last_{name}": v for name, v in attrs.asdict(last).items()}
        txn.execute(EXPIRE_REPLACED_BATCH, values)
        return last

    def _due_ms(self) -> int:
        """Unix time in milliseconds. The sweeper begins to delete the keys of versions
        that were deleted at this time or earlier."""
        return self._now_ms() - self._retention.deleted_versions_days * _DAY_MS

    def _now_ms(self) -> int:
        return int(1000 * self._now())

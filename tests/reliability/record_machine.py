"""The state machine of the record, of undo and of the sweeper's transactions."""

from __future__ import annotations

from typing import Any
from unittest import mock

from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule
from twisted.internet.defer import Deferred

from synapse_roomkeys.storage import Place
from synapse_roomkeys.types import Actor, BackupId, Restore

from ..contract.base import ALGORITHM
from .machine import (
    UNKNOWN_VERSION,
    BackupMachine,
    ages,
    check_rows,
    key_of,
    result_of,
    scopes,
    sessions_of,
    uploads,
    users,
)
from .model import MOVING, Backup, Change, Keys, Replaced, Version
from .record_check import read_sessions

OPERATOR = Actor(None, "@admin:h")
DAY = 24 * 60 * 60
_DAY_MS = 1000 * DAY


class RecordMachine(BackupMachine):
    """A `BackupMachine` whose users get versions and keys back, and whose deleted keys
    and old records are swept."""

    @rule(
        user_id=users,
        age=ages,
        steps=st.lists(
            st.sampled_from(("delete", "restore", "sweep")), min_size=1, max_size=4
        ),
        size=st.sampled_from((1, 2, 5)),
    )
    def end_version(self, user_id: str, age: int, steps: list[str], size: int) -> None:
        """Delete and restore a version and sweep a batch, in any order; then create a
        version if none is left."""
        number = self.number_of(user_id, age)
        for step in steps:
            if step == "delete":
                self.delete_version(user_id, number)
            elif step == "restore":
                self.restore_version(user_id, number)
            else:
                self.sweep(self.retention.deleted_versions_days, size, 1)
        if self.users[user_id].current is None:
            self.create(user_id, ALGORITHM, "{}")

    def restore_version(self, user_id: str, number: int) -> None:
        """A deleted version comes back whole, with a new etag, until its first keys are
        deleted."""
        version = self.users[user_id].versions.get(number)

        def call() -> Deferred[None]:
            return self.store.restore_version(user_id, number, OPERATOR)

        if version is None or not version.can_come_back():
            self.check_refused(call, 404, "M_NOT_FOUND")
            return
        result_of(call())
        version.deletion = None
        version.backup = Backup(version.backup.etag + 1, version.backup.keys)
        self.note_restore(user_id, number, "restore_version")

    @rule(
        user_id=users,
        age=ages,
        keys=uploads,
        scope=st.just((None, None)) | scopes,
        days=st.sampled_from((0, 0.5, 9, 9)),
        is_forced=st.booleans(),
    )
    def restore_keys(
        self,
        user_id: str,
        age: int,
        keys: Keys,
        scope: tuple[Any, Any],
        days: float,
        is_forced: bool,
    ) -> None:
        """After an upload, the keys of a time come back, and the keys that they replace
        are kept."""
        self.upload_more(user_id, keys)
        number = self.number_of(user_id, age)
        version = self.version_of(user_id, number)
        since_ms = self.now_ms - int(days * _DAY_MS)

        def call() -> Deferred[int]:
            restore = Restore(*scope, since_ms, is_forced)
            return self.store.restore_keys(user_id, number, restore, OPERATOR)

        if version is None:
            self.check_refused(call, *UNKNOWN_VERSION)
            return
        old = version.restorable(scope, since_ms, is_forced)
        restored = result_of(call())
        assert restored == len(old), f"restored {restored} keys, not {len(old)}"
        if not old:
            return
        before = version.backup
        version.backup = Backup(before.etag + 1, {**before.keys, **old})
        new = [ids for ids in old if ids not in before.keys]
        replaced = [ids for ids in old if ids in before.keys]
        version.replaced += [
            Replaced(ids, self.now_ms, before.etag + 1, before.keys[ids])
            for ids in replaced
        ]
        self.note_restore(
            user_id,
            number,
            "restore_keys",
            stored=len(new),
            replaced=len(replaced),
            sessions=sessions_of(new, replaced),
        )
        self.look(user_id, age)

    def note_restore(self, user_id: str, number: int, act: str, **more: Any) -> None:
        """Add an operator's act to the model's record."""
        operator = OPERATOR.operator
        self.note(user_id, number, act, device_id=None, operator=operator, **more)

    @rule(
        days=st.sampled_from((0, 0, 1)),
        size=st.sampled_from((1, 2, 5)),
        batches=st.sampled_from((1, 2, 99)),
    )
    def sweep(self, days: int, size: int, batches: int) -> None:
        """After some days, delete batches of the versions that are due, from the first
        on.

        Args:
            size: number of keys in a batch.
        """
        self.now += days * DAY
        with mock.patch.object(type(self.engine), "swept_at_once", size):
            listed = result_of(self.sweeps.list_deleted(BackupId("", -1)))
            due = [who for who, version in self.versions() if self.is_due(version)]
            check_rows("due", [(b.user_id, b.version) for b in listed], due)
            for backup in listed:
                version = self.users[backup.user_id].versions[backup.version]
                place: Place | None = Place()
                while place is not None and batches:
                    place = result_of(self.sweeps.delete_batch(backup, place))
                    self.check_batch(backup, version, size if place else None)
                    batches -= 1

    def is_due(self, version: Version) -> bool:
        """Whether the sweeper may delete the keys of a version now."""
        deletion = version.deletion
        if deletion is None or not deletion.is_queued:
            return False
        days = self.retention.deleted_versions_days
        return deletion.deleted_ms + days * _DAY_MS <= self.now_ms

    def check_batch(self, backup: BackupId, version: Version, size: int | None) -> None:
        """Take the keys that a batch left over into the model.

        Args:
            size: number of deleted keys; None after the last batch, which leaves none.
        """
        deletion = version.deletion
        assert deletion is not None
        deletion.is_started, deletion.is_queued = True, size is not None
        before = version.backup.keys
        where = "WHERE user_id = ? AND version = ?"
        query = f"SELECT room_id, session_id FROM e2e_room_keys {where}"
        left = self.sql(query, backup.user_id, backup.version)
        expected = 0 if size is None else len(before) - size
        assert len(left) == expected, f"sweep: {len(left)} keys left, not {expected}"
        version.backup = Backup(version.backup.etag, {i: before[i] for i in left})
        query = f"SELECT room_id, session_id FROM roomkeys_replaced {where}"
        kept = {*self.sql(query, backup.user_id, backup.version)}
        assert size or not kept, f"sweep: replaced keys left: {kept}"
        version.replaced = [row for row in version.replaced if row.ids in kept]

    @rule(user_id=users, days=st.sampled_from((0, 1, 4)), size=st.sampled_from((1, 3)))
    def expire(self, user_id: str, days: int, size: int) -> None:
        """After some days, delete a user's records and replaced keys that are older
        than the options say.

        Args:
            size: number of replaced keys in a batch.
        """
        self.now += days * DAY
        with mock.patch.object(type(self.engine), "swept_at_once", size):
            place: Place | None = Place()
            while place is not None:
                place = result_of(self.sweeps.expire(user_id, place))
        record_ms = self.now_ms - self.retention.record_days * _DAY_MS
        replaced_ms = self.now_ms - self.retention.replaced_keys_days * _DAY_MS
        for version in self.users[user_id].versions.values():
            old = [c for c in version.changes if c.changed_ms < record_ms]
            moved = [change.etag for change in old if change.act in MOVING]
            version.unrecorded = max([version.unrecorded, *moved])
            version.changes = [c for c in version.changes if c not in old]
            version.replaced = [
                row for row in version.replaced if row.replaced_ms >= replaced_ms
            ]
        for number in self.users[user_id].versions:
            self.check_record(user_id, number)

    def check_record(self, user_id: str, number: int) -> None:
        """Check the record of a version, deleted or not, and the etag since which it
        is whole."""
        version = self.users[user_id].versions[number]
        record = result_of(self.store.get_version_record(user_id, number))
        etags = [change.etag for change in record.changes]
        due = sorted(change.etag for change in version.changes)
        assert etags == due, f"record: missing {due}, unexpected {etags}"
        whole_from, expected = record.whole_from, version.unrecorded
        assert whole_from == expected, (
            f"record: whole from {whole_from}, not {expected}"
        )

    @invariant()
    def each_change_is_recorded_once(self) -> None:
        """The record holds each change once, with etag, device, numbers and sessions,
        and nothing else."""
        rows = self.sql(
            "SELECT user_id, version, etag, changed_ms, act, device_id, operator,"
            " stored, replaced, unchanged, deleted, sessions FROM roomkeys_changes"
        )
        found = [
            Change(*row[:-1], sessions=frozenset(read_sessions(row[-1])))  # type: ignore[misc]
            for row in rows
        ]
        expected = [c for _, version in self.versions() for c in version.changes]
        check_rows("record", found, expected)

    @invariant()
    def replaced_keys_are_kept(self) -> None:
        """Replaced keys are kept as they were, those that the options name."""
        rows = self.sql(
            "SELECT user_id, version, room_id, session_id, replaced_ms, etag,"
            " is_verified, first_message_index, forwarded_count, session_data"
            " FROM roomkeys_replaced"
        )
        found = [
            (row[:2], Replaced(row[2:4], row[4], row[5], key_of(row[6:])))
            for row in rows
        ]
        expected = [
            (who, row) for who, version in self.versions() for row in version.replaced
        ]
        check_rows("replaced", found, expected)

    @invariant()
    def deleted_versions_are_queued(self) -> None:
        """The sweeper's queue holds the deleted versions that may have keys."""
        rows = self.sql(
            "SELECT user_id, version, deleted_ms, is_started FROM roomkeys_deleted"
        )
        expected = [
            (*who, version.deletion.deleted_ms, int(version.deletion.is_started))
            for who, version in self.versions()
            if version.deletion and version.deletion.is_queued
        ]
        check_rows("queue", rows, expected)

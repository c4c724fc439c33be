"""The record and undo on a database in memory: kept rows, reports and restores."""

from __future__ import annotations

import json
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys.errors import NotFoundError
from synapse_roomkeys.types import Restore, Retention, VersionRecord

from ..contract import Client
from ..contract.base import Rooms, key, version_path
from ..memory import MemoryHost

ADMIN = "@admin:test.example"
ALL = Restore(None, None, 0, is_forced=False)
FORCED = Restore(None, None, 0, is_forced=True)


class RecordCase(SynchronousTestCase):
    """A user with an empty backup."""

    retention = Retention(deleted_versions_days=3)

    def setUp(self) -> None:
        self.host = MemoryHost(retention=self.retention)
        self.client = Client(self.host, self.host.new_user())
        self.user_id = self.client.user.user_id
        self.version = self.successResultOf(self.client.create_version())

    def sql(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Run a statement past the plugin."""
        with self.host.database.connection as connection:
            return connection.execute(statement, parameters).fetchall()

    def upload(self, rooms: Rooms) -> tuple[int, int]:
        """Upload keys; return the etag and the count afterwards."""
        return self.successResultOf(self.client.upload(self.version, rooms))

    def download(self) -> Rooms:
        """Return all keys of the version."""
        return self.successResultOf(self.client.download(self.version))

    def tally(self) -> tuple[int, int]:
        """Return etag and count of the version."""
        info = self.successResultOf(self.client.get(version_path(self.version))).json
        return int(info["etag"]), info["count"]

    def delete(self, path: str) -> None:
        """Send a DELETE that succeeds."""
        self.assertEqual(self.successResultOf(self.client.delete(path)).status, 200)

    def restore(self, restore: Restore) -> int:
        """Give keys back; return the number of sessions."""
        restored = self.host.handler.restore_room_keys(
            self.user_id, self.version, restore, ADMIN
        )
        return self.successResultOf(restored)

    def changes(self) -> list[tuple[Any, ...]]:
        """Return the record: act, etag, device, operator, and the four numbers."""
        return self.sql(
            "SELECT act, etag, device_id, operator, stored, replaced, unchanged,"
            " deleted FROM roomkeys_changes ORDER BY rowid"
        )

    def kept(self) -> dict[str, Any]:
        """Return the data of the replaced keys by session."""
        rows = self.sql("SELECT session_id, session_data FROM roomkeys_replaced")
        return {session: json.loads(data) for session, data in rows}


class RecordTests(RecordCase):
    """The rows of the record."""

    def test_each_change_has_a_row(self) -> None:
        """Each change of a backup is recorded with etag, device or operator, and the
        numbers of keys."""
        self.upload({"!a": {"1": key(index=5), "2": key(index=5)}})
        self.upload({"!a": {"1": key(index=3), "2": key(index=7), "3": key()}})
        info = {"algorithm": "m.megolm_backup.v1.curve25519-aes-sha2"}
        body = {**info, "auth_data": {"a": 1}, "version": self.version}
        put = self.client.put(version_path(self.version), body)
        self.assertEqual(self.successResultOf(put).status, 200)
        self.delete(f"/keys/%21a/1?version={self.version}")
        self.delete(version_path(self.version))
        restored = self.host.handler.restore_version(self.user_id, self.version, ADMIN)
        self.successResultOf(restored)
        device = "DEVICE"
        self.assertEqual(
            self.changes(),
            [
                ("create_version", 0, device, None, 0, 0, 0, 0),
                ("upload", 1, device, None, 2, 0, 0, 0),
                ("upload", 2, device, None, 1, 1, 1, 0),
                ("update_version", 2, device, None, 0, 0, 0, 0),
                ("delete_keys", 3, device, None, 0, 0, 0, 1),
                ("delete_version", 3, device, None, 0, 0, 0, 2),
                ("restore_version", 4, None, ADMIN, 0, 0, 0, 0),
            ],
        )

    def test_an_unknown_number_of_deleted_keys(self) -> None:
        """The record has no number of deleted keys if another program has moved the
        etag since the last count."""
        self.upload({"!a": {"1": key()}})
        self.sql("DELETE FROM e2e_room_keys")
        self.sql("UPDATE e2e_room_keys_versions SET etag = etag + 1")
        self.delete(version_path(self.version))
        deletion = ("delete_version", 2, "DEVICE", None, 0, 0, 0, None)
        self.assertEqual(self.changes()[-1], deletion)

    def test_sessions_are_named(self) -> None:
        """The row of an upload names its stored and replaced sessions, without data."""
        self.upload({"!a": {"1": key(index=5, data="SECRET")}})
        self.upload({"!a": {"1": key(index=3)}, "!b": {"é": key()}})
        ((first,), (second,)) = self.sql(
            "SELECT sessions FROM roomkeys_changes WHERE act = 'upload' ORDER BY rowid"
        )
        self.assertEqual(json.loads(first), {"!a": {"stored": ["1"]}})
        found = {"!a": {"replaced": ["1"]}, "!b": {"stored": ["é"]}}
        self.assertEqual(json.loads(second), found)

    def test_a_request_without_a_change_has_no_row(self) -> None:
        """Equal keys, and deletions of nothing, are not recorded."""
        rooms: Rooms = {"!a": {"1": key()}}
        self.upload(rooms)
        before = self.changes()
        self.upload(rooms)
        self.delete(f"/keys/%21b?version={self.version}")
        self.assertEqual(self.changes(), before)
        self.delete(version_path(self.version))
        before = self.changes()
        self.delete(version_path(self.version))
        self.assertEqual(self.changes(), before)

    def record(self) -> VersionRecord:
        """Return the version's record."""
        number = int(self.version)
        record = self.host.store.get_version_record(self.user_id, number)
        return self.successResultOf(record)

    def test_the_record_of_a_version(self) -> None:
        """A version changed only by the plugin has a whole record from etag 0 on."""
        for index in (3, 2, 1):
            self.upload({"!a": {"1": key(index=index)}})
        record = self.record()
        self.assertEqual([change.etag for change in record.changes], [0, 1, 2, 3])
        self.assertEqual(record.whole_from, 0)

    def test_writes_past_the_plugin(self) -> None:
        """After a write by another program, the record is whole from a later etag on:
        exactly one recorded change made each etag after ``whole_from``."""
        self.upload({"!a": {"1": key(index=3)}})
        self.sql("UPDATE e2e_room_keys_versions SET etag = 2")
        self.assertEqual(self.record().whole_from, 2)
        self.upload({"!a": {"1": key(index=2)}})
        self.upload({"!a": {"1": key(index=1)}})
        self.assertEqual(self.record().whole_from, 2)
        # Another program moved the etag back, and the plugin forward again.
        self.sql("UPDATE e2e_room_keys_versions SET etag = 3")
        self.upload({"!a": {"1": key(index=0)}})
        self.assertEqual(self.record().whole_from, 4)

    def test_the_record_of_a_user(self) -> None:
        """A user's record lists the changes since a time, oldest first."""
        self.host.reactor.advance(60)
        since = int(1000 * self.host.reactor.seconds())
        self.upload({"!a": {"1": key()}})
        self.delete(version_path(self.version))
        record = self.host.store.get_user_record(self.user_id, since)
        acts = [change.act for change in self.successResultOf(record)]
        self.assertEqual(acts, ["upload", "delete_version"])

    def test_the_record_of_no_version(self) -> None:
        """A version that never existed has no record."""
        record = self.host.store.get_version_record(self.user_id, 7)
        self.failureResultOf(record, NotFoundError)


class OffTests(RecordCase):
    """Record and undo are switched off."""

    retention = Retention(record_days=0, keep_replaced="off")

    def test_nothing_is_written(self) -> None:
        """The tables of record and undo stay empty."""
        self.upload({"!a": {"1": key(index=5)}})
        self.upload({"!a": {"1": key(index=9, verified=True)}})
        self.delete(f"/keys?version={self.version}")
        self.assertEqual(self.changes(), [])
        self.assertEqual(self.kept(), {})


class KeptKeyTests(RecordCase):
    """Replaced keys."""

    def test_a_lossy_replacement_is_kept(self) -> None:
        """By default, a key is kept if the new one has a higher index."""
        self.upload({"!a": {f"{i}": key(index=5, data="old") for i in range(3)}})
        new = {
            "0": key(index=9, verified=True),
            "1": key(index=5, verified=True),
            "2": key(index=1),
        }
        self.upload({"!a": new})
        self.assertEqual(self.kept(), {"0": "old"})

    def test_a_forced_restore(self) -> None:
        """A restore against the rule brings the old key back and keeps the new one, so
        that a second restore can undo the first."""
        old, new = key(index=5, data="old"), key(index=9, verified=True)
        self.upload({"!a": {"1": old, "2": key()}})
        self.upload({"!a": {"1": new}})
        self.assertEqual(self.restore(ALL), 0)
        self.assertEqual(self.tally(), (2, 2))
        self.assertEqual(self.restore(FORCED), 1)
        self.assertEqual(self.download(), {"!a": {"1": old, "2": key()}})
        self.assertEqual(self.tally(), (3, 2))
        self.host.reactor.advance(1)
        self.assertEqual(self.restore(FORCED), 0)
        since = int(1000 * self.host.reactor.seconds()) - 1000
        self.sql("UPDATE roomkeys_replaced SET replaced_ms = 0 WHERE etag = 2")
        self.assertEqual(self.restore(Restore("!a", "1", since, is_forced=True)), 1)
        self.assertEqual(self.download(), {"!a": {"1": new, "2": key()}})
        self.assertEqual(self.tally(), (4, 2))
        self.assertEqual(self.changes()[-1][:6], ("restore_keys", 4, None, ADMIN, 0, 1))

    def test_a_restore_by_the_rule(self) -> None:
        """Without force, a key comes back where nothing, or a worse key, is stored."""
        old = key(index=5, data="old")
        self.upload({"!a": {"1": old, "2": old}, "!b": {"1": old}})
        new = key(index=9, verified=True)
        self.upload({"!a": {"1": new, "2": new}, "!b": {"1": new}})
        self.delete(f"/keys/%21a/1?version={self.version}")
        self.delete(f"/keys/%21b?version={self.version}")
        only = Restore("!a", None, 0, is_forced=False)
        self.assertEqual(self.restore(only), 1)
        self.assertEqual(self.download(), {"!a": {"1": old, "2": new}})
        self.assertEqual(self.tally(), (5, 2))
        self.assertEqual(self.restore(ALL), 1)
        self.assertEqual(self.tally(), (6, 3))

    def test_an_incomplete_key_stays_replaced(self) -> None:
        """Without force, a key with a NULL field or without data doesn't replace a
        complete key, as in an upload."""
        old, new = key(index=5, verified=True), key(index=9, verified=True)
        self.upload({"!a": {"1": old, "2": old}})
        self.sql(
            "UPDATE e2e_room_keys SET first_message_index = NULL WHERE session_id = '1'"
        )
        self.sql("UPDATE e2e_room_keys SET session_data = 'null' WHERE session_id='2'")
        self.upload({"!a": {"1": new, "2": new}})
        self.assertEqual(set(self.kept()), {"1", "2"})
        self.assertEqual(self.restore(ALL), 0)
        self.assertEqual(self.restore(FORCED), 2)


class AllKeptTests(RecordCase):
    """Each replaced key is kept."""

    retention = Retention(keep_replaced="all")

    def test_the_key_of_a_time_comes_back(self) -> None:
        """Of several replaced keys, the one that was stored at the time comes back."""
        times = []
        for index in (9, 7, 5, 3):
            self.host.reactor.advance(10)
            times.append(int(1000 * self.host.reactor.seconds()))
            self.upload({"!a": {"1": key(index=index, data=f"{index}")}})
        for since, index in ((times[3], 5), (times[1], 9), (times[2], 7)):
            self.restore(Restore(None, None, since, is_forced=True))
            found = self.download()["!a"]["1"]
            self.assertEqual(found["first_message_index"], index)


class VersionTests(RecordCase):
    """Deleted versions, which are kept for three days."""

    def setUp(self) -> None:
        super().setUp()
        self.upload({"!a": {"1": key(), "2": key()}})
        self.info = self.successResultOf(self.client.info())
        self.delete(version_path(self.version))

    def give_back(self) -> None:
        """Restore the version."""
        restored = self.host.handler.restore_version(self.user_id, self.version, ADMIN)
        self.successResultOf(restored)

    def test_a_version_comes_back_as_current(self) -> None:
        """A restored version has the same auth_data, keys and count, and a new etag."""
        self.give_back()
        info = self.successResultOf(self.client.info())
        self.assertEqual(info, {**self.info, "etag": "2"})
        self.assertEqual(self.download(), {"!a": {"1": key(), "2": key()}})
        self.host.sweeper.start()
        self.host.reactor.pump([60] * 5 * 24 * 60)
        self.assertEqual(len(self.download()["!a"]), 2)

    def test_a_version_comes_back_beside_a_newer_one(self) -> None:
        """If a newer version exists, a restored version is readable but not current."""
        newer = self.successResultOf(self.client.create_version())
        self.give_back()
        self.assertEqual(self.successResultOf(self.client.info())["version"], newer)
        self.assertEqual(len(self.download()["!a"]), 2)

    def test_a_version_that_is_gone(self) -> None:
        """Restoring a version whose keys are being deleted raises NotFoundError."""
        self.host.sweeper.start()
        self.host.reactor.pump([3 * 24 * 60 * 60 + 60, 0.1, 0.1])
        for version in (self.version, "7"):
            restored = self.host.handler.restore_version(self.user_id, version, ADMIN)
            self.failureResultOf(restored, NotFoundError)

    def test_a_version_that_is_deleted_again(self) -> None:
        """Once its keys are deleted, a second DELETE doesn't make it seem complete: its
        auth_data is gone as well."""
        self.host.sweeper.start()
        self.host.reactor.pump([3 * 24 * 60 * 60 + 60, *[0.1] * 10])
        self.assertEqual(self.sql("SELECT * FROM roomkeys_deleted"), [])
        self.delete(version_path(self.version))
        restored = self.host.handler.restore_version(self.user_id, self.version, ADMIN)
        self.failureResultOf(restored, NotFoundError)

    def test_a_version_that_is_not_deleted(self) -> None:
        """Restoring a version that isn't deleted raises NotFoundError."""
        self.give_back()
        restored = self.host.handler.restore_version(self.user_id, self.version, ADMIN)
        self.failureResultOf(restored, NotFoundError)

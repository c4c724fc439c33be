"""The sweeper on a database in memory: what it deletes, when, and how it recovers."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred, fail
from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys import metrics
from synapse_roomkeys.background import INTERVAL
from synapse_roomkeys.storage import LEASE_SECONDS, SQLITE, Place, Sweeps
from synapse_roomkeys.storage.sqlite_engine import SqliteEngine
from synapse_roomkeys.types import BackupId, Retention

from ..contract import Client
from ..contract.base import key, keys_path, version_path
from ..memory import MemoryHost

_DAY = 24 * 60 * 60


class SweeperTests(SynchronousTestCase):
    """A user with a backup of 20 keys, and batches of 8 keys."""

    retention = Retention()

    def setUp(self) -> None:
        self.patch(SqliteEngine, "swept_at_once", 8)
        self.host = MemoryHost(retention=self.retention)
        self.client = Client(self.host, self.host.new_user())
        self.version = self.successResultOf(self.client.create_version())
        rooms = {room: {f"{i}": key() for i in range(10)} for room in ("!a", "!b")}
        self.successResultOf(self.client.upload(self.version, rooms))

    def sql(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Run a statement past the plugin."""
        with self.host.database.connection as connection:
            return connection.execute(statement, parameters).fetchall()

    def keys(self) -> int:
        """Number of keys in the database."""
        ((count,),) = self.sql("SELECT COUNT(*) FROM e2e_room_keys")
        number: int = count
        return number

    def delete(self) -> None:
        """Delete the version as a client does."""
        path = version_path(self.version)
        answer = self.successResultOf(self.client.delete(path))
        self.assertEqual(answer.status, 200)

    def sweep(self) -> None:
        """Begin the passes, and let the first one run."""
        self.host.sweeper.start()
        self.host.reactor.pump([0, *[0.1] * 10])


class DeletionTests(SweeperTests):
    """The deletion of a version's keys."""

    def test_a_deletion_writes_no_key(self) -> None:
        """The answer doesn't wait for the keys, and no client sees them any more."""
        self.delete()
        self.assertEqual(self.keys(), 20)
        for path in (keys_path(self.version), version_path(self.version)):
            answer = self.successResultOf(self.client.get(path))
            self.assertEqual(answer.status, 404)

    def test_keys_are_deleted_in_batches(self) -> None:
        """A deletion wakes the sweeper; others have their turn between two batches."""
        other = Client(self.host, self.host.new_user())
        self.successResultOf(other.create_version())
        self.sweep()
        self.delete()
        left = []
        for _ in range(4):
            self.successResultOf(other.info())
            left.append(self.keys())
            self.host.reactor.advance(0.1 if left[1:] else 0)
        self.assertEqual(left, [20, 12, 4, 0])
        self.assertEqual(self.sql("SELECT * FROM roomkeys_deleted"), [])

    def test_the_queue_is_measured(self) -> None:
        """The metrics have the waiting keys, and the delay of the oldest deletion."""
        self.delete()
        self.host.reactor.advance(3)
        self.successResultOf(self.measure())
        self.assertEqual(metrics.waiting_keys._value.get(), 20)
        self.assertEqual(metrics.deletion_delay._value.get(), 3)
        self.host.reactor.pump([1] * int(LEASE_SECONDS + 2 * INTERVAL))
        self.assertEqual(metrics.waiting_keys._value.get(), 0)
        self.assertEqual(metrics.deletion_delay._value.get(), 0)

    def measure(self) -> Deferred[None]:
        """A pass of a process that doesn't have the lease."""
        self.successResultOf(self.other_process().leases.take("sweep", "other"))
        return self.host.sweeper.run()

    def other_process(self) -> Sweeps:
        """The transactions of another process."""
        seconds = self.host.reactor.seconds
        return Sweeps(self.host.database, SQLITE, seconds, self.retention)

    def test_one_process_sweeps_at_a_time(self) -> None:
        """A process leaves the work to the one with the lease, until the lease ends."""
        self.delete()
        self.successResultOf(self.other_process().leases.take("sweep", "other"))
        self.sweep()
        self.assertEqual(self.keys(), 20)
        self.host.reactor.pump([1] * int(LEASE_SECONDS + INTERVAL))
        self.assertEqual(self.keys(), 0)

    def test_a_deletion_during_the_sweep_of_another_process(self) -> None:
        """A process that deleted a version tries again every 5 seconds."""
        self.sweep()
        other = self.other_process()
        self.successResultOf(other.leases.take("sweep", "other"))
        self.delete()
        self.host.reactor.pump([0, 5, 5])
        self.assertEqual(self.keys(), 20)
        self.successResultOf(other.leases.end("sweep", "other"))
        self.host.reactor.pump([5, *[0.1] * 10])
        self.assertEqual(self.keys(), 0)

    def test_a_process_that_lost_the_lease_stops(self) -> None:
        """Another process took over, because this one was stopped for a minute."""
        self.delete()
        self.host.sweeper.start()
        self.host.reactor.advance(0)
        self.assertEqual(self.keys(), 12)
        self.sql("UPDATE roomkeys_leases SET owner = 'other', until_ms = 1 << 62")
        self.host.reactor.advance(LEASE_SECONDS)
        self.host.reactor.pump([0.1] * 10)
        self.assertEqual(self.keys(), 12)

    def test_a_killed_process_is_continued(self) -> None:
        """Another process goes on where a killed process ended."""
        self.delete()
        (backup,) = self.successResultOf(
            self.other_process().list_deleted(BackupId("", -1))
        )
        self.successResultOf(self.other_process().delete_batch(backup, Place()))
        self.assertEqual(self.keys(), 12)
        self.sweep()
        self.assertEqual(self.keys(), 0)

    def test_keys_that_an_older_version_left(self) -> None:
        """A second DELETE queues keys whose deletion another program didn't finish."""
        self.sql("UPDATE e2e_room_keys_versions SET deleted = 1")
        self.sweep()
        self.assertEqual(self.keys(), 20)
        self.delete()
        self.host.reactor.pump([0, *[0.1] * 10])
        self.assertEqual(self.keys(), 0)

    def test_a_version_that_is_not_deleted(self) -> None:
        """The keys of a queued version stay if another program created the version
        anew."""
        self.delete()
        self.sql("UPDATE e2e_room_keys_versions SET deleted = 0")
        self.sweep()
        self.assertEqual(self.keys(), 20)
        self.assertEqual(self.sql("SELECT * FROM roomkeys_deleted"), [])

    def test_a_failed_sweep_is_repeated(self) -> None:
        """A failure is logged once and counted each time; the next pass succeeds."""
        self.delete()
        before = metrics.sweep_failures._value.get()
        real = self.host.database.run
        error = RuntimeError("no disk")
        self.patch(self.host.database, "run", lambda *args: fail(error))
        with self.assertLogs("synapse_roomkeys.background", "ERROR") as logs:
            self.sweep()
            self.host.reactor.advance(INTERVAL)
        self.assertEqual(len(logs.records), 1)
        self.assertEqual(metrics.sweep_failures._value.get(), before + 2)
        self.patch(self.host.database, "run", real)
        self.host.reactor.pump([INTERVAL, *[0.1] * 10])
        self.assertEqual(self.keys(), 0)

    def test_a_failing_version_stops_no_other(self) -> None:
        """The pass after a failure begins with the versions after the failed one."""
        other = Client(self.host, self.host.new_user())
        version = self.successResultOf(other.create_version())
        self.successResultOf(other.upload(version, {"!a": {"1": key()}}))
        self.delete()
        self.successResultOf(other.delete(version_path(version)))
        real = self.host.sweeps.delete_batch

        def fail_for_first(backup: BackupId, after: Place) -> Deferred[Place | None]:
            if backup.user_id == self.client.user.user_id:
                return fail(RuntimeError("a damaged row"))
            return real(backup, after)

        self.patch(self.host.sweeps, "delete_batch", fail_for_first)
        with self.assertLogs("synapse_roomkeys.background", "ERROR"):
            self.sweep()
            self.assertEqual(self.keys(), 21)
            self.host.reactor.pump([INTERVAL, *[0.1] * 10])
        self.assertEqual(self.keys(), 20)
        self.patch(self.host.sweeps, "delete_batch", real)
        self.host.reactor.pump([INTERVAL, *[0.1] * 10])
        self.assertEqual(self.keys(), 0)

    def test_a_stopped_sweeper_begins_no_batch(self) -> None:
        """The end of a process doesn't wait for a large deletion."""
        self.delete()
        self.host.sweeper.start()
        self.host.reactor.advance(0)
        self.host.sweeper.stop()
        self.host.reactor.pump([0.1] * 10)
        self.assertEqual(self.keys(), 12)
        self.assertEqual(self.host.reactor.getDelayedCalls(), [])


class KeptVersionTests(SweeperTests):
    """Deleted versions that are kept for three days."""

    retention = Retention(deleted_versions_days=3)

    def test_keys_wait_for_their_time(self) -> None:
        """The keys stay for three days, and are deleted within a minute then."""
        self.delete()
        self.sweep()
        self.host.reactor.advance(3 * _DAY - 10)
        self.assertEqual(self.keys(), 20)
        self.assertEqual(metrics.deletion_delay._value.get(), 0)
        self.host.reactor.pump([INTERVAL + 10, *[0.1] * 10])
        self.assertEqual(self.keys(), 0)

    def test_a_deletion_by_an_operator_is_finished(self) -> None:
        """If a kill interrupts a purge within a version, the sweeper deletes the rest
        of the keys without the wait of three days."""
        self.delete()
        database, seconds = self.host.database, self.host.reactor.seconds
        purge = Sweeps(database, SQLITE, seconds, Retention(deleted_versions_days=0))
        backup = BackupId(self.client.user.user_id, int(self.version))
        self.successResultOf(purge.delete_batch(backup, Place()))
        self.assertEqual(self.keys(), 12)
        self.sweep()
        self.assertEqual(self.keys(), 0)
        self.assertEqual(self.sql("SELECT * FROM roomkeys_deleted"), [])

    def test_waiting_keys_are_told_at_the_start(self) -> None:
        """The log tells once what to do before the plugin is taken out."""
        self.delete()
        with self.assertLogs("synapse_roomkeys.sweeper", "INFO") as logs:
            self.sweep()
            self.host.reactor.pump([INTERVAL] * 3)
        (message,) = [record.getMessage() for record in logs.records]
        self.assertIn("20 keys of deleted versions wait", message)

    def test_a_deactivated_user(self) -> None:
        """Nothing of a deactivated user is kept."""
        self.delete()
        user_id = self.client.user.user_id
        self.successResultOf(self.host.store.forget_user(user_id))
        self.assertEqual(self.sql("SELECT * FROM roomkeys_deleted"), [])


class ExpiryTests(SweeperTests):
    """Records that have been kept for long enough."""

    def acts(self) -> list[str]:
        """The acts in the record."""
        return [act for (act,) in self.sql("SELECT act FROM roomkeys_changes")]

    def replaced(self) -> list[str]:
        """The sessions of the replaced keys."""
        rows = self.sql("SELECT session_id FROM roomkeys_replaced")
        return sorted(session_id for (session_id,) in rows)

    def test_old_records_are_deleted(self) -> None:
        """Once a day, the record loses what is older than 28 days."""
        self.host.reactor.advance(27 * _DAY)
        self.delete()
        self.sweep()
        self.assertEqual(self.acts(), ["create_version", "upload", "delete_version"])
        self.host.reactor.pump([2 * _DAY, *[0.1] * 10])
        self.assertEqual(self.acts(), ["delete_version"])
        self.sql("UPDATE roomkeys_changes SET changed_ms = 0")
        self.host.reactor.pump([_DAY / 2, *[0.1] * 10])
        self.assertEqual(self.acts(), ["delete_version"])
        self.host.reactor.pump([_DAY / 2, *[0.1] * 10])
        self.assertEqual(self.acts(), [])

    def test_old_replaced_keys_are_deleted(self) -> None:
        """Replaced keys go after 14 days, in batches."""
        now = self.host.reactor.seconds()
        old, new = int(1000 * (now - 15 * _DAY)), int(1000 * (now - 13 * _DAY))
        for i in range(20):
            self.sql(
                "INSERT INTO roomkeys_replaced SELECT user_id, version, room_id,"
                " session_id, ?, 1, 0, 0, 0, session_data FROM e2e_room_keys"
                " WHERE room_id = '!a' AND session_id = ?",
                *(old if i % 10 else new, f"{i % 10}"),
            )
        self.sweep()
        self.assertEqual(self.replaced(), ["0", "0"])

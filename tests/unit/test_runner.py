"""The runner of operators' tasks on a database in memory: faults, leases, expiry."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred, fail
from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys import metrics
from synapse_roomkeys.admin.runner import PURGE, STATISTICS
from synapse_roomkeys.background import INTERVAL
from synapse_roomkeys.errors import UnavailableError
from synapse_roomkeys.storage import LEASE_SECONDS, Overview, Task
from synapse_roomkeys.storage.tasks import CANCELLED

from ..contract import Client
from ..contract.base import key
from ..memory import MemoryAdminHost

_WEEK = 7 * 24 * 60 * 60


class RunnerTests(SynchronousTestCase):
    """A user with a key, and tasks that are added past the interface."""

    def setUp(self) -> None:
        self.host = MemoryAdminHost()
        self.tasks = self.host.tasks
        client = Client(self.host.clients, self.host.clients.new_user())
        version = self.successResultOf(client.create_version())
        self.successResultOf(client.upload(version, {"!room": {"s": key()}}))

    def add(self, action: str, **parameters: Any) -> str:
        """Add a task and wake the runner; return the task's id."""
        task_id = self.successResultOf(self.tasks.add(action, "@admin:x", parameters))
        self.host.runner.wake()
        return task_id

    def get(self, task_id: str) -> Task:
        """Return a task."""
        task = self.successResultOf(self.tasks.get(task_id))
        assert task is not None
        return task

    def pump(self, seconds: int = 1) -> None:
        """Let the background work go on for some seconds."""
        self.host.clients.reactor.pump([0.1] * (10 * seconds))

    def test_tasks_are_run_one_after_the_other(self) -> None:
        """The oldest task runs first. Each task gets its own result."""
        ids = [self.add(STATISTICS, top=number) for number in range(3)]
        self.pump()
        found = [self.get(task_id) for task_id in ids]
        self.assertEqual({task.status for task in found}, {"complete"})
        largest = [len((task.result or {})["largest"]) for task in found]
        self.assertEqual(largest, [0, 1, 1])

    def test_a_defect_fails_one_task(self) -> None:
        """A task with an unknown action fails with an error in the log. The next task
        runs."""
        unknown = self.add("dance")
        good = self.add(STATISTICS, top=1)
        with self.assertLogs("synapse_roomkeys.admin.runner", "ERROR") as logs:
            self.pump()
        self.assertIn(unknown, logs.output[0])
        task = self.get(unknown)
        self.assertEqual(task.status, "failed")
        self.assertIn("log", task.error or "")
        self.assertEqual(self.get(good).status, "complete")

    def test_an_outage_delays_a_task(self) -> None:
        """A task stays active during a database outage, and runs a minute later."""
        failures = metrics.task_failures._value.get()
        real = Overview.list_owners

        def unavailable(overview: Overview, after: str) -> Deferred[Any]:
            return fail(UnavailableError(10))

        self.patch(Overview, "list_owners", unavailable)
        task_id = self.add(STATISTICS, top=1)
        self.pump()
        self.assertEqual(self.get(task_id).status, "active")
        self.assertEqual(metrics.task_failures._value.get(), failures + 1)
        self.patch(Overview, "list_owners", real)
        self.pump(int(INTERVAL) + 1)
        self.assertEqual(self.get(task_id).status, "complete")

    def test_an_outage_of_one_task_does_not_block_others(self) -> None:
        """A task with an outage in each pass is retried after the other tasks."""

        def unavailable(overview: Overview, after: str) -> Deferred[Any]:
            return fail(UnavailableError(10))

        self.patch(Overview, "list_owners", unavailable)
        stuck = self.add(STATISTICS, top=1)
        self.pump()
        good = self.add(PURGE, what="record", before_ms=1)
        self.pump(2 * int(INTERVAL) + 1)
        self.assertEqual(self.get(stuck).status, "active")
        self.assertEqual(self.get(good).status, "complete")

    def test_a_process_that_lost_the_lease_stops(self) -> None:
        """A process without the lease runs no task. After the end of the other
        process's lease, the process runs the task."""
        leases = self.tasks.leases
        self.successResultOf(leases.take("tasks", "other"))
        task_id = self.add(STATISTICS, top=1)
        self.pump()
        self.assertEqual(self.get(task_id).status, "scheduled")
        self.pump(int(LEASE_SECONDS) + 10)
        self.assertEqual(self.get(task_id).status, "complete")

    def test_a_cancelled_task_is_not_run(self) -> None:
        """A task that was cancelled before its start gets no result."""
        task_id = self.add(PURGE, what="orphaned")
        self.successResultOf(self.tasks.finish(task_id, CANCELLED))
        self.pump()
        task = self.get(task_id)
        self.assertEqual((task.status, task.result), ("cancelled", None))
        done = self.tasks.finish(task_id, "complete", {})
        self.assertFalse(self.successResultOf(done))

    def test_a_task_that_is_cancelled_at_its_end_is_not_complete(self) -> None:
        """A task cancelled during the last step has no result. The log line says
        cancelled, not complete."""
        real = Overview.measure_tables

        def cancel(overview: Overview) -> Deferred[dict[str, int]]:
            self.successResultOf(self.tasks.finish(task_id, CANCELLED))
            return real(overview)

        self.patch(Overview, "measure_tables", cancel)
        task_id = self.add(STATISTICS, top=1)
        with self.assertLogs("synapse_roomkeys.admin.runner", "INFO") as logs:
            self.pump()
        self.assertEqual(self.get(task_id).status, "cancelled")
        self.assertIn("is cancelled", logs.output[-1])

    def test_finished_tasks_are_kept_for_four_weeks(self) -> None:
        """A pass deletes a task four weeks after its end, and not earlier."""
        task_id = self.add(STATISTICS, top=1)
        self.pump()
        reactor = self.host.clients.reactor
        reactor.advance(4 * _WEEK - INTERVAL)
        self.pump()
        self.assertEqual(self.get(task_id).status, "complete")
        reactor.advance(2 * INTERVAL)
        self.pump()
        self.assertIsNone(self.successResultOf(self.tasks.get(task_id)))

"""Deletion of a large backup, and the latency of another user meanwhile."""

import threading
import time
from collections.abc import Callable
from functools import partial

from ..backups import Backup, Backups
from ..client import Connection
from ..results import Results, compare, state_values
from ..sampling import interleave
from ..testbed import Testbed

_POLL_PAUSE_SECONDS = 0.002
_DELETE_TIMEOUT_SECONDS = 60.0


class VersionPoller:
    """Another user who polls GET version; ``samples`` has the milliseconds."""

    def __init__(self, backup: Backup) -> None:
        """Poll as the owner of a backup."""
        self.samples: list[float] = []
        self._backup = backup
        self._done = threading.Event()

    def poll_during(self, action: Callable[[], float]) -> float:
        """Run an action, poll until it returns, and return its result."""
        self._done.clear()
        thread = threading.Thread(target=self._poll, daemon=True)
        thread.start()
        try:
            return action()
        finally:
            self._done.set()
            thread.join()

    def _poll(self) -> None:
        """Poll at least once, until the action has ended."""
        with Connection(self._backup.server.port) as connection:
            request = self._backup.get_version()
            while True:
                self.samples.append(connection.send(request).seconds * 1e3)
                if self._done.wait(_POLL_PAUSE_SECONDS):
                    return


def delete(testbed: Testbed, results: Results) -> None:
    """Measure the deletion of full backups, one after the other."""
    accounts = testbed.register_users()
    others = testbed.create_backups(0)
    pollers = {name: VersionPoller(others[name]) for name in testbed.servers}
    samplers: dict[str, Callable[[Backups], float]] = {
        name: partial(_delete, name, pollers[name]) for name in testbed.servers
    }
    rounds = range(max(testbed.plan.heavy_samples - 2, 2))
    full_backups = (
        testbed.create_backups_for(accounts, testbed.full_size) for _ in rounds
    )
    seconds = interleave(samplers, full_backups)
    title = f"DELETE a version of {testbed.full_size:,} keys"
    polled = {name: pollers[name].samples for name in testbed.without_limit}
    longest = {name: max(samples) for name, samples in polled.items()}
    results.lines += [
        compare("7", title, "s", seconds, goal=testbed.speedup_goal(3)),
        compare("7", f"{title}: another's GET version", "ms", polled),
        state_values("7", f"{title}: the longest of these", "ms", longest),
    ]
    testbed.run_maintenance()


def _delete(name: str, poller: VersionPoller, backups: Backups) -> float:
    """Delete a server's backup, wait until its keys are gone, return the seconds.

    The seconds exclude the wait. Raises AssertionError if keys stay in the database.
    """
    backup = backups[name]
    time.sleep(0.1)
    seconds = poller.poll_during(lambda: backup.send(backup.delete()).seconds)
    deadline = time.monotonic() + _DELETE_TIMEOUT_SECONDS
    while backup.server.database.count_keys(backup.account.user_id, backup.version):
        if time.monotonic() > deadline:
            raise AssertionError(f"{name}: keys remain in the database after DELETE")
        time.sleep(0.05)
    return seconds

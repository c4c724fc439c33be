"""The deletion of a large backup, and what another user feels of it."""

import threading
import time
from collections.abc import Callable
from functools import partial

from ..backups import Backup, Backups
from ..client import Connection
from ..results import Results, compare, state
from ..sampling import interleave
from ..stage import Stage

_PAUSE = 0.002
_GONE_TIMEOUT = 60.0


class Onlooker:
    """Another user, who looks at the own version again and again."""

    def __init__(self, backup: Backup) -> None:
        """Act for the owner of a backup."""
        self.samples: list[float] = []
        self._backup = backup
        self._done = threading.Event()

    def during(self, action: Callable[[], float]) -> float:
        """Look while something else is done."""
        self._done.clear()
        thread = threading.Thread(target=self._look, daemon=True)
        thread.start()
        try:
            return action()
        finally:
            self._done.set()
            thread.join()

    def _look(self) -> None:
        """Look until told to stop, at least once."""
        with Connection(self._backup.subject.port) as connection:
            request = self._backup.get_version()
            while True:
                self.samples.append(connection.send(request).seconds * 1e3)
                if self._done.wait(_PAUSE):
                    return


def delete(stage: Stage, results: Results) -> None:
    """Delete full backups one after the other."""
    accounts = stage.register()
    others = stage.backup(0)
    onlookers = {name: Onlooker(others[name]) for name in stage.subjects}
    samplers: dict[str, Callable[[Backups], float]] = {
        name: partial(_delete, name, onlookers[name]) for name in stage.subjects
    }
    rounds = range(max(stage.plan.heavy - 2, 2))
    fills = (stage.refill(accounts, stage.size) for _ in rounds)
    seconds = interleave(samplers, fills)
    title = f"DELETE a version of {stage.size:,} keys"
    seen = {name: onlookers[name].samples for name in stage.servers}
    longest = {name: max(samples) for name, samples in seen.items()}
    results.lines += [
        compare("7", title, "s", seconds, goal=stage.speedup(3)),
        compare("7", f"{title}: another's GET version", "ms", seen),
        state("7", f"{title}: the longest of these", "ms", longest),
    ]
    stage.settle()


def _delete(name: str, onlooker: Onlooker, backups: Backups) -> float:
    """Delete one server's backup, and wait until its keys are gone."""
    backup = backups[name]
    time.sleep(0.1)
    taken = onlooker.during(lambda: backup.send(backup.delete()).seconds)
    deadline = time.monotonic() + _GONE_TIMEOUT
    while backup.subject.database.count(backup.account.user_id, backup.version):
        if time.monotonic() > deadline:
            raise AssertionError(f"{name} left keys behind")
        time.sleep(0.05)
    return taken

"""What others feel while one user restores a whole backup."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.servers import temporary_directory

from ..backups import Backup
from ..client import Connection
from ..keys import Key
from ..results import LIMIT, PLUGIN, Goal, Results, at_most, compare, state
from ..sampling import Summary, wait_until_idle
from ..servers import downloading
from ..stage import Stage

_PAUSE = 0.005
_IDLE_SHARE = 0.5
KINDS = ("upload", "whoami")
TITLES = {"upload": "another user's single upload", "whoami": "GET whoami"}


class Visitors:
    """Two users of one server, who ask for something again and again."""

    def __init__(self, backup: Backup, keys: list[Key]) -> None:
        """Act for the owner of a backup."""
        self.backup = backup
        self.idle: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.busy: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self._keys = keys

    def visit(self, samples: dict[str, list[float]], seconds: float) -> None:
        """Ask for both things side by side for some time."""
        end = time.monotonic() + seconds
        requests: dict[str, Callable[[], bytes]] = {
            "upload": lambda: self.backup.upload_one(self._keys.pop()),
            "whoami": self.backup.whoami,
        }
        threads = [
            threading.Thread(
                target=self._ask, args=(requests[kind], samples[kind], end)
            )
            for kind in KINDS
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _ask(
        self, request: Callable[[], bytes], samples: list[float], end: float
    ) -> None:
        """Ask, pause, and ask again, at least once."""
        with Connection(self.backup.subject.port) as connection:
            while True:
                samples.append(connection.send(request()).seconds * 1e3)
                if time.monotonic() > end:
                    return
                time.sleep(_PAUSE)


def restore(stage: Stage, results: Results) -> None:
    """Measure the latency of others, idle and during downloads.

    The limit is what others at the plugin's server feel while the limit's own site, a
    process beside it, sends the same bytes: they share the machine and nothing more.
    """
    owners = stage.backup(stage.size)
    backups = stage.backup(0)
    plan = stage.plan
    supply = int(plan.rounds * plan.restore_seconds * 400) + 1000
    visited = {**{name: name for name in stage.synapses}, LIMIT: PLUGIN}
    visitors = {
        name: Visitors(backups[place], stage.source.take(supply))
        for name, place in visited.items()
    }
    order = list(visitors)
    with temporary_directory("restore-") as directory:
        for _ in range(plan.rounds):
            for name in order:
                _visit(visitors[name], owners[name], plan.restore_seconds, directory)
            order.reverse()
    for kind in KINDS:
        _report(kind, visitors, results)


def _visit(visitors: Visitors, owner: Backup, seconds: float, directory: Path) -> None:
    """Visit a server first while it has nothing else to do, then while it has."""
    wait_until_idle(owner.subject.pid)
    visitors.visit(visitors.idle, seconds * _IDLE_SHARE)
    with downloading(owner, directory):
        visitors.visit(visitors.busy, seconds)
    wait_until_idle(owner.subject.pid)


def _report(kind: str, visitors: dict[str, Visitors], results: Results) -> None:
    """Compare the latencies of one kind of request."""
    idle = {name: each.idle[kind] for name, each in visitors.items()}
    busy = {name: each.busy[kind] for name, each in visitors.items()}
    for name in visitors:
        results.latencies[f"{kind}/{name}/idle"] = idle[name]
        results.latencies[f"{kind}/{name}/restoring"] = busy[name]
    title = TITLES[kind]
    goal: Goal = at_most(2)
    quotients = {
        name: Summary.of(busy[name]).p99 / Summary.of(idle[name]).p99
        for name in visitors
    }
    results.lines += [
        compare("5", f"{title}, idle", "ms", idle),
        compare("5", f"{title}, during a restore", "ms", busy),
        state("5", f"{title}: p99 against idle p99", "", quotients, goal=goal),
    ]

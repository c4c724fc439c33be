"""Latency of other users while a user restores a whole backup."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.servers import temporary_directory

from ..backups import Backup
from ..client import Connection
from ..keys import Key
from ..results import LIMIT, PLUGIN, Goal, Results, at_most, compare, state_values
from ..sampling import Summary, wait_until_idle
from ..servers import download_in_background
from ..testbed import Testbed

_PAUSE_SECONDS = 0.005
# Duration of the idle probes, as a share of the probes during the restore.
_IDLE_SHARE = 0.5
_KINDS = ("upload", "whoami")
_TITLES = {"upload": "another user's single upload", "whoami": "GET whoami"}


class LatencyProbes:
    """Two clients of a server that repeat a request: an upload and whoami.

    Samples in milliseconds by kind of request are in ``idle`` and ``restoring``.
    """

    def __init__(self, backup: Backup, keys: list[Key]) -> None:
        """Probe as the owner of a backup; the uploads consume the keys."""
        self.backup = backup
        self.idle: dict[str, list[float]] = {kind: [] for kind in _KINDS}
        self.restoring: dict[str, list[float]] = {kind: [] for kind in _KINDS}
        self._keys = keys

    def run(self, samples: dict[str, list[float]], seconds: float) -> None:
        """Repeat both requests in parallel for some seconds, and append the samples."""
        end = time.monotonic() + seconds
        requests: dict[str, Callable[[], bytes]] = {
            "upload": lambda: self.backup.upload_one(self._keys.pop()),
            "whoami": self.backup.whoami,
        }
        threads = [
            threading.Thread(
                target=self._repeat_request, args=(requests[kind], samples[kind], end)
            )
            for kind in _KINDS
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _repeat_request(
        self, request: Callable[[], bytes], samples: list[float], end: float
    ) -> None:
        """Send a request at least once, pause, and repeat until the end."""
        with Connection(self.backup.server.port) as connection:
            while True:
                samples.append(connection.send(request()).seconds * 1e3)
                if time.monotonic() > end:
                    return
                time.sleep(_PAUSE_SECONDS)


def restore(testbed: Testbed, results: Results) -> None:
    """Measure the latency of other users, idle and during downloads.

    For the limit, users of the plugin's server are probed while the limit's site, a
    separate process, sends the same bytes: the two share the machine and nothing else.
    """
    owners = testbed.create_backups(testbed.full_size)
    backups = testbed.create_backups(0)
    plan = testbed.plan
    # With pauses of 5 ms a round of 1.5 * restore_seconds has at most 300 uploads for
    # each of these seconds; the other keys are a reserve.
    key_count = int(plan.rounds * plan.restore_seconds * 400) + 1000
    probed_server = {**{name: name for name in testbed.synapses}, LIMIT: PLUGIN}
    probes = {
        name: LatencyProbes(backups[server], testbed.key_source.next_keys(key_count))
        for name, server in probed_server.items()
    }
    order = list(probes)
    with temporary_directory("restore-") as directory:
        for _ in range(plan.rounds):
            for name in order:
                _probe_server(
                    probes[name], owners[name], plan.restore_seconds, directory
                )
            order.reverse()
    for kind in _KINDS:
        _report(kind, probes, results)


def _probe_server(
    probes: LatencyProbes, owner: Backup, seconds: float, directory: Path
) -> None:
    """Probe a server while it is idle, then while a backup is downloaded from it."""
    wait_until_idle(owner.server.pid)
    probes.run(probes.idle, seconds * _IDLE_SHARE)
    with download_in_background(owner, directory):
        probes.run(probes.restoring, seconds)
    wait_until_idle(owner.server.pid)


def _report(kind: str, probes: dict[str, LatencyProbes], results: Results) -> None:
    """Add the lines and the latencies of a kind of request."""
    idle = {name: each.idle[kind] for name, each in probes.items()}
    restoring = {name: each.restoring[kind] for name, each in probes.items()}
    for name in probes:
        results.latencies[f"{kind}/{name}/idle"] = idle[name]
        results.latencies[f"{kind}/{name}/restoring"] = restoring[name]
    title = _TITLES[kind]
    goal: Goal = at_most(2)
    quotients = {
        name: Summary.of(restoring[name]).p99 / Summary.of(idle[name]).p99
        for name in probes
    }
    results.lines += [
        compare("5", f"{title}, idle", "ms", idle),
        compare("5", f"{title}, during a restore", "ms", restoring),
        state_values("5", f"{title}: p99 against idle p99", "", quotients, goal=goal),
    ]

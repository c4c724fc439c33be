"""Downloads of a key, of a room and of the whole backup."""

import random
from collections.abc import Callable
from functools import partial

from ..backups import Backup
from ..checks import check_downloads
from ..client import Response
from ..keys import Key
from ..results import PLUGIN, Results, at_most, at_most_times_limit, below, compare
from ..sampling import BURST, MemoryWatch, Summary, interleave
from ..testbed import Testbed


def reads(testbed: Testbed, results: Results) -> None:
    """Measure downloads of single keys and of the big room."""
    backups = testbed.create_backups(testbed.full_size)
    check_downloads(backups, testbed.template_keys, testbed.key_source.big_room)
    keys = random.Random(1).choices(testbed.template_keys, k=testbed.plan.fast_samples)
    one: dict[str, Callable[[Key], float]] = {
        name: partial(_get_key, backup) for name, backup in backups.items()
    }
    big_room = testbed.key_source.big_room
    room: dict[str, Callable[[int], float]] = {
        name: partial(_get_room, backup, big_room) for name, backup in backups.items()
    }
    whoami: dict[str, Callable[[Key], float]] = {
        name: partial(_get_whoami, backups[name]) for name in testbed.synapses
    }
    whoami_samples = interleave(whoami, keys, burst=BURST)
    key_samples = interleave(one, keys, burst=BURST)
    room_samples = interleave(room, range(max(testbed.plan.slow_samples // 2, 3)))
    size = sum(key.room_id == big_room for key in testbed.template_keys)
    one_title = f"GET one key of {testbed.full_size:,}"
    room_title = f"GET a room of {size:,}"
    results.lines += [
        compare("4", "GET whoami, for comparison", "ms", whoami_samples),
        compare(
            "4",
            one_title,
            "ms",
            key_samples,
            goal=testbed.speedup_goal(1.6),
            service_goal=at_most_times_limit(3),
        ),
        compare("4", room_title, "ms", room_samples, goal=testbed.speedup_goal(2)),
    ]


def whole_backup(testbed: Testbed, results: Results) -> None:
    """Measure the download of a whole backup: duration, first byte, memory."""
    backups = testbed.create_backups(testbed.full_size)
    downloads = {name: RepeatedDownload(backup) for name, backup in backups.items()}
    samplers: dict[str, Callable[[int], float]] = {
        name: download.run for name, download in downloads.items()
    }
    seconds = interleave(samplers, range(testbed.plan.heavy_samples))
    title = f"GET the whole backup, {testbed.full_size:,} keys"
    first = {name: download.first_bytes for name, download in downloads.items()}
    memory = {
        name: downloads[name].megabytes
        for name in downloads
        if name in testbed.without_limit
    }
    results.lines += [
        compare("4", title, "s", seconds, goal=testbed.speedup_goal(4)),
        compare("4", f"{title}: first byte", "ms", first).with_goal(
            Summary.of(first[PLUGIN]).median, testbed.postgres_goal(at_most(30, " ms"))
        ),
        compare("4", f"{title}: memory grown", "MB", memory).with_goal(
            max(memory[PLUGIN]), testbed.postgres_goal(below(20, " MB"))
        ),
    ]


class RepeatedDownload:
    """Repeated download of a whole backup.

    Samples of the time to the first byte (milliseconds) are in ``first_bytes``, of the
    server's memory growth in ``megabytes``.
    """

    def __init__(self, backup: Backup) -> None:
        """Prepare the download of a backup."""
        self.backup = backup
        self.first_bytes: list[float] = []
        self.megabytes: list[float] = []

    def run(self, _: object = None) -> float:
        """Download once, store first byte and memory growth, return the seconds."""
        with MemoryWatch(self.backup.server.pid) as memory:
            answer: Response = self.backup.send(self.backup.get_whole())
        self.first_bytes.append(answer.first_byte_seconds * 1e3)
        self.megabytes.append(memory.growth_megabytes)
        return answer.seconds


def _get_whoami(backup: Backup, _: Key) -> float:
    """Time whoami, which shows a homeserver's overhead for any request."""
    return backup.milliseconds(backup.whoami())


def _get_key(backup: Backup, key: Key) -> float:
    """Time the download of a key."""
    return backup.milliseconds(backup.get_key(key))


def _get_room(backup: Backup, room_id: str, _: int) -> float:
    """Time the download of a room."""
    return backup.milliseconds(backup.get_room(room_id))

"""Downloads of one key, of a room and of everything."""

import random
from collections.abc import Callable
from functools import partial

from ..backups import Backup
from ..checks import check_downloads
from ..client import Answer
from ..keys import Key
from ..results import PLUGIN, Results, at_most, below, compare, within
from ..sampling import BURST, MemoryWatch, Summary, interleave
from ..stage import Stage


def reads(stage: Stage, results: Results) -> None:
    """Download single keys and the big room."""
    backups = stage.backup(stage.size)
    check_downloads(backups, stage.master, stage.source.big_room)
    keys = random.Random(1).choices(stage.master, k=stage.plan.fast)
    one: dict[str, Callable[[Key], float]] = {
        name: partial(_get_key, backup) for name, backup in backups.items()
    }
    big_room = stage.source.big_room
    room: dict[str, Callable[[int], float]] = {
        name: partial(_get_room, backup, big_room) for name, backup in backups.items()
    }
    floor: dict[str, Callable[[Key], float]] = {
        name: partial(_ask_who, backups[name]) for name in stage.synapses
    }
    of_none = interleave(floor, keys, burst=BURST)
    of_one = interleave(one, keys, burst=BURST)
    of_room = interleave(room, range(max(stage.plan.slow // 2, 3)))
    size = sum(key.room_id == big_room for key in stage.master)
    one_title = f"GET one key of {stage.size:,}"
    room_title = f"GET a room of {size:,}"
    results.lines += [
        compare("4", "GET whoami, for comparison", "ms", of_none),
        compare(
            *("4", one_title, "ms", of_one),
            goal=stage.speedup(1.6),
            service_goal=within(3),
        ),
        compare("4", room_title, "ms", of_room, goal=stage.speedup(2)),
    ]


def whole(stage: Stage, results: Results) -> None:
    """Download everything: its time, its first byte, its memory."""
    backups = stage.backup(stage.size)
    downloads = {name: Download(backup) for name, backup in backups.items()}
    samplers: dict[str, Callable[[int], float]] = {
        name: download.run for name, download in downloads.items()
    }
    seconds = interleave(samplers, range(stage.plan.heavy))
    title = f"GET the whole backup, {stage.size:,} keys"
    first = {name: download.first_bytes for name, download in downloads.items()}
    grown = {
        name: downloads[name].megabytes for name in downloads if name in stage.servers
    }
    results.lines += [
        compare("4", title, "s", seconds, goal=stage.speedup(4)),
        compare("4", f"{title}: first byte", "ms", first).judge(
            Summary.of(first[PLUGIN]).median, stage.unless_sqlite(at_most(30, " ms"))
        ),
        compare("4", f"{title}: memory grown", "MB", grown).judge(
            max(grown[PLUGIN]), stage.unless_sqlite(below(20, " MB"))
        ),
    ]


class Download:
    """The whole backup, downloaded again and again."""

    def __init__(self, backup: Backup) -> None:
        """Download a backup."""
        self.backup = backup
        self.first_bytes: list[float] = []
        self.megabytes: list[float] = []

    def run(self, _: object = None) -> float:
        """Download once, and note when it began and the memory it took."""
        with MemoryWatch(self.backup.subject.pid) as memory:
            answer: Answer = self.backup.send(self.backup.get_whole())
        self.first_bytes.append(answer.first_byte * 1e3)
        self.megabytes.append(memory.growth_megabytes)
        return answer.seconds


def _ask_who(backup: Backup, _: Key) -> float:
    """Send what costs a homeserver little more than answering at all."""
    return backup.milliseconds(backup.whoami())


def _get_key(backup: Backup, key: Key) -> float:
    """Download one key."""
    return backup.milliseconds(backup.get_key(key))


def _get_room(backup: Backup, room_id: str, _: int) -> float:
    """Download one room."""
    return backup.milliseconds(backup.get_room(room_id))

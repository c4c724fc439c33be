"""Ends what a harness left running, run as a script beside it.

Each line read is ``watch PID SIGNAL``, ``forget PID``, ``remove DIRECTORY`` or
``keep DIRECTORY``. The input ends with the harness, however that dies.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Mapping

GRACE = 10.0


def follow(lines: Iterable[str]) -> tuple[dict[int, int], set[str]]:
    """Take orders until the harness is gone; return what it left behind."""
    processes: dict[int, int] = {}
    directories: set[str] = set()
    for line in lines:
        order, _, value = line.rstrip("\n").partition(" ")
        if order == "watch":
            pid, number = value.split()
            processes[int(pid)] = int(number)
        elif order == "forget":
            processes.pop(int(value), None)
        elif order == "remove":
            directories.add(value)
        elif order == "keep":
            directories.discard(value)
    return processes, directories


def running(pid: int) -> bool:
    """Tell whether the process is alive; one nobody reaped is not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in "XZ"
    except OSError:
        return False


def end(processes: Mapping[int, int]) -> None:
    """Signal every process as asked, and kill those that linger."""
    for pid, number in processes.items():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    deadline = time.monotonic() + GRACE
    while any(map(running, processes)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in filter(running, processes):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def main() -> None:
    """Wait for the harness to end, then clean up after it."""
    processes, directories = follow(sys.stdin)
    end(processes)
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()

"""Script that cleans up after a test process, run as a child of its own beside it.

Each line of standard input is ``watch PID SIGNAL``, ``forget PID``, ``remove
DIRECTORY`` or ``keep DIRECTORY``. Standard input reaches its end when the test process
ends, even by SIGKILL. Then the script ends all watched processes and removes all
directories.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Mapping

#: Seconds from the first signal until SIGKILL for the processes that are still alive.
GRACE = 10.0


def read_commands(lines: Iterable[str]) -> tuple[dict[int, int], set[str]]:
    """Read commands until the end of the input, which is the end of the test process.

    Returns:
        The watched processes, as a signal number for each pid, and the directories to
        remove.
    """
    processes: dict[int, int] = {}
    directories: set[str] = set()
    for line in lines:
        command, _, value = line.rstrip("\n").partition(" ")
        if command == "watch":
            pid, number = value.split()
            processes[int(pid)] = int(number)
        elif command == "forget":
            processes.pop(int(value), None)
        elif command == "remove":
            directories.add(value)
        elif command == "keep":
            directories.discard(value)
    return processes, directories


def is_running(pid: int) -> bool:
    """Return whether a process is alive; a zombie counts as ended."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in "XZ"
    except OSError:
        return False


def end_processes(processes: Mapping[int, int]) -> None:
    """Send each process its signal, and SIGKILL after `GRACE` seconds if still
    alive."""
    for pid, number in processes.items():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    deadline = time.monotonic() + GRACE
    while any(map(is_running, processes)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in filter(is_running, processes):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def main() -> None:
    """Wait for the end of the test process, then end the children and remove the
    files."""
    processes, directories = read_commands(sys.stdin)
    end_processes(processes)
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()

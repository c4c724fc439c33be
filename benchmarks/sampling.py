"""Samples: how they are taken in turns, and what is made of them."""

import itertools
import math
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import attrs

BURST = 10
SHORT_BURST = 5
_PAGE = 4096
_TICKS_PER_SECOND = 100
_SAMPLE_SECONDS = 0.01

Subject = TypeVar("Subject")
Material = TypeVar("Material")


@attrs.frozen
class Summary:
    """What is kept of some samples."""

    n: int
    median: float
    q1: float
    q3: float
    p99: float
    maximum: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Summary":
        """Summarise at least one sample."""
        ordered = sorted(samples)
        q1 = q3 = ordered[0]
        if len(ordered) > 1:
            q1, _, q3 = statistics.quantiles(ordered, n=4, method="inclusive")
        median = statistics.median(ordered)
        p99 = percentile(ordered, 99)
        return cls(len(ordered), median, q1, q3, p99, ordered[-1])


def percentile(samples: Iterable[float], percent: float) -> float:
    """Return the smallest sample that so many per cent don't exceed."""
    ordered = sorted(samples)
    return ordered[max(math.ceil(len(ordered) * percent / 100) - 1, 0)]


def interleave(
    samplers: Mapping[Subject, Callable[[Material], float]],
    materials: Iterable[Material],
    *,
    burst: int = 1,
    skip_first: bool = True,
) -> dict[Subject, list[float]]:
    """Take samples of each in turn, backwards every other time.

    The first sample of a burst isn't kept unless asked for: it finds caches that are
    cold because the others just had their turn, as a server in use doesn't.
    """
    order = list(samplers)
    samples: dict[Subject, list[float]] = {subject: [] for subject in order}
    skipped = 1 if skip_first and burst > 1 else 0
    supply = iter(materials)
    while turn := list(itertools.islice(supply, burst)):
        for subject in order:
            taken = [samplers[subject](material) for material in turn]
            samples[subject] += taken[skipped:]
        order.reverse()
    return samples


def progress(text: str) -> None:
    """Tell whoever waits what is being done."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def rss_bytes(pid: int) -> int:
    """Measure the memory that a process occupies."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE


def cpu_seconds(pid: int) -> float:
    """Measure the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND


def children(pid: int) -> list[int]:
    """List the direct children of a process."""
    listing = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in listing.split()]


def wait_until_idle(pid: int, timeout: float = 60.0) -> None:
    """Wait until a process does next to nothing."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        before = cpu_seconds(pid)
        time.sleep(0.3)
        if cpu_seconds(pid) - before <= 0.03:
            return


class MemoryWatch:
    """Follows the memory of a process while something is done."""

    def __init__(self, pid: int) -> None:
        """Watch a process."""
        self._pid = pid
        self._before = 0
        self._peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    @property
    def growth_megabytes(self) -> float:
        """Return how far memory went over what it was just before."""
        return (self._peak - self._before) / 1e6

    def __enter__(self) -> "MemoryWatch":
        """Begin."""
        self._before = self._peak = rss_bytes(self._pid)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End."""
        self._done.set()
        self._thread.join()

    def _follow(self) -> None:
        """Note the most that was seen."""
        while not self._done.wait(_SAMPLE_SECONDS):
            self._peak = max(self._peak, rss_bytes(self._pid))

"""Sampling: interleaved measurements, statistics, memory and processor time."""

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

# Samples that a sampler takes in a row: of single requests, and of batches.
BURST = 10
SHORT_BURST = 5
# Units of /proc on Linux.
_PAGE_BYTES = 4096
_TICKS_PER_SECOND = 100
_MEMORY_INTERVAL_SECONDS = 0.01

Label = TypeVar("Label")
Input = TypeVar("Input")


@attrs.frozen
class Summary:
    """Statistics of a list of samples; ``n`` is their number."""

    n: int
    median: float
    q1: float
    q3: float
    p99: float
    maximum: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Summary":
        """Summarise a list of at least one sample."""
        ordered = sorted(samples)
        q1 = q3 = ordered[0]
        if len(ordered) > 1:
            q1, _, q3 = statistics.quantiles(ordered, n=4, method="inclusive")
        median = statistics.median(ordered)
        p99 = percentile(ordered, 99)
        return cls(len(ordered), median, q1, q3, p99, ordered[-1])


def percentile(samples: Iterable[float], percent: float) -> float:
    """Return the smallest sample that so many per cent of the samples don't exceed."""
    ordered = sorted(samples)
    return ordered[max(math.ceil(len(ordered) * percent / 100) - 1, 0)]


def interleave(
    samplers: Mapping[Label, Callable[[Input], float]],
    inputs: Iterable[Input],
    *,
    burst: int = 1,
    discard_first: bool = True,
) -> dict[Label, list[float]]:
    """Sample several labelled operations in alternating bursts.

    In each turn every sampler gets the same burst of inputs. The order of the samplers
    is reversed after each turn, so that each is first equally often.

    Args:
        samplers: Functions that run an operation and return a sample, by label.
        inputs: An input per sample.
        burst: The number of samples that a sampler takes in a row.
        discard_first: Whether the first sample of each longer burst is discarded. It
            meets caches that the other servers' turns left cold, unlike the requests
            to a server in use.

    Returns:
        The samples by label, in the order of the inputs.
    """
    order = list(samplers)
    samples: dict[Label, list[float]] = {label: [] for label in order}
    skipped = 1 if discard_first and burst > 1 else 0
    remaining = iter(inputs)
    while turn := list(itertools.islice(remaining, burst)):
        for label in order:
            burst_samples = [samplers[label](item) for item in turn]
            samples[label] += burst_samples[skipped:]
        order.reverse()
    return samples


def log_progress(text: str) -> None:
    """Print a message with the time to standard error."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def rss_bytes(pid: int) -> int:
    """Return the resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has used, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND


def children(pid: int) -> list[int]:
    """Return the process ids of a process's direct children."""
    listing = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in listing.split()]


def wait_until_idle(pid: int, timeout: float = 60.0) -> None:
    """Wait until a process uses at most 10 % of a processor, or until the timeout."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        before = cpu_seconds(pid)
        time.sleep(0.3)
        if cpu_seconds(pid) - before <= 0.03:
            return


class MemoryWatch:
    """Context manager that samples the memory of a process in a thread."""

    def __init__(self, pid: int) -> None:
        """Prepare to watch a process."""
        self._pid = pid
        self._before = 0
        self._peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    @property
    def growth_megabytes(self) -> float:
        """Return the difference between the peak and the memory at the start."""
        return (self._peak - self._before) / 1e6

    def __enter__(self) -> "MemoryWatch":
        """Read the memory and start the thread."""
        self._before = self._peak = rss_bytes(self._pid)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the thread."""
        self._done.set()
        self._thread.join()

    def _follow(self) -> None:
        """Update the peak until the watch ends."""
        while not self._done.wait(_MEMORY_INTERVAL_SECONDS):
            self._peak = max(self._peak, rss_bytes(self._pid))

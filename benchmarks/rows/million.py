"""Backups of ten times the full size, like the largest real backups."""

from collections.abc import Callable, Sequence
from functools import partial

from ..backups import Backup
from ..keys import BATCH, Key
from ..results import (
    PLUGIN,
    STOCK,
    Point,
    Results,
    at_most,
    below,
    compare,
    state_values,
)
from ..sampling import BURST, SHORT_BURST, Summary, interleave
from ..testbed import Testbed
from .downloads import RepeatedDownload
from .uploads import get_version, median_quotients, upload, upload_one

_COPIES = 10
_OPERATIONS = (get_version, upload_one, upload)

Sampler = Callable[[Sequence[Key]], float]


def million(testbed: Testbed, results: Results) -> None:
    """Measure the plugin fully, and the built-in endpoints with few samples.

    The built-in endpoints are too slow here for more samples or a whole download.
    """
    names = (STOCK, PLUGIN)
    empty = testbed.create_backups(0, names=names)
    full = testbed.create_backups(testbed.full_size, copies=_COPIES, names=names)
    keys = testbed.full_size * _COPIES
    for operation in _OPERATIONS:
        samples = _sample_plugin(testbed, operation, full[PLUGIN], empty[PLUGIN])
        point = Summary.of(samples["full"])
        results.points.append(Point(operation.__name__, keys, PLUGIN, point))
        if operation is upload_one:
            _report_single(testbed, keys, samples, full[STOCK], results)
        else:
            _sample_stock(testbed, operation, full[STOCK], keys, results)
    _report_whole(full[PLUGIN], keys, results)


def _sample_plugin(
    testbed: Testbed,
    operation: Callable[[Backup, Sequence[Key]], float],
    full: Backup,
    empty: Backup,
) -> dict[str, list[float]]:
    """Sample an operation of the plugin on a full and an empty backup, interleaved."""
    samplers: dict[str, Sampler] = {
        "full": partial(operation, full),
        "empty": partial(operation, empty),
    }
    size = 1 if operation is upload_one else BATCH
    count = (
        testbed.plan.slow_samples if operation is upload else testbed.plan.fast_samples
    )
    burst = SHORT_BURST if operation is upload else BURST
    return interleave(samplers, testbed.key_source.batches(count, size), burst=burst)


def _sample_stock(
    testbed: Testbed,
    operation: Callable[[Backup, Sequence[Key]], float],
    backup: Backup,
    keys: int,
    results: Results,
) -> list[float]:
    """Sample an operation of the built-in endpoints a few times."""
    size = 1 if operation is upload_one else BATCH
    batches = testbed.key_source.batches(testbed.plan.heavy_samples, size)
    taken = [operation(backup, batch) for batch in batches]
    results.points.append(Point(operation.__name__, keys, STOCK, Summary.of(taken)))
    return taken


def _report_single(
    testbed: Testbed,
    keys: int,
    samples: dict[str, list[float]],
    stock: Backup,
    results: Results,
) -> None:
    """Add the lines for the upload of a single new key."""
    full = {
        STOCK: _sample_stock(testbed, upload_one, stock, keys, results),
        PLUGIN: samples["full"],
    }
    quotients = median_quotients({PLUGIN: samples["empty"]}, {PLUGIN: samples["full"]})
    title = "a single new key"
    results.lines += [
        compare("2", f"{title}, {keys:,} keys", "ms", full),
        state_values(
            "2", f"{title}: {keys:,} against empty", "", quotients, goal=at_most(1.3)
        ),
    ]


def _report_whole(backup: Backup, keys: int, results: Results) -> None:
    """Measure two downloads of the whole backup, and add their lines."""
    download = RepeatedDownload(backup)
    seconds = [download.run() for _ in range(2)]
    title = f"GET the whole backup, {keys:,} keys"
    memory = {PLUGIN: download.megabytes}
    results.lines += [
        compare("4", title, "s", {PLUGIN: seconds}),
        compare("4", f"{title}: first byte", "ms", {PLUGIN: download.first_bytes}),
        compare("4", f"{title}: memory grown", "MB", memory).with_goal(
            max(download.megabytes), below(20, " MB")
        ),
    ]

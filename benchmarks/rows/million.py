"""Backups ten times the full size, as the largest real ones are."""

from collections.abc import Callable, Sequence
from functools import partial

from ..backups import Backup
from ..keys import BATCH, Key
from ..results import PLUGIN, STOCK, Point, Results, at_most, below, compare, state
from ..sampling import BURST, SHORT_BURST, Summary, interleave
from ..stage import Stage
from .downloads import Download
from .uploads import growth, look, upload, upload_one

COPIES = 10
_OPERATIONS = (look, upload_one, upload)

Sampler = Callable[[Sequence[Key]], float]


def million(stage: Stage, results: Results) -> None:
    """Measure the plugin, and of the built-in endpoints what doesn't take for ever."""
    names = (STOCK, PLUGIN)
    empty = stage.backup(0, names=names)
    full = stage.backup(stage.size, copies=COPIES, names=names)
    keys = stage.size * COPIES
    for operation in _OPERATIONS:
        samples = _sample(stage, operation, full[PLUGIN], empty[PLUGIN])
        point = Summary.of(samples["full"])
        results.points.append(Point(operation.__name__, keys, PLUGIN, point))
        if operation is upload_one:
            _report_single(stage, keys, samples, full[STOCK], results)
        else:
            _point_stock(stage, operation, full[STOCK], keys, results)
    _report_whole(full[PLUGIN], keys, results)


def _sample(
    stage: Stage,
    operation: Callable[[Backup, Sequence[Key]], float],
    full: Backup,
    empty: Backup,
) -> dict[str, list[float]]:
    """Sample one operation of the plugin at a full and an empty backup in turn."""
    samplers: dict[str, Sampler] = {
        "full": partial(operation, full),
        "empty": partial(operation, empty),
    }
    size = 1 if operation is upload_one else BATCH
    count = stage.plan.slow if operation is upload else stage.plan.fast
    burst = SHORT_BURST if operation is upload else BURST
    return interleave(samplers, stage.source.batches(count, size), burst=burst)


def _point_stock(
    stage: Stage,
    operation: Callable[[Backup, Sequence[Key]], float],
    backup: Backup,
    keys: int,
    results: Results,
) -> list[float]:
    """Sample one operation of the built-in endpoints a few times."""
    size = 1 if operation is upload_one else BATCH
    lots = stage.source.batches(stage.plan.heavy, size)
    taken = [operation(backup, lot) for lot in lots]
    results.points.append(Point(operation.__name__, keys, STOCK, Summary.of(taken)))
    return taken


def _report_single(
    stage: Stage,
    keys: int,
    samples: dict[str, list[float]],
    stock: Backup,
    results: Results,
) -> None:
    """Report what a single new key costs."""
    full = {
        STOCK: _point_stock(stage, upload_one, stock, keys, results),
        PLUGIN: samples["full"],
    }
    quotient = growth({PLUGIN: samples["empty"]}, {PLUGIN: samples["full"]})
    title = "a single new key"
    results.lines += [
        compare("2", f"{title}, {keys:,} keys", "ms", full),
        state("2", f"{title}: {keys:,} against empty", "", quotient, goal=at_most(1.3)),
    ]


def _report_whole(backup: Backup, keys: int, results: Results) -> None:
    """Report what it takes to download everything."""
    download = Download(backup)
    seconds = [download.run() for _ in range(2)]
    title = f"GET the whole backup, {keys:,} keys"
    grown = {PLUGIN: download.megabytes}
    results.lines += [
        compare("4", title, "s", {PLUGIN: seconds}),
        compare("4", f"{title}: first byte", "ms", {PLUGIN: download.first_bytes}),
        compare("4", f"{title}: memory grown", "MB", grown).judge(
            max(download.megabytes), below(20, " MB")
        ),
    ]

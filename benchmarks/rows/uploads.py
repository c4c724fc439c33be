"""Uploads: of new keys, to backups of all sizes, and of keys already there."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

from ..backups import Backup, Backups
from ..checks import check_count, check_key
from ..keys import BATCH, Key
from ..results import (
    PLUGIN,
    Goal,
    Line,
    Point,
    Results,
    Samples,
    at_most,
    compare,
    state,
    within,
)
from ..sampling import BURST, SHORT_BURST, Summary, interleave
from ..stage import Stage

Operation = Callable[[Backup, Sequence[Key]], float]


def batches(stage: Stage, results: Results) -> None:
    """Fill empty backups batch by batch."""
    backups = stage.backup(0)
    count = stage.size // BATCH
    samples = interleave(
        _each(backups, upload),
        stage.source.batches(count),
        burst=SHORT_BURST,
        skip_first=False,
    )
    check_count(backups, count * BATCH)
    goal = stage.unless_sqlite(at_most(1.15))
    title = f"{BATCH} new keys, up to {count * BATCH:,}"
    whole = f"{title}: all of it"
    tenths = "last tenth of these against the first"
    results.lines += [
        _rates(title, samples, stage.speedup(2.5)),
        compare("1", title, "ms", samples, service_goal=within(1.5)),
        state("1", whole, "keys/s", _overall(samples)),
        state("1", tenths, "", _slowdown(samples), goal=goal),
    ]
    stage.settle()


def sizes(stage: Stage, results: Results) -> None:
    """Measure what depends on the size of the backup in a poor implementation."""
    counts = (0, stage.size // 100, stage.size // 10, stage.size)
    backups = {count: stage.backup(count) for count in counts}
    plan, source = stage.plan, stage.source
    lookups: Iterable[Sequence[Key]] = [()] * plan.fast
    lots = source.batches(plan.slow // 2)
    version = _across(backups, look, lookups)
    single = _across(backups, upload_one, source.batches(plan.fast, 1))
    batch = _across(backups, upload, lots, SHORT_BURST)
    if not stage.on_sqlite:
        results.points += [
            *_points(version, "look", 0),
            *_points(single, "upload_one", 1),
            *_points(batch, "upload", BATCH),
        ]
    empty, full = single[0], single[stage.size]
    goal = stage.unless_sqlite(at_most(1.3))
    title = "a single new key: full against empty"
    results.lines += [
        _single("empty backup", empty, stage.speedup(1.8)),
        _single(f"{stage.size:,} keys", full, stage.speedup(8)),
        state("2", title, "", growth(empty, full), goal=goal),
        _version(f"{stage.size:,} keys", version[stage.size], stage),
    ]


def just_stored(stage: Stage, results: Results) -> None:
    """Measure again what depends on it before the table was ever vacuumed."""
    backups = {stage.size: stage.backup(stage.size, vacuumed=False)}
    lookups: Iterable[Sequence[Key]] = [()] * stage.plan.slow
    version = _across(backups, look, lookups)
    single = _across(backups, upload_one, stage.source.batches(stage.plan.slow, 1))
    at = f"{stage.size:,} keys just stored (not vacuumed)"
    results.lines += [
        _single(at, single[stage.size], stage.speedup(8)),
        _version(at, version[stage.size], stage),
    ]
    stage.settle()


def merges(stage: Stage, results: Results) -> None:
    """Upload keys that are there already, better ones and the same ones."""
    backups = stage.backup(stage.size)
    update = _each(backups, partial(upload, work="update"))
    ignore = _each(backups, partial(upload, work="compare"))
    lots = [
        stage.master[start : start + BATCH]
        for start in range(0, stage.size - BATCH + 1, BATCH)
    ]
    half = min(len(lots) // 2, stage.plan.slow)
    better = ([key.better() for key in lot] for lot in lots[:half])
    improved = interleave(update, better, burst=SHORT_BURST)
    check_key(backups, stage.master[0].better())
    same = interleave(ignore, lots[half : 2 * half], burst=SHORT_BURST)
    better_title = f"{BATCH} better keys in {stage.size:,}"
    equal_title = f"{BATCH} equal keys in {stage.size:,}"
    results.lines += [
        compare("3", better_title, "ms", improved, goal=stage.speedup(13)),
        compare("3", equal_title, "ms", same, goal=stage.speedup(5)),
    ]
    stage.settle()


def _rates(title: str, samples: Samples, goal: Goal) -> Line:
    """Compare keys per second."""
    rates = {
        name: [1e3 * BATCH / milliseconds for milliseconds in taken]
        for name, taken in samples.items()
    }
    return compare("1", title, "keys/s", rates, goal=goal, more_is_better=True)


def _single(at: str, samples: Samples, goal: Goal) -> Line:
    """Compare uploads of a single key."""
    title = f"a single new key, {at}"
    return compare("2", title, "ms", samples, goal=goal, service_goal=within(4))


def _version(at: str, samples: Samples, stage: Stage) -> Line:
    """Compare looks at the current version."""
    goal = stage.speedup(10)
    return compare("4", f"GET version, {at}", "ms", samples, goal=goal)


def upload(backup: Backup, keys: Sequence[Key], work: str = "insert") -> float:
    """Upload keys at once."""
    return backup.milliseconds(backup.upload(keys, work))


def upload_one(backup: Backup, keys: Sequence[Key]) -> float:
    """Upload a single key."""
    (key,) = keys
    return backup.milliseconds(backup.upload_one(key))


def look(backup: Backup, _: Sequence[Key]) -> float:
    """Look at the current version."""
    return backup.milliseconds(backup.get_version())


def growth(empty: Samples, full: Samples) -> dict[str, float]:
    """Divide what it costs at a full backup by what it costs at an empty one."""
    return {
        name: Summary.of(full[name]).median / Summary.of(empty[name]).median
        for name in full
    }


def _each(
    backups: Backups, operation: Operation
) -> dict[str, Callable[[Sequence[Key]], float]]:
    """Bind an operation to each server's backup."""
    return {name: partial(operation, backup) for name, backup in backups.items()}


def _across(
    backups: Mapping[int, Backups],
    operation: Operation,
    materials: Iterable[Sequence[Key]],
    burst: int = BURST,
) -> dict[int, dict[str, list[float]]]:
    """Sample one operation at all sizes and servers in turn."""
    samplers = {
        (count, name): partial(operation, backup)
        for count, each in backups.items()
        for name, backup in each.items()
    }
    by_size: dict[int, dict[str, list[float]]] = {count: {} for count in backups}
    for (count, name), taken in interleave(samplers, materials, burst=burst).items():
        by_size[count][name] = taken
    return by_size


def _points(
    by_size: Mapping[int, Samples], operation: str, added: int
) -> Iterator[Point]:
    """Make points of the samples, each at the mean size during the sampling."""
    for count, samples in by_size.items():
        for name, taken in samples.items():
            size = count + len(taken) * added // 2
            yield Point(operation, size, name, Summary.of(taken))


def _overall(samples: Samples) -> dict[str, float]:
    """Divide all keys by the time that all uploads took."""
    return {name: 1e3 * BATCH * len(each) / sum(each) for name, each in samples.items()}


def _slowdown(samples: Samples) -> dict[str, float]:
    """Compare the medians of the last and the first tenth of the uploads."""
    tenth = max(len(samples[PLUGIN]) // 10, 1)
    return {
        name: Summary.of(taken[-tenth:]).median / Summary.of(taken[:tenth]).median
        for name, taken in samples.items()
    }

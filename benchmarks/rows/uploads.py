"""Uploads of new keys to backups of all sizes, and of keys already stored."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

from ..backups import Backup, Backups
from ..checks import check_key, check_key_count
from ..keys import BATCH, Key
from ..results import (
    PLUGIN,
    Goal,
    Line,
    Point,
    Results,
    Samples,
    at_most,
    at_most_times_limit,
    compare,
    state_values,
)
from ..sampling import BURST, SHORT_BURST, Summary, interleave
from ..testbed import Testbed

Operation = Callable[[Backup, Sequence[Key]], float]


def batches(testbed: Testbed, results: Results) -> None:
    """Measure the upload of new keys, from an empty backup to the full size."""
    backups = testbed.create_backups(0)
    count = testbed.full_size // BATCH
    samples = interleave(
        _bind(backups, upload),
        testbed.key_source.batches(count),
        burst=SHORT_BURST,
        discard_first=False,
    )
    check_key_count(backups, count * BATCH)
    goal = testbed.postgres_goal(at_most(1.15))
    title = f"{BATCH} new keys, up to {count * BATCH:,}"
    overall_title = f"{title}: all of it"
    slowdown_title = "last tenth of these against the first"
    results.lines += [
        _compare_rates(title, samples, testbed.speedup_goal(2.5)),
        compare("1", title, "ms", samples, service_goal=at_most_times_limit(1.5)),
        state_values("1", overall_title, "keys/s", _overall_rates(samples)),
        state_values("1", slowdown_title, "", _slowdown(samples), goal=goal),
    ]
    testbed.run_maintenance()


def sizes(testbed: Testbed, results: Results) -> None:
    """Measure operations whose cost may grow with the backup, at four sizes."""
    counts = (0, testbed.full_size // 100, testbed.full_size // 10, testbed.full_size)
    backups = {count: testbed.create_backups(count) for count in counts}
    plan, source = testbed.plan, testbed.key_source
    no_keys: Iterable[Sequence[Key]] = [()] * plan.fast_samples
    key_batches = source.batches(plan.slow_samples // 2)
    version = _sample_sizes(backups, get_version, no_keys)
    single = _sample_sizes(backups, upload_one, source.batches(plan.fast_samples, 1))
    batch = _sample_sizes(backups, upload, key_batches, SHORT_BURST)
    if not testbed.on_sqlite:
        results.points += [
            *_points_of(version, "get_version", 0),
            *_points_of(single, "upload_one", 1),
            *_points_of(batch, "upload", BATCH),
        ]
    empty, full = single[0], single[testbed.full_size]
    goal = testbed.postgres_goal(at_most(1.3))
    title = "a single new key: full against empty"
    results.lines += [
        _compare_single("empty backup", empty, testbed.speedup_goal(1.8)),
        _compare_single(f"{testbed.full_size:,} keys", full, testbed.speedup_goal(8)),
        state_values("2", title, "", median_quotients(empty, full), goal=goal),
        _compare_version(
            f"{testbed.full_size:,} keys", version[testbed.full_size], testbed
        ),
    ]


def unvacuumed(testbed: Testbed, results: Results) -> None:
    """Measure GET version and a single upload before the table's first vacuum."""
    backups = {
        testbed.full_size: testbed.create_backups(testbed.full_size, vacuumed=False)
    }
    no_keys: Iterable[Sequence[Key]] = [()] * testbed.plan.slow_samples
    version = _sample_sizes(backups, get_version, no_keys)
    single = _sample_sizes(
        backups, upload_one, testbed.key_source.batches(testbed.plan.slow_samples, 1)
    )
    at = f"{testbed.full_size:,} keys just stored (not vacuumed)"
    results.lines += [
        _compare_single(at, single[testbed.full_size], testbed.speedup_goal(8)),
        _compare_version(at, version[testbed.full_size], testbed),
    ]
    testbed.run_maintenance()


def merges(testbed: Testbed, results: Results) -> None:
    """Measure uploads of keys already stored: better keys and equal keys."""
    backups = testbed.create_backups(testbed.full_size)
    update = _bind(backups, partial(upload, statement="update"))
    ignore = _bind(backups, partial(upload, statement="compare"))
    key_batches = [
        testbed.template_keys[start : start + BATCH]
        for start in range(0, testbed.full_size - BATCH + 1, BATCH)
    ]
    half = min(len(key_batches) // 2, testbed.plan.slow_samples)
    better = ([key.better() for key in batch] for batch in key_batches[:half])
    improved = interleave(update, better, burst=SHORT_BURST)
    check_key(backups, testbed.template_keys[0].better())
    same = interleave(ignore, key_batches[half : 2 * half], burst=SHORT_BURST)
    better_title = f"{BATCH} better keys in {testbed.full_size:,}"
    equal_title = f"{BATCH} equal keys in {testbed.full_size:,}"
    results.lines += [
        compare("3", better_title, "ms", improved, goal=testbed.speedup_goal(13)),
        compare("3", equal_title, "ms", same, goal=testbed.speedup_goal(5)),
    ]
    testbed.run_maintenance()


def _compare_rates(title: str, samples: Samples, goal: Goal) -> Line:
    """Return the line that compares keys per second."""
    rates = {
        name: [1e3 * BATCH / milliseconds for milliseconds in taken]
        for name, taken in samples.items()
    }
    return compare("1", title, "keys/s", rates, goal=goal, more_is_better=True)


def _compare_single(at: str, samples: Samples, goal: Goal) -> Line:
    """Return the line that compares uploads of a single key."""
    title = f"a single new key, {at}"
    return compare(
        "2", title, "ms", samples, goal=goal, service_goal=at_most_times_limit(4)
    )


def _compare_version(at: str, samples: Samples, testbed: Testbed) -> Line:
    """Return the line that compares GET version."""
    goal = testbed.speedup_goal(10)
    return compare("4", f"GET version, {at}", "ms", samples, goal=goal)


def upload(backup: Backup, keys: Sequence[Key], statement: str = "insert") -> float:
    """Upload keys in a single request and return the milliseconds."""
    return backup.milliseconds(backup.upload(keys, statement))


def upload_one(backup: Backup, keys: Sequence[Key]) -> float:
    """Upload a single key and return the milliseconds."""
    (key,) = keys
    return backup.milliseconds(backup.upload_one(key))


def get_version(backup: Backup, _: Sequence[Key]) -> float:
    """Request the current version and return the milliseconds."""
    return backup.milliseconds(backup.get_version())


def median_quotients(empty: Samples, full: Samples) -> dict[str, float]:
    """Divide each server's median on a full backup by the median on an empty backup."""
    return {
        name: Summary.of(full[name]).median / Summary.of(empty[name]).median
        for name in full
    }


def _bind(
    backups: Backups, operation: Operation
) -> dict[str, Callable[[Sequence[Key]], float]]:
    """Bind an operation to each server's backup."""
    return {name: partial(operation, backup) for name, backup in backups.items()}


def _sample_sizes(
    backups: Mapping[int, Backups],
    operation: Operation,
    inputs: Iterable[Sequence[Key]],
    burst: int = BURST,
) -> dict[int, dict[str, list[float]]]:
    """Sample an operation at all backup sizes on all servers, interleaved."""
    samplers = {
        (count, name): partial(operation, backup)
        for count, each in backups.items()
        for name, backup in each.items()
    }
    by_size: dict[int, dict[str, list[float]]] = {count: {} for count in backups}
    for (count, name), taken in interleave(samplers, inputs, burst=burst).items():
        by_size[count][name] = taken
    return by_size


def _points_of(
    by_size: Mapping[int, Samples], operation: str, added: int
) -> Iterator[Point]:
    """Yield a plot point for each size and server.

    An operation that adds keys enlarges the backup: the point is at the mean size
    during the sampling.
    """
    for count, samples in by_size.items():
        for name, taken in samples.items():
            size = count + len(taken) * added // 2
            yield Point(operation, size, name, Summary.of(taken))


def _overall_rates(samples: Samples) -> dict[str, float]:
    """Return keys per second over all uploads of each server."""
    return {name: 1e3 * BATCH * len(each) / sum(each) for name, each in samples.items()}


def _slowdown(samples: Samples) -> dict[str, float]:
    """Divide the median of the last tenth of the uploads by that of the first."""
    tenth = max(len(samples[PLUGIN]) // 10, 1)
    return {
        name: Summary.of(taken[-tenth:]).median / Summary.of(taken[:tenth]).median
        for name, taken in samples.items()
    }

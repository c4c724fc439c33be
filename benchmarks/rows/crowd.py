"""Many users: who upload at once, and in one table."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from ..backups import Backup
from ..client import Connection
from ..keys import BATCH, Key
from ..results import PLUGIN, STOCK, Results, at_most, compare, state
from ..sampling import BURST, interleave
from ..stage import Stage
from .statements import postgres
from .uploads import growth, upload_one

USERS = 16
_BATCHES = 3
_CROWD_KEYS = 10

Lots = Sequence[Sequence[Sequence[Key]]]


def users(stage: Stage, results: Results) -> None:
    """Have several users upload batches of new keys over a connection each."""
    backups = [stage.backup(0) for _ in range(USERS)]
    each = 1 if stage.plan.quick else _BATCHES
    samplers: dict[str, Callable[[Lots], float]] = {
        name: partial(_upload_all, [every[name] for every in backups])
        for name in stage.subjects
    }
    rates = interleave(samplers, _lots(stage, each))
    title = f"{USERS} users, {BATCH} new keys an upload"
    results.lines.append(
        compare(
            "6",
            title,
            "keys/s",
            rates,
            goal=stage.speedup(2),
            more_is_better=True,
        )
    )
    stage.settle()


def crowd(stage: Stage, results: Results) -> None:
    """Upload single keys in tables of few users, then of as many as keys else."""
    names = (STOCK, PLUGIN)
    backups = stage.backup(_CROWD_KEYS, names=names)
    samplers: dict[str, Callable[[Sequence[Key]], float]] = {
        name: partial(upload_one, backup) for name, backup in backups.items()
    }

    def sample() -> dict[str, list[float]]:
        return interleave(
            samplers, stage.source.batches(stage.plan.fast, 1), burst=BURST
        )

    # The first ones find servers that have just started.
    sample()
    before = sample()
    for name in names:
        postgres(stage.subjects[name]).crowd(stage.size, _CROWD_KEYS)
    after = sample()
    title = f"a single new key, {stage.size:,} users in the table"
    quotient = growth(before, after)
    results.lines += [
        compare("6", title, "ms", after),
        state("6", f"{title}: against few users", "", quotient, goal=at_most(1.3)),
    ]


def _lots(stage: Stage, each: int) -> Iterator[Lots]:
    """Make the keys of one round for all users."""
    for _ in range(stage.plan.rounds * 2):
        yield [list(stage.source.batches(each)) for _ in range(USERS)]


def _upload_all(backups: Sequence[Backup], lots: Lots) -> float:
    """Upload every user's batches at once; return keys per second."""
    requests = [
        [backup.upload(keys) for keys in batches]
        for backup, batches in zip(backups, lots, strict=True)
    ]
    connections = [Connection(backup.subject.port) for backup in backups]
    with ThreadPoolExecutor(USERS) as pool:
        start = time.perf_counter()
        list(pool.map(_upload, connections, requests))
        seconds = time.perf_counter() - start
    for connection in connections:
        connection.close()
    return sum(map(len, requests)) * BATCH / seconds


def _upload(connection: Connection, requests: Sequence[bytes]) -> None:
    """Upload one user's batches one after the other."""
    for request in requests:
        connection.send(request)

"""Many users: uploads at the same time, and many users in a table."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from ..backups import Backup
from ..client import Connection
from ..keys import BATCH, Key
from ..results import PLUGIN, STOCK, Results, at_most, compare, state_values
from ..sampling import BURST, interleave
from ..testbed import Testbed
from .statements import postgres_database
from .uploads import median_quotients, upload_one

_USERS = 16
_BATCHES_PER_USER = 3
_KEYS_PER_USER = 10

BatchesPerUser = Sequence[Sequence[Sequence[Key]]]


def concurrent_uploads(testbed: Testbed, results: Results) -> None:
    """Measure the rate at which several users upload new keys at the same time."""
    backups = [testbed.create_backups(0) for _ in range(_USERS)]
    count = 1 if testbed.plan.quick else _BATCHES_PER_USER
    samplers: dict[str, Callable[[BatchesPerUser], float]] = {
        name: partial(_upload_concurrently, [every[name] for every in backups])
        for name in testbed.servers
    }
    rates = interleave(samplers, _rounds(testbed, count))
    title = f"{_USERS} users, {BATCH} new keys an upload"
    results.lines.append(
        compare(
            "6",
            title,
            "keys/s",
            rates,
            goal=testbed.speedup_goal(2),
            more_is_better=True,
        )
    )
    testbed.run_maintenance()


def large_table(testbed: Testbed, results: Results) -> None:
    """Measure uploads of single keys in a table of few users, then of many."""
    names = (STOCK, PLUGIN)
    backups = testbed.create_backups(_KEYS_PER_USER, names=names)
    samplers: dict[str, Callable[[Sequence[Key]], float]] = {
        name: partial(upload_one, backup) for name, backup in backups.items()
    }

    def sample() -> dict[str, list[float]]:
        return interleave(
            samplers,
            testbed.key_source.batches(testbed.plan.fast_samples, 1),
            burst=BURST,
        )

    # Discard the first samples: the servers have just started.
    sample()
    before = sample()
    for name in names:
        postgres_database(testbed.servers[name]).add_users(
            testbed.full_size, _KEYS_PER_USER
        )
    after = sample()
    title = f"a single new key, {testbed.full_size:,} users in the table"
    quotients = median_quotients(before, after)
    results.lines += [
        compare("6", title, "ms", after),
        state_values(
            "6", f"{title}: against few users", "", quotients, goal=at_most(1.3)
        ),
    ]


def _rounds(testbed: Testbed, count: int) -> Iterator[BatchesPerUser]:
    """Yield the batches of all users for each round."""
    for _ in range(testbed.plan.rounds * 2):
        yield [list(testbed.key_source.batches(count)) for _ in range(_USERS)]


def _upload_concurrently(
    backups: Sequence[Backup], batches_per_user: BatchesPerUser
) -> float:
    """Upload all users' batches over a connection a user; return keys per second."""
    requests = [
        [backup.upload(keys) for keys in batches]
        for backup, batches in zip(backups, batches_per_user, strict=True)
    ]
    connections = [Connection(backup.server.port) for backup in backups]
    with ThreadPoolExecutor(_USERS) as pool:
        start = time.perf_counter()
        list(pool.map(_send_all, connections, requests))
        seconds = time.perf_counter() - start
    for connection in connections:
        connection.close()
    return sum(map(len, requests)) * BATCH / seconds


def _send_all(connection: Connection, requests: Sequence[bytes]) -> None:
    """Send a user's requests in sequence."""
    for request in requests:
        connection.send(request)

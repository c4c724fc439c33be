"""Number of statements and transactions per request."""

import re
import time
from collections.abc import Callable, Iterator

import attrs

from ..backups import Backup, Backups, MeasuredServer
from ..databases import PostgresDatabase
from ..keys import BATCH, Key
from ..results import Goal, Results, at_most_rounded, state_values
from ..sampling import log_progress
from ..testbed import Testbed
from ..transaction_log import TransactionLog, log_transactions

_TRANSACTION_CONTROL = re.compile(
    r"\s*(BEGIN|START TRANSACTION|COMMIT|ROLLBACK|SET)\b", re.I
)
_RESET = "SELECT pg_stat_statements_reset()"
_COUNT_CALLS = """
SELECT query, calls FROM pg_stat_statements
JOIN pg_database ON pg_database.oid = dbid
WHERE datname = current_database() AND query NOT LIKE '%pg_stat%'
"""
_COUNT_TRANSACTIONS = """
SELECT xact_commit + xact_rollback FROM pg_stat_database
WHERE datname = current_database()
"""
# An idle process of PostgreSQL publishes its statistics after at most 10 s.
_STATISTICS_DELAY_SECONDS = 11.0
_CROSS_CHECK_UPLOADS = 300

Requests = Callable[[Testbed, Backup, int], Iterator[bytes]]


@attrs.frozen
class _RequestKind:
    """A kind of request with the goal for its number of statements."""

    title: str
    requests: Requests
    goal: Goal | None = None


def statements(testbed: Testbed, results: Results) -> None:
    """Count the statements and transactions of each kind of request."""
    backups = testbed.create_backups(testbed.full_size)
    for server in testbed.without_limit.values():
        postgres_database(server).execute("CREATE EXTENSION pg_stat_statements")
    times = 10 if testbed.plan.quick else 50
    with log_transactions(
        postgres_database(next(iter(testbed.without_limit.values())))
    ):
        for kind in _KINDS:
            _count_kind(testbed, backups, kind, times, results)
    if not testbed.plan.quick:
        _cross_check(testbed, backups, results)
    testbed.run_maintenance()


def postgres_database(server: MeasuredServer) -> PostgresDatabase:
    """Return a server's database; it must be on PostgreSQL."""
    assert isinstance(server.database, PostgresDatabase)
    return server.database


def _count_kind(
    testbed: Testbed, backups: Backups, kind: _RequestKind, times: int, results: Results
) -> None:
    """Add the lines with the counts of a kind of request."""
    counts: dict[str, float] = {}
    transactions: dict[str, float] = {}
    for name in testbed.without_limit:
        requests = list(kind.requests(testbed, backups[name], times))
        counts[name], transactions[name] = _count(testbed, backups[name], requests)
    results.lines += [
        state_values("8", f"statements: {kind.title}", "", counts, goal=kind.goal),
        state_values(
            "8",
            f"transactions: {kind.title}",
            "",
            transactions,
            goal=at_most_rounded(1),
        ),
    ]


def _count(
    testbed: Testbed, backup: Backup, requests: list[bytes]
) -> tuple[float, float]:
    """Send requests; return the mean number of statements and of transactions.

    The first request warms the server up and isn't counted.
    """
    assert testbed.postgres is not None
    database = postgres_database(backup.server)
    file = testbed.postgres.directory / "postgres.log"
    log = TransactionLog(file, database.arguments["dbname"])
    backup.send(requests.pop(0))
    database.query(_RESET)
    log.count_new()
    for request in requests:
        backup.send(request)
    transactions = log.count_new()
    calls = [(str(query), int(count)) for query, count in database.query(_COUNT_CALLS)]
    statement_count = sum(
        count for query, count in calls if not _TRANSACTION_CONTROL.match(query)
    )
    return statement_count / len(requests), transactions / len(requests)


def _cross_check(testbed: Testbed, backups: Backups, results: Results) -> None:
    """Count the transactions of single uploads by PostgreSQL's own statistics.

    PostgreSQL publishes them with a delay of some seconds.
    """
    log_progress("waiting for PostgreSQL's statistics")
    time.sleep(_STATISTICS_DELAY_SECONDS)
    before = {
        name: _count_transactions(testbed.servers[name])
        for name in testbed.without_limit
    }
    for name in testbed.without_limit:
        for request in _one_new(testbed, backups[name], _CROSS_CHECK_UPLOADS):
            backups[name].send(request)
    time.sleep(_STATISTICS_DELAY_SECONDS)
    counts = {
        name: (_count_transactions(testbed.servers[name]) - before[name])
        / _CROSS_CHECK_UPLOADS
        for name in testbed.without_limit
    }
    title = "transactions: 1 new key (pg_stat_database, background work included)"
    results.lines.append(state_values("8", title, "", counts, goal=at_most_rounded(1)))


def _count_transactions(server: MeasuredServer) -> int:
    """Return the number of transactions since the database's creation."""
    ((count,),) = postgres_database(server).query(_COUNT_TRANSACTIONS)
    return int(count)


def _template_batch(testbed: Testbed, index: int) -> list[Key]:
    """Return a batch of the keys that the backup was filled with."""
    start = index * BATCH % (len(testbed.template_keys) - BATCH + 1)
    return testbed.template_keys[start : start + BATCH]


def _new(testbed: Testbed, backup: Backup, times: int) -> Iterator[bytes]:
    """Build uploads of new keys."""
    return (backup.upload(keys) for keys in testbed.key_source.batches(times))


def _better(testbed: Testbed, backup: Backup, times: int) -> Iterator[bytes]:
    """Build uploads of keys that are better than the stored keys."""
    batches = (_template_batch(testbed, index) for index in range(times))
    return (backup.upload([key.better() for key in batch]) for batch in batches)


def _equal(testbed: Testbed, backup: Backup, times: int) -> Iterator[bytes]:
    """Build uploads of keys equal to the stored keys."""
    return (
        backup.upload(_template_batch(testbed, times + index)) for index in range(times)
    )


def _one_new(testbed: Testbed, backup: Backup, times: int) -> Iterator[bytes]:
    """Build uploads of a single new key."""
    return (backup.upload_one(key) for key in testbed.key_source.next_keys(times))


def _get_key(testbed: Testbed, backup: Backup, times: int) -> Iterator[bytes]:
    """Build downloads of single keys."""
    return (backup.get_key(key) for key in testbed.template_keys[:times])


def _get_version(_: Testbed, backup: Backup, times: int) -> Iterator[bytes]:
    """Build requests for the current version."""
    return (backup.get_version() for _ in range(times))


def _get_room(testbed: Testbed, backup: Backup, times: int) -> Iterator[bytes]:
    """Build downloads of the big room."""
    request = backup.get_room(testbed.key_source.big_room)
    return (request for _ in range(max(times // 5, 2)))


_KINDS = (
    _RequestKind(f"{BATCH} new keys", _new, at_most_rounded(5)),
    _RequestKind(f"{BATCH} better keys", _better, at_most_rounded(5)),
    _RequestKind(f"{BATCH} equal keys", _equal, at_most_rounded(5)),
    _RequestKind("1 new key", _one_new, at_most_rounded(5)),
    _RequestKind("GET one key", _get_key, at_most_rounded(2)),
    _RequestKind("GET version", _get_version, at_most_rounded(2)),
    _RequestKind("GET the big room", _get_room),
)

"""How many statements and transactions a request takes."""

import re
import time
from collections.abc import Callable, Iterator

import attrs

from ..backups import Backup, Backups, Subject
from ..databases import PostgresDatabase
from ..keys import BATCH, Key
from ..pglog import TransactionLog, logging
from ..results import Goal, Results, counted, state
from ..sampling import progress
from ..stage import Stage

_CONTROL = re.compile(r"\s*(BEGIN|START TRANSACTION|COMMIT|ROLLBACK|SET)\b", re.I)
_RESET = "SELECT pg_stat_statements_reset()"
_CALLS = """
SELECT query, calls FROM pg_stat_statements
JOIN pg_database ON pg_database.oid = dbid
WHERE datname = current_database() AND query NOT LIKE '%pg_stat%'
"""
_TRANSACTIONS = """
SELECT xact_commit + xact_rollback FROM pg_stat_database
WHERE datname = current_database()
"""
_FLUSH_SECONDS = 11.0
_CROSS_CHECKS = 300

Requests = Callable[[Stage, Backup, int], Iterator[bytes]]


@attrs.frozen
class _Kind:
    """A kind of request, and how many statements it may take."""

    title: str
    requests: Requests
    goal: Goal | None = None


def statements(stage: Stage, results: Results) -> None:
    """Count statements and transactions of each kind of request."""
    backups = stage.backup(stage.size)
    for subject in stage.servers.values():
        postgres(subject).execute("CREATE EXTENSION pg_stat_statements")
    times = 10 if stage.plan.quick else 50
    with logging(postgres(next(iter(stage.servers.values())))):
        for kind in _KINDS:
            _count_kind(stage, backups, kind, times, results)
    if not stage.plan.quick:
        _cross_check(stage, backups, results)
    stage.settle()


def postgres(subject: Subject) -> PostgresDatabase:
    """Return a server's database, which is one of PostgreSQL's."""
    assert isinstance(subject.database, PostgresDatabase)
    return subject.database


def _count_kind(
    stage: Stage, backups: Backups, kind: _Kind, times: int, results: Results
) -> None:
    """Count statements and transactions of one kind of request."""
    counts: dict[str, float] = {}
    ends: dict[str, float] = {}
    for name in stage.servers:
        requests = list(kind.requests(stage, backups[name], times))
        counts[name], ends[name] = _count(stage, backups[name], requests)
    results.lines += [
        state("8", f"statements: {kind.title}", "", counts, goal=kind.goal),
        state("8", f"transactions: {kind.title}", "", ends, goal=counted(1)),
    ]


def _count(stage: Stage, backup: Backup, requests: list[bytes]) -> tuple[float, float]:
    """Send requests; return statements and transactions for each of them."""
    assert stage.postgres is not None
    database = postgres(backup.subject)
    file = stage.postgres.directory / "postgres.log"
    log = TransactionLog(file, database.arguments["dbname"])
    backup.send(requests.pop(0))
    database.query(_RESET)
    log.count()
    for request in requests:
        backup.send(request)
    ends = log.count()
    calls = [(str(query), int(count)) for query, count in database.query(_CALLS)]
    work = sum(count for query, count in calls if not _CONTROL.match(query))
    return work / len(requests), ends / len(requests)


def _cross_check(stage: Stage, backups: Backups, results: Results) -> None:
    """Count transactions as PostgreSQL does, which takes it some seconds to tell."""
    progress("waiting for PostgreSQL's statistics")
    time.sleep(_FLUSH_SECONDS)
    before = {name: _transactions(stage.subjects[name]) for name in stage.servers}
    for name in stage.servers:
        for request in _one_new(stage, backups[name], _CROSS_CHECKS):
            backups[name].send(request)
    time.sleep(_FLUSH_SECONDS)
    counts = {
        name: (_transactions(stage.subjects[name]) - before[name]) / _CROSS_CHECKS
        for name in stage.servers
    }
    title = "transactions: 1 new key (pg_stat_database, background work included)"
    results.lines.append(state("8", title, "", counts, goal=counted(1)))


def _transactions(subject: Subject) -> int:
    """Return how many transactions a database has seen."""
    ((count,),) = postgres(subject).query(_TRANSACTIONS)
    return int(count)


def _lot(stage: Stage, index: int) -> list[Key]:
    """Return one of the lots that the backup was filled with."""
    start = index * BATCH % (len(stage.master) - BATCH + 1)
    return stage.master[start : start + BATCH]


def _new(stage: Stage, backup: Backup, times: int) -> Iterator[bytes]:
    """Upload keys that aren't there."""
    return (backup.upload(keys) for keys in stage.source.batches(times))


def _better(stage: Stage, backup: Backup, times: int) -> Iterator[bytes]:
    """Upload better keys than are there."""
    lots = (_lot(stage, index) for index in range(times))
    return (backup.upload([key.better() for key in lot]) for lot in lots)


def _equal(stage: Stage, backup: Backup, times: int) -> Iterator[bytes]:
    """Upload keys that are there."""
    return (backup.upload(_lot(stage, times + index)) for index in range(times))


def _one_new(stage: Stage, backup: Backup, times: int) -> Iterator[bytes]:
    """Upload one key that isn't there."""
    return (backup.upload_one(key) for key in stage.source.take(times))


def _get_key(stage: Stage, backup: Backup, times: int) -> Iterator[bytes]:
    """Download one key."""
    return (backup.get_key(key) for key in stage.master[:times])


def _get_version(_: Stage, backup: Backup, times: int) -> Iterator[bytes]:
    """Look at the current version."""
    return (backup.get_version() for _ in range(times))


def _get_room(stage: Stage, backup: Backup, times: int) -> Iterator[bytes]:
    """Download the big room."""
    request = backup.get_room(stage.source.big_room)
    return (request for _ in range(max(times // 5, 2)))


_KINDS = (
    _Kind(f"{BATCH} new keys", _new, counted(5)),
    _Kind(f"{BATCH} better keys", _better, counted(5)),
    _Kind(f"{BATCH} equal keys", _equal, counted(5)),
    _Kind("1 new key", _one_new, counted(5)),
    _Kind("GET one key", _get_key, counted(2)),
    _Kind("GET version", _get_version, counted(2)),
    _Kind("GET the big room", _get_room),
)

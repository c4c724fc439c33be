"""The causes of failed transactions, for metrics, logs and operators."""

from collections.abc import Mapping

from .. import metrics
from ..outages import Cause

#: What a client is told to wait when all tries have failed, in seconds.
RETRY_AFTER = 10


#: Reads go on while nothing can be written, and a client that was answered 503 sends
#: its upload again after `RETRY_AFTER` seconds: a write outage is over only later.
_WRITE_SETTLE_SECONDS = RETRY_AFTER + 5.0
UNREACHABLE = Cause(
    "unreachable", "See that the database runs, and that this address is the right one"
)
READ_ONLY = Cause(
    "read_only",
    "Connect to the primary (target_session_attrs: read-write), or see what made the"
    " database read-only",
    _WRITE_SETTLE_SECONDS,
)
DISK_FULL = Cause(
    "disk_full",
    "Make room where the database keeps its files, and see its own log",
    _WRITE_SETTLE_SECONDS,
)
LOCK = Cause(
    "lock",
    "If it lasts, look for who holds the lock: pg_stat_activity in PostgreSQL, another"
    " process with the file in SQLite",
)
CONNECTIONS = Cause(
    "connections", "If it lasts, look for slow queries, or raise cp_max of the pool"
)
SCHEMA = Cause(
    "schema",
    "A table is missing, not of this version, or not granted: put it back from a copy,"
    " or install the version that made it",
)
OTHER = Cause("other", "See the database's own log")
#: All causes, as metrics label them.
CAUSES = (UNREACHABLE, READ_ONLY, DISK_FULL, LOCK, CONNECTIONS, SCHEMA, OTHER)
#: The causes that stop writes and leave reads.
WRITE_CAUSES = (READ_ONLY, DISK_FULL)

# A rate needs a series that begins at 0.
for _cause in CAUSES:
    metrics.transaction_retries.labels(_cause.name)
    metrics.transaction_failures.labels(_cause.name)

#: The causes of SQLite's errors by the beginning of their texts. (Python 3.10 doesn't
#: give their numbers.)
_SQLITE_TEXTS = {
    "database is locked": LOCK,
    "database table is locked": LOCK,
    "database or disk is full": DISK_FULL,
    "disk I/O error": DISK_FULL,
    "attempt to write a readonly database": READ_ONLY,
    "unable to open database file": UNREACHABLE,
    "no such table": SCHEMA,
}
#: The causes of PostgreSQL's errors by the beginning of their SQLSTATE, from the
#: documentation's "PostgreSQL Error Codes".
_POSTGRES_STATES = {
    "08": UNREACHABLE,
    "57P": UNREACHABLE,
    "25006": READ_ONLY,
    "53100": DISK_FULL,
    "58030": DISK_FULL,
    "40": LOCK,
    "55P03": LOCK,
    "57014": LOCK,
    "25P03": LOCK,
    "53300": CONNECTIONS,
    # A password, a role or the database itself.
    "28": UNREACHABLE,
    "3D000": UNREACHABLE,
    # A privilege, a table, a unique index or a schema.
    "42501": SCHEMA,
    "42P01": SCHEMA,
    "42P10": SCHEMA,
    "3F000": SCHEMA,
}


def _find_cause(text: str, causes: Mapping[str, Cause]) -> Cause:
    found = (cause for start, cause in causes.items() if text.startswith(start))
    return next(found, OTHER)


def find_postgres_cause(error: Exception) -> Cause:
    """Return the cause of an error of PostgreSQL. One without an SQLSTATE is libpq's,
    which found no server."""
    return _find_cause(getattr(error, "pgcode", None) or "08", _POSTGRES_STATES)


def find_sqlite_cause(error: Exception) -> Cause:
    """Return the cause of an error of SQLite."""
    return _find_cause(str(error), _SQLITE_TEXTS)

"""Where the backups are kept: statements, transactions, and the store over both."""

from .arguments import database_address, find_wrong_argument, split_dsn, with_timeouts
from .causes import CONNECTIONS, LOCK, SCHEMA, WRITE_CAUSES
from .citus import find_cluster
from .downloads import report_broken_row
from .engine import Engine
from .erasure import Erasure
from .imports import Imports
from .inspection import Blob, Inspection, StoredRow, StoredVersion, Tally
from .leases import LEASE_SECONDS, Leases
from .overview import Activity, Overview, Owner, VersionFacts
from .pool import PoolDatabase, postgres_database, sqlite_database
from .postgres_engine import pack_array, postgres
from .retries import RetryingDatabase, brief
from .rows import FIRST_KEYS, PAGE_KEYS, batches
from .schema import (
    SchemaError,
    check_tables,
    estimate_keys,
    open_tables,
    probe_tables,
    rehearse_start,
    upgrade_tables,
)
from .sqlite_engine import SQLITE
from .store import EndToEndRoomKeyStore
from .sweeps import Place, Queue, Sweeps
from .tasks import Task, Tasks
from .transactions import Database, Transaction
from .uploads import InsertGuess

__all__ = [
    "CONNECTIONS",
    "FIRST_KEYS",
    "LEASE_SECONDS",
    "LOCK",
    "PAGE_KEYS",
    "SCHEMA",
    "SQLITE",
    "WRITE_CAUSES",
    "Activity",
    "Blob",
    "Database",
    "EndToEndRoomKeyStore",
    "Engine",
    "Erasure",
    "Imports",
    "InsertGuess",
    "Inspection",
    "Leases",
    "Overview",
    "Owner",
    "Place",
    "PoolDatabase",
    "Queue",
    "RetryingDatabase",
    "SchemaError",
    "StoredRow",
    "StoredVersion",
    "Sweeps",
    "Tally",
    "Task",
    "Tasks",
    "Transaction",
    "VersionFacts",
    "batches",
    "brief",
    "check_tables",
    "database_address",
    "estimate_keys",
    "find_cluster",
    "find_wrong_argument",
    "open_tables",
    "pack_array",
    "postgres",
    "postgres_database",
    "probe_tables",
    "rehearse_start",
    "report_broken_row",
    "split_dsn",
    "sqlite_database",
    "upgrade_tables",
    "with_timeouts",
]

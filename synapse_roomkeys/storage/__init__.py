"""Where the backups are kept: statements, transactions, and the store over both."""

from .database import (
    SQLITE,
    Database,
    Engine,
    PoolDatabase,
    RetryingDatabase,
    Transaction,
    find_wrong_argument,
    postgres,
    postgres_database,
    sqlite_database,
    with_timeouts,
)
from .rows import FIRST_KEYS, PAGE_KEYS
from .schema import SchemaError, check_tables, upgrade_tables
from .store import EndToEndRoomKeyStore

__all__ = [
    "FIRST_KEYS",
    "PAGE_KEYS",
    "SQLITE",
    "Database",
    "EndToEndRoomKeyStore",
    "Engine",
    "PoolDatabase",
    "RetryingDatabase",
    "SchemaError",
    "Transaction",
    "check_tables",
    "find_wrong_argument",
    "postgres",
    "postgres_database",
    "sqlite_database",
    "upgrade_tables",
    "with_timeouts",
]

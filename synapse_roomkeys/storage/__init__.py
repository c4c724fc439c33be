"""Where the backups are kept: statements, transactions, and the store over both."""

from .database import (
    SQLITE,
    Database,
    Engine,
    PoolDatabase,
    RetryingDatabase,
    Transaction,
    check_tables,
    create_tables,
    postgres,
    postgres_database,
    sqlite_database,
)
from .rows import PAGE_KEYS
from .store import EndToEndRoomKeyStore

__all__ = [
    "PAGE_KEYS",
    "SQLITE",
    "Database",
    "EndToEndRoomKeyStore",
    "Engine",
    "PoolDatabase",
    "RetryingDatabase",
    "Transaction",
    "check_tables",
    "create_tables",
    "postgres",
    "postgres_database",
    "sqlite_database",
]

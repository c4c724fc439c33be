"""Real servers for the tests, each stopped at the latest when the test run ends."""

from .accounts import User
from .pgbouncer import PgBouncer
from .postgres import PostgresServer
from .processes import StartFailed, temporary_directory
from .redis import RedisServer
from .synapse import Synapse, Worker

__all__ = [
    "PgBouncer",
    "PostgresServer",
    "RedisServer",
    "StartFailed",
    "Synapse",
    "User",
    "Worker",
    "temporary_directory",
]

"""Real servers to run the module in, each stopped with the test run."""

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

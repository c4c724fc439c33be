"""A Citus cluster: a coordinator without shards, and two workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg2

from .postgres import PostgresServer
from .processes import Server

#: Environment variable with the directory of the programs of a PostgreSQL with Citus.
#: No package index has Citus: tests on Citus run only if the variable is set.
PROGRAMS = "ROOMKEYS_CITUS_PROGRAMS"
_WORKERS = 2
_ADD_WORKER = "SELECT citus_add_node('127.0.0.1', %s)"
_SET_COORDINATOR = "SELECT citus_set_coordinator_host('127.0.0.1', %s)"
#: Settings of each node. No statistics are sent to the vendor.
_SETTINGS = {
    "shared_preload_libraries": "citus",
    "citus.enable_statistics_collection": "off",
    "synchronous_commit": "on",
    "wal_level": "logical",
}


class _Node(PostgresServer):
    """A node; the nodes trust each other's connections."""

    _authentication = ("--auth=trust",)

    def _programs(self) -> Path:
        return Path(os.environ[PROGRAMS])


class Citus(Server):
    """The nodes of a cluster.

    Attributes:
        coordinator: the node that makes and changes tables; it has no shards.
        workers: the nodes with shards.
    """

    def __init__(self, directory: Path) -> None:
        self.coordinator = _Node(directory / "coordinator", settings=_SETTINGS)
        self.workers = [
            _Node(directory / f"worker{i}", settings=_SETTINGS) for i in range(_WORKERS)
        ]
        self._nodes = [self.coordinator, *self.workers]

    def start(self) -> None:
        """Start all nodes and wait until they are ready."""
        for node in self._nodes:
            node.start()

    def stop(self) -> None:
        """Stop all nodes."""
        for node in self._nodes:
            node.stop()

    def close(self) -> None:
        """Stop all nodes and delete their clusters."""
        for node in self._nodes:
            node.close()

    def create_database(self) -> list[dict[str, Any]]:
        """Create a database on each node, and connect the nodes.

        Returns:
            By node, the coordinator first, the arguments by which psycopg2 connects to
            the database.
        """
        first = self.coordinator.create_database()
        databases = [first]
        for node in self.workers:
            made = node.create_database()
            with _cursor({**made, "dbname": "postgres"}) as cursor:
                cursor.execute(
                    f"ALTER DATABASE {made['dbname']} RENAME TO {first['dbname']}"
                )
            databases.append({**made, "dbname": first["dbname"]})
        for database in databases:
            with _cursor(database) as cursor:
                cursor.execute("CREATE EXTENSION citus")
        with _cursor(first) as cursor:
            cursor.execute(_SET_COORDINATOR, (first["port"],))
            for worker in databases[1:]:
                cursor.execute(_ADD_WORKER, (worker["port"],))
        return databases


@contextmanager
def _cursor(database: dict[str, Any]) -> Iterator[Any]:
    """A cursor in autocommit mode."""
    with closing(psycopg2.connect(**database)) as connection:
        connection.autocommit = True
        yield connection.cursor()

"""Databases that a migration reads or writes."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from typing import Any

import attrs
import psycopg2

from synapse_roomkeys.service.config import DatabaseConfig


@attrs.frozen
class Place:
    """The source or target of a migration."""

    config: DatabaseConfig

    def run(self, statement: str, *rows: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """Run a statement with each row of parameters, and commit.

        Returns:
            The rows of the last run of the statement.
        """
        connection: Any
        if self.config.name == "sqlite3":
            connection = sqlite3.connect(self.config.args["database"])
        else:
            args = {n: v for n, v in self.config.args.items() if n[:3] != "cp_"}
            connection = psycopg2.connect(**args)
            statement = statement.replace("%", "%%").replace("?", "%s")
        with closing(connection), closing(connection.cursor()) as cursor:
            for row in rows or [()]:
                cursor.execute(statement, row)
            found = cursor.fetchall() if cursor.description else []
            connection.commit()
        return list(found)

    @property
    def tables(self) -> set[str]:
        """The names of its tables."""
        if self.config.name == "sqlite3":
            rows = self.run("SELECT name FROM sqlite_master WHERE type = 'table'")
        else:
            rows = self.run(
                "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
            )
        return {name for (name,) in rows}


#: Creates a database without tables, by the name of the engine.
NewPlace = Callable[[str], Place]

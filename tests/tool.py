"""Runs of the operator's commands, ``synapse-roomkeys COMMAND``, as processes."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import attrs
import psycopg2

from .servers.service import _environment

#: Seconds that a command may take.
DEADLINE = 60.0


@attrs.frozen
class Done:
    """The end of a command.

    Attributes:
        code: exit status.
        out: standard output.
        err: standard error.
    """

    code: int
    out: str
    err: str

    def rows(self) -> list[dict[str, Any]]:
        """Return the lines of ``--json``."""
        assert self.code == 0, self
        return [json.loads(line) for line in self.out.splitlines()]


@attrs.frozen
class Tool:
    """The program on one database.

    Attributes:
        directory: working directory.
        where: arguments that name the database, after the command.
        database: psycopg2's arguments, or the path of an SQLite file.
    """

    directory: Path
    where: tuple[str, ...]
    database: Mapping[str, Any] | Path

    def arguments(self, command: str, *arguments: str) -> list[str]:
        """Return the command line of a command."""
        program = [sys.executable, "-m", "synapse_roomkeys.service"]
        return [*program, command, *self.where, *arguments]

    def run(self, command: str, *arguments: str) -> Done:
        """Run a command to its end."""
        done = subprocess.run(
            self.arguments(command, *arguments),
            cwd=self.directory,
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Done(done.returncode, done.stdout, done.stderr)

    def sql(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Run one statement in a connection of its own, commit, and return the rows."""
        connection: Any
        if isinstance(self.database, Path):
            connection = sqlite3.connect(self.database, timeout=30)
        else:
            connection = psycopg2.connect(**self.database)
            statement = statement.replace("?", "%s")
        with closing(connection), closing(connection.cursor()) as cursor:
            cursor.execute(statement, parameters)
            rows = list(cursor.fetchall()) if cursor.description else []
            connection.commit()
        return rows

"""A PostgreSQL that follows another, and can take its place."""

import json
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2

from .postgres import _SUPERUSER, PostgresServer, _give
from .processes import HOST, make_directory

_TIMEOUT = 30.0


class Standby(PostgresServer):
    """A standby, made of a base backup of a server that is running."""

    def __init__(self, directory: Path, primary: PostgresServer) -> None:
        """Choose a port."""
        super().__init__(directory, durable=True)
        self._password = primary._password
        self._primary = primary

    def _create_cluster(self) -> Path:
        """Copy the primary's cluster, and have it followed."""
        home = make_directory("postgres-")
        if self._user is not None:
            _give(home, self._user)
        source = ["--host", HOST, "--port", str(self._primary.port)]
        source += ["--username", _SUPERUSER, "--checkpoint", "fast"]
        self._run(
            *("pg_basebackup", *source, "--pgdata", str(home / "data")),
            *("--write-recovery-conf", "--no-sync"),
            cwd=home,
        )
        return home

    def be_waited_for(self, database: Mapping[str, Any]) -> None:
        """Have the primary acknowledge nothing that isn't here as well, from now on.

        Args:
            database: how to connect to the primary.
        """
        with closing(psycopg2.connect(**database)) as connection:
            connection.autocommit = True
            cursor = connection.cursor()
            cursor.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
            cursor.execute("SELECT pg_reload_conf()")
            end = time.monotonic() + _TIMEOUT
            while True:
                cursor.execute("SELECT sync_state FROM pg_stat_replication")
                found = cursor.fetchall()
                if found == [("sync",)]:
                    return
                assert time.monotonic() < end, json.dumps(found)
                time.sleep(0.05)

    def promote(self) -> None:
        """Make it a primary; it takes writes when this returns."""
        self._run("pg_ctl", "promote", "--pgdata", str(self._data()), "--wait")

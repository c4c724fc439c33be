"""A PostgreSQL standby that replicates a primary and can be promoted."""

import json
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2

from .postgres import _SUPERUSER, PostgresServer, _change_owner
from .processes import HOST, make_directory

_TIMEOUT = 30.0


class Standby(PostgresServer):
    """A streaming standby, created by a base backup of a running primary."""

    def __init__(self, directory: Path, primary: PostgresServer) -> None:
        """Choose a port.

        Args:
            directory: the directory of the standby's log.
            primary: the running server to replicate.
        """
        super().__init__(directory, durable=True)
        self._password = primary._password
        self._primary = primary

    def _create_cluster(self) -> Path:
        """Copy the primary's cluster and configure streaming replication."""
        home = make_directory("postgres-")
        if self._user is not None:
            _change_owner(home, self._user)
        source = ["--host", HOST, "--port", str(self._primary.port)]
        source += ["--username", _SUPERUSER, "--checkpoint", "fast"]
        self._run(
            "pg_basebackup",
            *source,
            "--pgdata",
            str(home / "data"),
            "--write-recovery-conf",
            "--no-sync",
            cwd=home,
        )
        return home

    def make_synchronous(self, database: Mapping[str, Any]) -> None:
        """Make replication synchronous: each commit of the primary waits for this
        standby.

        The method returns when the primary reports the standby as synchronous.

        Args:
            database: psycopg2's arguments for the primary.
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
        """Promote the standby to a primary, and return when it accepts writes."""
        self._run("pg_ctl", "promote", "--pgdata", str(self._data()), "--wait")

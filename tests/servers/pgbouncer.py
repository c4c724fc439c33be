"""A PgBouncer in front of a PostgreSQL of the tests."""

import os
import shutil
import signal
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .debian import locate
from .processes import (
    HOST,
    Process,
    Server,
    free_port,
    make_directory,
    remove_directory,
)

_UNPRIVILEGED = "nobody"
_TIMEOUT = 60.0

#: A usual configuration for transaction pooling, with the tests' ports and sizes. The
#: empty server_reset_query means that session state left by one transaction is visible
#: to the next transaction on the same server connection.
_CONFIG = """\
[databases]
* = host={host} port={server_port} pool_size={pool_size}

[pgbouncer]
listen_addr = {host}
listen_port = {port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {users}
admin_users = {user}
pool_mode = transaction
server_reset_query =
server_round_robin = 1
max_client_conn = 500
"""


class PgBouncer(Server):
    """A connection pooler in transaction mode."""

    def __init__(
        self, directory: Path, server: Mapping[str, Any], *, pool_size: int = 4
    ) -> None:
        """Choose a port, which stays the same over restarts.

        Args:
            directory: the directory of the pooler's log.
            server: psycopg2's arguments for a direct connection to the database.
            pool_size: the number of server connections that all clients share.
        """
        self.directory = directory
        self.port = free_port()
        self.pool_size = pool_size
        self._server = server
        self._user = _UNPRIVILEGED if os.geteuid() == 0 else None
        self._home: Path | None = None
        self._process: Process | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments by which psycopg2 connects through the pooler."""
        return {**self._server, "host": HOST, "port": self.port}

    @property
    def console(self) -> dict[str, Any]:
        """The arguments by which psycopg2 connects to the pooler's admin console."""
        return {**self.arguments, "dbname": "pgbouncer"}

    def start(self) -> None:
        """Start the pooler and wait until the port accepts connections."""
        assert self._process is None, "already started"
        self.directory.mkdir(parents=True, exist_ok=True)
        program = locate("pgbouncer", "pgbouncer")
        if self._home is None:
            self._home = make_directory("pgbouncer-")
            self._write_config(self._home)
        self._process = Process(
            [str(program.path), str(self._home / "pgbouncer.ini")],
            output=self.directory / "pgbouncer.log",
            cwd=self._home,
            environment=program.environment,
            user=self._user,
        )
        self._process.wait_until(self._is_listening, _TIMEOUT)

    def stop(self) -> None:
        """Stop the pooler; stopping twice does no harm."""
        if self._process is not None:
            self._process.stop(signal.SIGINT)
            self._process = None

    def close(self) -> None:
        """Stop the pooler and delete its configuration."""
        self.stop()
        if self._home is not None:
            remove_directory(self._home)
            self._home = None

    def _write_config(self, home: Path) -> None:
        """Write the configuration with the pooler's user as the owner."""
        user, password = self._server["user"], self._server["password"]
        users = home / "users.txt"
        users.write_text(f'"{user}" "{password}"\n')
        config = home / "pgbouncer.ini"
        config.write_text(
            _CONFIG.format(
                host=HOST,
                port=self.port,
                server_port=self._server["port"],
                pool_size=self.pool_size,
                users=users,
                user=user,
            )
        )
        if self._user is not None:
            for path in (home, users, config):
                shutil.chown(path, self._user)

    def _is_listening(self) -> bool:
        """Return whether the port accepts connections."""
        with socket.socket() as probe:
            return probe.connect_ex((HOST, self.port)) == 0

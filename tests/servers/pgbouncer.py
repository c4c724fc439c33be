"""A PgBouncer in front of a PostgreSQL of ours."""

import functools
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import attrs

from .processes import (
    HOST,
    Process,
    StartFailed,
    free_port,
    make_directory,
    remove_directory,
)

_UNPRIVILEGED = "nobody"
_TIMEOUT = 60.0
_DOWNLOAD_TIMEOUT = 300.0
_SYSTEM_PATHS = "/usr/sbin:/usr/local/sbin"

#: As transaction pooling is set up, but for the ports and sizes: nothing is reset
#: between two transactions, so whatever one leaves behind the next one meets.
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


class PgBouncer:
    """A pooler that gives a connection to the database to one transaction at a time."""

    def __init__(
        self, directory: Path, server: Mapping[str, Any], *, pool_size: int = 4
    ) -> None:
        """Choose a port, which stays the same over restarts.

        Args:
            server: how psycopg2 connects to the database itself.
            pool_size: how many connections to it are shared by all clients.
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
        """How psycopg2 connects to the database through the pooler."""
        return {**self._server, "host": HOST, "port": self.port}

    @property
    def console(self) -> dict[str, Any]:
        """How psycopg2 connects to the pooler's own console."""
        return {**self.arguments, "dbname": "pgbouncer"}

    def start(self) -> None:
        """Start the pooler."""
        assert self._process is None, "already started"
        self.directory.mkdir(parents=True, exist_ok=True)
        program = _program()
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
        self._process.wait_until(self._accepts, _TIMEOUT)

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

    def __enter__(self) -> "PgBouncer":
        """Start the pooler."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the pooler and delete its configuration."""
        self.close()

    def _write_config(self, home: Path) -> None:
        """Write the configuration where the user that the pooler runs as can read."""
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

    def _accepts(self) -> bool:
        """Tell whether the port answers yet."""
        with socket.socket() as probe:
            return probe.connect_ex((HOST, self.port)) == 0


@attrs.frozen
class _Program:
    """A program, and the environment that it finds its libraries in."""

    path: Path
    environment: Mapping[str, str]


@functools.cache
def _program() -> _Program:
    """Locate PgBouncer, fetching Debian's package where it isn't installed."""
    search = f"{os.environ.get('PATH', os.defpath)}:{_SYSTEM_PATHS}"
    installed = shutil.which("pgbouncer", path=search)
    if installed is not None:
        return _Program(Path(installed), {})
    if shutil.which("apt-get") is None:
        raise StartFailed(
            "pgbouncer is not installed: install it, or run this on a Debian or Ubuntu,"
            " where its package is fetched"
        )
    root = _fetch()
    libraries = {str(path.parent) for path in root.rglob("*.so.*")}
    return _Program(
        root / "usr" / "sbin" / "pgbouncer",
        {"LD_LIBRARY_PATH": ":".join(sorted(libraries))},
    )


def _fetch() -> Path:
    """Unpack Debian's package, and those it needs that are missing, aside.

    Nothing is installed: so no service is started, nothing needs to be removed, and
    anybody may do it.
    """
    root = make_directory("pgbouncer-program-")
    root.chmod(0o755)
    (root / "lists" / "partial").mkdir(parents=True)
    (root / "partial").mkdir()
    apt = ["apt-get", "-o", "Debug::NoLocking=1", "-o", "APT::Sandbox::User=root"]
    apt += ["-o", f"Dir::Cache={root}", "-o", f"Dir::Cache::archives={root}"]
    download = ["install", "--yes", "--download-only", "--no-install-recommends"]
    if _run([*apt, *download, "pgbouncer"]).returncode:
        apt += ["-o", f"Dir::State::lists={root}/lists"]
        _check(_run([*apt, "update"]))
        _check(_run([*apt, *download, "pgbouncer"]))
    for package in root.glob("*.deb"):
        _check(_run(["dpkg-deb", "--extract", str(package), str(root)]))
    return root


def _run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    """Run one of the system's tools to its end."""
    return subprocess.run(
        command,
        env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_DOWNLOAD_TIMEOUT,
        check=False,
    )


def _check(done: "subprocess.CompletedProcess[str]") -> None:
    """Give up if a tool has failed."""
    if done.returncode:
        raise StartFailed(f"pgbouncer can't be fetched:\n{done.stdout}")

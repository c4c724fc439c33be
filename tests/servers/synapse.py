"""Real Synapse servers, main processes and workers, each on ports of its own."""

import json
import os
import secrets
import signal
import sys
import urllib.error
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from . import accounts, config
from .accounts import User
from .processes import HOST, Process, Server, StartFailed, free_port
from .redis import RedisServer

_REPOSITORY = Path(__file__).resolve().parents[2]
_START_TIMEOUT = 120.0
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class _Server(Server):
    """Base class of a Synapse main process and a worker."""

    _app: str

    def __init__(self, directory: Path, *, python: str, preload: str | None) -> None:
        """Choose the ports, which stay the same over restarts.

        Args:
            directory: the directory of configuration, log and output.
            python: the Python executable to run Synapse with.
            preload: Python source to execute before Synapse is imported, or None.
        """
        self.directory = directory
        self.port = free_port()
        self.metrics_port = free_port()
        self.python = python
        self._preload = preload
        self._process: Process | None = None

    @property
    def url(self) -> str:
        """The base URL of the client API."""
        return f"http://{HOST}:{self.port}"

    @property
    def metrics_url(self) -> str:
        """The URL of the metrics."""
        return f"http://{HOST}:{self.metrics_port}/_synapse/metrics"

    @property
    def pid(self) -> int:
        """The process id of the running process."""
        return self._running().pid

    def start(self) -> None:
        """Start the process and wait until the client API answers."""
        self._process = self._spawn()
        try:
            self._process.wait_until(self._is_healthy, _START_TIMEOUT)
        except StartFailed:
            self._process = None
            raise

    def run_to_failure(self, timeout: float = 60.0) -> str:
        """Start the process, wait for its end with an exit code other than 0.

        Args:
            timeout: seconds after which the process is killed and the test fails.

        Returns:
            The output.
        """
        process = self._spawn()
        code = process.wait(timeout)
        if code is None:
            process.kill()
            raise AssertionError(f"still running after {timeout} s:\n{self.log()}")
        assert code != 0, f"ended as if all were well:\n{process.output()}"
        return process.output()

    def stop(self) -> None:
        """Stop the process by SIGTERM; no effect on a stopped process."""
        if self._process is not None:
            self._process.stop(signal.SIGTERM)
            self._process = None

    def kill(self) -> None:
        """Kill the process with SIGKILL, as in a crash."""
        self._running().kill()
        self._process = None

    def log(self) -> str:
        """Return the log and the output of all runs so far."""
        files = (self.directory / name for name in ("homeserver.log", "output.txt"))
        return "\n".join(
            file.read_text(encoding="utf-8", errors="replace")
            for file in files
            if file.exists()
        )

    def rss_bytes(self) -> int:
        """Return the resident memory of the process, in bytes."""
        pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def _running(self) -> Process:
        """Return the process, and fail if there is none."""
        assert self._process is not None, "not started"
        return self._process

    def _write_config(self) -> list[Path]:
        """Write the configuration files; return those to pass with ``-c``."""
        raise NotImplementedError

    def _spawn(self) -> Process:
        """Write the configuration and start the process, without waiting for an
        answer."""
        assert self._process is None, "already started"
        self.directory.mkdir(parents=True, exist_ok=True)
        command = [self.python, *self._program()]
        for path in self._write_config():
            command += ["-c", str(path)]
        return Process(
            command,
            output=self.directory / "output.txt",
            cwd=self.directory,
            environment=_environment(),
        )

    def _program(self) -> list[str]:
        """Return Python's arguments to run the app, after the preloaded source if
        any."""
        if self._preload is None:
            return ["-m", self._app]
        return ["-c", f"{self._preload}\nimport {self._app} as app\napp.main()\n"]

    def _is_healthy(self) -> bool:
        """Return whether the client API's ``/health`` answers with success."""
        try:
            accounts.fetch(f"{self.url}/health")
        except (urllib.error.URLError, OSError, RuntimeError):
            return False
        return True

    def _write(self, name: str, content: str | Mapping[str, Any]) -> Path:
        """Write a file and return its path; a mapping is written as JSON (valid
        YAML)."""
        path = self.directory / name
        if not isinstance(content, str):
            content = json.dumps(content, indent=2, ensure_ascii=False)
        path.write_text(content, encoding="utf-8")
        return path


class Synapse(_Server):
    """A Synapse main process, by default with the module loaded.

    Several of them on one database act as one homeserver, because server name, signing
    key and secrets are the same for all.
    """

    _app = "synapse.app.homeserver"

    def __init__(
        self,
        directory: Path,
        *,
        database: Mapping[str, Any] | None = None,
        module_config: Mapping[str, Any] | None = _NOTHING,
        python: str = sys.executable,
        extra_config: Mapping[str, Any] = _NOTHING,
        preload: str | None = None,
        redis: RedisServer | None = None,
    ) -> None:
        """Set the configuration of a main process.

        Args:
            directory: the directory of configuration, log and SQLite file.
            database: psycopg2's arguments, or None for an SQLite file.
            module_config: the module's options, or None to run without the module.
            python: the Python executable to run Synapse with.
            extra_config: settings that are added to the configuration or replace those
                of it.
            preload: Python source to execute before Synapse is imported, or None.
            redis: the Redis through which workers connect, or None for no workers.
        """
        super().__init__(directory, python=python, preload=preload)
        self.database = database
        self.redis = redis
        self._module_config = module_config
        self._extra_config = extra_config
        self._replication_port = free_port()
        self._admin: User | None = None

    def register(self, name: str, *, admin: bool = False) -> User:
        """Register a user; with `admin`, as a server administrator."""
        return accounts.register(
            self.url, config.REGISTRATION_SECRET, name, admin=admin
        )

    def guest(self) -> User:
        """Register a guest, an account without a password."""
        return accounts.register_guest(self.url)

    def login(self, user: User, *, refreshable: bool = False) -> User:
        """Log a user in on another device.

        Args:
            user: the user.
            refreshable: whether to ask for a token that can be refreshed; such a token
                expires after 1 second.
        """
        return accounts.login(self.url, user, refreshable=refreshable)

    def logout(self, user: User) -> None:
        """Log a device out, which invalidates the device's access token."""
        accounts.logout(self.url, user)

    def deactivate(self, user: User) -> None:
        """Deactivate an account for good."""
        if self._admin is None:
            self._admin = self.register(f"admin-{secrets.token_hex(4)}", admin=True)
        accounts.deactivate(self.url, self._admin, user.user_id)

    def shared_config(self) -> dict[str, Any]:
        """Build the settings common to the main process and the workers."""
        settings = config.base()
        settings["database"] = config.database(self.database, self.directory)
        if self._module_config is not None:
            settings["modules"] = [config.module(self._module_config)]
        if self.redis is not None:
            settings |= config.replication(self.redis.port, self._replication_port)
        return {**settings, **self._extra_config}

    def _write_config(self) -> list[Path]:
        """Write the main configuration, the signing key and the logging
        configuration."""
        listeners = config.listeners(self.port, self.metrics_port)
        if self.redis is not None:
            listeners.append(config.http(self._replication_port, "replication"))
        log_file = self.directory / "homeserver.log"
        own = {
            "listeners": listeners,
            "log_config": str(self._write("log.yaml", config.log(log_file))),
            "signing_key_path": str(self._write("signing.key", config.SIGNING_KEY)),
            "media_store_path": str(self.directory / "media"),
        }
        return [self._write("homeserver.yaml", {**own, **self.shared_config()})]


class Worker(_Server):
    """A Synapse worker of a main process, on the same PostgreSQL and Redis."""

    _app = "synapse.app.generic_worker"

    def __init__(self, main: Synapse, name: str, *, preload: str | None = None) -> None:
        """Set the configuration of a worker; the main process may start later."""
        assert main.database is not None, "workers need PostgreSQL"
        assert main.redis is not None, "workers need Redis"
        super().__init__(main.directory / name, python=main.python, preload=preload)
        self.main = main
        self.name = name

    def _write_config(self) -> list[Path]:
        """Write the shared settings and the worker's own; return the file."""
        log_file = self.directory / "homeserver.log"
        own = {
            "worker_app": self._app,
            "worker_name": self.name,
            "worker_listeners": config.listeners(self.port, self.metrics_port),
            "worker_log_config": str(self._write("log.yaml", config.log(log_file))),
            "signing_key_path": str(self._write("signing.key", config.SIGNING_KEY)),
        }
        return [self._write("worker.yaml", {**self.main.shared_config(), **own})]


def _environment(inherited: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Build an environment in which the module can be imported from the repository.

    PYTHONPATH has no other entry, so that further modules must be installed.
    """
    own = {name: inherited[name] for name in inherited if name != "PYTHONHOME"}
    return {**own, "PYTHONPATH": str(_REPOSITORY), "PYTHONUNBUFFERED": "1"}

"""Real processes of the service, ``synapse-roomkeys serve``."""

import json
import os
import signal
import sys
import urllib.error
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from . import accounts
from .processes import HOST, Process, Server, StartFailed, free_port

_REPOSITORY = Path(__file__).resolve().parents[2]
_START_TIMEOUT = 30.0
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Service(Server):
    """A process of the service, in a directory of its own.

    Attributes:
        program: the arguments by which Python runs the program.
        arguments: the command line arguments of the program.
        environment: environment variables in addition to the inherited ones.
    """

    def __init__(
        self,
        directory: Path,
        homeserver: str,
        *,
        database: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] = _NOTHING,
        environment: Mapping[str, str] = _NOTHING,
        arguments: Sequence[str] = ("serve", "--config", "roomkeys.yaml"),
        operator_token: str | None = None,
    ) -> None:
        """Choose the ports, which stay the same over restarts.

        Args:
            directory: the directory of configuration, output and SQLite file.
            homeserver: the base URL of the homeserver.
            database: psycopg2's arguments, or None for an SQLite file.
            settings: options that are added to the configuration or replace those of
                it.
            environment: environment variables in addition to the inherited ones.
            arguments: the command line arguments of the program.
            operator_token: token of operators. With it, or with options ``admin`` of
                the settings, the service listens for operators too.
        """
        self.directory = directory
        self.port = free_port()
        self.metrics_port = free_port()
        self.operators_port = free_port()
        self.operator_token = operator_token
        self.program: Sequence[str] = ("-m", "synapse_roomkeys.service")
        self.arguments = arguments
        self.environment = environment
        self._settings = {
            "homeserver": {"url": homeserver},
            "database": _database(database, directory),
            "listeners": [f"tcp:{self.port}:interface={HOST}"],
            "metrics_listeners": [f"tcp:{self.metrics_port}:interface={HOST}"],
            **settings,
        }
        admin = dict(settings.get("admin", {}))
        if operator_token is not None:
            admin["token_path"] = "operator_token"
        if admin:
            admin["listeners"] = [f"tcp:{self.operators_port}:interface={HOST}"]
            self._settings["admin"] = admin
        self._process: Process | None = None

    @property
    def url(self) -> str:
        """The base URL of the client API."""
        return f"http://{HOST}:{self.port}"

    @property
    def operators_url(self) -> str:
        """The base URL of the interface for operators."""
        return f"http://{HOST}:{self.operators_port}"

    @property
    def metrics_url(self) -> str:
        """The URL of the metrics."""
        return f"http://{HOST}:{self.metrics_port}/metrics"

    @property
    def pid(self) -> int:
        """The process id of the running process."""
        return self._running().pid

    def start(self) -> None:
        """Start the process and wait until ``/health`` answers."""
        self.start_without_waiting()
        self.wait_until_healthy()

    def start_without_waiting(self) -> None:
        """Start the process without waiting until ``/health`` answers."""
        self._process = self.spawn()

    def wait_until_healthy(self) -> None:
        """Wait until ``/health`` answers, after `start_without_waiting`."""
        try:
            self._running().wait_until(self._is_healthy, _START_TIMEOUT)
        except StartFailed:
            self._process = None
            raise

    def spawn(self) -> Process:
        """Write the configuration and start a process, which the caller has to end.

        `stop`, `kill` and the other methods don't act on this process.
        """
        assert self._process is None, "already started"
        self.directory.mkdir(parents=True, exist_ok=True)
        # Valid JSON is valid YAML.
        config = self.directory / "roomkeys.yaml"
        config.write_text(json.dumps(self._settings), encoding="utf-8")
        if self.operator_token is not None:
            (self.directory / "operator_token").write_text(f"{self.operator_token}\n")
        return Process(
            [sys.executable, *self.program, *self.arguments],
            output=self.directory / "output.txt",
            cwd=self.directory,
            environment={**_environment(), **self.environment},
        )

    def run_to_end(self, timeout: float = 30.0) -> tuple[int, str]:
        """Start the process and wait until it ends by itself.

        Args:
            timeout: seconds after which the process is killed and the test fails.

        Returns:
            The exit code and the output.
        """
        process = self.spawn()
        code = process.wait(timeout)
        if code is None:
            process.kill()
            raise AssertionError(f"still running after {timeout} s:\n{self.log()}")
        return code, process.output()

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._running().send(number)

    def wait(self, timeout: float) -> int | None:
        """Wait for the end; return the exit code, or None after `timeout` seconds."""
        code = self._running().wait(timeout)
        if code is not None:
            self._process = None
        return code

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
        output = self.directory / "output.txt"
        return output.read_text(encoding="utf-8", errors="replace")

    def rss_bytes(self) -> int:
        """Return the resident memory of the process, in bytes."""
        pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def _running(self) -> Process:
        """Return the process, and fail if there is none."""
        assert self._process is not None, "not started"
        return self._process

    def _is_healthy(self) -> bool:
        """Return whether ``/health`` answers with success."""
        try:
            accounts.fetch(f"{self.url}/health")
        except (urllib.error.URLError, OSError, RuntimeError):
            return False
        return True


def _database(arguments: Mapping[str, Any] | None, directory: Path) -> dict[str, Any]:
    """Build the ``database`` option.

    Args:
        arguments: psycopg2's arguments for a PostgreSQL, or None for an SQLite file.
        directory: the directory of the SQLite file.
    """
    if arguments is None:
        path = str(directory / "roomkeys.db")
        return {"name": "sqlite3", "args": {"database": path}}
    return {"name": "psycopg2", "args": dict(arguments)}


def _environment(inherited: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Build an environment in which the package can be imported.

    Inherited ``ROOMKEYS_`` variables are dropped, because they would change options.
    """
    own = {
        name: value
        for name, value in inherited.items()
        if name != "PYTHONHOME" and not name.startswith("ROOMKEYS_")
    }
    return {**own, "PYTHONPATH": str(_REPOSITORY), "PYTHONUNBUFFERED": "1"}

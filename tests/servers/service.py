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
        program: what Python is to run.
        arguments: those of the command line.
        environment: what its environment has besides ours.
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
    ) -> None:
        """Choose the ports, which stay the same over restarts.

        Args:
            homeserver: its address.
            database: psycopg2's arguments, or None for an SQLite file.
            settings: what the configuration has besides, or instead.
        """
        self.directory = directory
        self.port = free_port()
        self.metrics_port = free_port()
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
        self._process: Process | None = None

    @property
    def url(self) -> str:
        """Locate the client API."""
        return f"http://{HOST}:{self.port}"

    @property
    def metrics_url(self) -> str:
        """Locate the metrics."""
        return f"http://{HOST}:{self.metrics_port}/metrics"

    @property
    def pid(self) -> int:
        """Identify the running process to the system."""
        return self._running().pid

    def start(self) -> None:
        """Start the process and wait until it answers."""
        self.begin()
        self.wait_until_it_answers()

    def begin(self) -> None:
        """Start the process; it may take a while until it answers."""
        self._process = self.spawn()

    def wait_until_it_answers(self) -> None:
        """Wait for the process that was begun."""
        try:
            self._running().wait_until(self._answers, _START_TIMEOUT)
        except StartFailed:
            self._process = None
            raise

    def spawn(self) -> Process:
        """Start the process without waiting for it."""
        assert self._process is None, "already started"
        self.directory.mkdir(parents=True, exist_ok=True)
        # JSON is YAML too.
        config = self.directory / "roomkeys.yaml"
        config.write_text(json.dumps(self._settings), encoding="utf-8")
        return Process(
            [sys.executable, *self.program, *self.arguments],
            output=self.directory / "output.txt",
            cwd=self.directory,
            environment={**_environment(), **self.environment},
        )

    def run_to_end(self, timeout: float = 30.0) -> tuple[int, str]:
        """Start the process, expect it to end by itself; its exit code, and what it
        printed."""
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
        """Return the exit code, or nothing if the process is still running."""
        code = self._running().wait(timeout)
        if code is not None:
            self._process = None
        return code

    def stop(self) -> None:
        """Stop the process in order; stopping twice does no harm."""
        if self._process is not None:
            self._process.stop(signal.SIGTERM)
            self._process = None

    def kill(self) -> None:
        """End the process at once, as a crash would."""
        self._running().kill()
        self._process = None

    def log(self) -> str:
        """Return what all runs so far have logged and printed."""
        output = self.directory / "output.txt"
        return output.read_text(encoding="utf-8", errors="replace")

    def rss_bytes(self) -> int:
        """Measure the memory that the process occupies."""
        pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def _running(self) -> Process:
        """Return the process, which must have been started."""
        assert self._process is not None, "not started"
        return self._process

    def _answers(self) -> bool:
        """Tell whether it serves."""
        try:
            accounts.fetch(f"{self.url}/health")
        except (urllib.error.URLError, OSError, RuntimeError):
            return False
        return True


def _database(arguments: Mapping[str, Any] | None, directory: Path) -> dict[str, Any]:
    """Point at a PostgreSQL, or at a file in the directory."""
    if arguments is None:
        path = str(directory / "roomkeys.db")
        return {"name": "sqlite3", "args": {"database": path}}
    return {"name": "psycopg2", "args": dict(arguments)}


def _environment(inherited: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Make the package importable, and leave no option set by chance."""
    own = {
        name: value
        for name, value in inherited.items()
        if name != "PYTHONHOME" and not name.startswith("ROOMKEYS_")
    }
    return {**own, "PYTHONPATH": str(_REPOSITORY), "PYTHONUNBUFFERED": "1"}

"""A Redis server for the replication between a Synapse and its workers."""

import signal
import socket
from pathlib import Path

from .debian import locate
from .processes import HOST, Process, Server, free_port

_START_TIMEOUT = 30.0


class RedisServer(Server):
    """A Redis server, from the Debian package, for a Synapse and its workers.

    Two deployments can't share a Redis, because the name of the replication channel is
    the server name, and all test servers have the same name.
    """

    def __init__(self, directory: Path) -> None:
        """Choose a port, which stays the same over restarts."""
        self.directory = directory
        self.port = free_port()
        self._process: Process | None = None

    def start(self) -> None:
        """Start the server without persistence and wait until the port accepts
        connections."""
        assert self._process is None, "already started"
        self.directory.mkdir(parents=True, exist_ok=True)
        program = locate("redis-server", "redis-server")
        settings = {"bind": HOST, "port": str(self.port), "save": "", "daemonize": "no"}
        options = [part for n, v in settings.items() for part in (f"--{n}", v)]
        self._process = Process(
            [str(program.path), *options],
            output=self.directory / "redis.log",
            cwd=self.directory,
            environment=program.environment,
        )
        self._process.wait_until(self._is_listening, _START_TIMEOUT)

    def stop(self) -> None:
        """Stop the server; stopping twice does no harm."""
        if self._process is not None:
            self._process.stop(signal.SIGTERM)
            self._process = None

    def _is_listening(self) -> bool:
        """Return whether the port accepts connections."""
        with socket.socket() as probe:
            return probe.connect_ex((HOST, self.port)) == 0

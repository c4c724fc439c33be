"""The Redis that a Synapse and its workers find each other through."""

import signal
import socket
from pathlib import Path

from .debian import locate
from .processes import HOST, Process, Server, free_port

_START_TIMEOUT = 30.0


class RedisServer(Server):
    """A Redis of Debian's that carries the replication of one deployment.

    All servers share one name, which is the channel that replication goes by.
    """

    def __init__(self, directory: Path) -> None:
        """Choose a port, which stays the same over restarts."""
        self.directory = directory
        self.port = free_port()
        self._process: Process | None = None

    def start(self) -> None:
        """Start the server, which keeps nothing on disk."""
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
        self._process.wait_until(self._accepts, _START_TIMEOUT)

    def stop(self) -> None:
        """Stop the server; stopping twice does no harm."""
        if self._process is not None:
            self._process.stop(signal.SIGTERM)
            self._process = None

    def _accepts(self) -> bool:
        """Tell whether the port answers yet."""
        with socket.socket() as probe:
            return probe.connect_ex((HOST, self.port)) == 0

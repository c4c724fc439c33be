"""Reverse proxies with the configurations in ``contrib/``."""

import os
import shutil
import signal
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from .debian import Program, locate
from .processes import (
    HOST,
    Process,
    Server,
    free_port,
    make_directory,
    remove_directory,
)

CONTRIB = Path(__file__).resolve().parents[2] / "contrib"
_UNPRIVILEGED = "nobody"
_TIMEOUT = 30.0


class Proxy(Server):
    """A reverse proxy in front of two service processes and a homeserver.

    The configuration is a file of ``contrib/`` with the ports replaced.

    Attributes:
        program: the name of the executable.
        package: the Debian package that contains the executable.
        config: the file name in ``contrib/``.
    """

    program: str
    package: str
    config: str

    def __init__(
        self, directory: Path, services: Sequence[int], homeserver: int
    ) -> None:
        """Choose a port.

        Args:
            directory: the directory of the proxy's log.
            services: the ports of the two service processes.
            homeserver: the port of the homeserver.
        """
        self.directory = directory
        self.port = free_port()
        self._services = services
        self._homeserver = homeserver
        self._home: Path | None = None
        self._process: Process | None = None

    @property
    def url(self) -> str:
        """The base URL of the proxy."""
        return f"http://{HOST}:{self.port}"

    def start(self) -> None:
        """Start the proxy and wait until the port accepts connections."""
        assert self._process is None, "already started"
        self.directory.mkdir(parents=True, exist_ok=True)
        program = locate(self.program, self.package)
        self._home = make_directory(f"{self.program}-")
        self._write_config(self._home, self._config_text())
        user = _UNPRIVILEGED if os.geteuid() == 0 else None
        if user is not None:
            for path in (self._home, *self._home.iterdir()):
                shutil.chown(path, user)
        self._process = Process(
            self._command(program, self._home),
            output=self.directory / f"{self.program}.log",
            cwd=self._home,
            environment={**program.environment, "HOME": str(self._home)},
            user=user,
        )
        self._process.wait_until(self._is_listening, _TIMEOUT)

    def stop(self) -> None:
        """Stop the proxy and delete its configuration."""
        if self._process is not None:
            self._process.stop(signal.SIGTERM, grace=5.0)
            self._process = None
        if self._home is not None:
            remove_directory(self._home)
            self._home = None

    def log(self) -> str:
        """Return the proxy's output so far."""
        assert self._process is not None, "not started"
        return self._process.output()

    def rss_bytes(self) -> int:
        """Return the resident memory of the proxy's processes, in bytes."""
        statm = (Path(f"/proc/{pid}/statm").read_text() for pid in self._pids())
        pages = sum(int(text.split()[1]) for text in statm)
        return pages * os.sysconf("SC_PAGE_SIZE")

    def temporary_bytes(self) -> int:
        """Return the size of the files that the proxy has open in its directory, in
        bytes.

        Open files that are already deleted are included.
        """
        total = 0
        for pid in self._pids():
            for link in Path(f"/proc/{pid}/fd").iterdir():
                if os.readlink(link).startswith(f"{self._home}/"):
                    total += link.stat().st_size
        return total

    def _replacements(self) -> Mapping[str, str]:
        """Return the replacements for the configuration, from old text to new text.

        Each old text occurs in the file exactly once.
        """
        first, second = self._services
        return {
            "127.0.0.1:8008": f"{HOST}:{self._homeserver}",
            "127.0.0.1:8009": f"{HOST}:{first}",
            "127.0.0.1:8010": f"{HOST}:{second}",
        }

    def _write_config(self, home: Path, text: str) -> None:
        """Write the configuration and the files it includes into a directory."""
        raise NotImplementedError

    def _command(self, program: Program, home: Path) -> list[str]:
        """Return the command that runs the proxy in the foreground."""
        raise NotImplementedError

    def _config_text(self) -> str:
        """Return the configuration of ``contrib/`` with this proxy's ports."""
        text = (CONTRIB / self.config).read_text()
        for old, new in self._replacements().items():
            assert text.count(old) == 1, (self.config, old)
            text = text.replace(old, new)
        return text

    def _pids(self) -> list[int]:
        """Return the pids of the proxy's process and of its children."""
        assert self._process is not None, "not started"
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [pid, *map(int, children.split())]

    def _is_listening(self) -> bool:
        """Return whether the port accepts connections."""
        with socket.socket() as probe:
            return probe.connect_ex((HOST, self.port)) == 0

"""A Prometheus server for the metrics of a single service process."""

import json
import signal
import subprocess
import urllib.error
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .accounts import fetch
from .debian import locate
from .processes import HOST, Process, Server, free_port

_TIMEOUT = 30.0
_CONFIG = """\
global:
  scrape_interval: 1s
scrape_configs:
  - job_name: synapse-roomkeys
    static_configs:
      - targets: ["{target}"]
"""


def promtool(
    *arguments: str, cwd: Path, given: str = ""
) -> "subprocess.CompletedProcess[str]":
    """Run ``promtool``, Prometheus' command line tool, until its end.

    Args:
        arguments: the command line arguments.
        cwd: the working directory.
        given: the text for standard input.
    """
    program = locate("promtool", "prometheus")
    return subprocess.run(
        [str(program.path), *arguments],
        cwd=cwd,
        env=dict(program.environment),
        input=given,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
        check=False,
    )


class Prometheus(Server):
    """A Prometheus server with its time series in a directory."""

    def __init__(self, directory: Path, target: str) -> None:
        """Choose a port.

        Args:
            directory: the directory of configuration, log and data.
            target: the host and port that serve ``/metrics``.
        """
        self.directory = directory
        self.port = free_port()
        self._target = target
        self._process: Process | None = None

    @property
    def url(self) -> str:
        """The base URL of the server."""
        return f"http://{HOST}:{self.port}"

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the current series of a PromQL expression."""
        answer = fetch(f"{self.url}/api/v1/query?query={quote(expression, safe='')}")
        body = json.loads(answer)
        assert body["status"] == "success", body
        series: list[dict[str, Any]] = body["data"]["result"]
        return series

    def start(self) -> None:
        """Start the server with a scrape interval of 1 s and wait until ready."""
        program = locate("prometheus", "prometheus")
        config = self.directory / "prometheus.yml"
        config.write_text(_CONFIG.format(target=self._target))
        self._process = Process(
            [
                str(program.path),
                f"--config.file={config}",
                f"--storage.tsdb.path={self.directory / 'data'}",
                f"--web.listen-address={HOST}:{self.port}",
            ],
            output=self.directory / "prometheus.log",
            cwd=self.directory,
            environment=program.environment,
        )
        self._process.wait_until(self._is_ready, _TIMEOUT)

    def stop(self) -> None:
        """Stop the server; no effect on a stopped server."""
        if self._process is not None:
            self._process.stop(signal.SIGTERM)
            self._process = None

    def _is_ready(self) -> bool:
        """Return whether the server answers queries."""
        try:
            fetch(f"{self.url}/-/ready")
        except (urllib.error.URLError, OSError, RuntimeError):
            return False
        return True

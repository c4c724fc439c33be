"""The search for secrets in the logs and metrics of a test run."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from prometheus_client import generate_latest

#: Secrets that no log, metric or error may hold: the access tokens that the fake
#: homeserver and Synapse issue, and the texts that the contract's scenarios and the
#: tests of leaks put into ``session_data`` and ``auth_data``.
SECRET = re.compile(
    rb"""token_0\d{19}|syt_\w{6,}|["']secret["']|ed25519:c["']|MaRkEr|OF-THE-LOG-TEST"""
)
#: Name of PostgreSQL's own log, which is not searched. PostgreSQL logs failed
#: statements with the rows that the statements wrote, and no client can prevent that.
POSTGRES_LOG = "postgres.log"


class SecretSearch(logging.Handler):
    """Search for secrets in log records and metrics of this process, and in log files.

    Each finding is a text that names the test during which the secret was found.
    """

    def __init__(self, directory: Path) -> None:
        """Begin without findings.

        Args:
            directory: the directory below which the servers of the run log.
        """
        super().__init__()
        self._directory = directory
        self._offsets: dict[Path, int] = {}
        self._reported: set[str] = set()
        self._findings: list[str] = []
        self._taken = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Search a log record, formatted as a log would show it."""
        text = self.format(record)
        if SECRET.search(text.encode("utf-8", "backslashreplace")):
            # pytest sets the variable to the running test and its phase.
            test = os.environ.get("PYTEST_CURRENT_TEST", "no test")
            self._findings.append(f"logged during {test}: {text[:2000]}")

    def take_findings(self, when: str) -> list[str]:
        """Search the metrics, and the lines added to log files since the last call.

        Args:
            when: the test that ran since the last call, for the text of the findings.

        Returns:
            The findings since the last call, in log records, log files and metrics.
        """
        for path in self._log_files():
            # A server may delete its log during the search.
            with suppress(FileNotFoundError):
                self._search_file(path, when)
        for line in generate_latest().splitlines():
            self._search_line("metrics", line, when)
        findings = self._findings[self._taken :]
        self._taken += len(findings)
        return findings

    def search_all_again(self, when: str) -> list[str]:
        """As `take_findings`, but read each log file from its start, because a server
        may have overwritten a part of its log before that part was searched."""
        self._offsets.clear()
        return self.take_findings(when)

    def _log_files(self) -> Iterator[Path]:
        """All log files below the directory, except PostgreSQL's own."""
        for folder, _, names in os.walk(self._directory):
            for name in names:
                is_log = name.endswith(".log") or name == "output.txt"
                if is_log and name != POSTGRES_LOG:
                    yield Path(folder, name)

    def _search_file(self, path: Path, when: str) -> None:
        """Search a log file from the end of the last search, or from its start if the
        file is shorter.

        A last line without a newline is searched now, and again after it has grown.
        """
        size = path.stat().st_size
        offset = self._offsets.get(path, 0)
        if size == offset:
            return
        if size < offset:
            offset = 0
        with path.open("rb") as log:
            log.seek(offset)
            for line in log:
                self._search_line(str(path), line, when)
                if line.endswith(b"\n"):
                    offset = log.tell()
        self._offsets[path] = offset

    def _search_line(self, source: str, line: bytes, when: str) -> None:
        """Add a finding if a line holds a secret, unless the same line was found
        before."""
        if SECRET.search(line):
            hit = f"{source}: {line[:2000]!r}"
            if hit not in self._reported:
                self._reported.add(hit)
                self._findings.append(f"found after {when} in {hit}")

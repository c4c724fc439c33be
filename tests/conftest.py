"""The servers that all tests share, and what nothing may ever tell."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from .secrecy import SECRET
from .servers import PostgresServer
from .servers.fake_homeserver import Homeserver

#: Where PostgreSQL logs. It shows statements that fail, with the rows that it refuses,
#: which no client of it can help.
POSTGRES_LOG = "postgres.log"


def lines_with_secrets(directory: Path) -> Iterator[str]:
    """What all logs below a directory should not have."""
    for folder, _, names in os.walk(directory):
        for name in names:
            is_log = name.endswith(".log") or name == "output.txt"
            if is_log and name != POSTGRES_LOG:
                with Path(folder, name).open("rb") as log:
                    for line in filter(SECRET.search, log):
                        yield f"{folder}/{name}: {line[:2000]!r}"


class Listener(logging.Handler):
    """Keeps what is logged in this process and should not be."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Look at a record as a log would show it."""
        line = self.format(record)
        if SECRET.search(line.encode("utf-8", "backslashreplace")):
            self.found.append(line)


@pytest.fixture(scope="session", autouse=True)
def nothing_tells_a_secret(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No log of any server that the run has started but PostgreSQL, nor what the plugin
    has logged in the tests' own process, nor its metrics there."""
    listener = Listener()
    logger = logging.getLogger("synapse_roomkeys")
    logger.addHandler(listener)
    logger.setLevel(logging.DEBUG)
    yield
    logger.removeHandler(listener)
    assert not listener.found[:10]
    assert not list(lines_with_secrets(tmp_path_factory.getbasetemp()))[:10]
    assert not SECRET.search(generate_latest())


@pytest.fixture(scope="module")
def homeserver() -> Iterator[Homeserver]:
    """Whose users they are."""
    with Homeserver() as homeserver:
        yield homeserver


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A PostgreSQL server; each user makes a database of its own."""
    with PostgresServer(tmp_path_factory.mktemp("postgres")) as server:
        yield server

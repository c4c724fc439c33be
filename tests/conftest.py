"""The servers that all tests share, and what none of them may ever log."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from .servers import PostgresServer
from .servers.homeserver import Homeserver

#: The tokens of either kind of homeserver, and what the contract's scenarios and the
#: tests of secrets have in ``session_data`` and ``auth_data``.
SECRET = re.compile(
    rb"""token_0\d{19}|syt_\w{6,}|["']secret["']|ed25519:c["']|MaRkEr|OF-THE-LOG-TEST"""
)
#: Where Synapse and the service log.
LOGS = {"homeserver.log", "output.txt"}


def lines_with_secrets(directory: Path) -> Iterator[str]:
    """What all logs below a directory should not have."""
    for folder, _, names in os.walk(directory):
        for path in (Path(folder, name) for name in names if name in LOGS):
            with path.open("rb") as log:
                for line in filter(SECRET.search, log):
                    yield f"{path}: {line[:2000]!r}"


@pytest.fixture(scope="session", autouse=True)
def no_log_has_a_secret(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """None of the whole run's, of any Synapse or service that a test has started."""
    yield
    assert not list(lines_with_secrets(tmp_path_factory.getbasetemp()))[:10]


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

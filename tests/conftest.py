"""The servers that all tests share."""

from collections.abc import Iterator

import pytest

from .servers import PostgresServer


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A PostgreSQL server; each user makes a database of its own."""
    with PostgresServer(tmp_path_factory.mktemp("postgres")) as server:
        yield server

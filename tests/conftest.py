"""Fixtures of all tests: servers, and the search for leaked secrets."""

import logging
from collections.abc import Iterator

import pytest

from .secret_search import SecretSearch
from .servers import PostgresServer
from .servers.fake_homeserver import Homeserver


@pytest.fixture(scope="session")
def secret_search(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecretSearch]:
    """The search for secrets that all tests of the run share.

    After the last test, the fixture searches all logs once more and fails for leaks
    that happened after the last test of a module, when the servers of the module stop.
    """
    search = SecretSearch(tmp_path_factory.getbasetemp())
    logger = logging.getLogger("synapse_roomkeys")
    logger.addHandler(search)
    logger.setLevel(logging.DEBUG)
    yield search
    logger.removeHandler(search)
    assert search.search_all_again("the last test")[:10] == []


@pytest.fixture(autouse=True)
def no_secret_is_leaked(
    secret_search: SecretSearch, request: pytest.FixtureRequest
) -> Iterator[None]:
    """Fail the test during which a secret was logged or became part of the metrics.

    The search covers the log files of all servers of the run except PostgreSQL, the
    plugin's log records in the tests' own process, and the metrics of that process.
    """
    yield
    assert secret_search.take_findings(request.node.nodeid)[:10] == []


@pytest.fixture(scope="module")
def homeserver() -> Iterator[Homeserver]:
    """A homeserver that answers whoami; the tests of a module share its users."""
    with Homeserver() as homeserver:
        yield homeserver


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A PostgreSQL server; each test that uses this server creates its own database."""
    with PostgresServer(tmp_path_factory.mktemp("postgres")) as server:
        yield server

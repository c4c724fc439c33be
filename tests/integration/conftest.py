"""Fixtures for the databases and servers of the integration tests."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import blockon

from synapse_roomkeys.service.config import DatabaseConfig

from ..client import HttpHost
from ..contract import User
from ..servers import PostgresServer, Synapse
from ..servers.citus import PROGRAMS
from ..sites import Backend, OwnSite
from .deployment import Deployment
from .places import NewPlace, Place

_numbers = count()
#: The tests on Citus run only where there is a Citus.
collect_ignore = [] if PROGRAMS in os.environ else ["test_citus.py"]


@pytest.fixture(scope="session", params=["sqlite", "postgres"])
def engine(request: pytest.FixtureRequest) -> str:
    """Name of the database engine, once for each supported engine."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def database(
    engine: str, request: pytest.FixtureRequest
) -> Callable[[], Mapping[str, Any] | None]:
    """Function that creates a database of the engine.

    The function returns psycopg2's arguments, or None for an SQLite file.
    """
    if engine == "sqlite":
        return lambda: None
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.create_database


@pytest.fixture(scope="module")
def new_deployment(
    database: Callable[[], Mapping[str, Any] | None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[], Deployment]:
    """Function that creates the directory and database of a new homeserver."""
    return lambda: Deployment(tmp_path_factory.mktemp("deployment"), database())


@pytest.fixture(scope="module")
def backend(
    engine: str,
    database: Callable[[], Mapping[str, Any] | None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Backend:
    """A new database of each engine."""
    path = tmp_path_factory.mktemp("backend") / "roomkeys.db"
    return Backend(engine, database(), path)


@pytest.fixture(scope="module")
def site(backend: Backend) -> Iterator[OwnSite]:
    """The plugin's own site on each engine."""
    site = OwnSite(backend)
    blockon(site.start())
    yield site
    blockon(site.stop())


@pytest.fixture(scope="module")
def synapse(
    database: Callable[[], Mapping[str, Any] | None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Synapse]:
    """A running Synapse with the plugin, on each engine."""
    with Synapse(tmp_path_factory.mktemp("synapse"), database=database()) as server:
        yield server


@pytest.fixture
def synapse_host(synapse: Synapse) -> Iterator[HttpHost]:
    """The running Synapse as a server under test."""
    host = host_of(synapse)
    yield host
    blockon(host.close())


def host_of(synapse: Synapse, url: str | None = None) -> HttpHost:
    """Make a Synapse a server under test.

    Args:
        synapse: registers the users.
        url: the address for requests, by default the address of `synapse`.
    """

    def new_user() -> User:
        user = synapse.register(f"user{next(_numbers)}")
        return User(user.user_id, user.access_token)

    def new_guest() -> User:
        user = synapse.guest()
        return User(user.user_id, user.access_token)

    return HttpHost(url or synapse.url, new_user, new_guest)


@pytest.fixture
def new_place(request: pytest.FixtureRequest, tmp_path: Path) -> NewPlace:
    """Function that creates a database without tables, by the name of the engine."""

    def new(engine: str) -> Place:
        if engine == "sqlite":
            path = tmp_path / f"100% new?#{secrets.token_hex(4)}.db"
            return Place(DatabaseConfig("sqlite3", {"database": str(path)}))
        server: PostgresServer = request.getfixturevalue("postgres")
        args = {**server.create_database(), "cp_min": 1, "cp_max": 10}
        return Place(DatabaseConfig("psycopg2", args))

    return new

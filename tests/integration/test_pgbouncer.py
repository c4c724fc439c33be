"""The plugin behind a PgBouncer that pools transactions: what one transaction leaves
on a connection, the next one would meet, whosever it is."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, closing
from itertools import cycle
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from twisted.internet.defer import Deferred, gatherResults, inlineCallbacks

from ..contract import SCENARIOS, Answer, Client, Scenario, User
from ..contract.base import Rooms, key
from ..servers import PgBouncer, PostgresServer
from ..sites import Backend, OwnSite
from . import test_storage

Steps = Generator[Deferred[Any], Any, None]
Sites = tuple[OwnSite, OwnSite]
ROOM = "!room"
#: What the plugin sets in its transactions.
SETTINGS = (
    "enable_sort",
    "enable_incremental_sort",
    "synchronous_commit",
    "lock_timeout",
    "idle_in_transaction_session_timeout",
    # Set at connect where there is no pooler.
    "tcp_user_timeout",
    "tcp_keepalives_idle",
)

# The races of two servers on one database, once more, on the backend below.
sites = test_storage.sites
test_tables_may_be_made_by_several_at_once = (
    test_storage.test_tables_may_be_made_by_several_at_once
)
test_uploads_at_two_servers_lose_nothing = (
    test_storage.test_uploads_at_two_servers_lose_nothing
)
test_versions_made_at_two_servers_differ = (
    test_storage.test_versions_made_at_two_servers_differ
)
test_an_upload_at_the_end_of_a_version = (
    test_storage.test_an_upload_at_the_end_of_a_version
)
test_a_backup_of_another_locale_is_paged_whole = (
    test_storage.test_a_backup_of_another_locale_is_paged_whole
)


@pytest.fixture(scope="module")
def direct(postgres: PostgresServer) -> Mapping[str, Any]:
    """A database, and how to reach it past the pooler."""
    return postgres.create_database()


@pytest.fixture(scope="module")
def pooler(
    direct: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PgBouncer]:
    """A pooler in front of it."""
    with PgBouncer(tmp_path_factory.mktemp("pgbouncer"), direct) as pooler:
        yield pooler


@pytest.fixture(scope="module")
def backend(pooler: PgBouncer) -> Backend:
    """The database as it is reached through the pooler."""
    return Backend("pgbouncer", pooler.arguments, Path())


class Alternating:
    """Two servers as one, as a balancer makes them: each gets every other request."""

    def __init__(self, sites: Sites) -> None:
        self._first = sites[0].host
        self._hosts = cycle([site.host for site in sites])

    def new_user(self) -> User:
        """As `Host.new_user`."""
        return self._first.new_user()

    def new_guest(self) -> User:
        """As `Host.new_guest`."""
        return self._first.new_guest()

    def request(
        self,
        method: str,
        path: str,
        *,
        token: str | None,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Deferred[Answer]:
        """As `Host.request`, at the server whose turn it is."""
        host = next(self._hosts)
        return host.request(method, path, token=token, body=body, headers=headers)


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_contract(scenario: Scenario, sites: Sites) -> Deferred[None]:
    """Two servers that take turns behind a pooler keep the contract."""
    return scenario(Alternating(sites))


@inlineCallbacks
def work(sites: Sites) -> Steps:
    """Uploads and downloads of many users at once, at both servers."""
    clients = [Client(site.host, site.host.new_user()) for site in sites * 20]
    versions = yield gatherResults([client.create_version() for client in clients])
    rooms: Rooms = {ROOM: {f"{i}": key() for i in range(20)}}
    both = list(zip(clients, versions, strict=True))
    yield gatherResults([client.upload(version, rooms) for client, version in both])
    got = yield gatherResults([client.download(version) for client, version in both])
    assert got == [rooms] * len(clients)


@inlineCallbacks
def test_connections_are_shared(
    sites: Sites, pooler: PgBouncer, direct: Mapping[str, Any]
) -> Steps:
    """The database has no more connections than the pool, however many the servers
    have."""
    yield work(sites)
    assert clients_of(pooler) > pooler.pool_size
    assert 1 < backends_of(direct) <= pooler.pool_size


@inlineCallbacks
def test_a_transaction_leaves_nothing_behind(
    sites: Sites, pooler: PgBouncer, direct: Mapping[str, Any]
) -> Steps:
    """What the plugin sets for a transaction ends with it: every connection in the pool
    has the database's own settings afterwards."""
    with closing(psycopg2.connect(**direct)) as connection:
        own = settings_of(connection)[1:]
    yield work(sites)
    with ExitStack() as stack:
        connections = [
            stack.enter_context(closing(psycopg2.connect(**pooler.arguments)))
            for _ in range(pooler.pool_size)
        ]
        found = [settings_of(connection) for connection in connections]
    assert len({pid for pid, *_ in found}) == pooler.pool_size
    assert [settings for _, *settings in found] == [list(own)] * pooler.pool_size


def settings_of(connection: Any) -> tuple[Any, ...]:
    """The pid of a connection's backend, and its settings; the transaction that it
    begins is left open, so that the pooler gives the backend to nobody else."""
    columns = ", ".join(f"current_setting('{name}')" for name in SETTINGS)
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT pg_backend_pid(), {columns}")
        row: tuple[Any, ...] = cursor.fetchone()
        return row


def clients_of(pooler: PgBouncer) -> int:
    """How many connections the pooler has from clients of the database."""
    with closing(psycopg2.connect(**pooler.console)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("SHOW CLIENTS")
            names = [column[0] for column in cursor.description or ()]
            database = names.index("database")
            rows = cursor.fetchall()
    return [row[database] for row in rows].count(pooler.arguments["dbname"])


def backends_of(arguments: Mapping[str, Any]) -> int:
    """How many connections the database has, but for the one that asks."""
    with (
        closing(psycopg2.connect(**arguments)) as connection,
        connection.cursor() as cursor,
    ):
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        (number,) = cursor.fetchone() or (0,)
        count: int = number
        return count

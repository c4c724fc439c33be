"""The plugin behind a PgBouncer in transaction mode.

A setting left on a connection by a transaction would affect the connection's next
transaction, even a transaction of another client.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from itertools import cycle
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from twisted.internet.defer import Deferred, gatherResults, inlineCallbacks

from ..contract import SCENARIOS, Answer, Client, Scenario, User
from ..contract.base import Rooms, Steps, key
from ..servers import PgBouncer, PostgresServer
from ..sites import Backend, OwnSite
from . import test_storage

Sites = tuple[OwnSite, OwnSite]
ROOM = "!room"
#: Database settings changed by the plugin's transactions.
SETTINGS = (
    "enable_sort",
    "enable_incremental_sort",
    "synchronous_commit",
    "lock_timeout",
    "idle_in_transaction_session_timeout",
    # Set at connect instead if there is no pooler.
    "tcp_user_timeout",
    "tcp_keepalives_idle",
)

# Tests of two servers on a database, repeated on this module's backend.
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
    """psycopg2's arguments for a connection to a new database, without the pooler."""
    return postgres.create_database()


@pytest.fixture(scope="module")
def pooler(
    direct: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PgBouncer]:
    """A PgBouncer in front of the database of `direct`."""
    with PgBouncer(tmp_path_factory.mktemp("pgbouncer"), direct) as pooler:
        yield pooler


@pytest.fixture(scope="module")
def backend(pooler: PgBouncer) -> Backend:
    """The database as reached through the pooler."""
    return Backend("pgbouncer", pooler.arguments, Path())


class Alternating:
    """Two servers as a single host, as behind a load balancer.

    Requests alternate between the two servers.
    """

    def __init__(self, sites: Sites) -> None:
        self._first = sites[0].host
        self._hosts = cycle([site.host for site in sites])

    def new_user(self) -> User:
        """See `Host.new_user`."""
        return self._first.new_user()

    def new_guest(self) -> User:
        """See `Host.new_guest`."""
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
        """See `Host.request`; the next server in turn gets the request."""
        host = next(self._hosts)
        return host.request(method, path, token=token, body=body, headers=headers)


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_contract(scenario: Scenario, sites: Sites) -> Deferred[None]:
    """Two alternating servers behind a pooler keep the contract."""
    return scenario(Alternating(sites))


@inlineCallbacks
def upload_and_download(sites: Sites) -> Steps:
    """Upload and download backups of 40 users concurrently, at both servers."""
    clients = [Client(site.host, site.host.new_user()) for site in sites * 20]
    versions = yield gatherResults([client.create_version() for client in clients])
    rooms: Rooms = {ROOM: {f"{i}": key() for i in range(20)}}
    both = list(zip(clients, versions, strict=True))
    yield gatherResults([client.upload(version, rooms) for client, version in both])
    downloads = yield gatherResults(
        [client.download(version) for client, version in both]
    )
    assert downloads == [rooms] * len(clients)


@inlineCallbacks
def test_connections_are_shared(
    sites: Sites, pooler: PgBouncer, direct: Mapping[str, Any]
) -> Steps:
    """The database has at most `pool_size` connections.

    The servers have more connections to the pooler.
    """
    yield upload_and_download(sites)
    assert client_connections(pooler) > pooler.pool_size
    assert 1 < server_connections(direct) <= pooler.pool_size


@inlineCallbacks
def test_settings_end_with_the_transaction(
    sites: Sites, pooler: PgBouncer, direct: Mapping[str, Any]
) -> Steps:
    """Settings of the plugin's transactions end with the transaction.

    Each connection in the pool has the database's own settings afterwards.
    """
    with closing(psycopg2.connect(**direct)) as connection:
        own = settings_of(connection)[1:]
    yield upload_and_download(sites)
    with ExitStack() as stack:
        connections = [
            stack.enter_context(closing(psycopg2.connect(**pooler.arguments)))
            for _ in range(pooler.pool_size)
        ]
        found = [settings_of(connection) for connection in connections]
    assert len({pid for pid, *_ in found}) == pooler.pool_size
    assert [settings for _, *settings in found] == [list(own)] * pooler.pool_size


def settings_of(connection: Any) -> tuple[Any, ...]:
    """Return the pid and the current settings of a connection's backend.

    The transaction stays open. Therefore the pooler gives the backend to no other
    client.
    """
    columns = ", ".join(f"current_setting('{name}')" for name in SETTINGS)
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT pg_backend_pid(), {columns}")
        row: tuple[Any, ...] = cursor.fetchone()
        return row


def client_connections(pooler: PgBouncer) -> int:
    """Return the number of client connections to the database at the pooler."""
    with closing(psycopg2.connect(**pooler.console)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("SHOW CLIENTS")
            names = [column[0] for column in cursor.description or ()]
            database = names.index("database")
            rows = cursor.fetchall()
    return [row[database] for row in rows].count(pooler.arguments["dbname"])


def server_connections(arguments: Mapping[str, Any]) -> int:
    """Return the number of the database's connections, without the current
    connection."""
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

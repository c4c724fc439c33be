"""The service on tables that are distributed by user with Citus.

The tests run only where an environment variable names a PostgreSQL with Citus:
see `tests.servers.citus.PROGRAMS`.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from io import StringIO
from pathlib import Path
from typing import Any

import attrs
import psycopg2
import pytest
from pytest_twisted import blockon
from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults, inlineCallbacks
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from synapse_roomkeys.service.config import DatabaseConfig
from synapse_roomkeys.service.migration import MigrateError, Progress, migrate
from synapse_roomkeys.storage import (
    SQLITE,
    EndToEndRoomKeyStore,
    SchemaError,
    Sweeps,
    probe_tables,
    upgrade_tables,
)
from synapse_roomkeys.storage.postgres_engine import PostgresEngine
from synapse_roomkeys.types import Limits, Retention

from ..client import HttpOperatorHost
from ..contract import Answer, Client, OperatorScenario, Scenario
from ..contract.base import (
    PREFIX,
    Rooms,
    Steps,
    encoded,
    key,
    keys_path,
    new_backup,
    wrapped,
)
from ..servers.citus import Citus
from ..servers.fake_homeserver import Homeserver
from ..servers.service import Service
from ..sites import Backend, OwnSite
from . import test_contract, test_operators, test_partitions, test_storage
from .test_partitions import Explained, ExplainedDatabase, all_statements, do_everything

Databases = list[dict[str, Any]]

#: Settings of the service's role on all nodes, as in docs/scaling.rst, except
#: lock_timeout: a test lets statements hang by locks.
SETTINGS = """
    ALTER ROLE CURRENT_USER SET synchronous_commit TO on;
    ALTER ROLE CURRENT_USER SET idle_in_transaction_session_timeout TO '10s';
    ALTER ROLE CURRENT_USER SET enable_sort TO off;
    ALTER ROLE CURRENT_USER SET enable_incremental_sort TO off;
    SELECT 1"""
#: As docs/scaling.rst says.
DISTRIBUTE = """
    ALTER TABLE e2e_room_keys_versions
        REPLICA IDENTITY USING INDEX e2e_room_keys_versions_idx;
    ALTER TABLE e2e_room_keys
        REPLICA IDENTITY USING INDEX e2e_room_keys_with_version_idx;
    SELECT create_distributed_table('e2e_room_keys_versions', 'user_id');
    SELECT create_distributed_table('e2e_room_keys', 'user_id',
        colocate_with => 'e2e_room_keys_versions')"""
TABLE_TYPES = "SELECT table_name::text, citus_table_type FROM citus_tables"
#: Returns the names of a node's tables that hold versions.
FIND_SHARDS = """
    SELECT shard_name FROM citus_shards
    WHERE table_name = 'e2e_room_keys_versions'::regclass AND nodeport = %s"""
#: Moves the shards that hold a user's rows to the other worker.
MOVE = """
    SELECT citus_move_shard_placement(get_shard_id_for_distribution_column(
        'e2e_room_keys_versions', %s), '127.0.0.1', %s, '127.0.0.1', %s)"""
#: Returns the port of the node that has a user's keys.
FIND_NODE = """
    SELECT nodeport FROM citus_shards WHERE shardid =
        get_shard_id_for_distribution_column('e2e_room_keys_versions', %s) LIMIT 1"""

# The concurrency tests, with one server at the coordinator and one at a worker.
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
def citus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Citus]:
    """A cluster of a coordinator and two workers."""
    with Citus(tmp_path_factory.mktemp("citus")) as citus:
        yield citus


def query(database: Mapping[str, Any], statement: str, *parameters: Any) -> Any:
    """Run statements on a node, and return the last one's rows."""
    with closing(psycopg2.connect(**database)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement, parameters)
            return cursor.fetchall()


def upgrade(database: Mapping[str, Any]) -> None:
    """Make or upgrade the tables, as the start of the service at a node does."""
    with closing(psycopg2.connect(**database)) as connection, connection:
        upgrade_tables(connection.cursor(), PostgresEngine(), True)


@pytest.fixture(scope="module")
def databases(citus: Citus) -> Databases:
    """A database with distributed tables, by node, the coordinator first."""
    databases = citus.create_database()
    upgrade(databases[0])
    query(databases[0], SETTINGS)
    query(databases[0], DISTRIBUTE)
    upgrade(databases[0])
    return databases


@pytest.fixture(scope="module")
def sites(databases: Databases) -> Iterator[tuple[OwnSite, OwnSite]]:
    """A server at the coordinator and one at a worker, which know the same users."""
    one = OwnSite(Backend("coordinator", databases[0], Path()))
    two = OwnSite(Backend("worker", databases[1], Path()), one.auth)
    blockon(gatherResults([one.start(), two.start()]))
    yield one, two
    for site in (one, two):
        blockon(site.stop())


@pytest.fixture
def site(sites: tuple[OwnSite, OwnSite]) -> OwnSite:
    """The server at the worker."""
    return sites[1]


@pytest.mark.parametrize("node", [0, 1], ids=["coordinator", "worker"])
@test_contract.each_scenario
def test_contract_at_a_node(
    scenario: Scenario, node: int, sites: tuple[OwnSite, OwnSite]
) -> Any:
    """The service keeps the contract at the coordinator and at a worker."""
    return scenario(sites[node].host)


@pytest.fixture(scope="module")
def operators(
    databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HttpOperatorHost]:
    """A process of the service at the coordinator, whose operators have a token."""
    with Homeserver() as homeserver:
        service = Service(
            tmp_path_factory.mktemp("service"),
            homeserver.url,
            database=databases[0],
            settings={"retention": test_operators.KEEPING},
            operator_token="a_token_of_thirty_two_characters",
        )
        with service:
            host = test_operators.operators_of(service, homeserver)
            yield host
            blockon(host.close())
        assert "Traceback" not in service.log()


@test_operators.each_scenario
def test_operators_at_the_coordinator(
    scenario: OperatorScenario, operators: HttpOperatorHost
) -> Any:
    """The service keeps the contract for operators."""
    return scenario(operators)


def test_a_worker_makes_no_tables_of_its_own(citus: Citus) -> None:
    """A worker is refused until the coordinator has made and distributed all tables."""
    coordinator, worker, _ = citus.create_database()
    with pytest.raises(SchemaError, match=r"a worker of Citus.*e2e_room_keys,"):
        upgrade(worker)
    upgrade(coordinator)
    with pytest.raises(SchemaError, match="a worker of Citus"):
        upgrade(worker)
    first, _, second = DISTRIBUTE.rpartition(";")
    query(coordinator, first)
    with pytest.raises(SchemaError, match="e2e_room_keys isn't distributed by Citus"):
        upgrade(coordinator)
    query(coordinator, second)
    with pytest.raises(SchemaError, match="these tables aren't distributed: roomkeys"):
        upgrade(worker)
    upgrade(coordinator)
    upgrade(worker)
    types = dict(query(worker, TABLE_TYPES))
    assert types.pop("roomkeys_schema") == "reference"
    assert set(types.values()) == {"distributed"}
    assert types.keys() >= set(test_partitions.TABLES)


def test_a_node_that_loses_commits_is_refused(citus: Citus) -> None:
    """The service doesn't start while a commit on a node doesn't wait for the disk."""
    coordinator, *workers = citus.create_database()
    upgrade(coordinator)
    query(coordinator, DISTRIBUTE)
    query(
        coordinator,
        f"ALTER ROLE CURRENT_USER IN DATABASE {coordinator['dbname']}"
        " SET synchronous_commit TO off; SELECT 1",
    )
    with pytest.raises(SchemaError, match="synchronous_commit is off on") as refusal:
        upgrade(coordinator)
    assert all(f":{worker['port']}" in str(refusal.value) for worker in workers)


def test_a_migration_refuses_distributed_tables(
    databases: Databases, tmp_path: Path
) -> None:
    """A migration from or into distributed tables ends at once, with what to do."""
    citus = DatabaseConfig("psycopg2", databases[0])
    file = tmp_path / "roomkeys.db"
    with closing(sqlite3.connect(file)) as connection, connection:
        upgrade_tables(connection.cursor(), SQLITE, True)
    plain = DatabaseConfig("sqlite3", {"database": str(file)})
    for source, target in ((citus, plain), (plain, citus)):
        with pytest.raises(MigrateError, match="its tables are distributed by Citus"):
            migrate(source, target, Progress(StringIO()))


class Routed(Explained):
    """A transaction that has Citus plan each statement just before it is run."""

    def _explain(self, query: str, parameters: Any) -> set[str]:
        """Explain a statement; return the plan's lines that tell of more than one task,
        and of rows that a node collects for another one."""
        self._txn.execute(f"EXPLAIN {query}", parameters)
        plan = [line.strip() for (line,) in self._txn.fetchall()]
        wrong = re.compile(r"Distributed Subplan|INSERT/SELECT method|Task Count: [^1]")
        found = {line for line in plan if wrong.search(line)}
        return found if "Task Count: 1" in plan else {*found, *plan}


@inlineCallbacks
def test_each_statement_is_one_task_on_one_shard(databases: Databases) -> Steps:
    """Citus sends every statement of a request unchanged to a single shard."""
    database = Backend("citus", databases[0], Path()).connect()
    engine = PostgresEngine()
    yield database.run("upgrade", upgrade_tables, engine, True)
    explained = ExplainedDatabase(database, transaction=Routed)
    stores = [
        EndToEndRoomKeyStore(explained, engine, time.time, limits, Retention())
        for limits in (Limits(), Limits(max_user_bytes=10**9))
    ]
    sweeper = Sweeps(explained, engine, time.time, Retention())
    for i, store in enumerate(stores):
        yield do_everything(store, sweeper, f"@explained{i}:test.example")
    served = all_statements()
    sent = {one.statement: one.touched for one in explained.sent}
    wrong = {s: lines for s, lines in sent.items() if lines and s in served}
    assert wrong == {}
    cursors = {s for s in served if s.startswith("DECLARE")}
    assert served - sent.keys() == cursors
    database.close()


@inlineCallbacks
def backups_by_node(
    site: OwnSite, databases: Databases, count: int
) -> Generator[Deferred[Any], Any, dict[int, list[Backup]]]:
    """Fire with new backups, ``count`` on each worker, by the worker's port."""
    backups: dict[int, list[Backup]] = {}
    while len(backups) < 2 or min(map(len, backups.values())) < count:
        client, version = yield new_backup(site.host)
        ((port,),) = query(databases[0], FIND_NODE, client.user.user_id)
        backups.setdefault(port, []).append(Backup(client, version))
    return {port: made[:count] for port, made in backups.items()}


@attrs.define
class Backup:
    """A backup whose client uploads one key after the other.

    Attributes:
        stored: ids of the sessions whose upload was answered 200.
        statuses: the status of each upload's answer.
        slowest: longest time of an upload, in seconds.
        is_over: set to end the uploads.
    """

    client: Client
    version: str
    stored: list[str] = attrs.field(factory=list)
    statuses: list[int] = attrs.field(factory=list)
    slowest: float = 0
    is_over: bool = False

    @inlineCallbacks
    def upload(self) -> Steps:
        """Upload a key."""
        session = f"s{len(self.statuses)}"
        body = encoded(wrapped({"!room": {session: key()}}))
        path = PREFIX + keys_path(self.version)
        began = time.monotonic()
        answer: Answer = yield self.client.host.request(
            "PUT", path, token=self.client.user.access_token, body=body
        )
        self.slowest = max(self.slowest, time.monotonic() - began)
        self.statuses.append(answer.status)
        if answer.status == 200:
            self.stored.append(session)

    @inlineCallbacks
    def upload_steadily(self) -> Steps:
        """Upload keys, twenty a second at most, until `is_over`."""
        while not self.is_over:
            yield self.upload()
            yield deferLater(reactor, 0.05)

    @inlineCallbacks
    def check(self) -> Steps:
        """Check that no stored key is lost."""
        rooms: Rooms = yield self.client.download(self.version)
        assert set(self.stored) <= rooms.get("!room", {}).keys()


@inlineCallbacks
def test_a_killed_worker_fails_its_own_users_alone(
    citus: Citus, databases: Databases, sites: tuple[OwnSite, OwnSite]
) -> Steps:
    """While a worker is down, uploads of its users are answered 503, never 500, and
    uploads of other users are stored. After its restart, no stored key is lost."""
    worker = citus.workers[1]
    for site in sites:
        backups: dict[int, list[Backup]] = yield backups_by_node(site, databases, 3)
        everyone = [backup for group in backups.values() for backup in group]
        steady = [backup.upload_steadily() for backup in everyone]
        yield deferLater(reactor, 0.5)
        worker.kill()
        yield deferLater(reactor, 5)
        # Another process may start, and is ready, at a node that is up.
        yield site.database.run("upgrade", upgrade_tables, site.engine, True)
        yield site.database.run("probe", probe_tables, site.engine)
        yield deferToThread(worker.start)
        yield deferLater(reactor, 1)
        for backup in everyone:
            backup.is_over = True
        yield gatherResults(steady)
        dead = backups.pop(worker.port)
        (living,) = backups.values()
        assert {s for backup in living for s in backup.statuses} == {200}
        assert {s for backup in dead for s in backup.statuses} == {200, 503}
        for backup in everyone:
            yield backup.check()


def hang(worker: Mapping[str, Any]) -> Any:
    """Let the statements of all users of a worker hang until the returned connection
    is closed."""
    shards = ", ".join(name for (name,) in query(worker, FIND_SHARDS, worker["port"]))
    connection = psycopg2.connect(**worker)
    connection.cursor().execute(
        "SET citus.enable_manual_changes_to_shards TO on;"
        f" LOCK TABLE {shards} IN ACCESS EXCLUSIVE MODE"
    )
    return connection


@inlineCallbacks
def test_a_worker_that_hangs_leaves_connections_to_others(
    citus: Citus, databases: Databases, sites: tuple[OwnSite, OwnSite]
) -> Steps:
    """While all statements of a worker hang, with more uploads of its users than
    connections, uploads of other users succeed: within 5 seconds at first, and within
    2.5 seconds after the first timeouts."""
    site, worker = sites[0], citus.workers[1]
    backups: dict[int, list[Backup]] = yield backups_by_node(site, databases, 15)
    everyone = [backup for group in backups.values() for backup in group]
    hung = backups.pop(worker.port)
    (living,) = backups.values()
    locks = hang(databases[2])
    steady = [backup.upload_steadily() for backup in everyone]
    yield deferLater(reactor, 8)
    first = max(backup.slowest for backup in living)
    for backup in living:
        backup.slowest = 0
    yield deferLater(reactor, 8)
    later = max(backup.slowest for backup in living)
    locks.close()
    for backup in everyone:
        backup.is_over = True
    yield gatherResults(steady)
    assert {s for backup in living for s in backup.statuses} == {200}
    assert {s for backup in hung for s in backup.statuses} <= {200, 503}
    assert first < 5 and later < 2.5
    for backup in everyone:
        yield backup.upload()
        assert backup.statuses[-1] == 200
        yield backup.check()


@inlineCallbacks
def test_shards_move_while_their_users_upload(
    citus: Citus, databases: Databases, sites: tuple[OwnSite, OwnSite]
) -> Steps:
    """Moving a user's shards to another node fails no upload and loses no key."""
    ports = [worker.port for worker in citus.workers]
    backups: dict[int, list[Backup]] = yield backups_by_node(sites[0], databases, 1)
    (backup,) = backups[ports[0]]
    user = backup.client.user.user_id
    steady = backup.upload_steadily()
    yield deferToThread(query, databases[0], MOVE, user, *ports)
    yield deferLater(reactor, 0.5)
    backup.is_over = True
    yield steady
    assert query(databases[0], FIND_NODE, user) == [(ports[1],)]
    assert set(backup.statuses) == {200}
    yield backup.check()


@inlineCallbacks
def test_workers_serve_while_the_coordinator_is_down(
    citus: Citus, databases: Databases, sites: tuple[OwnSite, OwnSite]
) -> Steps:
    """A process at a worker serves the users of all workers without the coordinator."""
    backups: dict[int, list[Backup]] = yield backups_by_node(sites[1], databases, 1)
    citus.coordinator.kill()
    try:
        for (backup,) in backups.values():
            yield backup.upload()
            assert backup.statuses == [200]
            yield backup.check()
    finally:
        yield deferToThread(citus.coordinator.start)

"""The plugin on tables partitioned by user: each statement uses a single partition."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import attrs
import psycopg2
import pytest
from twisted.internet.defer import Deferred, inlineCallbacks

from synapse_roomkeys.storage import (
    EndToEndRoomKeyStore,
    Place,
    PoolDatabase,
    Sweeps,
    Transaction,
    check_tables,
    postgres_statements,
    statements,
    sweeps,
    upgrade_tables,
    versions,
)
from synapse_roomkeys.storage.postgres_engine import PostgresEngine, to_pyformat
from synapse_roomkeys.storage.values import DownloadStatements
from synapse_roomkeys.types import (
    Actor,
    BackupId,
    KeyMetadata,
    KeyPage,
    Limits,
    Restore,
    Retention,
    RoomKey,
)

from ..memory import TriesOnce
from ..servers import PostgresServer
from ..sites import Backend
from . import test_contract

Steps = Generator[Deferred[Any], Any, None]
T = TypeVar("T")

ACTOR = Actor("DEVICE")
PARTITIONS = 16
TABLES = (
    *("e2e_room_keys", "e2e_room_keys_versions"),
    *("roomkeys_counts", "roomkeys_numbers"),
    *("roomkeys_changes", "roomkeys_deleted", "roomkeys_replaced"),
)
#: The plugin's tables with all indexes, but partitioned.
PARTITIONED = """
    CREATE TABLE e2e_room_keys (
        user_id TEXT NOT NULL, room_id TEXT NOT NULL, session_id TEXT NOT NULL,
        version BIGINT NOT NULL, first_message_index INT, forwarded_count INT,
        is_verified BOOLEAN, session_data TEXT NOT NULL
    ) PARTITION BY HASH (user_id);
    CREATE UNIQUE INDEX e2e_room_keys_with_version_idx
        ON e2e_room_keys (user_id, version, room_id, session_id);
    CREATE TABLE e2e_room_keys_versions (
        user_id TEXT NOT NULL, version BIGINT NOT NULL, algorithm TEXT NOT NULL,
        auth_data TEXT NOT NULL, deleted SMALLINT DEFAULT 0 NOT NULL, etag BIGINT
    ) PARTITION BY HASH (user_id);
    CREATE UNIQUE INDEX e2e_room_keys_versions_idx
        ON e2e_room_keys_versions (user_id, version);
    CREATE TABLE roomkeys_counts (
        user_id TEXT NOT NULL, version BIGINT NOT NULL, etag BIGINT NOT NULL,
        key_count BIGINT NOT NULL, counted_ts BIGINT NOT NULL,
        PRIMARY KEY (user_id, version)
    ) PARTITION BY HASH (user_id);
    CREATE TABLE roomkeys_numbers (
        user_id TEXT PRIMARY KEY, last_version BIGINT NOT NULL
    ) PARTITION BY HASH (user_id);
    CREATE TABLE roomkeys_deleted (
        user_id TEXT NOT NULL, version BIGINT NOT NULL, deleted_ms BIGINT NOT NULL,
        auth_data TEXT NOT NULL, key_count BIGINT, is_started SMALLINT NOT NULL,
        PRIMARY KEY (user_id, version)
    ) PARTITION BY HASH (user_id);
    CREATE TABLE roomkeys_changes (
        user_id TEXT NOT NULL, version BIGINT NOT NULL, etag BIGINT NOT NULL,
        changed_ms BIGINT NOT NULL, act TEXT NOT NULL, device_id TEXT, operator TEXT,
        stored BIGINT NOT NULL, replaced BIGINT NOT NULL, unchanged BIGINT NOT NULL,
        deleted BIGINT, sessions TEXT
    ) PARTITION BY HASH (user_id);
    CREATE INDEX roomkeys_changes_idx ON roomkeys_changes (user_id, changed_ms);
    CREATE TABLE roomkeys_replaced (
        user_id TEXT NOT NULL, version BIGINT NOT NULL, room_id TEXT NOT NULL,
        session_id TEXT NOT NULL, replaced_ms BIGINT NOT NULL, etag BIGINT NOT NULL,
        first_message_index INT, forwarded_count INT, is_verified BOOLEAN,
        session_data TEXT NOT NULL
    ) PARTITION BY HASH (user_id);
    CREATE INDEX roomkeys_replaced_idx
        ON roomkeys_replaced (user_id, version, room_id, session_id)"""
PARTITION = """
    CREATE TABLE {table}_{number} PARTITION OF {table}
        FOR VALUES WITH (MODULUS {partitions}, REMAINDER {number})"""

#: Returns the partitions locked by the transaction, which has read or written them.
LOCKED = """
    SELECT relation::regclass::text FROM pg_locks JOIN pg_inherits
    ON inhrelid = relation WHERE pid = pg_backend_pid()"""
RELATIONS = """
    SELECT relname, relkind FROM pg_class
    WHERE relnamespace = 'public'::regnamespace AND NOT relispartition"""

# The contract, on the backend below.
test_own_site = test_contract.test_own_site


@pytest.fixture(scope="module")
def backend(postgres: PostgresServer) -> Backend:
    """A new database with partitioned tables."""
    arguments = postgres.create_database()
    with closing(psycopg2.connect(**arguments)) as connection:
        with connection.cursor() as cursor:
            cursor.execute(PARTITIONED)
            for table in TABLES:
                for number in range(PARTITIONS):
                    cursor.execute(
                        PARTITION.format(
                            table=table, number=number, partitions=PARTITIONS
                        )
                    )
        connection.commit()
    return Backend("partitioned", arguments, Path())


@pytest.fixture
def database(backend: Backend) -> Iterator[PoolDatabase]:
    """Connections to the database."""
    database = backend.connect()
    yield database
    database.close()


@attrs.frozen
class Sent:
    """A statement and its partitions.

    Attributes:
        touched: the partitions read or written by the statement.
    """

    statement: str
    touched: frozenset[str]

    @property
    def numbers(self) -> dict[str, list[str]]:
        """The numbers of the partitions by table."""
        numbers: dict[str, list[str]] = {}
        for partition in self.touched:
            table, _, number = partition.rpartition("_")
            numbers.setdefault(table, []).append(number)
        return numbers


class Explained:
    """A transaction that explains each statement before running the statement."""

    def __init__(self, txn: Transaction, sent: list[Sent]) -> None:
        self._txn = txn
        self._sent = sent

    @property
    def rowcount(self) -> int:
        """As `Transaction.rowcount`."""
        return self._txn.rowcount

    @property
    def description(self) -> Any:
        """As `Transaction.description`."""
        return self._txn.description

    def execute(self, statement: str, parameters: Any = ()) -> Any:
        """As `Transaction.execute`; each statement of the message is explained first,
        with ANALYZE, and rolled back."""
        sent: list[Sent] = []
        self._txn.execute("SAVEPOINT explained")
        for part in statement.split(";"):
            if part.split()[0] == "SET":
                self._txn.execute(part)
            elif part.split()[0] != "FETCH":
                touched = self._explain(to_pyformat(part), parameters)
                sent.append(Sent(part.strip(), frozenset(touched)))
        self._txn.execute("ROLLBACK TO SAVEPOINT explained")
        self._sent += sent
        return self._txn.execute(to_pyformat(statement), parameters)

    def fetchone(self) -> Any:
        """As `Transaction.fetchone`."""
        return self._txn.fetchone()

    def fetchall(self) -> list[tuple[Any, ...]]:
        """As `Transaction.fetchall`."""
        return self._txn.fetchall()

    def _explain(self, query: str, parameters: Any) -> set[str]:
        """Return the partitions of a statement: from the plan, and from the locks,
        because the plan of an INSERT doesn't name the rows' partitions."""
        self._txn.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {query}", parameters)
        planned = set(relations_of(self._txn.fetchone()[0]))
        self._txn.execute(LOCKED)
        locked = {row[0] for row in self._txn.fetchall()}
        return {name for name in planned | locked if is_partition(name)}


@attrs.frozen
class ExplainedDatabase(TriesOnce):
    """A database that collects the sent statements."""

    database: PoolDatabase
    sent: list[Sent] = attrs.field(factory=list)
    transaction: type[Explained] = Explained

    def run(
        self, desc: str, function: Callable[..., T], *args: Any, **kwargs: Any
    ) -> Deferred[T]:
        """As `Database.run`."""

        def explained(txn: Transaction) -> T:
            return function(self.transaction(txn, self.sent), *args, **kwargs)

        return self.database.run(desc, explained)


def relations_of(plan: Any) -> Iterator[str]:
    """Yield the relations of a plan."""
    if isinstance(plan, list):
        for part in plan:
            yield from relations_of(part)
    elif isinstance(plan, dict):
        if "Relation Name" in plan:
            yield plan["Relation Name"]
        yield from relations_of(list(plan.values()))


def is_partition(relation: str) -> bool:
    """Whether a relation is a partition of a table, not of an index."""
    table, _, number = relation.rpartition("_")
    return table in TABLES and number.isdecimal()


def named(statement: str) -> set[str]:
    """Return the tables in a statement."""
    return {table for table in TABLES if re.search(rf"\b{table}\b", statement)}


def all_statements() -> set[str]:
    """Return each statement of the plugin for users, without settings."""
    found: set[str] = set()
    for module in (statements, postgres_statements, sweeps):
        for name, value in vars(module).items():
            if name.isupper() and not name.startswith("_"):
                if isinstance(value, str):
                    found.add(value)
                elif isinstance(value, DownloadStatements):
                    found |= set(attrs.astuple(value))
    # Statements without a user: of no user's rows, or of the rows of all users.
    apart = {
        statements.COLUMNS,
        postgres_statements.FETCH_PAGE,
        postgres_statements.SEPARATOR,
        *(sweeps.LAST_EXPIRY, sweeps.SAVE_EXPIRY),
        *(sweeps.LIST_DELETED, sweeps.MEASURE_QUEUE, sweeps.LIST_USERS),
    }
    parts = (part for text in found - apart for part in text.split(";"))
    ignored = ("SET", "FETCH")
    return {part.strip() for part in parts if part.split()[0] not in ignored}


def keys(index: int, count: int, room_id: str = "!room") -> list[RoomKey]:
    """Return keys of a room, with the same sessions in each call."""
    metadata = KeyMetadata(index, 0, False)
    return [RoomKey(room_id, f"{i}", metadata, '"secret"') for i in range(count)]


@inlineCallbacks
def upload_and_download(store: EndToEndRoomKeyStore, user: str, version: int) -> Steps:
    """Upload new keys, better keys and equal keys, and download in each way."""
    for index, room_id in ((5, "!room"), (5, "!other"), (4, "!room"), (4, "!room")):
        yield store.upload_keys(user, version, keys(index, 600, room_id), ACTOR)
    for of_room in (None, "!room"):
        pages: list[KeyPage] = []

        def take_two(page: KeyPage, pages: list[KeyPage] = pages) -> bool:
            pages.append(page)
            return len(pages) == 1

        yield store.get_pages(user, version, of_room, None, take_two)
        assert pages[1].rows
        yield store.get_pages(user, version, of_room, pages[0].last, take_two)
        assert pages[2] == pages[1]
    key: RoomKey = yield store.get_key(user, version, "!room", "7")
    assert key == keys(4, 8)[7]


@inlineCallbacks
def meet_broken_rows(store: EndToEndRoomKeyStore, user: str, version: int) -> Steps:
    """Download keys whose data aren't JSON in each way, and replace the keys."""
    broken = [broken_key(key) for key in keys(5, 600, "!broken")]
    yield store.upload_keys(user, version, broken, ACTOR)
    for of_room in (None, "!broken"):
        pages: list[KeyPage] = []

        def take_one(page: KeyPage, pages: list[KeyPage] = pages) -> bool:
            pages.append(page)
            return False

        yield store.get_pages(user, version, of_room, None, take_one)
        yield store.get_pages(user, version, of_room, pages[0].last, take_one)
        assert all(page.rows for page in pages)
        assert {row[2] for page in pages for row in page.rows} == {"not json"}
    result = yield store.upload_keys(user, version, keys(9, 600, "!broken"), ACTOR)
    assert len(result.replaced) == 600


def broken_key(key: RoomKey) -> RoomKey:
    """Return the key with data other than JSON."""
    return RoomKey(key.room_id, key.session_id, key.metadata, "not json")


@inlineCallbacks
def do_everything(store: EndToEndRoomKeyStore, sweeper: Sweeps, user: str) -> Steps:
    """Call each operation, in each state with different statements."""
    version: int = yield store.create_version(user, "algorithm", "{}", ACTOR)
    yield meet_broken_rows(store, user, version)
    yield store.delete_keys(user, version, None, None, ACTOR)
    yield upload_and_download(store, user, version)
    # Without a cached count, the next request counts the keys.
    yield store.forget_user(user)
    yield store.get_info(user, version)
    yield store.update_version(user, version, "algorithm", '{"a": 1}', ACTOR)
    yield store.forget_user(user)
    for room_id, session_id in (("!room", "7"), ("!room", None), (None, None)):
        done = yield store.delete_keys(user, version, room_id, session_id, ACTOR)
        assert done.deleted
    newer: int = yield store.create_version(user, "algorithm", "{}", ACTOR)
    assert newer > version
    yield store.get_info(user, None)
    yield restore_keys(store, user, newer)
    for _ in range(2):
        assert (yield store.delete_version(user, newer, ACTOR))
        yield store.restore_version(user, newer, ACTOR)
    assert (yield store.delete_version(user, newer, ACTOR))
    with mock.patch.object(versions, "DELETED_VERSIONS", 0):
        yield store.create_version(user, "algorithm", "{}", ACTOR)
    yield store.get_user_record(user, 0)
    yield store.get_newest_record(user, 0, 0, 10)
    yield store.get_version_record(user, newer)
    yield sweep(sweeper, user)
    yield store.forget_user(user)


@inlineCallbacks
def restore_keys(store: EndToEndRoomKeyStore, user: str, version: int) -> Steps:
    """Replace keys by verified keys that decrypt less, and give the old keys back."""
    yield store.upload_keys(user, version, keys(5, 600), ACTOR)
    verified = KeyMetadata(9, 0, True)
    worse = [RoomKey("!room", f"{i}", verified, '"new"') for i in range(3)]
    result = yield store.upload_keys(user, version, worse, ACTOR)
    assert len(result.replaced) == 3
    restore = Restore("!room", None, since_ms=0, is_forced=True)
    assert (yield store.restore_keys(user, version, restore, ACTOR)) == 3


@inlineCallbacks
def sweep(sweeper: Sweeps, user: str) -> Steps:
    """Delete the keys of the user's deleted versions, and old records."""
    with mock.patch.object(PostgresEngine, "swept_at_once", 2):
        place: Place | None = Place()
        while place is not None:
            place = yield sweeper.expire(user, place)
    with mock.patch.object(PostgresEngine, "swept_at_once", 200):
        for backup in (yield sweeper.list_deleted(BackupId("", -1))):
            place = Place()
            while place is not None:
                place = yield sweeper.delete_batch(backup, place)


@inlineCallbacks
def test_partitioned_tables_are_taken_as_they_are(
    backend: Backend, database: PoolDatabase
) -> Steps:
    """The plugin uses partitioned tables, and adds only tables without users."""
    before = yield database.run("relations", relations)
    assert {name for name, kind in before if kind == "p"} == set(TABLES)
    yield database.run("upgrade", upgrade_tables, backend.engine, True)
    problem: str | None = yield database.run("check", check_tables, backend.engine)
    assert problem is None
    after = yield database.run("relations", relations)
    apart = ("schema", "leases", "tasks")
    own = {(f"roomkeys_{name}", "r") for name in apart}
    own |= {(f"roomkeys_{name}_pkey", "i") for name in apart}
    assert after == before | own


@inlineCallbacks
def test_each_statement_touches_one_partition(
    backend: Backend, database: PoolDatabase
) -> Steps:
    """Every statement of the plugin reads and writes one partition of each named table,
    the same for all rows of a user."""
    explained = ExplainedDatabase(database)
    distributed = PostgresEngine()
    distributed.is_distributed = True
    stores = [
        EndToEndRoomKeyStore(explained, engine, time.time, limits, Retention())
        for engine in (backend.engine, distributed)
        for limits in (Limits(), Limits(max_user_bytes=10**9))
    ]
    sweeper = Sweeps(explained, backend.engine, time.time, Retention())
    homes: set[str] = set()
    touched: dict[str, set[str]] = {}
    for i in range(8):
        first = len(explained.sent)
        yield do_everything(stores[i % 4], sweeper, f"@user{i}:test.example")
        sent = [s for s in explained.sent[first:] if s.statement in all_statements()]
        (home,) = {check(one) for one in sent}
        homes.add(home)
        for one in sent:
            touched.setdefault(one.statement, set()).update(one.numbers)
    assert len(homes) > 1
    assert touched.keys() == all_statements()
    # An INSERT without a row locks no partition of its table; other calls wrote rows.
    for statement, tables in touched.items():
        assert named(statement) <= tables, statement


def check(sent: Sent) -> str:
    """Return the number of a statement's partitions: one partition of each table, with
    the same number."""
    assert named(sent.statement), sent.statement
    (home,) = {tuple(numbers) for numbers in sent.numbers.values()}
    assert len(home) == 1, sent
    return home[0]


def relations(txn: Transaction) -> set[tuple[Any, ...]]:
    """Return the tables and indexes without partitions, with their kinds."""
    txn.execute(RELATIONS)
    return set(txn.fetchall())

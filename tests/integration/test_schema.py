"""The tables on both engines: made, brought up to date, and left alone."""

from __future__ import annotations

import multiprocessing
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from importlib import resources
from itertools import count
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from synapse_roomkeys.storage import SchemaError, check_tables, upgrade_tables
from synapse_roomkeys.version import __version__

from ..sites import Backend

SCHEMA = resources.files("synapse_roomkeys.storage") / "schema"
NEWEST = max(int(file.name[:3]) for file in SCHEMA.iterdir())
COUNT = "INSERT INTO roomkeys_counts VALUES ('@user:test.example', 1, 2, 3, 4)"
#: Seconds that processes may take to start, and to be done.
DEADLINE = 60.0
OWN_TABLES = {
    "roomkeys_changes",
    "roomkeys_counts",
    "roomkeys_deleted",
    "roomkeys_leases",
    "roomkeys_numbers",
    "roomkeys_replaced",
    "roomkeys_schema",
    "roomkeys_tasks",
}
#: Columns that PostgreSQL stores without trying to compress them.
UNCOMPRESSED = """SELECT attname FROM pg_attribute WHERE attstorage = 'e'
    AND attrelid = 'roomkeys_changes'::regclass"""
HOMESERVERS_TABLES = {"e2e_room_keys", "e2e_room_keys_versions"}
#: Every column that there is, and every index, with the table it belongs to.
SHAPE = {
    "sqlite": """
        SELECT m.name, c.name FROM sqlite_master AS m, pragma_table_info(m.name) AS c
        WHERE m.type = 'table'
        UNION SELECT tbl_name, name FROM sqlite_master WHERE type = 'index'""",
    "postgres": """
        SELECT table_name, column_name FROM information_schema.columns
        WHERE table_schema = 'public'
        UNION SELECT tablename, indexname FROM pg_indexes
        WHERE schemaname = 'public'""",
}


class Died(Exception):
    """Stands for the end of the process."""


class Counting:
    """A transaction that counts its statements and can break off after some."""

    def __init__(self, cursor: Any, last: int | None = None) -> None:
        self._cursor = cursor
        self._last = last
        self.statements: list[str] = []

    def execute(self, statement: str, parameters: Any = ()) -> Any:
        if len(self.statements) == self._last:
            raise Died
        self.statements.append(statement)
        return self._cursor.execute(statement, parameters)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cursor, name)


@pytest.fixture
def new_backend(
    engine: str, database: Callable[[], Mapping[str, Any] | None], tmp_path: Path
) -> Callable[[], Backend]:
    """Makes new databases without a table."""
    numbers = count()
    return lambda: Backend(engine, database(), tmp_path / f"{next(numbers)}.db")


@pytest.fixture
def fresh(new_backend: Callable[[], Backend]) -> Backend:
    """A new database without a table."""
    return new_backend()


def connect(backend: Backend) -> Any:
    """A connection as a homeserver has it: repeatable reads on PostgreSQL."""
    if backend.arguments is None:
        return sqlite3.connect(backend.path, timeout=30)
    connection = psycopg2.connect(**backend.arguments)
    connection.set_session(isolation_level="REPEATABLE READ")
    return connection


@contextmanager
def transaction(backend: Backend, last: int | None = None) -> Iterator[Counting]:
    """A transaction that is rolled back when it fails."""
    with closing(connect(backend)) as connection:
        yield Counting(connection.cursor(), last)
        connection.commit()


def upgrade(backend: Backend, homeserver_tables: bool = True) -> list[str]:
    """Upgrade the tables; the statements that it took."""
    with transaction(backend) as txn:
        upgrade_tables(txn, backend.engine, homeserver_tables)
        return txn.statements


def run(backend: Backend, statement: str) -> list[tuple[Any, ...]]:
    """Run a statement, or in a new database several; the rows it has."""
    with transaction(backend) as txn:
        for part in statement.split(";"):
            txn.execute(part)
        return list(txn.fetchall()) if txn.description else []


def shape(backend: Backend) -> set[tuple[Any, ...]]:
    return set(run(backend, SHAPE[backend.name]))


def tables(backend: Backend) -> set[str]:
    return {table for table, _ in shape(backend)}


def apply(backend: Backend, *names: str) -> None:
    """Run some of the plugin's files."""
    for name in names:
        lines = (SCHEMA / name).read_text().splitlines()
        code = "\n".join(line for line in lines if not line.startswith("--"))
        run(backend, code.strip().rstrip(";"))


def make_old(backend: Backend) -> None:
    """Make the tables as the version before the numbers did."""
    apply(backend, "001_backups.sql", "002_counts.sql")


def start_together(backends: list[Backend], barrier: Barrier) -> None:
    """What each of several processes does."""
    for backend in backends:
        barrier.wait(DEADLINE)
        upgrade(backend)


def test_new_tables(fresh: Backend) -> None:
    """A new database gets all tables, which are then in order, and the number."""
    upgrade(fresh)
    assert tables(fresh) == OWN_TABLES | HOMESERVERS_TABLES
    assert run(fresh, "SELECT number FROM roomkeys_schema") == [(NEWEST,)]
    with transaction(fresh) as txn:
        assert check_tables(txn, fresh.engine) is None
    if fresh.name == "postgres":
        assert run(fresh, UNCOMPRESSED) == [("sessions",)]


def test_beside_a_homeserver(fresh: Backend) -> None:
    """Where a homeserver makes its own tables, only the plugin's are made."""
    homeservers = "CREATE TABLE e2e_room_keys_versions (user_id TEXT, version BIGINT)"
    run(fresh, homeservers)
    upgrade(fresh, homeserver_tables=False)
    assert tables(fresh) == OWN_TABLES | {"e2e_room_keys_versions"}


def test_numbers_of_before_their_table(fresh: Backend) -> None:
    """A start on the tables of the version before writes down each user's last number,
    once; the numbers stand when the versions are gone."""
    apply(fresh, "001_backups.sql", "002_counts.sql", "003_sizes.sql")
    run(fresh, "CREATE TABLE roomkeys_schema (number BIGINT PRIMARY KEY)")
    run(fresh, "INSERT INTO roomkeys_schema VALUES (3)")
    for user, version in (("a", 7), ("a", 9), ("b", 1)):
        run(
            fresh,
            "INSERT INTO e2e_room_keys_versions (user_id, version, algorithm,"
            f" auth_data, deleted) VALUES ('{user}', {version}, 'm', '{{}}', 1)",
        )
    statements = upgrade(fresh)
    assert not any("ALTER TABLE roomkeys_counts" in text for text in statements)
    run(fresh, "DELETE FROM e2e_room_keys_versions")
    upgrade(fresh)
    numbers = "SELECT user_id, last_version FROM roomkeys_numbers ORDER BY user_id"
    assert run(fresh, numbers) == [("a", 9), ("b", 1)]


@pytest.mark.parametrize("homeserver_tables", [True, False])
def test_tables_of_before_the_numbers(
    new_backend: Callable[[], Backend], homeserver_tables: bool
) -> None:
    """They end up like new ones, with all their rows."""
    new, old = new_backend(), new_backend()
    upgrade(new)
    make_old(old)
    run(old, COUNT)
    upgrade(old, homeserver_tables)
    assert shape(old) == shape(new)
    assert run(old, "SELECT * FROM roomkeys_counts") == [
        ("@user:test.example", 1, 2, 3, 4, None)
    ]


def test_a_dropped_cache_is_made_again(fresh: Backend) -> None:
    """The plugin's tables may be dropped, the cache alone too."""
    upgrade(fresh)
    before = shape(fresh)
    for dropped in (["roomkeys_counts"], ["roomkeys_numbers"], sorted(OWN_TABLES)):
        run(fresh, ";".join(f"DROP TABLE {table}" for table in dropped))
        upgrade(fresh)
        assert shape(fresh) == before


def test_newer_tables_are_refused(fresh: Backend) -> None:
    """An older version of the plugin says which is which, and changes nothing."""
    upgrade(fresh)
    run(fresh, f"UPDATE roomkeys_schema SET number = {NEWEST + 1}")
    with pytest.raises(SchemaError) as refused:
        upgrade(fresh)
    for word in (f" {NEWEST},", f" {NEWEST + 1},", __version__, "install"):
        assert word in f"{refused.value},".replace(":", ",")
    assert run(fresh, "SELECT number FROM roomkeys_schema") == [(NEWEST + 1,)]


def test_nothing_is_missing(fresh: Backend) -> None:
    """A second start reads and locks nothing, not even while another one writes."""
    upgrade(fresh)
    run(fresh, COUNT.replace("4)", "4, 5)"))
    with closing(connect(fresh)) as other:
        cursor = other.cursor()
        cursor.execute(fresh.engine.tables.lock)
        cursor.execute("UPDATE roomkeys_counts SET key_count = 0")
        statements = upgrade(fresh)
    assert fresh.engine.tables.lock not in statements
    assert run(fresh, "SELECT key_count, key_bytes FROM roomkeys_counts") == [(3, 5)]


def test_eight_processes_at_once(new_backend: Callable[[], Backend]) -> None:
    """Each finds the tables made, by one of them; none fails."""
    backends = [new_backend() for _ in range(3)]
    make_old(backends[-1])
    for backend in backends:
        if backend.arguments is None:
            run(backend, "PRAGMA journal_mode = WAL")
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(8)
    processes = [
        context.Process(target=start_together, args=(backends, barrier), daemon=True)
        for _ in range(8)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(DEADLINE)
    assert [process.exitcode for process in processes] == [0] * 8
    for backend in backends:
        assert run(backend, "SELECT number FROM roomkeys_schema") == [(NEWEST,)]
        assert tables(backend) == OWN_TABLES | HOMESERVERS_TABLES


def test_those_who_waited_find_it_done(fresh: Backend) -> None:
    """A process that looked before another was done doesn't do it again."""
    with closing(connect(fresh)) as waiting, closing(connect(fresh)) as first:
        upgraded = False

        class Late(Counting):
            """A process that another one overtakes between the check and the lock."""

            def execute(self, statement: str, parameters: Any = ()) -> Any:
                nonlocal upgraded
                if statement == fresh.engine.tables.lock and not upgraded:
                    upgraded = True
                    upgrade_tables(first.cursor(), fresh.engine, True)
                    first.commit()
                return super().execute(statement, parameters)

        txn = Late(waiting.cursor())
        upgrade_tables(txn, fresh.engine, True)
        waiting.commit()
    assert upgraded
    assert not any("ALTER" in statement for statement in txn.statements)
    assert run(fresh, "SELECT number FROM roomkeys_schema") == [(NEWEST,)]


def test_a_process_that_dies_leaves_nothing(fresh: Backend) -> None:
    """An upgrade that ends after any statement leaves no change. The next upgrade is
    complete."""
    make_old(fresh)
    before = shape(fresh)
    whole = 0
    while True:
        try:
            with transaction(fresh, whole) as txn:
                upgrade_tables(txn, fresh.engine, True)
            break
        except Died:
            assert shape(fresh) == before, whole
        whole += 1
    assert len(txn.statements) == whole > 6
    assert ("roomkeys_counts", "key_bytes") in shape(fresh)

"""Processes killed at any moment: what was acknowledged is there when they are back."""

from __future__ import annotations

import signal
import sqlite3
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import psycopg2
import pytest
from twisted.internet.defer import Deferred, inlineCallbacks

from synapse_roomkeys.service.config import DatabaseConfig

from ..backup_client import Api
from ..contract import User
from ..contract.base import key
from ..integration.test_migrate import (
    ADD_KEY,
    ADD_VERSION,
    KEYS,
    VERSIONS,
    Place,
    keys_of,
    make_synapses_tables,
    same,
)
from ..servers import PostgresServer, Synapse
from ..servers.fake_homeserver import Homeserver
from ..servers.service import Service
from . import SOAK
from .clients import Connection
from .linearizability import NotLinearizable
from .load import Load, new_load, summary

Steps = Generator[Deferred[Any], Any, None]

SERVICE_KILLS = 100 if SOAK else 5
SYNAPSE_KILLS = 100 if SOAK else 5
POSTGRES_KILLS = 20 if SOAK else 2
SCHEMA_KILLS = 20 if SOAK else 8
MIGRATION_KILLS = 20 if SOAK else 3
#: How many kills there may be until a loss is found.
MAX_KILLS = 10
#: How long after it has begun to make the tables, or was held up at it, a process is
#: killed, in seconds at most.
MAX_KILL_DELAY = 0.001
#: How long that sign, or the end of a migration, may take, in seconds.
DEADLINE = 30.0
#: The part of the kills that must have met what they are meant for.
MIN_FRACTION = 0.25
#: Those that the service makes.
TABLES = (
    "e2e_room_keys",
    "e2e_room_keys_versions",
    "roomkeys_counts",
    "roomkeys_numbers",
    "roomkeys_schema",
)
#: The service without the setting by which its commits wait for the disk.
WITHOUT_SYNCHRONOUS_COMMIT = """
import attrs
from synapse_roomkeys.service.cli import main
from synapse_roomkeys.storage import sql

def without_setting(statement):
    setting = "SET LOCAL synchronous_commit TO ON;"
    assert statement.count(setting) == 1
    return statement.replace(setting, "")

own = sql.POSTGRES
(step,) = own.write_keys
sql.POSTGRES = attrs.evolve(
    own,
    lock_version=without_setting(own.lock_version),
    insert_version=without_setting(own.insert_version),
    add_keys=without_setting(own.add_keys),
    write_keys=(attrs.evolve(step, statement=without_setting(step.statement)),),
)
main()
"""
NewDatabase = Callable[[], Mapping[str, Any] | None]


@pytest.fixture(scope="module")
def async_postgres(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[PostgresServer]:
    """A PostgreSQL whose transactions don't wait for the disk unless told to."""
    settings = {"synchronous_commit": "off", "wal_writer_delay": "10s"}
    directory = tmp_path_factory.mktemp("async_postgres")
    with PostgresServer(directory, durable=True, settings=settings) as server:
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
def new_database(request: pytest.FixtureRequest) -> NewDatabase:
    """Makes databases of each engine: psycopg2's arguments, or None for SQLite."""
    if request.param == "sqlite":
        return lambda: None
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.create_database


@inlineCallbacks
def kill_repeatedly(
    url: str,
    new_user: Callable[[int], User],
    kill: Callable[[], None],
    kills: int,
    may_repeat: bool = False,
) -> Steps:
    """Kill something under the load of a new backup's clients, and check all backups.

    Args:
        kill: ends it and starts it again.
        may_repeat: as for `Load.check`.
    """
    loads: list[tuple[Load, list[Any]]] = []
    for number in range(kills):
        connection = Connection(url, new_user(number))
        load: Load = yield new_load(connection, number)
        yield load.run(kill)
        seen: list[Any] = yield load.read_back()
        load.check(may_repeat)
        loads.append((load, seen))
    for load, seen in loads:
        again: list[Any] = yield load.read_back()
        assert again == seen, "changed by the kills after its own"
    print(summary([load for load, _ in loads]))


@inlineCallbacks
def test_killed_service(
    homeserver: Homeserver, new_database: NewDatabase, tmp_path: Path
) -> Steps:
    """Whatever it was doing: uploads without an answer are there as a whole or not at
    all, those with one are, and etag and count are exact."""
    with Service(tmp_path, homeserver.url, database=new_database()) as service:

        def kill() -> None:
            service.kill()
            service.start()

        yield kill_repeatedly(
            service.url, lambda _: homeserver.new_user(), kill, SERVICE_KILLS
        )
        assert "Traceback" not in service.log()


@inlineCallbacks
def test_killed_synapse(postgres: PostgresServer, tmp_path: Path) -> Steps:
    """The same with the plugin in a Synapse."""
    with Synapse(tmp_path, database=postgres.create_database()) as synapse:

        def new_user(number: int) -> User:
            user = synapse.register(f"user{number}")
            return User(user.user_id, user.access_token)

        def kill() -> None:
            synapse.kill()
            synapse.start()

        yield kill_repeatedly(synapse.url, new_user, kill, SYNAPSE_KILLS)


def kill_postgres(server: PostgresServer) -> None:
    """Kill it with all its processes, and start it again."""
    server.kill()
    server.start()


@inlineCallbacks
def test_killed_postgres(
    homeserver: Homeserver, async_postgres: PostgresServer, tmp_path: Path
) -> Steps:
    """A database is killed, and not the service, which tries again. It would not wait
    for its disk, but for us it does."""
    database = async_postgres.create_database()
    with Service(tmp_path, homeserver.url, database=database) as service:
        yield kill_repeatedly(
            service.url,
            lambda _: homeserver.new_user(),
            partial(kill_postgres, async_postgres),
            POSTGRES_KILLS,
            may_repeat=True,
        )
        assert "Traceback" not in service.log()


@inlineCallbacks
def test_a_lost_commit_is_detected(
    homeserver: Homeserver, async_postgres: PostgresServer, tmp_path: Path
) -> Steps:
    """A service that lets the database acknowledge what isn't on its disk yet loses
    some of it, and the check tells."""
    database = async_postgres.create_database()
    service = Service(tmp_path, homeserver.url, database=database)
    service.program = ("-c", WITHOUT_SYNCHRONOUS_COMMIT)
    with service:
        tries: int = yield kills_until_detected(
            service.url, homeserver, async_postgres, database
        )
    print(f"found at kill {tries}")


@inlineCallbacks
def kills_until_detected(
    url: str,
    homeserver: Homeserver,
    server: PostgresServer,
    database: Mapping[str, Any],
) -> Generator[Deferred[Any], Any, int]:
    """How many kills it takes until what was seen has no order.

    Raises:
        AssertionError: after as many as there may be, it has.
    """
    for number in range(MAX_KILLS):
        load: Load = yield new_load(Connection(url, homeserver.new_user()), number)
        # The tables and the version stay, whatever is lost.
        with closing(psycopg2.connect(**database)) as connection:
            connection.autocommit = True
            connection.cursor().execute("CHECKPOINT")
        yield load.run(partial(kill_postgres, server))
        yield load.read_back()
        try:
            load.check(may_repeat=True)
        except NotLinearizable:
            return number + 1
    raise AssertionError(f"{MAX_KILLS} kills have lost nothing")


def place_of(database: Mapping[str, Any] | None, directory: Path) -> Place:
    """The database that a service in a directory uses."""
    if database is None:
        path = str(directory / "roomkeys.db")
        return Place(DatabaseConfig("sqlite3", {"database": path}))
    return Place(DatabaseConfig("psycopg2", dict(database)))


def until(condition: Callable[[], object]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.0005)


@contextmanager
def during_table_creation(place: Place, random: Random) -> Iterator[Callable[[], None]]:
    """Let a process make tables, and hold it up while it is at it where that can be;
    gives what waits until it is."""
    if place.config.name == "sqlite3":
        path = Path(place.config.args["database"])
        path.parent.mkdir()
        with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as other:
            other.execute("PRAGMA journal_mode = WAL")
            yield lambda: until(lambda: is_locked(other))
        return
    with closing(psycopg2.connect(**place.config.args)) as other:
        cursor = other.cursor()
        # It waits to see whether there is such a table already.
        cursor.execute(f"CREATE TABLE {random.choice(TABLES)} (a INT)")
        with closing(psycopg2.connect(**place.config.args)) as watcher:
            watcher.autocommit = True
            yield lambda: until(lambda: has_lock_wait(watcher.cursor()))


def is_locked(connection: sqlite3.Connection) -> bool:
    """Whether another process is writing to an SQLite file."""
    try:
        connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        return True
    connection.execute("ROLLBACK")
    return False


def has_lock_wait(cursor: Any) -> bool:
    """Whether one transaction waits for another."""
    cursor.execute("SELECT 1 FROM pg_locks WHERE NOT granted")
    return cursor.fetchone() is not None


def test_kill_during_table_creation(
    homeserver: Homeserver, new_database: NewDatabase, tmp_path: Path
) -> None:
    """The tables are there all together or not at all, and the next start makes them
    all. Each kill comes while the process is making them, or has just done so."""
    random = Random(0)
    interrupted = 0
    for number in range(SCHEMA_KILLS):
        database = new_database()
        directory = tmp_path / f"{number}"
        place = place_of(database, directory)
        service = Service(directory, homeserver.url, database=database)
        with during_table_creation(place, random) as wait:
            service.start_without_waiting()
            wait()
            time.sleep(random.random() * MAX_KILL_DELAY)
            service.kill()
        tables = place.tables
        interrupted += not tables
        assert len(tables) in (0, len(TABLES)), tables
        with service:
            api = Api(service.url, homeserver.new_user().access_token)
            version = api.create_version()
            assert api.upload(version, {"!a": {"s": key()}}) == (1, 1)
        assert len(place.tables) == len(TABLES)
    print(f"{SCHEMA_KILLS} kills, {interrupted} while the tables were made")
    assert interrupted >= SCHEMA_KILLS * MIN_FRACTION


#: Whose backups are migrated, and how many keys each has.
USERS = 40
KEYS_OF_ONE = 700
#: After how many of them a kill comes at the latest.
LATEST_KILL = 32
#: How long a backup takes to be copied, in seconds at most.
MAX_COPY_SECONDS = 0.02


def source_in(directory: Path) -> Place:
    """The database of a Synapse with some backups."""
    path = str(directory / "homeserver.db")
    source = make_synapses_tables(Place(DatabaseConfig("sqlite3", {"database": path})))
    for number in range(USERS):
        user = f"@user{number:03}:test.example"
        source.run(ADD_VERSION, (user, 1, "a", "{}", 0, number))
        source.run(ADD_KEY, *keys_of(user, 1, KEYS_OF_ONE))
    return source


def new_migration(
    directory: Path, source: Place, database: Mapping[str, Any] | None
) -> Service:
    """A process that migrates, when it is started."""
    directory.mkdir()
    homeserver = directory / "homeserver.yaml"
    path = source.config.args["database"]
    homeserver.write_text(f"database: {{name: sqlite3, args: {{database: '{path}'}}}}")
    arguments = ("migrate", "--config", "roomkeys.yaml", "--from", str(homeserver))
    return Service(
        directory, "http://127.0.0.1:1", database=database, arguments=arguments
    )


def is_in_whole_backups(source: Place, target: Place) -> bool:
    """Whether each version at the target is the same as at the source."""
    if not target.tables:
        return True
    versions = target.run(VERSIONS)
    ids = {version[:2] for version in versions}
    keys = [row for row in source.run(KEYS) if row[:2] in ids]
    return set(versions) <= set(source.run(VERSIONS)) and target.run(KEYS) == keys


def copied(target: Place) -> int:
    """How many backups are at the target."""
    try:
        ((number,),) = target.run("SELECT COUNT(*) FROM e2e_room_keys_versions")
    except (sqlite3.OperationalError, psycopg2.errors.UndefinedTable):
        return 0
    found: int = number
    return found


def wait_until_copied(target: Place, number: int) -> None:
    """Wait until as many backups are at the target."""
    until(lambda: copied(target) >= number)


def test_kill_during_migration(new_database: NewDatabase, tmp_path: Path) -> None:
    """Each backup is at the target as a whole or not at all; another run goes on from
    there and ends with both sides equal."""
    source = source_in(tmp_path)
    random = Random(0)
    interrupted = 0
    for number in range(MIGRATION_KILLS):
        database = new_database()
        directory = tmp_path / f"{number}"
        target = place_of(database, directory)
        migration = new_migration(directory, source, database)
        process = migration.spawn()
        wait_until_copied(target, random.randint(1, LATEST_KILL))
        time.sleep(random.random() * MAX_COPY_SECONDS)
        process.kill()
        interrupted += copied(target) < USERS
        assert is_in_whole_backups(source, target)
        code, output = migration.run_to_end(DEADLINE)
        assert code == 0, output
        assert same(source, target)
    print(f"{MIGRATION_KILLS} kills, {interrupted} with a part copied")
    assert interrupted >= MIGRATION_KILLS * MIN_FRACTION


def test_an_interrupted_migration(new_database: NewDatabase, tmp_path: Path) -> None:
    """Ctrl-C ends it with one line and an exit code of its own; no backup is there in
    part, and the next run ends the work."""
    source = source_in(tmp_path)
    database = new_database()
    directory = tmp_path / "target"
    target = place_of(database, directory)
    migration = new_migration(directory, source, database)
    process = migration.spawn()
    wait_until_copied(target, 1)
    process.send(signal.SIGINT)
    assert process.wait(DEADLINE) == 130, process.output()
    assert process.output().splitlines()[2:] == [
        "synapse-roomkeys: interrupted: the backups committed so far stay; run the same"
        " command again to go on"
    ]
    assert 0 < copied(target) < USERS
    assert is_in_whole_backups(source, target)
    code, output = migration.run_to_end(DEADLINE)
    assert code == 0, output
    assert same(source, target)

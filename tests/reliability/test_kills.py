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
from .history import NoOrder
from .load import Load, new_load, shown

Steps = Generator[Deferred[Any], Any, None]

SERVICE_KILLS = 100 if SOAK else 5
SYNAPSE_KILLS = 100 if SOAK else 5
POSTGRES_KILLS = 20 if SOAK else 2
SCHEMA_KILLS = 20 if SOAK else 8
MIGRATION_KILLS = 20 if SOAK else 3
#: How many kills there may be until a loss is found.
TRIES = 10
#: How long after it has begun to make the tables, or was held up at it, a process is
#: killed, in seconds at most.
MOMENT = 0.001
#: How long that sign, or the end of a migration, may take, in seconds.
DEADLINE = 30.0
#: The part of the kills that must have met what they are meant for.
LEAST_PART = 0.25
#: Those that the service makes.
TABLES = (
    "e2e_room_keys",
    "e2e_room_keys_versions",
    "roomkeys_counts",
    "roomkeys_numbers",
    "roomkeys_schema",
)
#: The service without the setting by which its commits wait for the disk.
HASTY = """
import attrs
from synapse_roomkeys.service.cli import main
from synapse_roomkeys.storage import sql

def hasty(statement):
    setting = "SET LOCAL synchronous_commit TO ON;"
    assert statement.count(setting) == 1
    return statement.replace(setting, "")

own = sql.POSTGRES
(step,) = own.write_keys
sql.POSTGRES = attrs.evolve(
    own,
    lock_version=hasty(own.lock_version),
    insert_version=hasty(own.insert_version),
    add_keys=hasty(own.add_keys),
    write_keys=(attrs.evolve(step, statement=hasty(step.statement)),),
)
main()
"""
NewDatabase = Callable[[], Mapping[str, Any] | None]


@pytest.fixture(scope="module")
def careless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A PostgreSQL whose transactions don't wait for the disk unless told to."""
    settings = {"synchronous_commit": "off", "wal_writer_delay": "10s"}
    directory = tmp_path_factory.mktemp("careless")
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
def kill_again_and_again(
    url: str,
    new_user: Callable[[int], User],
    kill: Callable[[], None],
    kills: int,
    tries_again: bool = False,
) -> Steps:
    """Kill something under the load of a new backup's clients, and check all backups.

    Args:
        kill: ends it and starts it again.
        tries_again: as for `Load.check`.
    """
    loads: list[tuple[Load, list[Any]]] = []
    for number in range(kills):
        connection = Connection(url, new_user(number))
        load: Load = yield new_load(connection, number)
        yield load.run(kill)
        seen: list[Any] = yield load.look()
        load.check(tries_again)
        loads.append((load, seen))
    for load, seen in loads:
        again: list[Any] = yield load.look()
        assert again == seen, "changed by the kills after its own"
    print(shown([load for load, _ in loads]))


@inlineCallbacks
def test_the_service(
    homeserver: Homeserver, new_database: NewDatabase, tmp_path: Path
) -> Steps:
    """Whatever it was doing: uploads without an answer are there as a whole or not at
    all, those with one are, and etag and count are exact."""
    with Service(tmp_path, homeserver.url, database=new_database()) as service:

        def kill() -> None:
            service.kill()
            service.start()

        yield kill_again_and_again(
            service.url, lambda _: homeserver.new_user(), kill, SERVICE_KILLS
        )
        assert "Traceback" not in service.log()


@inlineCallbacks
def test_a_synapse(postgres: PostgresServer, tmp_path: Path) -> Steps:
    """The same with the plugin in a Synapse."""
    with Synapse(tmp_path, database=postgres.create_database()) as synapse:

        def new_user(number: int) -> User:
            user = synapse.register(f"user{number}")
            return User(user.user_id, user.access_token)

        def kill() -> None:
            synapse.kill()
            synapse.start()

        yield kill_again_and_again(synapse.url, new_user, kill, SYNAPSE_KILLS)


def kill_postgres(server: PostgresServer) -> None:
    """Kill it with all its processes, and start it again."""
    server.kill()
    server.start()


@inlineCallbacks
def test_a_postgres(
    homeserver: Homeserver, careless: PostgresServer, tmp_path: Path
) -> Steps:
    """A database is killed, and not the service, which tries again. It would not wait
    for its disk, but for us it does."""
    database = careless.create_database()
    with Service(tmp_path, homeserver.url, database=database) as service:
        yield kill_again_and_again(
            service.url,
            lambda _: homeserver.new_user(),
            partial(kill_postgres, careless),
            POSTGRES_KILLS,
            tries_again=True,
        )
        assert "Traceback" not in service.log()


@inlineCallbacks
def test_a_loss_is_found(
    homeserver: Homeserver, careless: PostgresServer, tmp_path: Path
) -> Steps:
    """A service that lets the database acknowledge what isn't on its disk yet loses
    some of it, and the check tells."""
    database = careless.create_database()
    service = Service(tmp_path, homeserver.url, database=database)
    service.program = ("-c", HASTY)
    with service:
        tries: int = yield tries_until_found(
            service.url, homeserver, careless, database
        )
    print(f"found at kill {tries}")


@inlineCallbacks
def tries_until_found(
    url: str,
    homeserver: Homeserver,
    server: PostgresServer,
    database: Mapping[str, Any],
) -> Generator[Deferred[Any], Any, int]:
    """How many kills it takes until what was seen has no order.

    Raises:
        AssertionError: after as many as there may be, it has.
    """
    for number in range(TRIES):
        load: Load = yield new_load(Connection(url, homeserver.new_user()), number)
        # The tables and the version stay, whatever is lost.
        with closing(psycopg2.connect(**database)) as connection:
            connection.autocommit = True
            connection.cursor().execute("CHECKPOINT")
        yield load.run(partial(kill_postgres, server))
        yield load.look()
        try:
            load.check(tries_again=True)
        except NoOrder:
            return number + 1
    raise AssertionError(f"{TRIES} kills have lost nothing")


def place_of(database: Mapping[str, Any] | None, directory: Path) -> Place:
    """The database that a service in a directory uses."""
    if database is None:
        path = str(directory / "roomkeys.db")
        return Place(DatabaseConfig("sqlite3", {"database": path}))
    return Place(DatabaseConfig("psycopg2", dict(database)))


def until(is_so: Callable[[], object]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + DEADLINE
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.0005)


@contextmanager
def held_up(place: Place, random: Random) -> Iterator[Callable[[], None]]:
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
            yield lambda: until(lambda: is_waited_for(watcher.cursor()))


def is_locked(connection: sqlite3.Connection) -> bool:
    """Whether another process is writing to an SQLite file."""
    try:
        connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        return True
    connection.execute("ROLLBACK")
    return False


def is_waited_for(cursor: Any) -> bool:
    """Whether one transaction waits for another."""
    cursor.execute("SELECT 1 FROM pg_locks WHERE NOT granted")
    return cursor.fetchone() is not None


def test_while_tables_are_made(
    homeserver: Homeserver, new_database: NewDatabase, tmp_path: Path
) -> None:
    """The tables are there all together or not at all, and the next start makes them
    all. Each kill comes while the process is making them, or has just done so."""
    random = Random(0)
    within = 0
    for number in range(SCHEMA_KILLS):
        database = new_database()
        directory = tmp_path / f"{number}"
        place = place_of(database, directory)
        service = Service(directory, homeserver.url, database=database)
        with held_up(place, random) as wait:
            service.start_without_waiting()
            wait()
            time.sleep(random.random() * MOMENT)
            service.kill()
        tables = place.tables
        within += not tables
        assert len(tables) in (0, len(TABLES)), tables
        with service:
            api = Api(service.url, homeserver.new_user().access_token)
            version = api.create_version()
            assert api.upload(version, {"!a": {"s": key()}}) == (1, 1)
        assert len(place.tables) == len(TABLES)
    print(f"{SCHEMA_KILLS} kills, {within} while the tables were made")
    assert within >= SCHEMA_KILLS * LEAST_PART


#: Whose backups are migrated, and how many keys each has.
USERS = 40
KEYS_OF_ONE = 700
#: After how many of them a kill comes at the latest.
LAST = 32
#: How long a backup takes to be copied, in seconds at most.
BETWEEN = 0.02


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


def test_a_migration(new_database: NewDatabase, tmp_path: Path) -> None:
    """Each backup is at the target as a whole or not at all; another run goes on from
    there and ends with both sides equal."""
    source = source_in(tmp_path)
    random = Random(0)
    within = 0
    for number in range(MIGRATION_KILLS):
        database = new_database()
        directory = tmp_path / f"{number}"
        target = place_of(database, directory)
        migration = new_migration(directory, source, database)
        process = migration.spawn()
        wait_until_copied(target, random.randint(1, LAST))
        time.sleep(random.random() * BETWEEN)
        process.kill()
        within += copied(target) < USERS
        assert is_in_whole_backups(source, target)
        code, told = migration.run_to_end(DEADLINE)
        assert code == 0, told
        assert same(source, target)
    print(f"{MIGRATION_KILLS} kills, {within} with a part copied")
    assert within >= MIGRATION_KILLS * LEAST_PART


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
    code, told = migration.run_to_end(DEADLINE)
    assert code == 0, told
    assert same(source, target)

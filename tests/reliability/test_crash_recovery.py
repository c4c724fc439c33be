"""Acknowledged writes survive a kill (SIGKILL) of any process at any moment."""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import attrs
import psycopg2
import pytest
from twisted.internet.defer import Deferred, inlineCallbacks

from synapse_roomkeys.service.config import DatabaseConfig
from synapse_roomkeys.storage import SQLITE
from synapse_roomkeys.storage.statements import ALL_TABLES

from ..backup_client import Api
from ..contract import User
from ..contract.base import accepted, key, version_path
from ..integration.places import Place
from ..integration.test_migrate import (
    ADD_KEY,
    ADD_VERSION,
    KEYS,
    VERSIONS,
    keys_of,
    make_synapses_tables,
    same,
)
from ..servers import PostgresServer, Synapse
from ..servers.fake_homeserver import Homeserver
from ..servers.processes import Process
from ..servers.service import Service
from ..tool import Tool
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
#: Largest number of kills until the check must detect a lost commit.
MAX_KILLS = 10
#: Longest delay of a kill after the first sign of table creation, in seconds.
MAX_KILL_DELAY = 0.001
#: Timeout for that sign and for the end of a migration, in seconds.
DEADLINE = 30.0
#: Least fraction of kills in the middle of the operation under test; with fewer, the
#: test would be meaningless.
MIN_FRACTION = 0.25
#: The tables created by the service.
TABLES = ALL_TABLES
#: Program: the service without ``SET LOCAL synchronous_commit TO ON``. With this
#: setting, a commit waits for the disk.
WITHOUT_SYNCHRONOUS_COMMIT = """
from synapse_roomkeys.service.cli import main
from synapse_roomkeys.storage import postgres_statements

for name in "LOCK_VERSION", "INSERT_VERSION":
    setting = "SET LOCAL synchronous_commit TO ON;"
    statement = getattr(postgres_statements, name)
    assert statement.count(setting) == 1
    setattr(postgres_statements, name, statement.replace(setting, ""))
main()
"""
NewDatabase = Callable[[], Mapping[str, Any] | None]


@pytest.fixture(scope="module")
def async_postgres(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[PostgresServer]:
    """A PostgreSQL server whose commits don't wait for the disk unless the client asks
    for that (synchronous_commit off)."""
    settings = {"synchronous_commit": "off", "wal_writer_delay": "10s"}
    directory = tmp_path_factory.mktemp("async_postgres")
    with PostgresServer(directory, durable=True, settings=settings) as server:
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
def new_database(request: pytest.FixtureRequest) -> NewDatabase:
    """A function that creates a database on each engine: psycopg2's arguments, or None
    for SQLite."""
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
    """Kill a process under the load of a new backup, several times, and check all
    backups.

    Args:
        url: of the server that the clients use.
        new_user: returns the user of a numbered load.
        kill: kills the process and restarts a process in its place.
        kills: number of kills.
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
    """After a kill of the service, acknowledged uploads are complete, unanswered ones
    are complete or absent, and etag and count are exact."""
    with Service(tmp_path, homeserver.url, database=new_database()) as service:

        def kill() -> None:
            service.kill()
            service.start()

        yield kill_repeatedly(
            service.url, lambda _: homeserver.new_user(), kill, SERVICE_KILLS
        )
        assert "Traceback" not in service.log()


def swept_keys(database: Mapping[str, Any] | None) -> int:
    """Return the number of keys of a version whose deletion takes half a second or
    more: 5 batches on PostgreSQL, 20 on SQLite."""
    return 20 * SQLITE.swept_at_once if database is None else 10_000


def test_a_killed_deletion(
    homeserver: Homeserver, new_database: NewDatabase, tmp_path: Path
) -> None:
    """After a kill of the service in the middle of the deletion of a version's keys,
    the next process deletes the remaining keys, and no other user loses a key."""
    database = new_database()
    place = place_of(database, tmp_path)
    owner, other = homeserver.new_user(), homeserver.new_user()
    size = swept_keys(database)
    count = "SELECT COUNT(*) FROM e2e_room_keys WHERE user_id = ?"

    def left() -> int:
        ((keys,),) = place.run(count, (owner.user_id,))
        number: int = keys
        return number

    with Service(tmp_path, homeserver.url, database=database) as service:
        apis = [Api(service.url, user.access_token) for user in (owner, other)]
        versions = [api.create_version() for api in apis]
        for api, version in zip(apis, versions, strict=True):
            for part in range(4):
                keys = {f"{part}.{i}": key() for i in range(size // 4)}
                api.upload(version, {"!room": keys})
        apis[0].delete(version_path(versions[0]))
        until(lambda: left() < size)
        service.kill()
        at_kill = left()
        assert 0 < at_kill < size
        # The lease of the killed process ends a minute after its last batch.
        place.run("UPDATE roomkeys_leases SET until_ms = 0")
        service.start()
        until(lambda: not left())
        assert len(apis[1].download(versions[1])["!room"]) == size
        assert apis[1].tally(versions[1]) == (4, size)
    print(f"killed with {at_kill} keys left")


def test_another_process_continues_a_deletion(
    homeserver: Homeserver, new_database: NewDatabase, tmp_path: Path
) -> None:
    """Two processes sweep the same database. After a kill of the one that deletes a
    version's keys, the other deletes the remaining keys, and no other version loses a
    key."""
    database = new_database()
    place = place_of(database, tmp_path)
    settings = {"database": attrs.asdict(place.config)}
    user, other = homeserver.new_user(), homeserver.new_user()
    size = swept_keys(database)
    count = "SELECT COUNT(*) FROM e2e_room_keys WHERE user_id = ?"

    def left() -> int:
        ((keys,),) = place.run(count, (user.user_id,))
        number: int = keys
        return number

    with (
        Service(tmp_path, homeserver.url, settings=settings) as first,
        Service(tmp_path / "second", homeserver.url, settings=settings) as second,
    ):
        api, others = (
            Api(service.url, one.access_token)
            for service, one in ((first, user), (second, other))
        )
        version, *gone = (a.create_version() for a in (api, others, others))
        kept = others.create_version()
        others.upload(kept, {"!room": {"kept": key()}})
        for part in range(4):
            keys = {f"{part}.{i}": key() for i in range(size // 4)}
            api.upload(version, {"!room": keys})
        accepted(api.delete(version_path(version)))
        until(lambda: left() < size)
        # A deletion wakes the second process, which finds the lease taken.
        accepted(others.delete(version_path(gone[0])))
        first.kill()
        at_kill = left()
        assert 0 < at_kill < size
        # The lease of the killed process ends a minute after its last batch.
        place.run("UPDATE roomkeys_leases SET until_ms = 0")
        accepted(others.delete(version_path(gone[1])))
        until(lambda: not left())
        assert others.tally(kept) == (1, 1)
        assert "Traceback" not in second.log()


#: Program: a command whose connections to SQLite stop in the function ``pause``.
PAUSING = """
import sqlite3, sys, time
from synapse_roomkeys.service.cli import main
from synapse_roomkeys.storage import pool

def pause():
    print("paused", flush=True)
    time.sleep(60)

class Pausing(pool._PrivateConnection):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.create_function("pause", 0, pause)

pool._PrivateConnection = Pausing
main(sys.argv[1:])
"""
#: Stops a statement that replaces the key of a session after other keys.
TRIGGER = """CREATE TRIGGER stop AFTER UPDATE ON e2e_room_keys
    WHEN NEW.session_id = '250' BEGIN SELECT pause(); END"""


@contextmanager
def stopped_in_restore(
    tool: Tool, arguments: Sequence[str], output: Path
) -> Iterator[Process]:
    """A process of the command ``restore`` that waits in the middle of the statement
    that writes keys: for a function (SQLite) or a lock (PostgreSQL)."""
    line = tool.arguments("restore", *arguments)
    start = partial(Process, output=output, cwd=tool.directory, environment=os.environ)
    if isinstance(tool.database, Path):
        tool.sql(TRIGGER)
        process = start([sys.executable, "-c", PAUSING, *line[3:]])
        until(lambda: "paused" in process.output())
        yield process
        tool.sql("DROP TRIGGER stop")
        return
    with closing(psycopg2.connect(**tool.database)) as other:
        other.cursor().execute(
            "SELECT 1 FROM e2e_room_keys WHERE session_id = '499' FOR UPDATE"
        )
        process = start(line)
        with closing(psycopg2.connect(**tool.database)) as watcher:
            watcher.autocommit = True
            until(lambda: has_lock_wait(watcher.cursor()))
        yield process


def test_a_killed_restore(
    homeserver: Homeserver, new_database: NewDatabase, tmp_path: Path
) -> None:
    """After a kill of ``synapse-roomkeys restore`` in the middle of the statement that
    gives keys back, no key, etag or row of the record has changed, and the next restore
    gives all keys back."""
    database = new_database()
    where = ("--config", "roomkeys.yaml")
    tool = Tool(tmp_path, where, database or tmp_path / "roomkeys.db")
    user = homeserver.new_user()
    old = {"!room": {f"{i}": key(1, data="old") for i in range(500)}}
    lossy = {"!room": {f"{i}": key(9, verified=True) for i in range(500)}}
    with Service(tmp_path, homeserver.url, database=database) as service:
        api = Api(service.url, user.access_token)
        version = api.create_version()
        api.upload(version, old)
        api.upload(version, lossy)
        arguments = (user.user_id, version, "--before", "1h", "--force")
        with stopped_in_restore(tool, arguments, tmp_path / "killed.txt") as process:
            process.kill()
        restores = "SELECT 1 FROM roomkeys_changes WHERE act = 'restore_keys'"
        assert api.download(version) == lossy
        assert api.tally(version) == (2, 500)
        assert tool.sql(restores) == []
        assert "500 keys" in tool.run("restore", *arguments).out
        assert api.download(version) == old
        assert api.tally(version) == (3, 500)
        assert len(tool.sql(restores)) == 1


@inlineCallbacks
def test_killed_synapse(postgres: PostgresServer, tmp_path: Path) -> Steps:
    """After a kill of a Synapse with the plugin, the same holds as for the service."""
    with Synapse(tmp_path, database=postgres.create_database()) as synapse:

        def new_user(number: int) -> User:
            user = synapse.register(f"user{number}")
            return User(user.user_id, user.access_token)

        def kill() -> None:
            synapse.kill()
            synapse.start()

        yield kill_repeatedly(synapse.url, new_user, kill, SYNAPSE_KILLS)


def kill_postgres(server: PostgresServer) -> None:
    """Kill all processes of PostgreSQL, and restart the server."""
    server.kill()
    server.start()


@inlineCallbacks
def test_killed_postgres(
    homeserver: Homeserver, async_postgres: PostgresServer, tmp_path: Path
) -> Steps:
    """After a kill of PostgreSQL, the running service retries and no acknowledged write
    is lost, although the server's default is not to wait for the disk."""
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
    """The check detects the loss if the service lets PostgreSQL acknowledge commits
    before they are on disk."""
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
    """Kill PostgreSQL under load until the history is not linearizable.

    Returns:
        A Deferred that fires with the number of kills.

    Raises:
        AssertionError: the histories of MAX_KILLS kills are all linearizable.
    """
    for number in range(MAX_KILLS):
        load: Load = yield new_load(Connection(url, homeserver.new_user()), number)
        # Write the tables and the version to disk: the kill can then lose only uploads.
        with closing(psycopg2.connect(**database)) as connection:
            connection.autocommit = True
            connection.cursor().execute("CHECKPOINT")
        yield load.run(partial(kill_postgres, server))
        yield load.read_back()
        try:
            load.check(may_repeat=True)
        except NotLinearizable:
            return number + 1
    raise AssertionError(f"{MAX_KILLS} kills without a detected loss")


def place_of(database: Mapping[str, Any] | None, directory: Path) -> Place:
    """Return the database used by a service in a directory."""
    if database is None:
        path = str(directory / "roomkeys.db")
        return Place(DatabaseConfig("sqlite3", {"database": path}))
    return Place(DatabaseConfig("psycopg2", dict(database)))


def until(condition: Callable[[], object]) -> None:
    """Poll until a condition is true; fail after DEADLINE seconds."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.0005)


@contextmanager
def during_table_creation(place: Place, random: Random) -> Iterator[Callable[[], None]]:
    """Prepare a database for a kill of a process in the middle of creating the tables.

    On PostgreSQL, an uncommitted table of the same name blocks the process at a random
    table. SQLite has no such means; there, polling the write lock shows the right
    moment.

    Yields:
        A function that waits until the process is creating the tables.
    """
    if place.config.name == "sqlite3":
        path = Path(place.config.args["database"])
        path.parent.mkdir()
        with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as other:
            other.execute("PRAGMA journal_mode = WAL")
            yield lambda: until(lambda: is_locked(other))
        return
    with closing(psycopg2.connect(**place.config.args)) as other:
        cursor = other.cursor()
        # CREATE TABLE of the same name waits until this transaction ends.
        cursor.execute(f"CREATE TABLE {random.choice(TABLES)} (a INT)")
        with closing(psycopg2.connect(**place.config.args)) as watcher:
            watcher.autocommit = True
            yield lambda: until(lambda: has_lock_wait(watcher.cursor()))


def is_locked(connection: sqlite3.Connection) -> bool:
    """Whether another process holds the write lock of the SQLite file."""
    try:
        connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        return True
    connection.execute("ROLLBACK")
    return False


def has_lock_wait(cursor: Any) -> bool:
    """Whether any transaction of the PostgreSQL server waits for a lock."""
    cursor.execute("SELECT 1 FROM pg_locks WHERE NOT granted")
    return cursor.fetchone() is not None


def test_kill_during_table_creation(
    homeserver: Homeserver, new_database: NewDatabase, tmp_path: Path
) -> None:
    """After a kill during or just after the creation of the tables, either all or none
    exist, and the next start creates all of them."""
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


#: Number of users whose backups are migrated, and of keys in each.
USERS = 40
KEYS_OF_ONE = 700
#: Largest number of migrated backups before a kill.
LATEST_KILL = 32
#: Longest additional delay of a kill, in seconds: about the time of a backup's copy.
MAX_COPY_SECONDS = 0.02


def source_in(directory: Path) -> Place:
    """Create a database with Synapse's tables and backups of USERS users."""
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
    """Return a migration process for a target database, not started yet."""
    directory.mkdir()
    homeserver = directory / "homeserver.yaml"
    path = source.config.args["database"]
    homeserver.write_text(f"database: {{name: sqlite3, args: {{database: '{path}'}}}}")
    arguments = ("migrate", "--config", "roomkeys.yaml", "--from", str(homeserver))
    return Service(
        directory, "http://127.0.0.1:1", database=database, arguments=arguments
    )


def is_in_whole_backups(source: Place, target: Place) -> bool:
    """Whether each version in the target has the same keys as in the source."""
    if not target.tables:
        return True
    versions = target.run(VERSIONS)
    ids = {version[:2] for version in versions}
    keys = [row for row in source.run(KEYS) if row[:2] in ids]
    return set(versions) <= set(source.run(VERSIONS)) and target.run(KEYS) == keys


def copied(target: Place) -> int:
    """Return the number of versions in the target."""
    try:
        ((number,),) = target.run("SELECT COUNT(*) FROM e2e_room_keys_versions")
    except (sqlite3.OperationalError, psycopg2.errors.UndefinedTable):
        return 0
    found: int = number
    return found


def wait_until_copied(target: Place, number: int) -> None:
    """Wait until the target has at least this number of versions."""
    until(lambda: copied(target) >= number)


def test_kill_during_migration(new_database: NewDatabase, tmp_path: Path) -> None:
    """After a kill of a migration, each backup is complete in the target or absent; the
    next run resumes and ends with equal source and target."""
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
    """An interrupted migration (Ctrl-C) prints one line and exits with code 130, no
    backup is copied in part, and the next run completes the work."""
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

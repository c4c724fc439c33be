"""Starts what is compared, and stops it again whatever happens."""

import contextlib
import json
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.servers import PostgresServer, Synapse
from tests.servers.processes import HOST, Process, free_port

from .backups import Backup, Subject
from .client import Connection
from .databases import Database, PostgresDatabase, SqliteDatabase
from .keys import KeySource
from .results import LIMIT, PLUGIN, SERVICE, STOCK
from .sampling import progress
from .stage import Plan, Stage

_REPOSITORY = Path(__file__).resolve().parents[1]
_CONFIG = {"background_updates": {"sleep_enabled": False}}
_PRELOAD = {"shared_preload_libraries": "pg_stat_statements"}
_START_TIMEOUT = 30.0
_SQLITE_KEYS = 20_000


@contextlib.contextmanager
def on_postgres(directory: Path, plan: Plan) -> Iterator[Stage]:
    """Start everything on PostgreSQL."""
    with contextlib.ExitStack() as stack:
        progress("starting PostgreSQL, two Synapses, the service and the limit")
        postgres = PostgresServer(
            directory / "postgres", durable=True, settings=_PRELOAD
        )
        stack.enter_context(postgres)
        databases = {name: postgres.create_database() for name in (STOCK, PLUGIN)}
        subjects = _start_synapses(
            stack,
            {
                name: _synapse(directory / name, name, arguments)
                for name, arguments in databases.items()
            },
        )
        for name, start in ((SERVICE, _service), (LIMIT, _limit)):
            subject = start(directory, postgres.create_database())
            subjects[name] = stack.enter_context(subject)
        yield _filled(plan, subjects, postgres)


def _filled(
    plan: Plan, subjects: dict[str, Subject], postgres: PostgresServer
) -> Stage:
    """Give all databases the keys that backups are filled from."""
    progress(f"filling {len(subjects)} databases with {plan.keys} keys each")
    source = KeySource()
    master = source.take(plan.keys)
    for subject in subjects.values():
        subject.database.load(master)
    limit = subjects[LIMIT].database
    assert isinstance(limit, PostgresDatabase)
    room = [key for key in master if key.room_id == source.big_room]
    limit.load_answers(master, room)
    return Stage(
        "PostgreSQL", plan, plan.keys, subjects, source, master, postgres=postgres
    )


@contextlib.contextmanager
def on_sqlite(directory: Path, plan: Plan) -> Iterator[Stage]:
    """Start two Synapses on SQLite."""
    with contextlib.ExitStack() as stack:
        progress("starting two Synapses on SQLite")
        synapses = {
            name: _synapse(directory / f"sqlite-{name}", name, None)
            for name in (STOCK, PLUGIN)
        }
        subjects = _start_synapses(stack, synapses)
        size = min(plan.keys, _SQLITE_KEYS)
        source = KeySource()
        master = source.take(size)
        for subject in subjects.values():
            subject.database.load(master)
        yield Stage("SQLite", plan, size, subjects, source, master, on_sqlite=True)


def _synapse(
    directory: Path, name: str, arguments: Mapping[str, object] | None
) -> Synapse:
    """Describe one of the two homeservers."""
    return Synapse(
        directory,
        database=arguments,
        module_config={} if name == PLUGIN else None,
        extra_config=_CONFIG,
    )


def _start_synapses(
    stack: contextlib.ExitStack, synapses: Mapping[str, Synapse]
) -> dict[str, Subject]:
    """Start homeservers at once, each to be stopped with the stack."""
    for synapse in synapses.values():
        stack.callback(synapse.stop)
    with ThreadPoolExecutor() as pool:
        list(pool.map(Synapse.start, synapses.values()))
    subjects = {}
    for name, synapse in synapses.items():
        database: Database
        if synapse.database is None:
            database = SqliteDatabase(synapse.directory / "homeserver.db")
        else:
            database = PostgresDatabase(synapse.database)
        stack.callback(database.close)
        database.wait_for_background_work()
        connection = stack.enter_context(Connection(synapse.port))
        subjects[name] = Subject(
            name, synapse.port, synapse.pid, database, connection, synapse
        )
    return subjects


@contextlib.contextmanager
def _service(directory: Path, arguments: Mapping[str, object]) -> Iterator[Subject]:
    """Start the service of its own, and the homeserver that it asks for users."""
    homeserver, port = free_port(), free_port()
    config = directory / "roomkeys.yaml"
    config.write_text(
        json.dumps(
            {
                "homeserver": {"url": f"http://{HOST}:{homeserver}"},
                "database": {"name": "psycopg2", "args": dict(arguments)},
                "listeners": [f"tcp:{port}:interface={HOST}"],
            }
        )
    )
    serve = ("synapse_roomkeys.service", "serve", "--config", str(config))
    with (
        _running(directory, homeserver, "benchmarks.homeserver", str(homeserver)),
        _running(directory, port, *serve) as process,
        contextlib.closing(PostgresDatabase(arguments)) as database,
        Connection(port) as connection,
    ):
        yield Subject(SERVICE, port, process.pid, database, connection)


@contextlib.contextmanager
def _limit(directory: Path, arguments: Mapping[str, object]) -> Iterator[Subject]:
    """Start the bare site over a database with bare tables."""
    port = free_port()
    settings = directory / "limit.json"
    settings.write_text(json.dumps(arguments))
    with (
        contextlib.closing(PostgresDatabase(arguments)) as database,
        _running(directory, port, "benchmarks.limit", str(port), str(settings)) as it,
        Connection(port) as connection,
    ):
        database.create_bare_tables()
        yield Subject(LIMIT, port, it.pid, database, connection)


@contextlib.contextmanager
def _running(directory: Path, port: int, module: str, *words: str) -> Iterator[Process]:
    """Run a module until it is no longer needed, from when it accepts connections."""
    process = Process(
        [sys.executable, "-m", module, *words],
        output=directory / f"{module}.txt",
        cwd=_REPOSITORY,
    )
    try:
        process.wait_until(lambda: _accepts(port), _START_TIMEOUT)
        yield process
    finally:
        process.kill()


def _accepts(port: int) -> bool:
    """Tell whether a port answers yet."""
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


@contextlib.contextmanager
def downloading(backup: Backup, directory: Path) -> Iterator[None]:
    """Have another process download a backup over and over."""
    request = directory / "request.bin"
    request.write_bytes(backup.get_whole())
    process = Process(
        [
            sys.executable,
            "-m",
            "benchmarks.restorer",
            str(backup.subject.port),
            str(request),
        ],
        output=directory / "restorer.txt",
        cwd=_REPOSITORY,
    )
    try:
        process.wait_until(lambda: bool(process.output()), _START_TIMEOUT)
        time.sleep(0.05)
        yield
        if process.poll() is not None:
            raise RuntimeError(f"the download ended: {process.output()}")
    finally:
        process.kill()

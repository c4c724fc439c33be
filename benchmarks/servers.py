"""Start of the measured servers; context managers stop them on every exit."""

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

from .backups import Backup, MeasuredServer
from .client import Connection
from .databases import Database, PostgresDatabase, SqliteDatabase
from .keys import KeySource
from .results import LIMIT, PLUGIN, SERVICE, STOCK
from .sampling import log_progress
from .testbed import Plan, Testbed

_REPOSITORY = Path(__file__).resolve().parents[1]
_SYNAPSE_CONFIG = {"background_updates": {"sleep_enabled": False}}
_POSTGRES_SETTINGS = {"shared_preload_libraries": "pg_stat_statements"}
_START_TIMEOUT_SECONDS = 30.0
_MAX_SQLITE_KEYS = 20_000


@contextlib.contextmanager
def postgres_testbed(directory: Path, plan: Plan) -> Iterator[Testbed]:
    """Run PostgreSQL, two Synapses, the service and the limit."""
    with contextlib.ExitStack() as stack:
        log_progress("starting PostgreSQL, two Synapses, the service and the limit")
        postgres = PostgresServer(
            directory / "postgres", durable=True, settings=_POSTGRES_SETTINGS
        )
        stack.enter_context(postgres)
        databases = {name: postgres.create_database() for name in (STOCK, PLUGIN)}
        servers = _start_synapses(
            stack,
            {
                name: _configure_synapse(directory / name, name, arguments)
                for name, arguments in databases.items()
            },
        )
        for name, start in ((SERVICE, _start_service), (LIMIT, _start_limit)):
            server = start(directory, postgres.create_database())
            servers[name] = stack.enter_context(server)
        yield _load_databases(plan, servers, postgres)


def _load_databases(
    plan: Plan, servers: dict[str, MeasuredServer], postgres: PostgresServer
) -> Testbed:
    """Store the template keys in all databases and return the testbed."""
    log_progress(f"filling {len(servers)} databases with {plan.keys} keys each")
    key_source = KeySource()
    template_keys = key_source.next_keys(plan.keys)
    for server in servers.values():
        server.database.load_template_keys(template_keys)
    limit = servers[LIMIT].database
    assert isinstance(limit, PostgresDatabase)
    room = [key for key in template_keys if key.room_id == key_source.big_room]
    limit.load_responses(template_keys, room)
    return Testbed(
        "PostgreSQL",
        plan,
        plan.keys,
        servers,
        key_source,
        template_keys,
        postgres=postgres,
    )


@contextlib.contextmanager
def sqlite_testbed(directory: Path, plan: Plan) -> Iterator[Testbed]:
    """Run two Synapses on SQLite."""
    with contextlib.ExitStack() as stack:
        log_progress("starting two Synapses on SQLite")
        synapses = {
            name: _configure_synapse(directory / f"sqlite-{name}", name, None)
            for name in (STOCK, PLUGIN)
        }
        servers = _start_synapses(stack, synapses)
        full_size = min(plan.keys, _MAX_SQLITE_KEYS)
        key_source = KeySource()
        template_keys = key_source.next_keys(full_size)
        for server in servers.values():
            server.database.load_template_keys(template_keys)
        yield Testbed(
            "SQLite",
            plan,
            full_size,
            servers,
            key_source,
            template_keys,
            on_sqlite=True,
        )


def _configure_synapse(
    directory: Path, name: str, arguments: Mapping[str, object] | None
) -> Synapse:
    """Return a Synapse, not yet started, with the module if it is the plugin's."""
    return Synapse(
        directory,
        database=arguments,
        module_config={} if name == PLUGIN else None,
        extra_config=_SYNAPSE_CONFIG,
    )


def _start_synapses(
    stack: contextlib.ExitStack, synapses: Mapping[str, Synapse]
) -> dict[str, MeasuredServer]:
    """Start Synapses in parallel; the stack stops them."""
    for synapse in synapses.values():
        stack.callback(synapse.stop)
    with ThreadPoolExecutor() as pool:
        list(pool.map(Synapse.start, synapses.values()))
    servers = {}
    for name, synapse in synapses.items():
        database: Database
        if synapse.database is None:
            database = SqliteDatabase(synapse.directory / "homeserver.db")
        else:
            database = PostgresDatabase(synapse.database)
        stack.callback(database.close)
        database.wait_for_background_updates()
        connection = stack.enter_context(Connection(synapse.port))
        servers[name] = MeasuredServer(
            name, synapse.port, synapse.pid, database, connection, synapse
        )
    return servers


@contextlib.contextmanager
def _start_service(
    directory: Path, arguments: Mapping[str, object]
) -> Iterator[MeasuredServer]:
    """Run the service, and the minimal homeserver that authenticates users."""
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
        _running(directory, homeserver, "benchmarks.whoami_server", str(homeserver)),
        _running(directory, port, *serve) as process,
        contextlib.closing(PostgresDatabase(arguments)) as database,
        Connection(port) as connection,
    ):
        yield MeasuredServer(SERVICE, port, process.pid, database, connection)


@contextlib.contextmanager
def _start_limit(
    directory: Path, arguments: Mapping[str, object]
) -> Iterator[MeasuredServer]:
    """Run the limit on a database with the two key tables alone."""
    port = free_port()
    settings = directory / "limit.json"
    settings.write_text(json.dumps(arguments))
    with (
        contextlib.closing(PostgresDatabase(arguments)) as database,
        _running(
            directory, port, "benchmarks.limit_server", str(port), str(settings)
        ) as process,
        Connection(port) as connection,
    ):
        database.create_bare_tables()
        yield MeasuredServer(LIMIT, port, process.pid, database, connection)


@contextlib.contextmanager
def _running(
    directory: Path, port: int, module: str, *arguments: str
) -> Iterator[Process]:
    """Run a module as a process that accepts connections, and kill it at the exit."""
    process = Process(
        [sys.executable, "-m", module, *arguments],
        output=directory / f"{module}.txt",
        cwd=_REPOSITORY,
    )
    try:
        process.wait_until(lambda: _accepts_connections(port), _START_TIMEOUT_SECONDS)
        yield process
    finally:
        process.kill()


def _accepts_connections(port: int) -> bool:
    """Return whether a port accepts connections."""
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


@contextlib.contextmanager
def download_in_background(backup: Backup, directory: Path) -> Iterator[None]:
    """Download a backup in a loop in another process.

    Raises RuntimeError at the exit if the process has ended by itself.
    """
    request = directory / "request.bin"
    request.write_bytes(backup.get_whole())
    process = Process(
        [
            sys.executable,
            "-m",
            "benchmarks.download_loop",
            str(backup.server.port),
            str(request),
        ],
        output=directory / "download_loop.txt",
        cwd=_REPOSITORY,
    )
    try:
        process.wait_until(lambda: bool(process.output()), _START_TIMEOUT_SECONDS)
        time.sleep(0.05)
        yield
        if process.poll() is not None:
            raise RuntimeError(
                f"the background download ended early: {process.output()}"
            )
    finally:
        process.kill()

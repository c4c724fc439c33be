"""Starts of a Synapse with the plugin, and refusals to start with their reasons."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from synapse_roomkeys import __version__
from synapse_roomkeys.storage.postgres_statements import TABLE_STATEMENTS

from ..servers import PostgresServer, Synapse
from .test_synapse import DEADLINE, query

MODULE = "synapse_roomkeys.RoomKeysModule"
SYNAPSE_VERSION = version_of("matrix-synapse")
LISTENING = "now listening on TCP port"

WITHOUT_NAME = """
import synapse.rest
from synapse.rest.client import room_keys
del room_keys.register_servlets
"""
WITHOUT_REGISTRATION = """
from synapse import rest
from synapse.rest.client import room_keys
if hasattr(rest, "SERVLET_GROUPS"):
    rest.SERVLET_GROUPS["client"] = tuple(
        function for function in rest.SERVLET_GROUPS["client"]
        if function is not room_keys.register_servlets
    )
else:
    del room_keys.register_servlets
"""
WITHOUT_GROUPS = """
from synapse import rest
if hasattr(rest, "SERVLET_GROUPS"):
    del rest.SERVLET_GROUPS
else:
    del rest.client.room_keys.register_servlets
"""
OTHER_MOUNT = """
from synapse.rest import ClientRestResource
ClientRestResource.register_servlets = staticmethod(lambda *arguments: None)
"""
OTHER_POOL = """
from synapse.storage.database import DatabasePool
interact = DatabasePool.runInteraction
DatabasePool.runInteraction = lambda self, desc, func, *args, **kwargs: (
    interact(self, desc, func, *args, **kwargs)
)
"""
OTHER_API = """
from synapse.module_api import ModuleApi
ModuleApi.__init__ = lambda self, hs, auth_handler: None
"""


def failed_start(server: Synapse) -> str:
    """Start a Synapse, expect an exit before the first listener, and return the
    output."""
    before = server.log().count(LISTENING)
    output = server.run_to_failure(DEADLINE)
    assert server.log().count(LISTENING) == before
    return output


# Options


def test_unknown_option(tmp_path: Path) -> None:
    """An unknown option is an error; the message has the option and all known
    options."""
    option = "stalled_donwload_seconds"
    output = failed_start(Synapse(tmp_path, module_config={option: 5}))
    assert f"Error in configuration at 'modules.<item 0>.config.{option}'" in output
    assert re.search(f"{option}: .*stalled_download_seconds", output), output


def test_wrong_value(tmp_path: Path) -> None:
    """A value other than a positive integer is an error with the option's name.

    ``tests/unit/test_config.py`` has further values.
    """
    config = {"max_body_bytes": 1000, "stalled_download_seconds": "5"}
    output = failed_start(Synapse(tmp_path, module_config=config))
    where = "'modules.<item 0>.config.stalled_download_seconds'"
    assert f"Error in configuration at {where}" in output
    assert "stalled_download_seconds: must be a positive integer" in output


def test_options_that_are_no_mapping(tmp_path: Path) -> None:
    """Options other than a mapping are an error."""
    modules = [{"module": MODULE, "config": ["max_body_bytes"]}]
    output = failed_start(Synapse(tmp_path, extra_config={"modules": modules}))
    assert "Error in configuration at 'modules.<item 0>.config" in output
    assert "must be a mapping" in output


# Internals


@pytest.mark.parametrize(
    ("preload", "name"),
    [
        pytest.param(WITHOUT_NAME, "room_keys.register_servlets", id="name"),
        pytest.param(
            WITHOUT_REGISTRATION, "room_keys.register_servlets", id="registration"
        ),
        pytest.param(WITHOUT_GROUPS, "room_keys.register_servlets", id="groups"),
        pytest.param(OTHER_MOUNT, "ClientRestResource.register_servlets", id="mount"),
        pytest.param(OTHER_API, "ModuleApi._hs", id="api"),
        pytest.param(OTHER_POOL, "runInteraction", id="pool"),
    ],
)
def test_other_internals(preload: str, name: str, tmp_path: Path) -> None:
    """A Synapse with other internals than expected does not start.

    The error has the expected and the actual state.
    """
    output = failed_start(Synapse(tmp_path, preload=preload))
    versions = f"{__version__} can't be loaded into Synapse {SYNAPSE_VERSION}"
    message = re.search(
        rf"ConfigError: synapse_roomkeys {re.escape(versions)}:"
        r" expected (?P<expected>.+); found (?P<found>.+)",
        output,
    )
    assert message is not None, output
    assert name in message["expected"]
    assert message["found"] not in message["expected"], message[0]


def test_listed_twice(tmp_path: Path) -> None:
    """A module listed twice, with two sets of options, is an error."""
    modules = [{"module": MODULE, "config": {}}] * 2
    output = failed_start(Synapse(tmp_path, extra_config={"modules": modules}))
    assert re.search("ConfigError: synapse_roomkeys .+ expected .+; found .+", output)


# The database


@pytest.fixture(scope="module")
def stopped(
    database: Callable[[], Mapping[str, Any] | None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Synapse]:
    """A stopped Synapse with the plugin, on a database from Synapse without the
    plugin."""
    directory = tmp_path_factory.mktemp("stopped")
    arguments = database()
    with Synapse(directory, database=arguments, module_config=None):
        pass
    yield Synapse(directory, database=arguments)


@pytest.mark.parametrize(
    ("change", "undo", "table", "found"),
    [
        pytest.param(
            "ALTER TABLE e2e_room_keys DROP COLUMN forwarded_count",
            "ALTER TABLE e2e_room_keys ADD COLUMN forwarded_count INT",
            "e2e_room_keys",
            "session_data",
            id="column",
        ),
        pytest.param(
            "ALTER TABLE e2e_room_keys_versions RENAME COLUMN etag TO tag",
            "ALTER TABLE e2e_room_keys_versions RENAME COLUMN tag TO etag",
            "e2e_room_keys_versions",
            "tag",
            id="column of a version",
        ),
        pytest.param(
            "ALTER TABLE e2e_room_keys_versions RENAME TO moved",
            "ALTER TABLE moved RENAME TO e2e_room_keys_versions",
            "e2e_room_keys_versions",
            "e2e_room_keys_versions",
            id="table",
        ),
        pytest.param(
            "DROP INDEX e2e_room_keys_with_version_idx",
            "CREATE UNIQUE INDEX e2e_room_keys_with_version_idx"
            " ON e2e_room_keys (user_id, version, room_id, session_id)",
            "e2e_room_keys",
            "ON CONFLICT",
            id="index",
        ),
    ],
)
def test_other_tables(
    change: str, undo: str, table: str, found: str, stopped: Synapse
) -> None:
    """A Synapse with other tables than expected does not start.

    The error has the table, the expected and the actual state.
    """
    query(stopped, change)
    try:
        output = failed_start(stopped)
    finally:
        query(stopped, undo)
    message = re.search(
        r"ConfigError: synapse_roomkeys can't work on this database:"
        r" expected (?P<expected>.+); found (?P<found>.+)",
        output,
    )
    assert message is not None, output
    assert re.search(rf"\b{table}\b", message[0]), message[0]
    assert found in message["found"]


def test_newer_tables(stopped: Synapse) -> None:
    """Tables of a later version of the plugin are an error with advice."""
    with stopped:
        pass
    ((number,),) = query(stopped, "SELECT number FROM roomkeys_schema")
    query(stopped, f"UPDATE roomkeys_schema SET number = {number + 1}")
    try:
        output = failed_start(stopped)
    finally:
        query(stopped, f"UPDATE roomkeys_schema SET number = {number}")
    assert "ConfigError: synapse_roomkeys can't work on this database:" in output
    assert f" number {number + 1}," in output and f" number {number}:" in output


# Successful starts


def answering_lines(server: Synapse) -> list[str]:
    """Return the plugin's log lines at its starts, one line for each start."""
    text = f"{__version__} answers /room_keys in Synapse {SYNAPSE_VERSION}"
    return [line for line in server.log().splitlines() if text in line]


def test_start(stopped: Synapse) -> None:
    """A log line names the replaced function, the plugin's version and Synapse's
    version.

    The plugin's table exists after the start.
    """
    before = answering_lines(stopped)
    with stopped:
        *earlier, line = answering_lines(stopped)
        assert earlier == before
        assert "synapse.rest.client.room_keys.register_servlets" in line
        assert " INFO synapse_roomkeys" in line
    assert query(stopped, "SELECT * FROM roomkeys_counts") == []


def test_concurrent_starts(postgres: PostgresServer, tmp_path: Path) -> None:
    """Processes started at the same time can all create the plugin's table."""
    database = postgres.create_database()
    with Synapse(tmp_path / "stock", database=database, module_config=None):
        pass
    servers = [Synapse(tmp_path / name, database=database) for name in "ab"]
    try:
        start_together(servers, database)
        assert query(servers[0], "SELECT * FROM roomkeys_counts") == []
    finally:
        for server in servers:
            server.stop()
    for server in servers:
        assert server.log().count("answers /room_keys") == 1


def start_together(servers: Sequence[Synapse], database: Mapping[str, Any]) -> None:
    """Start servers, blocked by a lock until all are about to create the table."""
    with ThreadPoolExecutor() as threads:
        with closing(psycopg2.connect(**database)) as connection:
            connection.cursor().execute(TABLE_STATEMENTS.lock)
            starts = [threads.submit(server.start) for server in servers]
            wait_for_locks(servers[0], len(servers))
        for start in starts:
            start.result()


def wait_for_locks(synapse: Synapse, number: int) -> None:
    """Wait until `number` processes wait for the lock on the plugin's tables."""
    waiting = "SELECT COUNT(*) FROM pg_locks WHERE locktype = 'advisory'"
    deadline = time.monotonic() + DEADLINE
    while query(synapse, f"{waiting} AND NOT granted") != [(number,)]:
        assert time.monotonic() < deadline, "nobody waits for the lock"

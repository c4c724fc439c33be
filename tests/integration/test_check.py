"""``synapse-roomkeys check``: each checked part, with and without a fault."""

from __future__ import annotations

import socket
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from synapse_roomkeys.storage import SQLITE, upgrade_tables

from ..servers.fake_homeserver import Homeserver
from ..servers.processes import HOST, free_port
from ..servers.service import Service

SECRET = "hunter2"
ARGUMENTS = ("check", "--config", "roomkeys.yaml")


def check_command(directory: Path, homeserver: str, **settings: Any) -> Service:
    """Return a process of the check command for a service's configuration."""
    return Service(directory, homeserver, arguments=ARGUMENTS, **settings)


def run_check(service: Service) -> tuple[int, dict[str, str]]:
    """Run the command; return the exit code and the result of each part, by name."""
    code, output = service.run_to_end()
    assert SECRET not in output
    assert "Traceback" not in output
    lines = [line.split(": ", 1) for line in output.splitlines()]
    return code, dict(lines)


def assert_part_fails(service: Service, part: str, *texts: str) -> None:
    """Check that the command exits with 1 because of exactly one part.

    Args:
        service: the command to run.
        part: the beginning of the part's name.
        texts: texts that the part's result has to contain.
    """
    code, found = run_check(service)
    assert code == 1, found
    (name,) = (each for each, text in found.items() if text.startswith("FAILED: "))
    assert name.startswith(part)
    for text in texts:
        assert text in found[name], found[name]


def test_a_new_service(homeserver: Homeserver, tmp_path: Path) -> None:
    """Before the first start all parts are ok, and the command creates no database
    file."""
    service = check_command(tmp_path, homeserver.url)
    path = tmp_path / "roomkeys.db"
    assert run_check(service) == (
        0,
        {
            "configuration": "ok: all options are known",
            f"listener tcp:{service.port}:interface={HOST}": "ok: the listener can"
            " be opened",
            f"listener tcp:{service.metrics_port}:interface={HOST}": "ok: the"
            " listener can be opened",
            f"database {path}": "ok: the file doesn't exist yet; the service creates"
            " it at its start",
            f"homeserver {homeserver.url}": "ok: the homeserver answers, and refuses"
            " an invented token",
        },
    )
    assert not path.exists()


def test_beside_a_running_service(
    homeserver: Homeserver,
    database: Callable[[], Mapping[str, Any] | None],
    tmp_path: Path,
) -> None:
    """Listeners that the running service has open are reported as in use, not as
    failed."""
    own = {"metrics_listeners": [f"unix:{tmp_path}/socket"]}
    service = Service(tmp_path, homeserver.url, database=database(), settings=own)
    with service:
        check = check_command(tmp_path / "check", homeserver.url)
        check._settings = service._settings
        code, found = run_check(check)
        assert code == 0, found
        used = [name for name, text in found.items() if text.startswith("ok: in use")]
        assert len(used) == 2
        (tables,) = (text for name, text in found.items() if "database" in name)
        assert "all tables are there" in tables


def test_listeners_that_fail(homeserver: Homeserver, tmp_path: Path) -> None:
    """A port in use and a socket in a missing directory fail, with advice."""
    service = check_command(tmp_path / "a", homeserver.url)
    with closing(socket.create_server((HOST, service.port))) as server:
        server.settimeout(0.1)
        part = f"listener tcp:{service.port}"
        assert_part_fails(service, part, "in use", "choose another")
    no_directory = {"listeners": ["unix:/nowhere/socket"]}
    service = check_command(tmp_path / "b", homeserver.url, settings=no_directory)
    assert_part_fails(
        service, "listener unix:/nowhere/socket", "No such file", "directory"
    )


@contextmanager
def tables(path: Path) -> Iterator[sqlite3.Connection]:
    """An open database with the service's tables, for a test to change."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        upgrade_tables(connection.cursor(), SQLITE, True)
        connection.commit()
        yield connection


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (
            "DROP TABLE e2e_room_keys_versions",
            ["expected table e2e_room_keys_versions"],
        ),
        ("UPDATE roomkeys_schema SET number = 999", ["number 999", "install"]),
    ],
)
def test_unusable_tables(
    homeserver: Homeserver, tmp_path: Path, change: str, texts: list[str]
) -> None:
    """A missing table and tables of a later version fail, as at the service's start."""
    service = check_command(tmp_path, homeserver.url)
    with tables(tmp_path / "roomkeys.db") as connection:
        connection.execute(change)
    assert_part_fails(service, f"database {tmp_path}/roomkeys.db", *texts)


def test_tables_of_an_older_version(homeserver: Homeserver, tmp_path: Path) -> None:
    """Tables of an older version are ok; the service upgrades tables, the command does
    not."""
    service = check_command(tmp_path, homeserver.url)
    with tables(tmp_path / "roomkeys.db") as connection:
        connection.execute("UPDATE roomkeys_schema SET number = 2")
        code, found = run_check(service)
        assert code == 0
        assert (
            "brings the tables to number" in found[f"database {tmp_path}/roomkeys.db"]
        )
        number = connection.execute("SELECT number FROM roomkeys_schema").fetchone()
        assert number == (2,)


def test_a_database_without_tables(
    homeserver: Homeserver,
    database: Callable[[], Mapping[str, Any] | None],
    tmp_path: Path,
) -> None:
    """A database without tables is ok if tables can be created; the command creates
    none."""
    arguments = database()
    service = check_command(tmp_path, homeserver.url, database=arguments)
    if arguments is None:
        (tmp_path / "roomkeys.db").touch()
    for _ in range(2):
        code, found = run_check(service)
        assert code == 0, found
        (text,) = (text for name, text in found.items() if "database" in name)
        assert "there are no tables yet" in text


def test_databases_that_fail(
    homeserver: Homeserver,
    database: Callable[[], Mapping[str, Any] | None],
    tmp_path: Path,
) -> None:
    """A read-only database and a missing database fail, with their address."""
    arguments = database()
    if arguments is None:
        path = "/nowhere/roomkeys.db"
        unreachable = {"database": {"args": {"database": path}}}
        service = check_command(tmp_path, homeserver.url, settings=unreachable)
        assert_part_fails(
            service, f"database {path}", "the directory /nowhere doesn't exist"
        )
        return
    with closing(psycopg2.connect(**arguments)) as connection:
        connection.autocommit = True
        name = arguments["dbname"]
        connection.cursor().execute(
            f"ALTER DATABASE {name} SET default_transaction_read_only = on"
        )
    service = check_command(tmp_path / "a", homeserver.url, database=arguments)
    part = f"database {HOST}:{arguments['port']}"
    assert_part_fails(service, part, "read-only", "primary")
    port = free_port()
    args = {"host": HOST, "port": port, "user": "a", "password": SECRET}
    service = check_command(tmp_path / "b", homeserver.url, database=args)
    assert_part_fails(service, f"database {HOST}:{port}", "refused", "See that")


class WrongHomeserver(Homeserver):
    """A homeserver behind a proxy that does not forward whoami."""

    def _answer(self, path: str, token: str) -> tuple[int, dict[str, Any]]:
        if "whoami" in path:
            return 404, {"errcode": "M_UNRECOGNIZED", "error": "Unrecognized"}
        return super()._answer(path, token)


def test_homeservers_that_fail(homeserver: Homeserver, tmp_path: Path) -> None:
    """A homeserver fails if unreachable, at a wrong path, or without whoami behind a
    proxy."""
    unreachable = f"http://{HOST}:{free_port()}"
    assert_part_fails(
        check_command(tmp_path / "a", unreachable),
        f"homeserver {unreachable}",
        "/versions",
        "refused",
    )
    wrong = f"{homeserver.url}/wrong"
    assert_part_fails(
        check_command(tmp_path / "b", wrong), f"homeserver {wrong}", "status 404"
    )
    with WrongHomeserver() as other:
        part = f"homeserver {other.url}"
        assert_part_fails(
            check_command(tmp_path / "c", other.url),
            part,
            "whoami",
            "status 404",
            "401",
        )

"""The service's start, and the output of the other commands."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from synapse_roomkeys import __version__
from synapse_roomkeys.service.config import example
from synapse_roomkeys.storage import SQLITE, upgrade_tables

from ..backup_client import Api
from ..contract.base import ALGORITHM, AUTH_DATA
from ..servers import PostgresServer
from ..servers.accounts import fetch
from ..servers.fake_homeserver import Homeserver
from ..servers.processes import HOST, free_port
from ..servers.service import Service

SECRET = "hunter2"
#: Program that opens a socket, as systemd for a socket unit, and then executes the
#: service.
SYSTEMD_ACTIVATION = """
import os, socket, sys
listening = socket.create_server(("127.0.0.1", int(os.environ.pop("PORT"))))
os.dup2(listening.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(
    LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="roomkeys.socket"
)
program = [sys.executable, "-m", "synapse_roomkeys.service", *sys.argv[1:]]
os.execv(sys.executable, program)
"""


def assert_fails(service: Service, code: int, *names: str, attempts: int = 0) -> None:
    """Check that a command ends with an exit code and one last line with the reason.

    Args:
        service: the command to run; its output must not contain `SECRET`.
        code: the exit code.
        names: texts that the last line has to contain.
        attempts: the number of lines before the last, each about a failed attempt. The
            two lines about source and target of a migration are not counted.
    """
    found, output = service.run_to_end()
    assert found == code, output
    sides = ("From source, ", "to target, ")
    *lines, last = (t for t in output.splitlines() if not t.startswith(sides))
    assert len(lines) == attempts, output
    assert all("WARNING" in line or "ERROR" in line for line in lines), output
    assert SECRET not in output
    for name in names:
        assert name in last


def test_no_configuration_file_is_needed(
    homeserver: Homeserver, tmp_path: Path
) -> None:
    """With the homeserver's address as an option, the service needs no configuration
    file.

    The database is then an SQLite file in the working directory.
    """
    service = Service(tmp_path, "", arguments=("serve", "--homeserver", homeserver.url))
    # The default port may be in use.
    service.environment = {"ROOMKEYS_LISTENERS": f"tcp:{service.port}:interface={HOST}"}
    with service:
        user = homeserver.new_user()
        body = {"algorithm": ALGORITHM, "auth_data": AUTH_DATA}
        answer = Api(service.url, user.access_token).request("POST", "/version", body)
        assert answer.status == 200
        assert (tmp_path / "roomkeys.db").exists()


def test_the_database_file_is_private(homeserver: Homeserver, tmp_path: Path) -> None:
    """The SQLite file, the WAL and the shared memory file are private to their owner.

    The umask makes no difference. An existing file keeps the existing mode.
    """
    service = Service(tmp_path, homeserver.url)
    path = tmp_path / "roomkeys.db"
    umask = os.umask(0o022)
    try:
        for mode in (0o600, 0o640):
            with service:
                files = [
                    path.with_name(path.name + end) for end in ("", "-wal", "-shm")
                ]
                assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {mode}
            path.chmod(0o640)
    finally:
        os.umask(umask)


def test_a_port_in_use(homeserver: Homeserver, tmp_path: Path) -> None:
    """If a port is in use, the service does not start and names the listener."""
    service = Service(tmp_path, homeserver.url)
    with closing(socket.create_server((HOST, service.port))):
        assert_fails(service, 1, f"listeners: tcp:{service.port}:", "already in use")


@pytest.mark.parametrize("command", ["serve", "migrate"])
def test_a_database_of_another_encoding(
    homeserver: Homeserver, tmp_path: Path, postgres: PostgresServer, command: str
) -> None:
    """A database in another encoding than UTF-8 is refused before the first key is
    stored.

    ``serve`` and ``migrate`` name the encoding and the command that creates a suitable
    database.
    """
    database = postgres.create_database(encoding="LATIN1")
    service = Service(tmp_path, homeserver.url, database=database)
    if command == "migrate":
        source = {"name": "sqlite3", "args": {"database": str(tmp_path / "hs.db")}}
        file = tmp_path / "homeserver.yaml"
        file.write_text(json.dumps({"database": source}))
        with closing(sqlite3.connect(tmp_path / "hs.db")) as connection:
            upgrade_tables(connection.cursor(), SQLITE, True)
            connection.commit()
        config = ("--config", "roomkeys.yaml")
        service.arguments = ("migrate", "--from", str(file), *config)
    assert_fails(service, 1, "its encoding is LATIN1", "createdb -E UTF8 -T template0")


def test_an_unreachable_database(homeserver: Homeserver, tmp_path: Path) -> None:
    """An unreachable database is retried for some seconds, then the service exits.

    Each log line names the database but no password. The log has two lines for all
    attempts.
    """
    args = {"host": HOST, "port": free_port(), "user": "a", "password": SECRET}
    assert_fails(
        Service(tmp_path / "a", homeserver.url, database=args),
        1,
        f"Can't start: database: {HOST}:{args['port']}: ",
        "Connection refused",
        attempts=2,
    )
    unreachable = {"database": {"args": {"database": "/nowhere/roomkeys.db"}}}
    service = Service(tmp_path / "b", homeserver.url, settings=unreachable)
    path = "/nowhere/roomkeys.db"
    assert_fails(
        service, 1, f"Can't start: database: {path}: unable to open", attempts=2
    )


def test_a_temporarily_locked_database(homeserver: Homeserver, tmp_path: Path) -> None:
    """The service starts once another process releases the lock on the SQLite file.

    A process holds the lock while creating the tables.
    """
    service = Service(tmp_path, homeserver.url)
    path = tmp_path / "roomkeys.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("BEGIN IMMEDIATE")
        service.start_without_waiting()
        end = time.monotonic() + 10
        while (
            "(lock), trying again: OperationalError: database is locked"
            not in service.log()
        ):
            assert time.monotonic() < end, service.log()
            time.sleep(0.02)
        connection.execute("ROLLBACK")
    service.wait_until_healthy()
    service.stop()


def test_a_database_of_a_later_version(homeserver: Homeserver, tmp_path: Path) -> None:
    """The service does not start on tables of a later version."""
    with closing(sqlite3.connect(tmp_path / "roomkeys.db")) as connection:
        upgrade_tables(connection.cursor(), SQLITE, True)
        connection.execute("UPDATE roomkeys_schema SET number = 999")
        connection.commit()
    assert_fails(Service(tmp_path, homeserver.url), 1, "database: ", "999")


def test_a_missing_table(homeserver: Homeserver, tmp_path: Path) -> None:
    """The service does not start without a homeserver's table that existed before."""
    with closing(sqlite3.connect(tmp_path / "roomkeys.db")) as connection:
        upgrade_tables(connection.cursor(), SQLITE, True)
        connection.commit()
        connection.execute("DROP TABLE e2e_room_keys")
    assert_fails(
        Service(tmp_path, homeserver.url), 1, "database: ", "table e2e_room_keys"
    )


def test_an_unreachable_homeserver(tmp_path: Path) -> None:
    """Without a reachable homeserver the service starts, but is not ready."""
    unreachable = f"http://{HOST}:{free_port()}"
    with Service(tmp_path, unreachable) as service:
        assert json.loads(fetch(f"{service.url}/health")) == {"status": "ok"}
        with pytest.raises(RuntimeError, match=r'503 .*"homeserver":"unavailable"'):
            fetch(f"{service.url}/ready")
        begin = f"Homeserver {unreachable} fails (away), trying again: "
        assert begin in service.log()


def test_a_wrong_configuration(homeserver: Homeserver, tmp_path: Path) -> None:
    """With an invalid configuration the service does not start.

    The error names the file and the option.
    """
    for name, settings, names in (
        ("a", {"shutdown_seconds": "30"}, ["roomkeys.yaml", "shutdown_seconds"]),
        ("b", {"database": {"args": {"path": SECRET}}}, ["database.args.path"]),
        ("c", {"homeserver": {}}, ["homeserver.url"]),
        ("d", {"homeserver": SECRET}, ["roomkeys.yaml", "homeserver"]),
    ):
        service = Service(tmp_path / name, homeserver.url, settings=settings)
        assert_fails(service, 2, *names)
    service = Service(tmp_path / "e", homeserver.url)
    service.environment = {"ROOMKEYS_PASSWORD": SECRET}
    assert_fails(service, 2, "ROOMKEYS_PASSWORD")
    for name, endpoint in (("g", "tcp:99999"), ("h", "tcp:port=0")):
        service = Service(
            tmp_path / name, homeserver.url, settings={"listeners": [endpoint]}
        )
        assert_fails(
            service, 2, "roomkeys.yaml", f"listeners: '{endpoint}': the port must"
        )
    no_directory = {"listeners": ["unix:/nowhere/socket"]}
    service = Service(tmp_path / "i", homeserver.url, settings=no_directory)
    assert_fails(service, 1, "listeners: unix:/nowhere/socket: ", "No such file")
    absent = {"listeners": ["systemd:domain=INET:index=0"]}
    service = Service(tmp_path / "f", homeserver.url, settings=absent)
    assert_fails(service, 1, "systemd")


def test_a_socket_of_systemd(homeserver: Homeserver, tmp_path: Path) -> None:
    """The service serves on a socket that systemd opened before."""
    settings = {"listeners": ["systemd:domain=INET:index=0"]}
    service = Service(tmp_path, homeserver.url, settings=settings)
    service.program = ("-c", SYSTEMD_ACTIVATION)
    service.environment = {"PORT": str(service.port)}
    with service:
        assert json.loads(fetch(f"{service.url}/ready"))["service"] == "ok"


def test_several_start_at_once(
    homeserver: Homeserver,
    database: Callable[[], Mapping[str, Any] | None],
    tmp_path: Path,
) -> None:
    """Several processes can start at the same time on a new, shared database."""
    arguments = database()
    shared = {"name": "sqlite3", "args": {"database": str(tmp_path / "shared.db")}}
    if arguments is not None:
        shared = {"name": "psycopg2", "args": dict(arguments)}
    services = [
        Service(tmp_path / str(n), homeserver.url, settings={"database": shared})
        for n in range(3)
    ]
    with ExitStack() as stack:
        for service in services:
            stack.callback(service.stop)
            service.start_without_waiting()
        for service in services:
            service.wait_until_healthy()
            assert json.loads(fetch(f"{service.url}/ready"))["database"] == "ok"


def test_no_part_of_a_password_is_printed(
    homeserver: Homeserver, postgres: PostgresServer, tmp_path: Path
) -> None:
    """No command prints a password that stands in place of another argument.

    libpq or the server quotes such a password: as an unknown option, as the host or as
    the database.
    """
    reachable = postgres.create_database()
    wrong: list[Mapping[str, Any]] = [
        {"dsn": f"host={HOST} password=my {SECRET} pass"},
        {"host": f"u:{SECRET}@{HOST}", "dbname": "a"},
        {**reachable, "dbname": SECRET},
        {**reachable, "options": f"-c {SECRET}=1"},
    ]
    (tmp_path / "target.yaml").write_text("database: {args: {database: target.db}}")
    commands = [
        ("serve", "--config", "roomkeys.yaml"),
        ("check", "--config", "roomkeys.yaml"),
        ("migrate", "--config", "../target.yaml", "--from", "roomkeys.yaml"),
    ]
    running = [
        Service(
            tmp_path / f"{command[0]}{number}",
            homeserver.url,
            database=args,
            arguments=command,
        ).spawn()
        for number, args in enumerate(wrong)
        for command in commands
    ]
    codes = [process.wait(60) for process in running]
    for process in running:
        assert SECRET not in process.output()
        assert "Traceback" not in process.output()
    assert codes == [2] * 6 + [1, 1, 3] * 2


def test_migrate(homeserver: Homeserver, tmp_path: Path) -> None:
    """``migrate`` reads a Synapse's configuration file and reports the result."""
    source = tmp_path / "homeserver.db"
    with closing(sqlite3.connect(source)) as connection:
        upgrade_tables(connection.cursor(), SQLITE, True)
        connection.execute(
            "INSERT INTO e2e_room_keys_versions VALUES ('@a:b', 1, 'c', '{}', 0, 0)"
        )
        connection.commit()
    configuration = tmp_path / "homeserver.yaml"
    configuration.write_text(
        f"database: {{name: sqlite3, args: {{database: {source}}}}}"
    )
    service = Service(tmp_path / "service", homeserver.url)
    service.arguments = ("migrate", "--from", str(configuration), "--config")
    service.arguments += ("roomkeys.yaml",)
    code, output = service.run_to_end()
    assert code == 0, output
    assert f"From source, SQLite file {source}\n" in output
    assert "\n1 backups copied" in output
    assert output.endswith("DONE: compared 1 backups, 0 keys: equal\n")
    configuration.write_text(f"database: {{password: {SECRET}}}")
    assert_fails(service, 2, f"{configuration}: database: ")


def test_the_command() -> None:
    """The installed command prints version, example configuration and usage."""
    command = Path(sys.executable).with_name("synapse-roomkeys")

    def run(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [command, *arguments],
            check=False,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return done.returncode, done.stdout

    assert run("--version") == (0, f"{__version__}\n")
    assert run("config", "--example") == (0, example())
    code, output = run()
    assert code == 2
    assert "usage: synapse-roomkeys" in output

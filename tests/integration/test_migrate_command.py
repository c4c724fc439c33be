"""The command ``synapse-roomkeys migrate`` as a process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from synapse_roomkeys.service.config import DatabaseConfig

from ..servers.service import Service
from .places import Place
from .test_migrate import (
    ADD_VERSION,
    ALICE,
    BOB,
    VERSIONS,
    fill,
    make_synapses_tables,
    move,
    same,
)

SECRET = "my s3cret"


class Command:
    """The command, with a Synapse's SQLite file and a service's."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.synapse = make_synapses_tables(self.place("homeserver.db"))
        self.service = self.place("roomkeys.db")
        self.yaml = directory / "homeserver.yaml"
        path = self.synapse.config.args["database"]
        self.yaml.write_text(
            f"database: {{name: sqlite3, txn_limit: 5, args: {{database: {path}}}}}"
        )

    def place(self, name: str) -> Place:
        path = str(self.directory / name)
        return Place(DatabaseConfig("sqlite3", {"database": path}))

    def run(self, *arguments: str, **environment: str) -> tuple[int, list[str]]:
        """Run the command; return the exit code and the lines of the output."""
        command = Service(
            self.directory,
            "http://127.0.0.1:1",
            arguments=("migrate", *arguments),
            environment=environment,
        )
        code, output = command.run_to_end()
        return code, output.splitlines()

    def copy(self, *arguments: str) -> tuple[int, list[str]]:
        """Run the command from the Synapse to the service."""
        config = ("--config", "roomkeys.yaml", "--from", str(self.yaml))
        return self.run(*config, *arguments)


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """A command with a filled source."""
    found = Command(tmp_path)
    fill(found.synapse)
    return found


def test_a_target_must_be_named(command: Command) -> None:
    """Without a target no ./roomkeys.db is made. The environment may name the
    target."""
    code, lines = command.run("--from", str(command.yaml))
    assert code == 2
    (line,) = lines
    assert line.startswith("synapse-roomkeys: database.args: must name")
    assert not (command.directory / "roomkeys.db").exists()
    path = f"{command.directory}/other.db"
    code, lines = command.run(
        "--from", str(command.yaml), ROOMKEYS_DATABASE_ARGS_DATABASE=path
    )
    assert code == 0, lines
    assert same(command.synapse, command.place("other.db"))


def test_one_direction(command: Command) -> None:
    """The command needs either --from or --to."""
    config = ("--config", "roomkeys.yaml")
    for arguments in ((), ("--from", "a", "--to", "b")):
        code, lines = command.run(*config, *arguments)
        assert code == 2
        assert "--from" in lines[-1] and "--to" in lines[-1]


def test_there_and_back(command: Command) -> None:
    """Each option takes effect. The last line and the exit code report whether work is
    left."""
    code, lines = command.copy("--dry-run")
    assert (code, lines[-1]) == (0, "DRY RUN: nothing was written")
    assert not (command.directory / "roomkeys.db").exists()
    code, lines = command.copy("--user", ALICE, "--user", BOB)
    assert (code, lines[-1]) == (0, "DONE: compared 4 backups, 1246 keys: equal")
    code, lines = command.copy()
    assert code == 0 and lines[:2] == [
        f"From source, SQLite file {command.directory}/homeserver.db",
        f"to target, SQLite file {command.directory}/roomkeys.db",
    ]
    for place, times in ((command.synapse, 1), (command.service, 2)):
        for _ in range(times):
            move(place, ALICE, 2)
    before = command.service.run(VERSIONS)
    code, lines = command.copy()
    assert code == 1 and lines[-1].startswith("NOT DONE: 1 backups have changed at the")
    assert f"{ALICE} version 2: has changed on both sides" in lines[2]
    code, lines = command.copy("--keep", "target")
    assert code == 0 and lines[-1].startswith("DONE")
    assert command.service.run(VERSIONS) == before
    code, lines = command.copy("--keep", "better")
    assert code == 0 and "1 merged" in lines[2]
    command.service.run(ADD_VERSION, ("@new:x", 5, "a", "{}", 0, 0))
    back = ("--config", "roomkeys.yaml", "--to", str(command.yaml))
    code, lines = command.run(*back, "--keep", "source")
    assert code == 0 and lines[-1].startswith("DONE: compared 6 backups")
    assert same(command.service, command.synapse)


def test_the_same_file(command: Command) -> None:
    """A source equal to the target is a wrong usage, with one line."""
    path = command.synapse.config.args["database"]
    code, lines = command.run(
        "--from", str(command.yaml), ROOMKEYS_DATABASE_ARGS_DATABASE=path
    )
    assert code == 2 and "both are the same tables" in lines[-1]
    assert len(lines) == 3


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_database_away(command: Command, side: str) -> None:
    """The exit code is 3, and the error shows no secret."""
    args: dict[str, Any] = {"host": "127.0.0.1", "port": 1, "password": SECRET}
    environment = {
        f"ROOMKEYS_DATABASE_ARGS_{name.upper()}": str(value)
        for name, value in args.items()
    }
    environment["ROOMKEYS_DATABASE_NAME"] = "psycopg2"
    direction = "--from" if side == "target" else "--to"
    code, lines = command.run(direction, str(command.yaml), **environment)
    assert code == 3, lines
    line = lines[-1]
    assert line.startswith(f"synapse-roomkeys: {side}, PostgreSQL on 127.0.0.1")
    assert "127.0.0.1, port 1" in line and SECRET not in line


def test_help(command: Command) -> None:
    """The help has examples, and the meaning of each exit code."""
    code, lines = command.run("--help")
    text = " ".join(lines)
    assert code == 0
    for part in (
        "examples:",
        "--to homeserver.yaml",
        "exit codes: 0 done",
        "--dry-run",
    ):
        assert part in text

"""Backups that go from the service back into a Synapse, as the documents say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from ..backup_client import Api
from ..contract.base import key, version_path
from ..servers import PostgresServer, Synapse
from ..servers.postgres import binaries
from ..servers.service import Service

DOCUMENT = Path(__file__).parents[2] / "docs/service.rst"
ROOMS = {"!a/+": {"s/+": key(1), "é🔑": key(2, 3, True, {"the": 'k"e\\y\t\n'})}}
MORE = {"!b": {str(number): key() for number in range(200)}}


def commands(synapse: str) -> list[str]:
    """The commands of the document, for a Synapse on PostgreSQL or SQLite."""
    text = DOCUMENT.read_text(encoding="utf-8").partition("\nGoing back\n")[2]
    # The section ends at the next title.
    text = re.split(r"\n\n.+\n===", text)[0]
    lines = re.findall(r"^   (\S.*)$", text, re.MULTILINE)
    other = {"postgres": "sqlite3", "sqlite": "pg_dump"}[synapse]
    drop = {"postgres": "sqlite3", "sqlite": "psql"}[synapse]
    found = [line for line in lines if line.split()[0] not in (other, drop)]
    programs = [line.split()[0] for line in found]
    if synapse == "postgres":
        assert programs == ["pg_dump", "synapse-roomkeys", "psql"]
    else:
        assert programs == ["sqlite3", "synapse-roomkeys", "sqlite3"]
    return found


def write_homeserver_yaml(synapse: Synapse, directory: Path) -> None:
    """Write a Synapse's configuration, with nothing but its database."""
    database = synapse.shared_config()["database"]
    (directory / "homeserver.yaml").write_text(yaml.safe_dump({"database": database}))


def run_command(
    command: str, synapse: Synapse, synapses: Mapping[str, Any] | None, directory: Path
) -> str:
    """Run a command of the document, on databases with names of their own."""
    command = command.replace(
        "/etc/matrix-synapse/homeserver.yaml", str(directory / "homeserver.yaml")
    )
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{binaries(None)}:{os.environ['PATH']}"
    }
    if synapses is None:
        path = "/var/lib/matrix-synapse/homeserver.db"
        args = synapse.shared_config()["database"]["args"]
        command = command.replace(path, str(args["database"]))
    else:
        command = re.sub(r" synapse( |$)", rf" {synapses['dbname']}\1", command)
        environment |= {
            "PGHOST": synapses["host"],
            "PGPORT": str(synapses["port"]),
            "PGUSER": synapses["user"],
            "PGPASSWORD": synapses["password"],
        }
    done = subprocess.run(
        ["sh", "-ec", command],
        cwd=directory,
        env=environment,
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize(
    ("service_engine", "synapse_engine"),
    [("postgres", "postgres"), ("sqlite", "postgres"), ("sqlite", "sqlite")],
)
def test_going_back(
    service_engine: str,
    synapse_engine: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    """Synapse's own endpoints go on where the service has ended, and a copy of what
    they had is kept; the commands are the document's."""

    def new_database(engine: str) -> Mapping[str, Any] | None:
        if engine == "sqlite":
            return None
        server: PostgresServer = request.getfixturevalue("postgres")
        return server.create_database()

    synapses, services = map(new_database, (synapse_engine, service_engine))
    keep, migrate, drop = commands(synapse_engine)
    with Synapse(
        tmp_path / "synapse", database=synapses, module_config=None
    ) as synapse:
        user = synapse.register("back")
        own = Api(synapse.url, user.access_token)
        older = own.create_version()
        own.upload(older, {"!c": {"old": key()}})
        write_homeserver_yaml(synapse, tmp_path)
        move = ("migrate", "--config", "roomkeys.yaml", "--from", "homeserver.yaml")
        moving = Service(tmp_path, synapse.url, database=services, arguments=move)
        code, told = moving.run_to_end()
        assert code == 0, told
        with Service(tmp_path, synapse.url, database=services) as service:
            api = Api(service.url, user.access_token)
            api.upload(older, MORE)
            api.delete(version_path(api.create_version()))
            version = api.create_version({"some": "data"})
            api.upload(version, ROOMS)
            api.upload(version, MORE)
            info = api.info()
        run_command(keep, synapse, synapses, tmp_path)
        (copy,) = tmp_path.glob("synapse-backups.*")
        assert b"!c" in copy.read_bytes() and b"!a/+" not in copy.read_bytes()
        told = run_command(migrate, synapse, synapses, tmp_path)
        assert told.splitlines()[-1].startswith("DONE: ")
        run_command(drop, synapse, synapses, tmp_path)
        assert own.info() == info
        assert own.download(version) == {**ROOMS, **MORE}
        assert own.download(older) == {"!c": {"old": key()}, **MORE}
        new = {"!d": {"new": key()}}
        assert own.upload(version, new) == (int(info["etag"]) + 1, info["count"] + 1)

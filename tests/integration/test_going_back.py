"""Backups that go from the service back into a Synapse, as the documents say."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..backup_client import Api
from ..contract.base import key, version_path
from ..servers import PostgresServer, Synapse
from ..servers.postgres import binaries
from ..servers.service import Service

DOCUMENT = Path(__file__).parents[2] / "docs/service.rst"
ROOMS = {"!a/+": {"s/+": key(1), "é🔑": key(2, 3, True, {"the": 'k"e\\y\t\n'})}}
MORE = {"!b": {str(number): key() for number in range(200)}}


def run_commands(
    synapses: Mapping[str, Any], services: Mapping[str, Any], directory: Path
) -> None:
    """Run what the document says, on databases with names of their own."""
    text = DOCUMENT.read_text(encoding="utf-8").partition("Going back\n")[2]
    commands = text.partition("::\n\n")[2].partition("\n\n")[0]
    programs = [line.split()[0] for line in commands.splitlines()]
    assert programs == ["pg_dump", "psql", "psql"]
    commands = commands.replace(" synapse", f" {synapses['dbname']}")
    commands = commands.replace(" roomkeys", f" {services['dbname']}")
    environment = {
        "PGHOST": services["host"],
        "PGPORT": str(services["port"]),
        "PGUSER": services["user"],
        "PGPASSWORD": services["password"],
        "PATH": f"{binaries(None)}:{os.environ['PATH']}",
    }
    command = ["sh", "-ec", commands]
    subprocess.run(command, cwd=directory, env=environment, check=True)


def test_going_back(postgres: PostgresServer, tmp_path: Path) -> None:
    """Synapse's own endpoints go on where the service has ended."""
    synapses, services = postgres.create_database(), postgres.create_database()
    with Synapse(
        tmp_path / "synapse", database=synapses, module_config=None
    ) as synapse:
        user = synapse.register("back")
        own = Api(synapse.url, user.access_token)
        own.upload(own.create_version(), {"!c": {"old": key()}})
        with Service(tmp_path, synapse.url, database=services) as service:
            api = Api(service.url, user.access_token)
            api.delete(version_path(api.create_version()))
            version = api.create_version({"some": "data"})
            api.upload(version, ROOMS)
            api.upload(version, MORE)
            info = api.info()
        run_commands(synapses, services, tmp_path)
        assert own.info() == info
        assert own.download(version) == {**ROOMS, **MORE}
        new = {"!d": {"new": key()}}
        assert own.upload(version, new) == (int(info["etag"]) + 1, info["count"] + 1)

"""The commands of docs/operating.rst, run as by an operator."""

from __future__ import annotations

import os
import re
import subprocess
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psycopg2

from ..backup_client import Api
from ..contract.base import key, version_path
from ..servers import PostgresServer
from ..servers.debian import locate
from ..servers.fake_homeserver import Homeserver
from ..servers.postgres import binaries
from ..servers.service import Service

DOCUMENT = Path(__file__).parents[2] / "docs/operating.rst"
BEFORE = {"!a": {str(number): key() for number in range(300)}}
AFTER = {"!a": {"late": key()}}


def commands(section: str, engine: str) -> str:
    """Return a section's commands for an engine.

    Args:
        section: the heading of the section.
        engine: the name of the engine in the list of commands.
    """
    text = DOCUMENT.read_text(encoding="utf-8")
    body = text.partition(f"\n{section}\n===")[2].partition("\n===")[0]
    item = body.partition(f"- {engine}::\n\n")[2]
    found = re.match(r"(?: {5,}.*\n)+", item)
    assert found, f"no commands for {engine} in {section!r}"
    return textwrap.dedent(found[0])


def run(text: str, directory: Path, environment: Mapping[str, str]) -> None:
    """Run commands with a shell that exits at the first failure."""
    subprocess.run(
        ["sh", "-ec", text],
        cwd=directory,
        env={**os.environ, **environment},
        check=True,
    )


def write_before_backup(api: Api) -> str:
    """Create a version with 300 keys and return the version."""
    version = api.create_version()
    api.upload(version, BEFORE)
    return version


def write_after_backup(api: Api, version: str) -> str:
    """Upload one more key, then create a newer version; return the newer version."""
    api.upload(version, AFTER)
    return api.create_version()


def check_restored(api: Api, version: str, newer: str) -> None:
    """Check that the backup has the state of the copy and that new versions are unused.

    Args:
        api: the user's client, at the restored service.
        version: the version from before the copy.
        newer: a version created after the copy, therefore unknown now.
    """
    assert api.info()["version"] == version
    assert api.download(version) == BEFORE
    assert api.tally(version)[1] == len(BEFORE["!a"])
    assert api.get(version_path(newer)).status == 404
    # Version numbers are seconds: a number is unused again only in a later second.
    while time.time() < int(newer) + 1:
        time.sleep(0.05)
    assert int(api.create_version()) > int(newer)


def test_backup_and_restore_on_sqlite(homeserver: Homeserver, tmp_path: Path) -> None:
    """An SQLite copy made while the service runs is complete and can be restored."""
    sqlite3 = locate("sqlite3", "sqlite3")
    path = f"{sqlite3.path.parent}:{os.environ['PATH']}"
    environment = {"PATH": path, **sqlite3.environment}
    user = homeserver.new_user()
    with Service(tmp_path, homeserver.url) as service:
        api = Api(service.url, user.access_token)
        version = write_before_backup(api)
        run(commands("Back up the database", "SQLite"), tmp_path, environment)
        newer = write_after_backup(api, version)
        service.stop()
        run(commands("Restore the database", "SQLite"), tmp_path, environment)
        service.start()
        check_restored(api, version, newer)


def test_backup_and_restore_on_postgres(
    homeserver: Homeserver, postgres: PostgresServer, tmp_path: Path
) -> None:
    """A dump made while the service runs is complete and restores to another
    database."""
    database = postgres.create_database()
    restored = f"{database['dbname']}_restored"
    environment = libpq_environment(database)
    user = homeserver.new_user()
    with Service(tmp_path / "old", homeserver.url, database=database) as service:
        api = Api(service.url, user.access_token)
        version = write_before_backup(api)
        run(
            replace_names(commands("Back up the database", "PostgreSQL"), database),
            tmp_path,
            environment,
        )
        newer = write_after_backup(api, version)
    run(
        replace_names(commands("Restore the database", "PostgreSQL"), database),
        tmp_path,
        environment,
    )
    args = {**database, "dbname": restored}
    with Service(tmp_path / "new", homeserver.url, database=args) as service:
        check_restored(Api(service.url, user.access_token), version, newer)


def libpq_environment(database: Mapping[str, Any]) -> dict[str, str]:
    """Return the environment variables for PostgreSQL's programs to reach a
    database."""
    return {
        "PGHOST": database["host"],
        "PGPORT": str(database["port"]),
        "PGUSER": database["user"],
        "PGPASSWORD": database["password"],
        "PATH": f"{binaries(None)}:{os.environ['PATH']}",
    }


def replace_names(text: str, database: Mapping[str, Any]) -> str:
    """Replace the document's names of database and role by a test's names."""
    name = database["dbname"]
    text = text.replace("-O roomkeys ", f"-O {database['user']} ")
    text = text.replace("roomkeys_restored", f"{name}_restored")
    return re.sub(r" roomkeys$", f" {name}", text, flags=re.MULTILINE)


def test_a_second_role_can_use_the_tables(
    homeserver: Homeserver, postgres: PostgresServer, tmp_path: Path
) -> None:
    """A second role, created as documented, can use the tables of the first role."""
    database = postgres.create_database()
    text = DOCUMENT.read_text(encoding="utf-8").partition("password changes\n")[2]
    statements = re.findall(r"``((?:CREATE|ALTER) ROLE roomkeys2 [^`]*)``", text)
    assert len(statements) == 2
    first, second = "first_role", "second_role"
    connection = psycopg2.connect(**database)
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(f"CREATE ROLE {first} LOGIN PASSWORD 'one'")
        cursor.execute(f"ALTER DATABASE {database['dbname']} OWNER TO {first}")
        for statement in statements:
            plain = " ".join(statement.split()).replace("...", "two")
            plain = plain.replace("roomkeys2", second).replace("roomkeys", first)
            cursor.execute(plain)
    connection.close()
    user = homeserver.new_user()
    args = {**database, "user": first, "password": "one"}
    with Service(tmp_path / "one", homeserver.url, database=args) as service:
        version = write_before_backup(Api(service.url, user.access_token))
    args = {**database, "user": second, "password": "two"}
    with Service(tmp_path / "two", homeserver.url, database=args) as service:
        api = Api(service.url, user.access_token)
        assert api.download(version) == BEFORE
        api.upload(version, AFTER)

"""A read-only PostgreSQL: reads are served; writes and /ready get 503."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twisted.internet.defer import inlineCallbacks

from ..contract import Client
from ..contract.base import new_backup
from ..integration.conftest import host_of
from ..servers import PostgresServer, Synapse
from ..servers.accounts import fetch
from .faults import Backup, Serve, Served, Steps, connected, together

END_OTHERS = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
)


def set_read_only(cursor: Any, database: Mapping[str, Any], value: str) -> None:
    """Make new sessions of a database read-only ("on") or read-write ("off")."""
    cursor.execute(
        f"ALTER DATABASE {database['dbname']}"
        f" SET default_transaction_read_only = {value}"
    )


def is_ready(served: Served) -> bool:
    """Whether /ready is 200."""
    try:
        fetch(f"{served.service.url}/ready")
    except RuntimeError:
        return False
    return True


@inlineCallbacks
def test_the_service(postgres: PostgresServer, serve: Serve) -> Steps:
    """While PostgreSQL is read-only, writes and /ready get 503, and a version is shown
    although the count can't be cached. Once new sessions are read-write, the service
    replaces the connections without a restart."""
    database = postgres.create_database()
    served = serve(database)
    backups: list[Backup] = yield served.new_backups(2)
    assert is_ready(served)
    with connected(database) as cursor:
        set_read_only(cursor, database, "on")
        cursor.execute("DELETE FROM roomkeys_counts")
        cursor.execute(END_OTHERS)
        yield together([backup.refuse() for backup in backups])
        yield together([backup.check() for backup in backups])
        assert not is_ready(served)
        cursor.execute("SET default_transaction_read_only = off")
        set_read_only(cursor, database, "off")
    yield together([backup.upload() for backup in backups])
    yield together([backup.check() for backup in backups])
    yield served.wait_until_ready()
    given_up = "(read_only), giving up: ReadOnlySqlTransaction"
    assert given_up in served.service.log()


@inlineCallbacks
def test_synapse(postgres: PostgresServer, tmp_path: Path) -> Steps:
    """While PostgreSQL is read-only, a Synapse with the plugin gives the same answers;
    its connections are managed by Synapse."""
    database = postgres.create_database()
    with Synapse(tmp_path, database=database) as synapse:
        host = host_of(synapse)
        client: Client
        client, version = yield new_backup(host)
        backup = Backup(client, version)
        yield backup.upload()
        with connected(database) as cursor:
            set_read_only(cursor, database, "on")
            cursor.execute("DELETE FROM roomkeys_counts")
            cursor.execute(END_OTHERS)
            yield backup.refuse()
            yield backup.check()
        yield host.close()

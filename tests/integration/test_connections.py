"""The service's connection pool for PostgreSQL."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import inlineCallbacks

from synapse_roomkeys.storage import Transaction, postgres_database

from ..contract import Client
from ..contract.base import Rooms, Steps, key
from ..servers import PostgresServer
from ..sites import Backend, OwnSite


@pytest.fixture(scope="module")
def database(postgres: PostgresServer) -> Mapping[str, Any]:
    """psycopg2's arguments for a new database."""
    return postgres.create_database()


def read_settings(txn: Transaction) -> tuple[str, ...]:
    """Return the server's timeouts and keepalives for the current connection."""
    names = ("tcp_user_timeout", "tcp_keepalives_idle", "tcp_keepalives_interval")
    found = []
    for name in names:
        txn.execute("SELECT current_setting(%s)", (name,))
        found.append(txn.fetchone()[0])
    return tuple(found)


@inlineCallbacks
def test_keepalives_are_set(
    database: Mapping[str, Any],
) -> Steps:
    """Each connection sets the server's keepalives and TCP timeout.

    The server thus drops connections of vanished clients. Settings of the operator take
    precedence.
    """
    for options, expected in (
        ({}, ("10000", "5", "5")),
        ({"options": "-c tcp_keepalives_idle=77"}, ("10000", "77", "5")),
    ):
        pool = postgres_database({**database, **options})
        assert (yield pool.run("read_settings", read_settings)) == expected
        pool.close()


@inlineCallbacks
def test_the_client_encoding_is_utf8(
    database: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Steps:
    """Keys keep every character, because the plugin sets the client encoding itself.

    The operator's environment and connection arguments name another encoding in this
    test.
    """
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    arguments = {**database, "client_encoding": "LATIN1"}
    site = OwnSite(Backend("postgres", arguments, Path()))
    yield site.start()
    client = Client(site.host, site.host.new_user())
    version: str = yield client.create_version()
    rooms: Rooms = {"!\u00e9": {"\u20ac": key(data="\U0001f511")}}
    yield client.upload(version, rooms)
    assert (yield client.download(version)) == rooms
    yield site.stop()

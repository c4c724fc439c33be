"""Who waits for whom, on PostgreSQL, one step at a time."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import psycopg2
import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.task import deferLater

from ..contract import Answer, Client
from ..contract.base import key, keys_path, wrapped
from ..servers import PostgresServer
from ..sites import Backend, OwnSite

Steps = Generator[Deferred[Any], Any, None]
UPLOAD = wrapped({"!room": {"s": key()}})


@pytest.fixture(scope="module")
def backend(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Backend:
    """A database on PostgreSQL alone: SQLite has one lock for everything."""
    path = tmp_path_factory.mktemp("locks") / "unused"
    return Backend("postgres", postgres.create_database(), path)


@pytest.fixture
def other(site: OwnSite) -> Iterator[Any]:
    """Another process' transaction, which the test takes step by step."""
    connection = psycopg2.connect(**(site.backend.arguments or {}))
    yield connection
    connection.rollback()
    connection.close()


@inlineCallbacks
def until_waiting(site: OwnSite) -> Generator[Deferred[Any], Any, None]:
    """Wait until somebody waits for a row's lock."""
    watcher = psycopg2.connect(**(site.backend.arguments or {}))
    watcher.autocommit = True
    cursor = watcher.cursor()
    try:
        for _ in range(500):
            cursor.execute("SELECT 1 FROM pg_locks WHERE NOT granted")
            if cursor.fetchone():
                return
            yield deferLater(reactor, 0.02)
        raise AssertionError("nobody waits")
    finally:
        watcher.close()


@inlineCallbacks
def test_an_upload_that_waited_for_a_new_version_is_refused(
    site: OwnSite, other: Any
) -> Steps:
    """What was current when the upload looked need not be when its turn comes."""
    client = Client(site.host, site.host.new_user())
    version: str = yield client.create_version()
    newer = int(version) + 1
    cursor = other.cursor()
    user = client.user.user_id
    cursor.execute(
        "SELECT 1 FROM e2e_room_keys_versions WHERE user_id = %s FOR UPDATE", (user,)
    )
    cursor.execute(
        "INSERT INTO e2e_room_keys_versions (user_id, version, algorithm, auth_data)"
        " VALUES (%s, %s, 'm', '{}')",
        (user, newer),
    )
    upload = client.put(keys_path(version), UPLOAD)
    yield until_waiting(site)
    other.commit()
    answer: Answer = yield upload
    assert (answer.status, answer.json["current_version"]) == (403, str(newer))
    assert (yield client.tally(version)) == (0, 0)


@inlineCallbacks
def test_a_new_version_waits_for_an_upload(site: OwnSite, other: Any) -> Steps:
    """A version isn't replaced while keys are being written to it."""
    client = Client(site.host, site.host.new_user())
    version: str = yield client.create_version()
    other.cursor().execute(
        "UPDATE e2e_room_keys_versions SET etag = 1 WHERE user_id = %s",
        (client.user.user_id,),
    )
    created = client.create_version()
    yield until_waiting(site)
    assert not created.called
    other.commit()
    newer: str = yield created
    assert int(newer) > int(version)


@inlineCallbacks
def test_an_upload_that_waited_for_another_looks_again(
    site: OwnSite, other: Any
) -> Steps:
    """A key that another upload wrote meanwhile is merged, not written over."""
    client = Client(site.host, site.host.new_user())
    version: str = yield client.create_version()
    cursor = other.cursor()
    user = client.user.user_id
    cursor.execute(
        "UPDATE e2e_room_keys_versions SET etag = 1 WHERE user_id = %s", (user,)
    )
    cursor.execute(
        "INSERT INTO e2e_room_keys VALUES (%s, '!room', 's', %s, 0, 0, true, %s)",
        (user, version, '"best"'),
    )
    upload = client.put(keys_path(version), UPLOAD)
    yield until_waiting(site)
    other.commit()
    answer: Answer = yield upload
    assert answer.json == {"etag": "1", "count": 1}
    assert (yield client.download(version)) == {
        "!room": {"s": key(verified=True, data="best")}
    }

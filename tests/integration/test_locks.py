"""Waits for locks on PostgreSQL, step by step."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import psycopg2
import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.task import deferLater

from synapse_roomkeys.storage.postgres_engine import PostgresTransaction

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


@pytest.fixture(params=["adds", "looks"], autouse=True)
def way(site: OwnSite, request: pytest.FixtureRequest) -> str:
    """The first statement of an upload: the insertion of new keys ("adds"), or the
    query of stored keys ("looks")."""
    met_stored = site.guess._met_stored
    met_stored[:] = bytes([request.param == "looks"]) * len(met_stored)
    way: str = request.param
    return way


@pytest.fixture
def other(site: OwnSite) -> Iterator[Any]:
    """Another process' transaction, under the test's control."""
    connection = psycopg2.connect(**(site.backend.arguments or {}))
    yield connection
    connection.rollback()
    connection.close()


@inlineCallbacks
def until_waiting(site: OwnSite) -> Generator[Deferred[Any], Any, None]:
    """Wait until a transaction waits for a row lock."""
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
    """An upload that gets the lock after the creation of a newer version is refused."""
    client = Client(site.host, site.host.new_user())
    version: str = yield client.create_version()
    yield client.info()
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
    """A new version waits for the end of an upload to the current version."""
    client = Client(site.host, site.host.new_user())
    version: str = yield client.create_version()
    yield client.info()
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
    """A key from another upload during the wait is merged, not overwritten."""
    client = Client(site.host, site.host.new_user())
    version: str = yield client.create_version()
    yield client.info()
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


@inlineCallbacks
def test_a_key_that_was_added_without_a_lock_is_merged(
    site: OwnSite, other: Any, way: str
) -> Steps:
    """Synapse's own endpoints take no lock. If they insert a key of an upload, the
    upload's insertion fails and the upload merges. An upload that has queried the
    stored keys overwrites the key."""
    client = Client(site.host, site.host.new_user())
    version: str = yield client.create_version()
    yield client.info()
    user = client.user.user_id
    for session, verified, index in (("best", True, 0), ("worst", False, 9)):
        other.cursor().execute(
            "INSERT INTO e2e_room_keys"
            " VALUES (%s, '!room', %s, %s, %s, 0, %s, '\"old\"')",
            (user, session, version, index, verified),
        )
    new = {name: key(1, data="new") for name in ("best", "new", "worst")}
    upload = client.put(keys_path(version), wrapped({"!room": new}))
    yield until_waiting(site)
    other.commit()
    answer: Answer = yield upload
    assert answer.json == {"etag": "1", "count": 3}
    assert (yield client.tally(version)) == (1, 3)
    kept = {"best": key(verified=True, data="old")} if way == "adds" else {}
    assert (yield client.download(version)) == {"!room": {**new, **kept}}


@inlineCallbacks
def test_new_keys_are_added_without_a_look(
    site: OwnSite, way: str, monkeypatch: pytest.MonkeyPatch
) -> Steps:
    """An upload begins with a query only if the user's last upload contained stored
    sessions, because an insertion would likely fail again."""
    client = Client(site.host, site.host.new_user())
    version: str = yield client.create_version()
    done = noted(site, monkeypatch)
    if way == "looks":
        yield client.upload(version, {"!room": {"0": key()}})
        assert done == ["find"]
        done.clear()
    for count, session, wanted in (
        (2, "1", ["add"]),
        (3, "2", ["add"]),
        (3, "2", ["add", "find"]),
        (3, "1", ["find"]),
        (4, "3", ["find"]),
        (5, "4", ["add"]),
    ):
        count -= way == "adds"
        tally = yield client.upload(version, {"!room": {session: key()}})
        assert (tally, done) == ((count, count), wanted)
        done.clear()


def noted(site: OwnSite, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that collects the steps of later uploads."""
    done: list[str] = []
    for name, method in (("add", "insert"), ("find", "find")):
        step: Any = getattr(site.store._uploads, method)

        def note(*args: Any, name: str = name, step: Any = step) -> Any:
            done.append(name)
            return step(*args)

        monkeypatch.setattr(site.store._uploads, method, note)
    return done


@inlineCallbacks
def test_a_wrong_guess_and_no_count_take_four_messages(
    site: OwnSite, other: Any, way: str, monkeypatch: pytest.MonkeyPatch
) -> Steps:
    """An upload of one batch takes four messages at most: it locks and fails to insert,
    reads, writes, and recounts. After an upload with stored keys, the next upload saves
    the first message."""
    client = Client(site.host, site.host.new_user())
    version: str = yield client.create_version()
    etag, _ = yield client.upload(version, {"!room": {"1": key(index=9)}})
    if way == "looks":
        etag, _ = yield client.upload(version, {"!room": {"1": key(index=8)}})
    other.cursor().execute("DELETE FROM roomkeys_counts")
    other.commit()
    sent = messages(monkeypatch)
    better = {"!room": {"1": key(), "2": key()}}
    assert (yield client.upload(version, better)) == (etag + 1, 2)
    write = ["WITH", "INSERT", "INSERT", "UPDATE"]
    lock_and_write = ["SELECT", *write]
    if way == "adds":
        assert sent == [lock_and_write, ["WITH"], write, ["INSERT"]]
    else:
        assert sent == [["WITH"], lock_and_write, ["INSERT"]]


def messages(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return a list that collects later messages: the first word of each statement,
    without settings."""
    sent: list[list[str]] = []
    execute = PostgresTransaction.execute

    def note(self: Any, statement: str, parameters: Any = ()) -> Any:
        words = [part.split()[0] for part in statement.split(";")]
        sent.append([word for word in words if word != "SET"])
        return execute(self, statement, parameters)

    monkeypatch.setattr(PostgresTransaction, "execute", note)
    return sent


@inlineCallbacks
def test_what_is_not_new_is_not_added(site: OwnSite, way: str) -> Steps:
    """A single stored session makes an upload query the stored keys before writing."""
    client = Client(site.host, site.host.new_user())
    version: str = yield client.create_version()
    assert (yield client.upload(version, {"!room": {"1": key(index=5)}})) == (1, 1)
    rooms = {"!room": {"1": key(index=7), "2": key()}, "!other": {"1": key()}}
    assert (yield client.upload(version, rooms)) == (2, 3)
    better = {"!room": {"1": key(index=3), "3": key()}}
    assert (yield client.upload(version, better)) == (3, 4)
    got = yield client.download(version)
    assert got["!room"]["1"] == key(index=3)
    assert {room: set(sessions) for room, sessions in got.items()} == {
        "!room": {"1", "2", "3"},
        "!other": {"1"},
    }


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM roomkeys_counts",
        "UPDATE roomkeys_counts SET etag = 0, key_count = 9",
    ],
)
@inlineCallbacks
def test_a_count_that_is_not_cached(
    site: OwnSite, other: Any, way: str, change: str
) -> Steps:
    """Without a valid cached count, the keys are counted after the upload."""
    client = Client(site.host, site.host.new_user())
    version: str = yield client.create_version()
    yield client.info()
    yield client.upload(version, {"!room": {"1": key()}})
    where = " WHERE user_id = %s"
    other.cursor().execute(change + where, (client.user.user_id,))
    other.commit()
    assert (yield client.upload(version, {"!room": {"2": key()}})) == (2, 2)


@inlineCallbacks
def test_a_count_that_is_old(
    site: OwnSite, other: Any, way: str, monkeypatch: pytest.MonkeyPatch
) -> Steps:
    """After an upload with an expired count, all keys are recounted, also keys of other
    processes that left the etag unchanged."""
    client = Client(site.host, site.host.new_user())
    version: str = yield client.create_version()
    done = noted(site, monkeypatch)
    cursor = other.cursor()
    user = client.user.user_id
    cursor.execute(
        "INSERT INTO e2e_room_keys VALUES (%s, '!room', 's', %s, 0, 0, true, '1')",
        (user, version),
    )
    cursor.execute(
        "UPDATE roomkeys_counts SET counted_ts = counted_ts - 3601 WHERE user_id = %s",
        (user,),
    )
    other.commit()
    assert (yield client.upload(version, {"!room": {"1": key()}})) == (1, 2)
    assert done == ["add" if way == "adds" else "find"]
    assert (yield client.upload(version, {"!room": {"2": key()}})) == (2, 3)


@inlineCallbacks
def test_an_upload_waits_for_a_count_that_is_being_kept(
    site: OwnSite, other: Any
) -> Steps:
    """An upload waits for a transaction that caches a count, and adds the upload's keys
    to this count."""
    client = Client(site.host, site.host.new_user())
    version: str = yield client.create_version()
    yield client.info()
    yield client.upload(version, {"!room": {"1": key()}})
    other.cursor().execute(
        "UPDATE roomkeys_counts SET counted_ts = counted_ts WHERE user_id = %s",
        (client.user.user_id,),
    )
    upload = client.upload(version, {"!room": {"2": key()}})
    yield until_waiting(site)
    other.commit()
    assert (yield upload) == (2, 2)
    assert (yield client.tally(version)) == (2, 2)


@inlineCallbacks
def test_a_count_that_is_locked(site: OwnSite, other: Any) -> Steps:
    """GET of a version returns the count of keys while another process locks the row of
    the cached count."""
    client = Client(site.host, site.host.new_user())
    version: str = yield client.create_version()
    yield client.upload(version, {"!room": {"1": key()}})
    other.cursor().execute(
        "UPDATE roomkeys_counts SET counted_ts = 0 WHERE user_id = %s",
        (client.user.user_id,),
    )
    other.commit()
    other.cursor().execute(
        "SELECT 1 FROM roomkeys_counts WHERE user_id = %s FOR UPDATE",
        (client.user.user_id,),
    )
    assert (yield client.tally(version)) == (1, 1)

"""Record, undo and the sweeper on real databases and in a Synapse."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from typing import Any

import pytest
from pytest_twisted import blockon
from twisted.internet import reactor
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.task import deferLater

from synapse_roomkeys.storage import Transaction
from synapse_roomkeys.types import RecordedChange, Restore, Retention, VersionRecord

from ..client import HttpHost
from ..contract import Client
from ..contract.base import Rooms, accepted, key, keys_path, version_path
from ..servers import Synapse
from ..sites import Backend, OwnSite
from .test_synapse import DEADLINE, count_rows

Steps = Generator[Deferred[Any], Any, None]
OPERATOR = "@admin:test.example"
FORCED = Restore(None, None, 0, is_forced=True)


@pytest.fixture(scope="module")
def kept(backend: Backend) -> Iterator[OwnSite]:
    """A server that keeps deleted versions for three days."""
    site = OwnSite(backend, retention=Retention(deleted_versions_days=3))
    blockon(site.start())
    yield site
    blockon(site.stop())


@inlineCallbacks
def test_a_lossy_upload_is_undone(kept: OwnSite) -> Steps:
    """An operator gives keys back that verified keys replaced, and takes that back."""
    client = Client(kept.host, kept.host.new_user())
    user_id = client.user.user_id
    version: str = yield client.create_version()
    old: Rooms = {"!a": {f"{i}": key(index=1, data=f"old{i}") for i in range(300)}}
    lossy: Rooms = {
        "!a": {f"{i}": key(index=9, verified=True, data="new") for i in range(250)}
    }
    yield client.upload(version, old)
    yield client.upload(version, {**lossy, "!b": {"other": key()}})
    handler = kept.handler
    by_the_rule = Restore("!a", None, 0, is_forced=False)
    restored = yield handler.restore_room_keys(user_id, version, by_the_rule, OPERATOR)
    assert restored == 0
    one = Restore("!a", "7", 0, is_forced=True)
    assert (yield handler.restore_room_keys(user_id, version, one, OPERATOR)) == 1
    assert (yield client.tally(version)) == (3, 301)
    since = int(1000 * time.time())
    restored = yield handler.restore_room_keys(user_id, version, FORCED, OPERATOR)
    assert restored == 249
    assert (yield client.download(version)) == {**old, "!b": {"other": key()}}
    assert (yield client.tally(version)) == (4, 301)
    back = Restore(None, None, since, is_forced=True)
    assert (yield handler.restore_room_keys(user_id, version, back, OPERATOR)) == 249
    downloaded: Rooms = yield client.download(version)
    expected = {**old["!a"], **lossy["!a"], "7": old["!a"]["7"]}
    assert downloaded["!a"] == expected
    record: VersionRecord = yield kept.store.get_version_record(user_id, int(version))
    told = [(c.act, c.etag, c.stored, c.replaced) for c in record.changes]
    assert told == [
        ("create_version", 0, 0, 0),
        ("upload", 1, 300, 0),
        ("upload", 2, 1, 250),
        ("restore_keys", 3, 0, 1),
        ("restore_keys", 4, 0, 249),
        ("restore_keys", 5, 0, 249),
    ]
    assert record.whole_from == 0


@inlineCallbacks
def test_a_deleted_version_comes_back(kept: OwnSite) -> Steps:
    """A reset is undone: the old version is current again after the new one's end."""
    client = Client(kept.host, kept.host.new_user())
    user_id = client.user.user_id
    version: str = yield client.create_version()
    rooms: Rooms = {"!a": {f"{i}": key() for i in range(10)}}
    yield client.upload(version, rooms)
    accepted((yield client.delete(version_path(version))))
    newer: str = yield client.create_version()
    yield kept.handler.restore_version(user_id, version, OPERATOR)
    assert (yield client.download(version)) == rooms
    info = yield client.info()
    assert info["version"] == newer
    accepted((yield client.delete(version_path(newer))))
    info = yield client.info()
    assert (info["version"], info["etag"], info["count"]) == (version, "2", 10)
    # The version takes uploads again.
    assert (yield client.upload(version, {"!b": {"new": key()}})) == (3, 11)
    changes: tuple[RecordedChange, ...] = yield kept.store.get_user_record(user_id, 0)
    acts = [change.act for change in changes]
    assert acts.count("delete_version") == 2
    assert acts[-1] == "upload" and "restore_version" in acts


@inlineCallbacks
def test_two_sweepers_delete_once(backend: Backend, kept: OwnSite) -> Steps:
    """Two processes that are woken together delete all keys of a deleted version."""
    one = OwnSite(backend, kept.auth)
    two = OwnSite(backend, kept.auth)
    for site in (one, two):
        yield site.start()
    client = Client(one.host, one.host.new_user())
    version: str = yield client.create_version()
    for part in range(3):
        size = one.engine.swept_at_once
        rooms: Rooms = {f"!{part}": {f"{i}": key() for i in range(size)}}
        yield client.upload(version, rooms)
    accepted((yield client.delete(version_path(version))))
    two.sweeper.wake()
    user_id = client.user.user_id
    yield until_no_keys(one, user_id)
    assert (yield client.get(keys_path(version))).status == 404
    for site in (one, two):
        yield site.stop()


@inlineCallbacks
def until_no_keys(site: OwnSite, user_id: str) -> Steps:
    """Wait until no row of a user's keys is left."""

    def count(txn: Transaction) -> int:
        statement = "SELECT COUNT(*) FROM e2e_room_keys WHERE user_id = :user_id"
        txn.execute(statement, {"user_id": user_id})
        number: int = txn.fetchone()[0]
        return number

    def prepared(txn: Transaction) -> int:
        return count(site.backend.engine.prepare(txn))

    end = time.monotonic() + DEADLINE
    while (yield site.database.run("count", prepared)):
        assert time.monotonic() < end
        yield deferLater(reactor, 0.05)


@inlineCallbacks
def test_a_synapse_sweeps(synapse: Synapse, synapse_host: HttpHost) -> Steps:
    """In a Synapse too, the keys of a deleted version are deleted in the background."""
    client = Client(synapse_host, synapse_host.new_user())
    version: str = yield client.create_version()
    yield client.upload(version, {"!a": {f"{i}": key() for i in range(100)}})
    accepted((yield client.delete(version_path(version))))
    end = time.monotonic() + DEADLINE
    while count_rows(synapse, "e2e_room_keys", client.user.user_id):
        assert time.monotonic() < end
        yield deferLater(reactor, 0.05)
    assert count_rows(synapse, "roomkeys_changes", client.user.user_id) == 3

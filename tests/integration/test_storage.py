"""The store on real engines: tables made at once, writers at once, faults between."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from itertools import product
from typing import Any

import pytest
from pytest_twisted import blockon
from twisted.internet.defer import Deferred, gatherResults, inlineCallbacks

from synapse_roomkeys.storage import check_tables, upgrade_tables

from ..contract import Answer, Client, User
from ..contract.base import Rooms, key, keys_path, version_path, wrapped
from ..sites import Backend, OwnSite

Steps = Generator[Deferred[Any], Any, None]
ROOM = "!room"


@pytest.fixture(scope="module")
def sites(backend: Backend) -> Iterator[tuple[OwnSite, OwnSite]]:
    """Two servers on one database, as two processes would be, that know the same
    users."""
    one = OwnSite(backend)
    two = OwnSite(backend, one.auth)
    both = gatherResults([one.start(), two.start()])
    blockon(both)
    yield one, two
    for site in (one, two):
        blockon(site.stop())


def clients(sites: tuple[OwnSite, OwnSite]) -> tuple[Client, Client]:
    """One new user, at both servers."""
    user: User = sites[0].host.new_user()
    return Client(sites[0].host, user), Client(sites[1].host, user)


@inlineCallbacks
def test_tables_may_be_made_by_several_at_once(backend: Backend) -> Steps:
    """Processes that start together find the tables made, by one of them or another."""
    pools = [backend.connect() for _ in range(4)]
    engine = backend.engine
    yield gatherResults(
        [pool.run("upgrade", upgrade_tables, engine, True) for pool in pools * 3]
    )
    problem: str | None = yield pools[0].run("check", check_tables, engine)
    assert problem is None
    for pool in pools:
        pool.close()


@inlineCallbacks
def test_uploads_at_two_servers_lose_nothing(
    sites: tuple[OwnSite, OwnSite],
) -> Steps:
    """Overlapping uploads leave the best of each key, and each moves the etag once."""
    both = clients(sites)
    version: str = yield both[0].create_version()
    uploads: list[Rooms] = [
        {ROOM: {f"own{n}": key(), **{f"s{i}": key(index=n + 1) for i in range(50)}}}
        for n in range(20)
    ]
    answers = yield gatherResults(
        [both[n % 2].upload(version, rooms) for n, rooms in enumerate(uploads)]
    )
    assert sorted(etag for etag, _ in answers) == list(range(1, 21))
    info: dict[str, Any] = yield both[1].info()
    assert (info["etag"], info["count"]) == ("20", 70)
    rooms: Rooms = yield both[0].download(version)
    assert len(rooms[ROOM]) == 70
    assert all(rooms[ROOM][f"s{i}"] == key(index=1) for i in range(50))


@inlineCallbacks
def test_versions_made_at_two_servers_differ(sites: tuple[OwnSite, OwnSite]) -> Steps:
    """A user without a backup, who makes several at once, gets as many versions."""
    for _ in range(5):
        both = clients(sites)
        versions = yield gatherResults([client.create_version() for client in both * 4])
        assert len(set(versions)) == 8
        info: dict[str, Any] = yield both[0].info()
        assert info["version"] == max(versions, key=int)


@inlineCallbacks
def test_an_upload_at_the_end_of_a_version(sites: tuple[OwnSite, OwnSite]) -> Steps:
    """An upload that meets a deletion, or a new version, is stored or refused: no
    deleted version keeps a key, and no answer is a fault."""
    for attempt, ends in product(range(10), ("delete", "create")):
        both = clients(sites)
        version: str = yield both[0].create_version()
        rooms: Rooms = {ROOM: {f"{i}": key() for i in range(attempt * 20 + 1)}}
        end: Deferred[Any] = (
            both[1].delete(version_path(version))
            if ends == "delete"
            else both[1].create_version()
        )
        upload = both[0].put(keys_path(version), wrapped(rooms))
        _, answer = yield gatherResults([end, upload])
        assert answer.status in ((200, 404) if ends == "delete" else (200, 403))
        left: Answer = yield both[0].get(keys_path(version))
        if ends == "delete":
            assert left.status == 404
            newer: str = yield both[1].create_version()
            assert int(newer) > int(version)
        else:
            kept = left.json["rooms"].get(ROOM, {"sessions": {}})["sessions"]
            assert len(kept) == (len(rooms[ROOM]) if answer.status == 200 else 0)


@inlineCallbacks
def test_a_backup_of_another_locale_is_paged_whole(site: OwnSite) -> Steps:
    """Ids of any script come out once each, whatever order the database puts them
    in."""
    client = Client(site.host, site.host.new_user())
    version: str = yield client.create_version()
    letters = "aAzZ_-+/éÉßÄ日本\U0001f511 .!~"
    rooms: Rooms = {
        f"!{a}{b}": {f"{a}{i}": key() for i in range(9)}
        for a, b in product(letters, letters)
    }
    yield client.upload(version, rooms)
    got: Rooms = yield client.download(version)
    assert got == rooms

"""A Synapse process with the plugin beside a process without, as in a rolling
restart."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any

import attrs
import psycopg2
import pytest
from pytest_twisted import blockon
from twisted.internet import reactor
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.task import deferLater

from ..client import HttpHost
from ..contract import Answer, Client
from ..contract.base import Rooms, Steps, key, keys_path, same, tally, wrapped
from ..servers import PostgresServer, Synapse
from .conftest import host_of
from .test_synapse import query
from .test_synapse_race import wait_for_log

ROOM = "!room"
#: Timeout, in seconds, until the built-in endpoint waits for a row lock.
DEADLINE = 30.0


@attrs.frozen
class Fleet:
    """Two Synapse processes of a homeserver.

    Attributes:
        plugin: the process with the plugin.
        hosts: the process with the plugin and the process with Synapse's own endpoints.
    """

    plugin: Synapse
    hosts: tuple[HttpHost, HttpHost]

    def clients(self) -> tuple[Client, Client]:
        """Return two clients of a new user, one for each process."""
        user = self.hosts[0].new_user()
        return Client(self.hosts[0], user), Client(self.hosts[1], user)


@pytest.fixture(scope="module")
def fleet(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    """Two processes on one database.

    The second starts when the first has ended the background updates, because
    concurrent background updates would fail in both.
    """
    directory = tmp_path_factory.mktemp("fleet")
    database = postgres.create_database()
    extra = {"background_updates": {"sleep_enabled": False}}
    with Synapse(directory / "1", database=database, extra_config=extra) as plugin:
        wait_for_log(plugin, "No more background updates to do")
        with Synapse(directory / "2", database=database, module_config=None) as builtin:
            hosts = host_of(plugin), host_of(plugin, builtin.url)
            yield Fleet(plugin, hosts)
            for host in hosts:
                blockon(host.close())


@inlineCallbacks
def upload_during_a_builtin_upload(
    fleet: Fleet, clients: tuple[Client, Client], version: str, uploads: int
) -> Generator[Deferred[Any], Any, Rooms]:
    """Upload through the plugin while an upload of the built-in endpoint waits.

    The built-in endpoint has read the etag by then and waits for a row lock. The
    Deferred fires with all keys whose uploads were acknowledged.

    Args:
        fleet: the two processes.
        clients: two clients of one user, that of the plugin first.
        version: the version of the backup.
        uploads: the number of uploads through the plugin.
    """
    database: Any = fleet.plugin.database
    with closing(psycopg2.connect(**database)) as other:
        other.cursor().execute(
            "INSERT INTO e2e_room_keys VALUES (%s, %s, 'builtin', %s, 0, 0, true, '1')",
            (clients[0].user.user_id, ROOM, int(version)),
        )
        rooms: Rooms = {ROOM: {"builtin": key()}}
        waiting = clients[1].put(keys_path(version), wrapped(rooms))
        deadline = time.monotonic() + DEADLINE
        while not query(fleet.plugin, "SELECT 1 FROM pg_locks WHERE NOT granted"):
            assert time.monotonic() < deadline, "the upload doesn't wait"
            yield deferLater(reactor, 0.02)
        for number in range(uploads):
            new = {f"plugin{number}": key()}
            yield clients[0].upload(version, {ROOM: new})
            rooms[ROOM].update(new)
        other.rollback()
    answer: Answer = yield waiting
    assert tally(answer)[1] == uploads + 1
    return rooms


@inlineCallbacks
def test_two_changes_may_share_an_etag(fleet: Fleet) -> Steps:
    """Concurrent uploads through both processes may end with the same etag; no key is
    lost.

    The plugin's count then lacks the other process's keys until the cached count
    expires after one hour (3,600 s) or is deleted.
    """
    for end in (
        "UPDATE roomkeys_counts SET counted_ts = counted_ts - 3601",
        "DELETE FROM roomkeys_counts",
    ):
        clients = fleet.clients()
        version: str = yield clients[0].create_version()
        rooms: Rooms = yield upload_during_a_builtin_upload(fleet, clients, version, 1)
        assert (yield clients[0].tally()) == (1, 1)
        assert (yield clients[1].tally()) == (1, 2)
        same((yield clients[0].download(version)), rooms)
        query(fleet.plugin, end)
        assert (yield clients[0].tally()) == (1, 2)


@inlineCallbacks
def test_an_etag_may_decrease(fleet: Fleet) -> Steps:
    """The etag may decrease after concurrent uploads; no key is lost.

    The plugin recounts immediately, because the etag differs from that of the cached
    count.
    """
    clients = fleet.clients()
    version: str = yield clients[0].create_version()
    rooms: Rooms = yield upload_during_a_builtin_upload(fleet, clients, version, 2)
    for client in clients:
        assert (yield client.tally()) == (1, 3)
        same((yield client.download(version)), rooms)


@inlineCallbacks
def test_sequential_uploads_are_counted(fleet: Fleet) -> Steps:
    """Both processes report exact counts for uploads that are not concurrent."""
    clients = fleet.clients()
    version: str = yield clients[0].create_version()
    for number in range(4):
        rooms: Rooms = {ROOM: {f"{number}": key()}}
        assert (yield clients[number % 2].upload(version, rooms)) == (
            number + 1,
            number + 1,
        )
        for client in clients:
            assert (yield client.tally()) == (number + 1, number + 1)


@inlineCallbacks
def test_each_process_has_its_merge_rule(fleet: Fleet) -> Steps:
    """Each process applies its own merge rule.

    Synapse's own endpoint replaces a key by a key that the specification ranks lower;
    the plugin keeps the better key.
    """
    better, worse = key(0, 1, True), key(5, 0, True)
    for process, stored in ((0, better), (1, worse)):
        clients = fleet.clients()
        version: str = yield clients[0].create_version()
        yield clients[0].upload(version, {ROOM: {"s": better}})
        yield clients[process].upload(version, {ROOM: {"s": worse}})
        same((yield clients[0].download(version)), {ROOM: {"s": stored}})

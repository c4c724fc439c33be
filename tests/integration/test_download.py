"""Large downloads out of a real Synapse: what they cost in memory, and how they end."""

from __future__ import annotations

import json
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import psycopg2
import pytest

from ..servers import Synapse, User
from ..servers.accounts import fetch

KEYS = 100_000
#: As long as a real one, in its JSON text.
SESSION_DATA = json.dumps({"ciphertext": "x" * 820, "mac": "y" * 11, "ephemeral": "z"})
VERSION = 1_700_000_000
PATH = f"/_matrix/client/v3/room_keys/keys?version={VERSION}"
#: What a download may add to the memory of the process: a few pages of 0.4 MB.
BOUND = 20 * 1024 * 1024
#: The same for twenty of large keys, and for what is read of these at once.
LARGE_BOUND = 100 * 1024 * 1024
STALLED_SECONDS = 2


@pytest.fixture(scope="module")
def synapse(
    database: Callable[[], Mapping[str, Any] | None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Synapse]:
    """A Synapse that drops readers soon."""
    directory = tmp_path_factory.mktemp("synapse")
    config = {"stalled_download_seconds": STALLED_SECONDS}
    with Synapse(directory, database=database(), module_config=config) as server:
        yield server


@pytest.fixture(scope="module")
def user(synapse: Synapse) -> User:
    """A user with a large backup, one download of which is done already."""
    user = synapse.register("large")
    store(synapse, user, KEYS, SESSION_DATA)
    assert read_fast(synapse, user, [])[0] == KEYS
    return user


def store(synapse: Synapse, user: User, keys: int, session_data: str) -> None:
    """Give a user a backup, past the server."""
    if synapse.database is None:
        path = synapse.directory / "homeserver.db"
        with sqlite3.connect(path, timeout=30) as connection:
            fill(connection, "?", user.user_id, keys, session_data)
        connection.close()
    else:
        with psycopg2.connect(**synapse.database) as connection:
            fill(connection.cursor(), "%s", user.user_id, keys, session_data)
        connection.close()


def fill(cursor: Any, mark: str, user_id: str, keys: int, session_data: str) -> None:
    """Put keys into the tables, a tenth of them into each room."""
    cursor.execute(
        "INSERT INTO e2e_room_keys_versions (user_id, version, algorithm, auth_data,"
        f" etag) VALUES ({mark}, {VERSION}, 'm', '{{}}', 1)",
        (user_id,),
    )
    cursor.execute(
        "WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n"
        f" WHERE i < {keys - 1}) INSERT INTO e2e_room_keys (user_id, version, room_id,"
        " session_id, first_message_index, forwarded_count, is_verified, session_data)"
        f" SELECT {mark}, {VERSION}, '!room' || (i / {keys // 10}),"
        f" 'session' || i, 0, 0, i < 0, {mark} FROM n",
        (user_id, session_data),
    )


def connect(synapse: Synapse, user: User) -> socket.socket:
    """A connection on which the download has been asked for."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
    connection.settimeout(30)
    host, _, port = synapse.url.removeprefix("http://").partition(":")
    connection.connect((host, int(port)))
    connection.sendall(
        f"GET {PATH} HTTP/1.1\r\nHost: test.example\r\n"
        f"Authorization: Bearer {user.access_token}\r\n\r\n".encode()
    )
    return connection


def read_fast(synapse: Synapse, user: User, sizes: list[int]) -> tuple[int, int]:
    """Read as fast as the connection gives; the keys and the bytes that came.

    Args:
        sizes: is given the process' memory, after each few MiB.
    """
    keys = total = 0
    tail = b""
    with connect(synapse, user) as connection:
        while not tail.endswith(b"0\r\n\r\n"):
            data = connection.recv(1024 * 1024)
            assert data, "the connection ended before the answer did"
            keys += (tail[-13:] + data).count(b'"session_data"')
            if total // 2**22 != (total + len(data)) // 2**22:
                sizes.append(synapse.rss_bytes())
            total += len(data)
            tail = (tail + data)[-13:]
    return keys, total


def test_a_fast_reader_takes_no_more_memory_than_pages(
    synapse: Synapse, user: User
) -> None:
    """While 100,000 keys are read, the process grows by less than a few pages."""
    before = synapse.rss_bytes()
    sizes: list[int] = []
    keys, total = read_fast(synapse, user, sizes)
    assert keys == KEYS
    assert total > KEYS * len(SESSION_DATA)
    assert len(sizes) > 10
    assert max(sizes) - before < BOUND, (before, max(sizes))


def test_slow_readers_take_no_more_memory_than_pages(
    synapse: Synapse, user: User
) -> None:
    """Ten downloads that are read in turns, a little at a time, share the bound."""
    before = synapse.rss_bytes()
    connections = [connect(synapse, user) for _ in range(10)]
    sizes = []
    for _ in range(100):
        for connection in connections:
            assert connection.recv(16 * 1024)
        sizes.append(synapse.rss_bytes())
    for connection in connections:
        connection.close()
    assert max(sizes) - before < BOUND, (before, max(sizes))


def test_slow_readers_of_large_keys(synapse: Synapse) -> None:
    """However large keys are, a download has a few MiB of them in memory while it isn't
    read. A single character makes Python take four bytes for each."""
    user = synapse.register("heavy")
    store(synapse, user, 1000, f'"{"x" * 60_000}\N{GRINNING FACE}"')
    assert read_fast(synapse, user, [])[0] == 1000
    before = synapse.rss_bytes()
    connections = [connect(synapse, user) for _ in range(20)]
    for connection in connections:
        assert connection.recv(16 * 1024)
    sizes = []
    for _ in range(20):
        sizes.append(synapse.rss_bytes())
        time.sleep(0.05)
    for connection in connections:
        connection.close()
    assert max(sizes) - before < LARGE_BOUND, (before, max(sizes))


def test_a_reader_that_stops_is_dropped(synapse: Synapse, user: User) -> None:
    """The connection of a client that reads nothing breaks after the set time, and
    what it has got is not a whole answer."""
    text = f"read nothing for {STALLED_SECONDS} seconds"
    before = synapse.log().count(text)
    with connect(synapse, user) as connection:
        assert connection.recv(1, socket.MSG_PEEK)
        wait_for(synapse, text, before + 1)
        with pytest.raises(ConnectionResetError):
            while connection.recv(1024 * 1024):
                pass


def test_others_are_answered_meanwhile(synapse: Synapse, user: User) -> None:
    """Downloads that nobody reads hold no connection to the database."""
    connections = [connect(synapse, user) for _ in range(20)]
    other = synapse.register("other")
    for who in (user, other):
        with pytest.raises(RuntimeError, match="M_NOT_FOUND"):
            path = "/_matrix/client/v3/room_keys/version/1"
            fetch(synapse.url + path, token=who.access_token)
    for connection in connections:
        connection.close()


def wait_for(synapse: Synapse, text: str, times: int) -> None:
    """Wait until the homeserver's log has a text a number of times."""
    deadline = time.monotonic() + 30
    while synapse.log().count(text) < times:
        assert time.monotonic() < deadline, f"the log doesn't say: {text}"
        time.sleep(0.05)

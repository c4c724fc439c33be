"""Downloads that a client reads slowly or not at all, out of both hosts' processes."""

from __future__ import annotations

import json
import socket
import sqlite3
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import repeat
from pathlib import Path
from typing import Any, cast

import attrs
import psycopg2
import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.threads import deferToThread
from twisted.web.http import Request
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site

from synapse_roomkeys.clock import Clock, Reactor
from synapse_roomkeys.rest.streaming import WRITE_SIZE, PacedWriter

from ..contract.base import PREFIX, keys_path
from ..reliability.sockets import read_reply, request
from ..servers import PostgresServer, Synapse
from ..servers.fake_homeserver import Homeserver
from ..servers.processes import HOST
from ..servers.service import Service
from .test_file_limit import wait_for_connections

VERSION = 1_700_000_000
#: Keys of a backup of 6 MB, each nearly as large as the default limit allows.
KEYS = 100
SESSION_DATA = json.dumps("x" * 60_000)
#: Downloads of one user that are not read at all. Before there was a bound, each kept
#: 3 MB in the process and 2.6 MB in the kernel.
STALLED = 100
HONEST = 20
#: What all of them may add to the memory of a process, in bytes: 3 MiB of pages of 16
#: downloads, and 0.2 MB for each connection.
PROCESS_BOUND = 70 * 1024 * 1024
#: What each of the ten threads of Synapse's connection pool may keep for good besides,
#: in bytes: glibc gives a thread an arena of its own, unless MALLOC_ARENA_MAX is set,
#: and the first statement of a download reads 6 MB of these keys, twice.
ARENA_BOUND = 12 * 1024 * 1024
#: What each connection may keep in the kernel, in bytes: 256 KiB that it can't send
#: yet, one write more, and what is on its way.
KERNEL_BOUND = 400 * 1024
#: For how long an honest download may take meanwhile, in seconds. A busy machine needs
#: ten for what all of them read of the database.
PATIENCE = 30.0
#: How often all of them come and go, and by how much the memory may grow from the first
#: time to the last, in bytes. Left to the garbage collector they would add 8 MB each
#: time. From one time to another the memory goes up or down by some 5 MB.
ROUNDS = 4
LEVEL_BOUND = 14 * 1024 * 1024
#: The shortest stall timeout that the service can be given, in seconds.
STALL_SECONDS = 1
#: For how long and how often a slow client reads, in seconds.
SLOW_SECONDS = 2.5
SLOW_PAUSE = 0.1
#: How many bytes it reads each time. By TCP, the transport is empty after 6 seconds; a
#: Unix socket tells only when one of the kernel's buffers, of some 100 kB, was read.
SLOW_BYTES = {"tcp": 2000, "unix": 15_000}
#: The idle timeout of a site, in seconds: Twisted's own is 60.
IDLE_SECONDS = 1.5
#: How many writes are more than the kernel takes.
LAST_WRITES = 4


@attrs.frozen
class Target:
    """A server's process with two users, each of whom has the same backup."""

    server: Service | Synapse
    token: str
    other_token: str

    @property
    def bound(self) -> int:
        """What the process' memory may grow by, in bytes."""
        threads = 10 if isinstance(self.server, Synapse) else 0
        return PROCESS_BOUND + threads * ARENA_BOUND

    @property
    def address(self) -> tuple[str, int]:
        """Where the server listens."""
        return HOST, self.server.port

    def begin(self, address: tuple[str, int] | str | None = None) -> socket.socket:
        """A connection on which the user's download has been asked for.

        Args:
            address: of another listener, a path if it is a Unix socket.
        """
        is_unix = isinstance(address, str)
        connection = socket.socket(socket.AF_UNIX if is_unix else socket.AF_INET)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(30)
        connection.connect(address or self.address)
        connection.sendall(asked(self.token))
        return connection

    def read(self, token: str) -> float:
        """Download the backup at full speed; the seconds that it took."""
        start = time.monotonic()
        with socket.create_connection(self.address) as connection:
            connection.settimeout(60)
            connection.sendall(asked(token))
            check_answer(connection)
        return time.monotonic() - start

    def kernel_bytes(self) -> int:
        """What the kernel holds of all the server's connections."""
        with open("/proc/net/tcp", encoding="ascii") as table:
            lines = [line.split() for line in table]
        port = f":{self.server.port:04X}"
        queues = (line[4] for line in lines[1:] if line[1].endswith(port))
        return sum(int(queue.partition(":")[0], 16) for queue in queues)


def asked(token: str) -> bytes:
    """The request for the whole backup."""
    path = PREFIX + keys_path(str(VERSION))
    return request("GET", path, token, b"", "Connection: close")


def check_answer(connection: socket.socket) -> None:
    """Read the answer to its end; it has all keys."""
    with connection.makefile("rb") as stream:
        reply = read_reply(stream)
    assert reply is not None and reply.status == 200, reply
    rooms = json.loads(reply.body)["rooms"]
    assert sum(len(room["sessions"]) for room in rooms.values()) == KEYS


def fill(cursor: Any, mark: str, user_id: str) -> None:
    """Put a user's backup into the tables."""
    cursor.execute(
        "INSERT INTO e2e_room_keys_versions (user_id, version, algorithm, auth_data,"
        f" etag) VALUES ({mark}, {VERSION}, 'm', '{{}}', 1)",
        (user_id,),
    )
    cursor.execute(
        "WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n"
        f" WHERE i < {KEYS - 1}) INSERT INTO e2e_room_keys (user_id, version, room_id,"
        " session_id, first_message_index, forwarded_count, is_verified, session_data)"
        f" SELECT {mark}, {VERSION}, '!room' || (i / 10), 'session' || i, 0, 0, i < 0,"
        f" {mark} FROM n",
        (user_id, SESSION_DATA),
    )


def store(directory: Path, arguments: Mapping[str, Any] | None, *user_ids: str) -> None:
    """Give users a backup each, past the server."""
    connection: Any
    if arguments is None:
        connection, mark = sqlite3.connect(directory / "roomkeys.db", timeout=30), "?"
    else:
        connection, mark = psycopg2.connect(**arguments), "%s"
    with connection:
        for user_id in user_ids:
            fill(connection.cursor(), mark, user_id)
    connection.close()


def start_service(
    service: Service,
    homeserver: Homeserver,
    database: Mapping[str, Any] | None,
    stack: ExitStack,
) -> Target:
    """The service, ready to be read from."""
    stack.enter_context(service)
    users = [homeserver.new_user() for _ in range(2)]
    store(service.directory, database, *(user.user_id for user in users))
    return Target(service, *(user.access_token for user in users))


def start_synapse(
    directory: Path, database: Mapping[str, Any], stack: ExitStack
) -> Target:
    """A Synapse with the plugin, ready to be read from."""
    synapse = Synapse(directory, database=database, module_config={})
    stack.enter_context(synapse)
    users = [synapse.register(name) for name in ("one", "other")]
    store(directory, database, *(user.user_id for user in users))
    return Target(synapse, *(user.access_token for user in users))


@pytest.fixture(scope="module", params=["service", "synapse"])
def target(
    request: pytest.FixtureRequest,
    postgres: PostgresServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Target]:
    """Each host, one download of which is done already."""
    directory = tmp_path_factory.mktemp("stalled")
    database = postgres.create_database()
    with ExitStack() as stack:
        if request.param == "service":
            homeserver = stack.enter_context(Homeserver())
            service = Service(directory, homeserver.url, database=database)
            target = start_service(service, homeserver, database, stack)
        else:
            target = start_synapse(directory, database, stack)
        target.read(target.token)
        yield target


def test_stalled_downloads_take_bounded_memory(target: Target) -> None:
    """A hundred downloads that nobody reads keep a few MB in the process and in the
    kernel, and neither another user's download nor twenty of the same user's fails or
    takes long."""
    server = target.server
    before = server.rss_bytes()
    with ThreadPoolExecutor(HONEST + 1) as pool, ExitStack() as stack:
        for _ in range(STALLED):
            stack.enter_context(target.begin())
        other = pool.submit(target.read, target.other_token)
        honest = [pool.submit(target.read, target.token) for _ in range(HONEST)]
        waits = [other.result(), *(download.result() for download in honest)]
        grown = server.rss_bytes() - before
        kernel = target.kernel_bytes()
    print(f"grown {grown >> 20} MiB, kernel {kernel >> 20} MiB, waits {waits}")
    assert grown < target.bound
    assert kernel < STALLED * KERNEL_BOUND
    assert max(waits) < PATIENCE


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A service that drops clients soon that read nothing, with a Unix socket too."""
    directory = tmp_path_factory.mktemp("impatient")
    with ExitStack() as stack:
        homeserver = stack.enter_context(Homeserver())
        settings = {"stalled_download_seconds": STALL_SECONDS}
        service = Service(directory, homeserver.url, settings=settings)
        listener = f"tcp:{service.port}:interface={HOST}"
        service.environment = {"ROOMKEYS_LISTENERS": f"{listener},unix:{directory}/s"}
        yield start_service(service, homeserver, None, stack)


@pytest.mark.parametrize("listener", SLOW_BYTES)
def test_a_slow_client_is_not_dropped(impatient: Target, listener: str) -> None:
    """The stall timeout counts from the last byte that the client has read, though its
    connection's buffers are not empty for longer than the timeout."""
    path = str(impatient.server.directory / "s")
    with impatient.begin(path if listener == "unix" else None) as connection:
        data = b""
        end = time.monotonic() + SLOW_SECONDS
        while time.monotonic() < end:
            data += connection.recv(SLOW_BYTES[listener])
            time.sleep(SLOW_PAUSE)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        assert data.startswith(b"HTTP/1.1 200")
        while not data.endswith(b"\r\n0\r\n\r\n"):
            received = connection.recv(1 << 20)
            assert received, f"cut after {len(data)} bytes"
            data += received
    assert data.count(b'"session_data"') == KEYS


def test_a_client_that_reads_nothing_is_dropped(impatient: Target) -> None:
    """Its connection is broken when the stall timeout is over, or a tenth of it later,
    also if it has read some before."""
    with impatient.begin() as connection:
        assert connection.recv(SLOW_BYTES["tcp"])
        start = time.monotonic()
        deadline = start + 10 * STALL_SECONDS
        while impatient.kernel_bytes():
            assert time.monotonic() < deadline, "never dropped"
            time.sleep(0.01)
        waited = time.monotonic() - start
        with pytest.raises(ConnectionResetError):
            while connection.recv(1 << 20):
                pass
    assert STALL_SECONDS - 0.1 < waited < 2 * STALL_SECONDS, waited


def test_memory_is_level_afterwards(impatient: Target) -> None:
    """What stalled downloads held is used again by the next ones: it doesn't wait for
    the garbage collector, which may come after a thousand of them."""
    assert isinstance(impatient.server, Service)
    sizes = []
    for _ in range(ROUNDS):
        with ExitStack() as stack:
            for _ in range(STALLED):
                stack.enter_context(impatient.begin())
            impatient.read(impatient.token)
        # Open connections hold buffers; their end takes longer on a busy machine.
        wait_for_connections(impatient.server, 0)
        sizes.append(impatient.server.rss_bytes())
    assert sizes[-1] - sizes[0] < LEVEL_BOUND, sizes


class LongAnswer(Resource):
    """Answers with as much as the kernel takes, and some more that it doesn't.

    Attributes:
        ended: whether the answer has been ended.
    """

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ended = threading.Event()

    def render_GET(self, request: Request) -> int:
        """Write the answer by a `PacedWriter`."""
        # Seconds for which Twisted keeps the connection after its idle timeout.
        channel: Any = request.channel
        channel.abortTimeout = 0.1
        clock = Clock(cast(Reactor, reactor))
        writer = PacedWriter(request, clock, STALL_SECONDS, lambda seconds: None)
        self._answer(writer)
        return NOT_DONE_YET

    @inlineCallbacks
    def _answer(self, writer: PacedWriter) -> Generator[Deferred[Any], Any, None]:
        yield writer.write_all(repeat(b"#" * WRITE_SIZE, LAST_WRITES))
        writer.finish()
        self.ended.set()


@inlineCallbacks
def test_a_slow_client_gets_the_end() -> Generator[Deferred[Any], Any, None]:
    """A client that reads the last bytes slowly isn't taken for an idle connection,
    which Twisted drops together with what is still to be sent (twisted/twisted#12498).
    """
    resource = LongAnswer()
    listen: Any = reactor.listenTCP
    port = listen(0, Site(resource, timeout=IDLE_SECONDS), interface=HOST)

    def read() -> bytes:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(30)
            connection.connect((HOST, port.getHost().port))
            connection.sendall(request("GET", "/", None))
            data = b""
            while not resource.ended.is_set():
                data += connection.recv(SLOW_BYTES["tcp"])
                time.sleep(SLOW_PAUSE / 10)
            end = time.monotonic() + 2 * IDLE_SECONDS
            while time.monotonic() < end:
                data += connection.recv(SLOW_BYTES["tcp"])
                time.sleep(SLOW_PAUSE)
            while received := connection.recv(1 << 20):
                data += received
            return data

    data = yield deferToThread(read)
    assert data.endswith(b"\r\n0\r\n\r\n")
    assert data.count(b"#") == LAST_WRITES * WRITE_SIZE
    yield port.stopListening()

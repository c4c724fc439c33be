"""The service behind reverse proxies, with the configurations of ``contrib/``."""

from __future__ import annotations

import json
import re
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from http.client import HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import blockon
from twisted.internet.defer import Deferred
from twisted.web.iweb import IResponse

from ..backup_client import Api
from ..client import HttpHost
from ..contract import SCENARIOS, Scenario, User
from ..contract.base import PREFIX, Answer, Rooms, key, keys_path, refused, same
from ..reliability.sockets import connect, read_reply, request
from ..servers import PostgresServer
from ..servers.accounts import fetch
from ..servers.apache import Apache
from ..servers.caddy import Caddy
from ..servers.fake_homeserver import Homeserver
from ..servers.haproxy import HaProxy
from ..servers.nginx import Nginx
from ..servers.processes import HOST, free_port
from ..servers.proxy import Proxy
from ..servers.service import Service

KEYS = 80_000
#: session_data as long, in JSON, as real session_data; all keys together are 73 MB.
SESSION_DATA = json.dumps({"ciphertext": "x" * 820, "mac": "y" * 11, "ephemeral": "z"})
VERSION = 1_700_000_000
ROOM = "!room"
#: Limit of the memory added to a process by a download, in bytes.
MAX_GROWTH = 20 * 1024 * 1024
DEADLINE = 30.0
PROXIES = [Nginx, HaProxy, Caddy, Apache]
#: Proxies that buffer a whole upload before forwarding. The others stream uploads and
#: thus can't repeat an upload at another process.
BUFFERING_PROXIES = [Nginx, HaProxy]
buffering_proxies = pytest.mark.parametrize("proxy", BUFFERING_PROXIES, indirect=True)
TRAFFIC = "synapse_roomkeys_download_bytes_total"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of the SQLite file, shared by both processes."""
    return tmp_path_factory.mktemp("database") / "roomkeys.db"


@pytest.fixture(scope="module")
def services(
    homeserver: Homeserver, database: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Service, Service]]:
    """Two service processes on one database."""
    settings = {
        "database": {"name": "sqlite3", "args": {"database": str(database)}},
        "trusted_proxies": [HOST],
    }
    one, two = (
        Service(tmp_path_factory.mktemp("service"), homeserver.url, settings=settings)
        for _ in range(2)
    )
    one.start()
    two.start()
    yield one, two
    one.stop()
    two.stop()


@pytest.fixture(scope="module", params=PROXIES)
def proxy(
    request: pytest.FixtureRequest,
    services: tuple[Service, Service],
    homeserver: Homeserver,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Proxy]:
    """Each proxy, in front of both processes and the homeserver."""
    kind: type[Proxy] = request.param
    ports = [service.port for service in services]
    with kind(tmp_path_factory.mktemp("proxy"), ports, homeserver.port) as proxy:
        yield proxy


class WithoutNul(HttpHost):
    """A proxy under test, except that paths with a NUL go directly to the service.

    nginx and Apache refuse such paths themselves.
    """

    def __init__(
        self,
        url: str,
        new_user: Callable[[], User],
        new_guest: Callable[[], User],
        service_url: str,
    ) -> None:
        super().__init__(url, new_user, new_guest)
        self._urls = {True: service_url, False: url}

    def open(self, method: str, path: str, **rest: Any) -> Deferred[IResponse]:
        """See `HttpHost.open`."""
        self.url = self._urls["%00" in path]
        return super().open(method, path, **rest)


@pytest.fixture
def host(
    proxy: Proxy, services: tuple[Service, Service], homeserver: Homeserver
) -> Iterator[HttpHost]:
    """The proxy as a server under test."""
    users = (homeserver.new_user, homeserver.new_guest)
    host = HttpHost(proxy.url, *users)
    if isinstance(proxy, Nginx | Apache):
        host = WithoutNul(proxy.url, *users, services[0].url)
    yield host
    blockon(host.close())


@pytest.fixture(scope="module")
def host_on_postgres(
    homeserver: Homeserver,
    postgres: PostgresServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[HttpHost]:
    """A process on PostgreSQL behind nginx; the other tests here use SQLite."""
    directory = tmp_path_factory.mktemp("service")
    database = postgres.create_database()
    with Service(directory, homeserver.url, database=database) as service:
        ports = [service.port, service.port]
        directory = tmp_path_factory.mktemp("proxy")
        with Nginx(directory, ports, homeserver.port) as proxy:
            users = (homeserver.new_user, homeserver.new_guest)
            host = WithoutNul(proxy.url, *users, service.url)
            yield host
            blockon(host.close())


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_contract_on_postgres(
    scenario: Scenario, host_on_postgres: HttpHost
) -> Deferred[None]:
    """The service on PostgreSQL keeps the contract behind a proxy."""
    return scenario(host_on_postgres)


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_contract(scenario: Scenario, host: HttpHost) -> Deferred[None]:
    """The service keeps the contract behind each proxy; each path is forwarded
    unchanged."""
    return scenario(host)


def test_other_paths_go_to_the_homeserver(proxy: Proxy, homeserver: Homeserver) -> None:
    """The proxy sends all other paths to the homeserver, unchanged."""
    api = Api(proxy.url, homeserver.new_user().access_token)
    paths = [
        "/_matrix/client/versions",
        "/_matrix/client/v3/sync?since=a%2Fb",
        "/_matrix/client/v3/rooms/%21a%2Fb/state/m.room%2Broom_keys/",
        "/_matrix/client/v1/room_keys/version",
        "/_matrix/federation/v1/version",
        "/.well-known/matrix/client",
    ]
    del homeserver.paths[:]
    for path in paths:
        fetch_or_none(proxy.url + path, api.token)
    assert homeserver.paths == paths[1:]


def fetch_or_none(url: str, token: str) -> bytes | None:
    """Return the body of a successful answer, or None for an error."""
    try:
        return fetch(url, token=token)
    except RuntimeError:
        return None


def send(proxy: Proxy, sent: bytes) -> Answer:
    """Send the bytes of a request and return the answer, of any status."""
    with connect(proxy.port) as client, client.makefile("rb") as stream:
        # Caddy closes the connection during an upload whose body is refused.
        with suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(sent)
        answer = read_reply(stream)
    assert answer is not None, "closed without an answer"
    return answer


@pytest.mark.parametrize("mebibytes", [10, 12])
def test_too_large_an_upload(
    mebibytes: int, proxy: Proxy, homeserver: Homeserver
) -> None:
    """An upload above the limit is answered 413 in JSON that clients understand.

    This holds for 10 MiB + 1 byte, refused by the service, and for 12 MiB + 1 byte,
    above the proxy's limit as well.
    """
    token = homeserver.new_user().access_token
    body = b" " * (mebibytes * 2**20 + 1)
    answer = send(proxy, request("PUT", PREFIX + keys_path(str(VERSION)), token, body))
    refused(answer, 413, "M_TOO_LARGE")
    assert answer.headers["access-control-allow-origin"] == "*"


def test_claimed_ids_and_addresses_are_ignored(
    proxy: Proxy, services: tuple[Service, Service], homeserver: Homeserver
) -> None:
    """The log has the proxy's request id and the client's real address.

    The headers by which the client claims another id and address have no effect.
    """
    claims = {"X-Request-ID": "made-up", "X-Forwarded-For": "203.0.113.9"}
    headers = [f"{name}: {value}" for name, value in claims.items()]
    token = homeserver.new_user().access_token
    before = [len(service.log()) for service in services]
    answer = send(proxy, request("GET", PREFIX + "/version", token, b"", *headers))
    request_id = answer.headers["x-request-id"]
    # Request ids made by the service have 16 digits.
    assert re.fullmatch("[0-9a-f-]{32,36}", request_id)
    logs = "".join(
        service.log()[start:] for service, start in zip(services, before, strict=True)
    )
    (line,) = (line for line in logs.splitlines() if request_id in line)
    assert f"] {HOST} GET {PREFIX}/version 404 " in line
    assert not any(claim in logs for claim in claims.values())


@pytest.mark.parametrize("kind", PROXIES)
def test_no_process_is_running(
    kind: type[Proxy], homeserver: Homeserver, tmp_path: Path
) -> None:
    """A proxy without any running service process answers 503 in JSON.

    The answer has CORS headers for browsers, and Retry-After.
    """
    ports = [free_port(), free_port()]
    with kind(tmp_path, ports, homeserver.port) as proxy:
        answer = send(proxy, request("GET", PREFIX + "/version", "token"))
    refused(answer, 503, "M_UNKNOWN")
    assert answer.headers["access-control-allow-origin"] == "*"
    assert int(answer.headers["retry-after"]) > 0


@pytest.fixture(scope="module")
def big(
    services: tuple[Service, Service], homeserver: Homeserver, database: Path
) -> str:
    """The token of a user with a backup of 80,000 keys."""
    user = homeserver.new_user()
    rows = (
        (user.user_id, ROOM, f"{n:08}", VERSION, n, 0, True, SESSION_DATA)
        for n in range(KEYS)
    )
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(
            "INSERT INTO e2e_room_keys_versions"
            " (user_id, version, algorithm, auth_data, deleted, etag)"
            " VALUES (?, ?, 'a', '{}', 0, 1)",
            (user.user_id, VERSION),
        )
        connection.executemany(
            "INSERT INTO e2e_room_keys"
            " (user_id, room_id, session_id, version, first_message_index,"
            " forwarded_count, is_verified, session_data)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            rows,
        )
    return user.access_token


def open_download(proxy: Proxy, token: str) -> HTTPResponse:
    """Request the whole backup and read the headers of the answer.

    The receive buffer has 64 KiB. Therefore the connection stalls soon without reads.
    """
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    connection.settimeout(DEADLINE)
    connection.connect((HOST, proxy.port))
    path = PREFIX + keys_path(str(VERSION))
    with connection:
        connection.sendall(request("GET", path, token, b"", "Connection: close"))
        response = HTTPResponse(connection)
    response.begin()
    return response


def check_whole(body: bytes) -> None:
    """Check that a body has each key of the big backup."""
    sessions = json.loads(body)["rooms"][ROOM]["sessions"]
    assert len(sessions) == KEYS
    data = json.loads(SESSION_DATA)
    assert all(sessions[f"{n:08}"] == key(n, 0, True, data) for n in range(KEYS))


def bytes_sent(services: tuple[Service, Service]) -> float:
    """Return the number of bytes sent by both processes in downloads until now."""
    total = 0.0
    for service in services:
        for line in fetch(service.metrics_url).decode().splitlines():
            if line.startswith(f"{TRAFFIC} "):
                total += float(line.split()[1])
    return total


def test_a_slow_download(
    proxy: Proxy, services: tuple[Service, Service], big: str
) -> None:
    """A download starts within 1 s, and stalls while the client does not read.

    Meanwhile no process buffers the download in memory or in files. Afterwards the
    download is complete.
    """
    before = bytes_sent(services)
    parties: list[Proxy | Service] = [proxy, *services]
    memory = [party.rss_bytes() for party in parties]
    started = time.monotonic()
    with open_download(proxy, big) as response:
        assert response.status == 200
        body = response.read(1000)
        assert time.monotonic() - started < 1
        last, now = -1.0, bytes_sent(services)
        while now != last:
            assert time.monotonic() - started < DEADLINE
            time.sleep(0.5)
            last, now = now, bytes_sent(services)
        stalled_at = now - before
        assert proxy.temporary_bytes() == 0
        for party, first in zip(parties, memory, strict=True):
            assert party.rss_bytes() - first < MAX_GROWTH
        body += response.read()
    check_whole(body)
    # The kernel buffers some MiB for each connection.
    assert 0 < stalled_at < len(body) / 2


@pytest.mark.parametrize("kind", PROXIES)
def test_a_refused_connection_is_retried_at_the_other(
    kind: type[Proxy],
    services: tuple[Service, Service],
    homeserver: Homeserver,
    tmp_path: Path,
) -> None:
    """If one process is down, the other process answers each request."""
    token = homeserver.new_user().access_token
    sent = request("PUT", PREFIX + keys_path(str(VERSION)), token, b"{}")
    ports = [free_port(), services[0].port]
    with kind(tmp_path, ports, homeserver.port) as proxy:
        for _ in range(4):
            refused(send(proxy, sent), 400, "M_BAD_JSON")


class StoppingHandler(BaseHTTPRequestHandler):
    """Handler of a stopping process: ``/ready`` is 200, any other request 503.

    Attributes:
        methods: the methods of all requests except ``/ready``, in order of arrival.
    """

    protocol_version = "HTTP/1.1"
    methods: list[str]

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        ready = self.path == "/ready"
        if not ready:
            self.methods.append(self.command)
        self.send_response(200 if ready else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_PUT = do_POST = do_DELETE = answer

    def log_message(self, format: str, *args: Any) -> None:
        """Discard the log line of a request."""


class StoppingServer(ThreadingHTTPServer):
    """HTTP server that prints no error for connections dropped by the proxy."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Discard the error of a request."""


@pytest.mark.parametrize("kind", BUFFERING_PROXIES)
def test_a_503_is_retried_at_the_other(
    kind: type[Proxy],
    services: tuple[Service, Service],
    homeserver: Homeserver,
    tmp_path: Path,
) -> None:
    """A request that one process answers 503 is repeated at the other process.

    GET, PUT, POST and DELETE are repeated, even an upload of 200 keys and a new
    version.
    """
    methods: list[str] = []
    handler = type("Handler", (StoppingHandler,), {"methods": methods})
    with ExitStack() as stack:
        stopping = stack.enter_context(StoppingServer((HOST, 0), handler))
        thread = threading.Thread(target=stopping.serve_forever)
        thread.start()
        stack.callback(thread.join)
        stack.callback(stopping.shutdown)
        ports = [stopping.server_port, services[0].port]
        proxy = stack.enter_context(kind(tmp_path, ports, homeserver.port))
        for number in range(4):
            api = Api(proxy.url, homeserver.new_user().access_token)
            version = api.create_version()
            rooms = batch(0, 200)
            api.upload(version, rooms)
            same(api.download(version), rooms)
            api.delete(keys_path(version))
            if number % 2 == 0:
                api.info()
    assert {"POST", "PUT", "GET", "DELETE"} <= set(methods)


def batch(start: int, size: int) -> Rooms:
    """Build keys with session_data of the usual length."""
    data = json.loads(SESSION_DATA)
    return {ROOM: {f"{n}/+": key(data=data) for n in range(start, start + size)}}


def back_up_until(done: threading.Event, api: Api) -> int:
    """Upload keys, 1 or 100 at a time, and read the backup, until an event is set.

    The test fails if a request isn't answered with success.

    Returns:
        The number of requests.
    """
    requests = 2
    version = api.create_version()
    rooms = batch(0, 0)
    while not done.wait(0.01):
        more = batch(len(rooms[ROOM]), 100 if requests % 5 == 0 else 1)
        rooms[ROOM].update(more[ROOM])
        assert api.upload(version, more)[1] == len(rooms[ROOM])
        assert api.info()["version"] == version
        requests += 2
    api.upload(version, rooms)
    same(api.download(version), rooms)
    return requests


def create_versions_until(done: threading.Event, api: Api) -> int:
    """Create versions and delete them until an event is set; return the number of
    requests."""
    requests = 0
    while not done.wait(0.01):
        version = api.create_version()
        assert api.delete(f"/version/{version}").status == 200
        requests += 2
    return requests


def read_slowly(proxy: Proxy, token: str) -> None:
    """Download the big backup at a speed that takes about three seconds."""
    body = b""
    with open_download(proxy, token) as response:
        while more := response.read(2**20):
            body += more
            time.sleep(0.08)
    check_whole(body)


@buffering_proxies
def test_restarts_under_load(
    proxy: Proxy, services: tuple[Service, Service], homeserver: Homeserver, big: str
) -> None:
    """No request fails and no download is cut while the processes restart in turn."""
    done = threading.Event()
    apis = [Api(proxy.url, homeserver.new_user().access_token) for _ in range(5)]
    with ThreadPoolExecutor(10) as pool:
        running = [pool.submit(back_up_until, done, api) for api in apis[1:]]
        running.append(pool.submit(create_versions_until, done, apis[0]))
        slow = [pool.submit(read_slowly, proxy, big) for _ in services]
        try:
            time.sleep(0.5)
            for service in services:
                service.stop()
                time.sleep(0.5)
                service.start()
        finally:
            done.set()
        for future in slow:
            future.result()
        assert min(future.result() for future in running) > 20

"""The service as run by operators: answers, status, metrics and log."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import blockon
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import UNIXClientEndpoint
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.web.client import URI, Agent, HTTPConnectionPool
from twisted.web.iweb import IAgentEndpointFactory
from zope.interface import implementer

from ..backup_client import Api
from ..client import HttpHost
from ..contract import SCENARIOS, Scenario
from ..contract.base import PREFIX, key, keys_path, wrapped
from ..servers.accounts import fetch
from ..servers.fake_homeserver import Homeserver
from ..servers.processes import HOST
from ..servers.service import Service

DEADLINE = 20.0
LIMIT = 10 * 1024 * 1024
each_scenario = pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)


@pytest.fixture(scope="module")
def service(
    homeserver: Homeserver,
    database: Callable[[], Mapping[str, Any] | None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Service]:
    """The service on each engine."""
    directory = tmp_path_factory.mktemp("service")
    with Service(directory, homeserver.url, database=database()) as service:
        yield service


@pytest.fixture(scope="module")
def proxied(
    homeserver: Homeserver, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """The service with a trusted proxy, a second listener on a unix socket, and JSON
    logs.

    The loopback network is the trusted proxy, so the tests are trusted. The log has the
    requests of all tests in this module.
    """
    directory = tmp_path_factory.mktemp("proxied")
    service = Service(
        directory,
        homeserver.url,
        settings={
            "trusted_proxies": ["127.0.0.0/8"],
            "log": {"format": "json", "level": "DEBUG"},
        },
    )
    service.environment = {
        "ROOMKEYS_LISTENERS": f"tcp:{service.port}:interface={HOST},"
        f"unix:{directory}/s:mode=600"
    }
    with service:
        yield service


def host_of(service: Service, homeserver: Homeserver) -> HttpHost:
    """Make the service a server under test."""
    return HttpHost(service.url, homeserver.new_user, homeserver.new_guest)


@pytest.fixture
def host(service: Service, homeserver: Homeserver) -> Iterator[HttpHost]:
    """The service as a server under test."""
    host = host_of(service, homeserver)
    yield host
    blockon(host.close())


@implementer(IAgentEndpointFactory)
class UnixEndpoints:
    """Endpoint factory for connections to a unix socket, for any address."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def endpointForURI(self, uri: URI) -> IStreamClientEndpoint:
        """See `IAgentEndpointFactory.endpointForURI`."""
        return UNIXClientEndpoint(reactor, self._path)


@pytest.fixture
def unix_host(proxied: Service, homeserver: Homeserver) -> Iterator[HttpHost]:
    """The service as a server under test, over its unix socket."""
    host = host_of(proxied, homeserver)
    host._pool = HTTPConnectionPool(reactor, persistent=True)
    endpoints = UnixEndpoints(proxied.directory / "s")
    host._agent = Agent.usingEndpointFactory(reactor, endpoints, pool=host._pool)
    yield host
    blockon(host.close())


@each_scenario
def test_contract(scenario: Scenario, host: HttpHost) -> Deferred[None]:
    """The service keeps the contract on each engine."""
    return scenario(host)


@each_scenario
def test_contract_over_a_unix_socket(
    scenario: Scenario, unix_host: HttpHost
) -> Deferred[None]:
    """The service keeps the contract over a unix socket."""
    return scenario(unix_host)


def exchange(service: Service, *sent: bytes) -> bytes:
    """Send bytes unchanged; return all bytes until the server closes the connection."""
    with socket.create_connection((HOST, service.port), timeout=DEADLINE) as client:
        for part in sent:
            client.sendall(part)
        return b"".join(iter(lambda: client.recv(65536), b""))


def get(path: str, *headers: str) -> bytes:
    """Build a GET request after which the server closes the connection."""
    lines = [f"GET {path} HTTP/1.1", "Host: a", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


def head_of(answer: bytes) -> tuple[int, dict[str, str]]:
    """Return the status and the headers of an answer, with names in lower case."""
    status, *lines = answer.partition(b"\r\n\r\n")[0].decode().split("\r\n")
    headers = (line.split(": ", 1) for line in lines)
    return int(status.split()[1]), {name.lower(): value for name, value in headers}


def lines_of(service: Service, number: str) -> list[dict[str, Any]]:
    """Return the log lines of a request id, once the access line is logged."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        lines = [json.loads(line) for line in service.log().splitlines()]
        found = [line for line in lines if line["request_id"] == number]
        if any(line["logger"] == "synapse_roomkeys.access" for line in found):
            return found
        time.sleep(0.02)
    raise AssertionError(f"no access line of {number}:\n{service.log()}")


def access(service: Service, *headers: str, path: str = "/x") -> tuple[str, str]:
    """Send a GET request; return the request id and the access log line."""
    _, got = head_of(exchange(service, get(path, *headers)))
    number = got["x-request-id"]
    lines = lines_of(service, number)
    return number, str(lines[-1]["message"])


def test_status(service: Service) -> None:
    """``/health`` and ``/ready`` are served by all listeners, metrics by their listener
    only."""
    for url in (service.url, service.metrics_url.removesuffix("/metrics")):
        assert json.loads(fetch(f"{url}/health")) == {"status": "ok"}
        assert json.loads(fetch(f"{url}/ready")) == {
            "database": "ok",
            "homeserver": "ok",
            "service": "ok",
        }
    assert b"# TYPE" in fetch(service.metrics_url)
    for url in (f"{service.url}/metrics", service.metrics_url + "s"):
        with pytest.raises(RuntimeError, match=r"404 .*M_UNRECOGNIZED"):
            fetch(url)


def test_metrics(service: Service, homeserver: Homeserver) -> None:
    """Requests are counted by method, servlet and status, and timed by method and
    servlet.

    Unknown methods count as ``other``. Gauges show requests in progress and waiting,
    and transactions running and waiting.
    """
    api = Api(service.url, homeserver.new_user().access_token)
    api.request("GET", "/version")
    head_of(exchange(service, get("/unknown").replace(b"GET", b"BREW")))
    text = fetch(service.metrics_url).decode()
    for series in (
        'synapse_roomkeys_requests_total{method="GET",servlet="RoomKeysVersionServlet",'
        'status="404"}',
        'synapse_roomkeys_requests_total{method="other",servlet="none",status="404"}',
        'synapse_roomkeys_request_seconds_bucket{le="0.25",method="GET",'
        'servlet="RoomKeysVersionServlet"}',
        'synapse_roomkeys_requests_in_flight{method="GET"}',
        'synapse_roomkeys_pool_transactions{state="in_use"}',
        'synapse_roomkeys_pool_transactions{state="waiting"}',
        "synapse_roomkeys_waiting_requests",
    ):
        assert f"\n{series} " in text, series
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    for name in ("waiting_requests", 'requests_in_flight{method="GET"}'):
        assert float(values[f"synapse_roomkeys_{name}"]) == 0


def test_requests_have_ids(proxied: Service, homeserver: Homeserver) -> None:
    """Each answer has a request id, and each log line of the request has the same id.

    The id is still there in lines logged after a wait for the database.
    """
    user = homeserver.new_user()
    api = Api(proxied.url, user.access_token)
    version = api.request("POST", "/version", {"algorithm": "a", "auth_data": {}})
    number = version.json["version"]
    path = PREFIX + keys_path(number)
    body = json.dumps(wrapped({"!room:a": {"session": key(data="data")}})).encode()
    sent = get(path, f"Authorization: Bearer {user.access_token}", "X-Request-ID: up.1")
    head = sent.replace(b"GET", b"PUT").removesuffix(b"\r\n")
    exchange(proxied, head + b"Content-Length: %d\r\n\r\n" % len(body), body)
    better = body.replace(b"false", b"true").replace(b'"data"', b'"other"')
    head = head.replace(b"up.1", b"up.2")
    exchange(proxied, head + b"Content-Length: %d\r\n\r\n" % len(better), better)
    lines = lines_of(proxied, "up.2")
    assert [line["logger"] for line in lines] == [
        "synapse_roomkeys.handler",
        "synapse_roomkeys.access",
    ]
    line = lines[-1]
    assert line["message"].startswith(f"127.0.0.1 PUT {path.partition('?')[0]} 200 ")
    assert line["message"].endswith(
        f" s {user.user_id} device={line['device']} version={number}"
        " stored=0 replaced=1 unchanged=0"
    )


def test_access_lines_have_fields(proxied: Service, homeserver: Homeserver) -> None:
    """In JSON logs, each value that operators filter by is a field of its own.

    The query string is in no field. The line of a refusal has the user, too.
    """
    user = homeserver.new_user()
    api = Api(proxied.url, user.access_token)
    made = api.request("POST", "/version", {"algorithm": "a", "auth_data": {}})
    version = made.json["version"]
    keys = {f"{n}": key() for n in range(3)}
    api.request("PUT", keys_path(version), wrapped({"!a": keys}))
    better = {"0": key(verified=True), "1": key(), "new": key()}
    stored = api.request("PUT", keys_path(version), wrapped({"!a": better}))
    refused = api.request("PUT", keys_path("1"), wrapped({}))
    line = lines_of(proxied, stored.headers["x-request-id"])[-1]
    seconds = line.pop("seconds")
    assert 0 < seconds < DEADLINE
    assert line["device"]
    path = f"{PREFIX}/keys"
    assert (
        line.items()
        >= {
            **{"client": "127.0.0.1", "method": "PUT", "path": path, "status": 200},
            **{"bytes": len(stored.body), "user": user.user_id, "version": version},
            **{"stored": 1, "replaced": 1, "unchanged": 1},
        }.items()
    )
    refusal, line = lines_of(proxied, refused.headers["x-request-id"])
    assert refusal["message"].startswith(f"Refused PUT: user={user.user_id} device=")
    for found in (refusal, line):
        assert found["user"] == user.user_id
        assert (found["status"], found["version"]) == (404, "1")
    assert refusal["errcode"] == "M_NOT_FOUND"
    assert line["device"] == refusal["device"]


def test_ids_and_addresses_of_trusted_proxies(proxied: Service) -> None:
    """Request id and address from a trusted proxy are used if valid; no query is
    logged."""
    headers = ("X-Request-ID: abc-1", "X-Forwarded-For: 1.2.3.4, 203.0.113.9")
    number, line = access(proxied, *headers, path="/x?access_token=syt_query")
    assert number == "abc-1"
    assert line.startswith("203.0.113.9 GET /x 404 ")
    number, line = access(proxied, "X-Request-ID: a b", "X-Forwarded-For: rubbish")
    assert len(number) == 16
    assert line.startswith("127.0.0.1 GET /x 404 ")


def test_ids_and_addresses_of_strangers(service: Service) -> None:
    """Request id and address from an untrusted client are ignored; no query is
    logged."""
    headers = ("X-Request-ID: abc-2", "X-Forwarded-For: 203.0.113.9")
    _, got = head_of(
        exchange(service, get("/strange?access_token=syt_query", *headers))
    )
    number = got["x-request-id"]
    assert number != "abc-2"
    assert f"[{number}] 127.0.0.1 GET /strange 404 " in service.log()
    assert "syt_query" not in service.log()


def test_long_lines_are_cut(proxied: Service) -> None:
    """Log lines have at most 2,048 bytes, though paths may have 16 KB."""
    access(proxied, path="/" + "x" * 10_000)
    assert max(map(len, proxied.log().encode().splitlines())) <= 2048


def test_every_line_is_json_without_secrets(
    proxied: Service, homeserver: Homeserver
) -> None:
    """Each log line is a JSON object with the common fields, without a secret or an
    error.

    The log has the requests of all tests above.
    """
    user = homeserver.new_user()
    api = Api(proxied.url, user.access_token)
    api.request("GET", "/version")
    api.request("GET", "/keys")
    text = proxied.log()
    for line in text.splitlines():
        found = json.loads(line)
        assert {"time", "level", "logger", "message", "request_id"} <= found.keys()
        assert found["level"] not in ("ERROR", "CRITICAL"), line
    for secret in ("token_", "syt_query", "Bearer"):
        assert secret not in text


def chunked(size: int) -> Iterator[bytes]:
    """Yield a chunked body of `size` bytes without the final chunk."""
    for _ in range(size // 65536):
        yield b"10000\r\n" + bytes(65536) + b"\r\n"


def test_a_body_over_the_limit_is_refused_early(service: Service) -> None:
    """A body above the limit is refused with 413 before all of it is received.

    The answer has the usual headers, and the connection is closed.
    """
    head = get("/_matrix/client/v3/room_keys/keys?version=1").replace(b"GET", b"PUT")
    head = head.removesuffix(b"\r\n").replace(b"Connection: close\r\n", b"")
    for answer in (
        exchange(service, head + b"Content-Length: %d\r\n\r\n" % (LIMIT + 1)),
        exchange(
            service,
            head + b"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n" % (LIMIT + 1),
        ),
        exchange(
            service,
            head + b"Transfer-Encoding: chunked\r\n\r\n",
            *chunked(LIMIT + 2 * 65536),
        ),
        # The client continues to send. The service reads and discards the rest, because
        # an early close would reset the connection and lose the answer.
        exchange(
            service,
            head + b"Content-Length: %d\r\n\r\n" % (4 * LIMIT),
            *[bytes(65536)] * 400,
        ),
    ):
        status, headers = head_of(answer)
        assert status == 413
        assert headers["connection"] == "close"
        assert headers["access-control-allow-origin"] == "*"
        assert headers["content-type"] == "application/json"
        assert headers["x-request-id"]
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["errcode"] == "M_TOO_LARGE"


def test_a_body_at_the_limit_is_read(service: Service) -> None:
    """A body of exactly the limit is read and passed to the servlet."""
    head = get(PREFIX + "/version", f"Content-Length: {LIMIT}").replace(b"GET", b"POST")
    status, headers = head_of(exchange(service, head, bytes(LIMIT)))
    assert status == 401
    assert headers["access-control-allow-origin"] == "*"


def test_an_unknown_path_has_cors_headers(service: Service) -> None:
    """A 404 for an unknown path has CORS headers, for clients in browsers."""
    status, headers = head_of(exchange(service, get("/_matrix/client/v3/nothing")))
    assert status == 404
    assert headers["access-control-allow-origin"] == "*"

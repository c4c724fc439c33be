"""The log and the metrics of a Synapse with the plugin."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
from pytest_twisted import blockon
from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults, inlineCallbacks
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure

from ..client import HttpHost
from ..contract import Client, User
from ..contract.base import (
    ALGORITHM,
    PREFIX,
    accepted,
    key,
    keys_path,
    refused,
    tally,
    version_path,
    wrapped,
)
from ..servers import Synapse, config
from ..servers import User as Account
from ..servers.accounts import fetch
from .conftest import host_of
from .test_synapse import DEADLINE, problem_lines

SESSION_DATA = "SESSION-DATA-OF-THE-LOG-TEST"
AUTH_DATA = "AUTH-DATA-OF-THE-LOG-TEST"
FALSE_TOKEN = "FALSE-TOKEN-OF-THE-LOG-TEST"
ROOM = "!log:test.example"
SESSION = "log/session+0"

UPLOADS = 3
KEYS_AN_UPLOAD = 600
CONCURRENT_UPLOADS = 10
#: Seconds for which a slow client reads nothing; fetching a page takes less.
PAUSE_SECONDS = 0.5
#: session_data long enough for a backup above the kernel's buffers of a connection.
LONG_DATA = SESSION_DATA + "." * 14_000
SERVLETS = (
    "RoomKeysServlet",
    "RoomKeysVersionServlet",
    "RoomKeysNewVersionServlet",
)


@attrs.frozen
class Recorded:
    """Log and metrics of a run of all endpoints.

    Attributes:
        account: the only user.
        version: the backup that was used and deleted in the end.
        second_version: another version.
        log: the log and the output.
        metrics: the metrics at the end of the run.
    """

    account: Account
    version: str
    second_version: str
    log: str
    metrics: str

    def lines(self, *parts: str) -> list[str]:
        """Return the log lines that contain each of some texts."""
        lines = self.log.splitlines()
        return [line for line in lines if all(part in line for part in parts)]

    def plugin_lines(self, text: str, *parts: str) -> list[str]:
        """Return the plugin's INFO lines that contain the user, the device and some
        texts."""
        who = (self.account.user_id, self.account.device_id)
        return self.lines(" INFO synapse_roomkeys", text, *who, *parts)

    def requests(self, pattern: str) -> list[str]:
        """Return Synapse's lines of requests whose method and path match a pattern."""
        lines = self.lines("Processed request")
        return [line for line in lines if re.search(f'"{pattern}', line)]


def metric(metrics: str, name: str, **labels: str) -> float:
    """Return the sum of a metric's samples with the given labels."""
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    samples = re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", metrics, re.MULTILINE)
    return sum(
        float(value)
        for found, value in samples
        if all(label in found for label in wanted)
    )


class Reader(Protocol):
    """Client of a download.

    Attributes:
        done: fires at the end of the connection.
    """

    def __init__(self) -> None:
        self.done: Deferred[None] = Deferred()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.done.callback(None)


class SlowReader(Reader):
    """Client that pauses reading for a while after the first bytes."""

    size = 0

    def dataReceived(self, data: bytes) -> None:
        if not self.size:
            transport: Any = self.transport
            transport.pauseProducing()
            clock: Any = reactor
            clock.callLater(PAUSE_SECONDS, transport.resumeProducing)
        self.size += len(data)


class AbortingReader(Reader):
    """Client that closes the connection after the first bytes."""

    def dataReceived(self, data: bytes) -> None:
        transport: Any = self.transport
        transport.loseConnection()


def debug_synapse(directory: Path, database: Mapping[str, Any] | None) -> Synapse:
    """Return a Synapse with a DEBUG log, but without the values of SQL statements.

    If an operator turns the values on, Synapse logs the values of its own endpoints as
    well.
    """
    settings = config.log(directory / "homeserver.log")
    settings["loggers"] = {"synapse.storage.SQL": {"level": "INFO"}}
    settings["root"]["level"] = "DEBUG"
    file = directory / "debug.yaml"
    file.write_text(json.dumps(settings))
    extra = {"log_config": str(file)}
    return Synapse(directory, database=database, extra_config=extra)


def settled_metrics(synapse: Synapse) -> str:
    """Return the metrics once Synapse has finished each request to the plugin."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        metrics = fetch(synapse.metrics_url).decode()
        counts = [
            sum(
                metric(metrics, f"synapse_http_server_{name}_total", servlet=servlet)
                for servlet in SERVLETS
            )
            for name in ("requests_received", "response_count")
        ]
        if counts[0] == counts[1]:
            return metrics
    raise AssertionError(f"requests go on after {DEADLINE} s")


@pytest.fixture(scope="module")
def recorded(
    database: Callable[[], Mapping[str, Any] | None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Recorded:
    """Log and metrics after all valid and invalid requests of a client, on each
    engine."""
    with debug_synapse(tmp_path_factory.mktemp("log"), database()) as synapse:
        host = host_of(synapse)
        account = synapse.register("user")
        client = Client(host, User(account.user_id, account.access_token))
        version, second = blockon(send_everything(host, client))
        blockon(host.close())
        metrics = settled_metrics(synapse)
    return Recorded(account, version, second, synapse.log(), metrics)


@inlineCallbacks
def send_everything(
    host: HttpHost, client: Client
) -> Generator[Deferred[Any], Any, tuple[str, str]]:
    """Send each kind of request; fires with the two versions created."""
    version: str = yield client.create_version({"public_key": AUTH_DATA})
    yield upload(client, version)
    yield read(host, client, version)
    slow_reader = SlowReader()
    yield read_with(slow_reader, host, client, keys_path(version))
    assert slow_reader.size > UPLOADS * KEYS_AN_UPLOAD * len(LONG_DATA)
    yield read_with(AbortingReader(), host, client, keys_path(version))
    yield send_refused_requests(host, client, version)
    body = {"algorithm": ALGORITHM, "auth_data": {"other": AUTH_DATA}}
    accepted((yield client.put(version_path(version), body)))
    tally((yield client.delete(keys_path(version, ROOM, SESSION))))
    second: str = yield client.create_version({"public_key": AUTH_DATA})
    refused(
        (yield client.put(keys_path(version), wrapped({}))),
        403,
        "M_WRONG_ROOM_KEYS_VERSION",
    )
    for _ in range(2):
        accepted((yield client.delete(version_path(version))))
    return version, second


@inlineCallbacks
def upload(client: Client, version: str) -> Generator[Deferred[Any], Any, None]:
    """Upload many keys in concurrent requests, then a better and a worse key."""
    for number in range(UPLOADS):
        sessions = {f"{number}-{n}": key(data=LONG_DATA) for n in range(KEYS_AN_UPLOAD)}
        yield client.upload(version, {ROOM: sessions})
    path = keys_path(version, ROOM, SESSION)
    for index in (7, 5, 6):
        tally((yield client.put(path, key(index, 2, index == 5, SESSION_DATA))))
    yield gatherResults(
        [
            client.upload(version, {f"!{n}:test.example": {"s": key(data=LONG_DATA)}})
            for n in range(CONCURRENT_UPLOADS)
        ]
    )


@inlineCallbacks
def read(
    host: HttpHost, client: Client, version: str
) -> Generator[Deferred[Any], Any, None]:
    """Download a backup as a whole, by room and by session, and read the version."""
    rooms = yield client.download(version)
    assert len(rooms[ROOM]) == UPLOADS * KEYS_AN_UPLOAD + 1
    accepted((yield client.get(keys_path(version, ROOM))))
    accepted((yield client.get(keys_path(version, ROOM, SESSION))))
    yield client.info()
    path = f"{PREFIX}/version?access_token={client.user.access_token}"
    accepted((yield host.request("GET", path, token=None)))


@inlineCallbacks
def read_with(
    reader: Reader, host: HttpHost, client: Client, path: str
) -> Generator[Deferred[Any], Any, None]:
    """Download a path with a client's own behaviour; fires at the end."""
    token = client.user.access_token
    response = yield host.open("GET", PREFIX + path, token=token)
    response.deliverBody(reader)
    yield reader.done


@inlineCallbacks
def send_refused_requests(
    host: HttpHost, client: Client, version: str
) -> Generator[Deferred[Any], Any, None]:
    """Send requests with secrets that are refused."""
    path = keys_path(version, ROOM, SESSION)
    answer = yield client.put(path, b'{"session_data": "%s' % SESSION_DATA.encode())
    refused(answer, 400, "M_NOT_JSON")
    for body in (
        {"session_data": SESSION_DATA},
        key(index=SESSION_DATA),
        {**key(), "session_data": None, "is_verified": SESSION_DATA},
    ):
        refused((yield client.put(path, body)), 400, "M_BAD_JSON")
    answer = yield client.put(path, key(data=SESSION_DATA * 10_000))
    refused(answer, 413, "M_TOO_LARGE")
    body = {"algorithm": 1, "auth_data": AUTH_DATA}
    refused((yield client.post("/version", body)), 400, "M_BAD_JSON")
    refused((yield client.get(keys_path("1"))), 404, "M_NOT_FOUND")
    refused((yield client.get(keys_path(None))), 400, "M_MISSING_PARAM")
    refused((yield client.request("PATCH", "/version")), 405, "M_UNRECOGNIZED")
    answer = yield host.request("GET", PREFIX + "/version", token=FALSE_TOKEN)
    refused(answer, 401, "M_UNKNOWN_TOKEN")


# The log


def test_secrets(recorded: Recorded) -> None:
    """No log line contains a key, auth_data or a token, in any kind of request."""
    secrets = (SESSION_DATA, AUTH_DATA, FALSE_TOKEN, recorded.account.access_token)
    for secret in secrets:
        assert recorded.lines(secret) == []


def test_no_problems(recorded: Recorded) -> None:
    """The log has no error, no warning of the plugin and no log context problem."""
    assert recorded.lines(" DEBUG "), "the log level isn't DEBUG"
    assert problem_lines(recorded.log) == []
    assert recorded.lines(" WARNING synapse_roomkeys") == []


def test_contexts(recorded: Recorded) -> None:
    """Each line logged by the plugin during a request has the request's name."""
    lines = recorded.lines(" synapse_roomkeys.")
    lines = [line for line in lines if "answers /room_keys in Synapse" not in line]
    for line in lines:
        assert re.search(r" synapse_roomkeys\S* (PUT|POST|GET|DELETE)-\d+ ", line), line
    for method in ("PUT", "POST", "DELETE"):
        assert any(f" {method}-" in line for line in lines)


def test_replaced_key(recorded: Recorded) -> None:
    """A replaced key is logged once, with the user, the ids and the fields of both
    keys."""
    (line,) = recorded.lines("Replaced key")
    who = (recorded.account.user_id, recorded.account.device_id, recorded.version)
    assert " INFO synapse_roomkeys" in line
    for part in (*who, ROOM, SESSION):
        assert part in line
    assert "(first_message_index/forwarded_count/is_verified): " in line
    assert line.endswith(" old=7/2/False new=5/2/True"), line


def test_deleted_key(recorded: Recorded) -> None:
    """A deletion of keys is logged once."""
    assert len(recorded.lines("Deleted keys")) == 1
    where = (recorded.version, ROOM, SESSION)
    assert len(recorded.plugin_lines("Deleted keys", *where)) == 1


def test_versions(recorded: Recorded) -> None:
    """A created version is logged once, and a deleted version once."""
    assert len(recorded.lines("Created version")) == 2
    assert len(recorded.plugin_lines("Created version", recorded.version)) == 1
    assert len(recorded.plugin_lines("Created version", recorded.second_version)) == 1
    assert len(recorded.lines("Deleted version")) == 1
    assert len(recorded.plugin_lines("Deleted version", recorded.version)) == 1


def test_refusals(recorded: Recorded) -> None:
    """A refusal other than a GET's 404 is logged at INFO and counted, with its
    errcode."""
    for status, errcode, number in (
        (400, "M_NOT_JSON", 1),
        (400, "M_BAD_JSON", 4),
        (413, "M_TOO_LARGE", 1),
        (400, "M_MISSING_PARAM", 1),
        (403, "M_WRONG_ROOM_KEYS_VERSION", 1),
    ):
        plugin_lines = recorded.lines(" INFO synapse_roomkeys", f"{status} {errcode}")
        assert len(plugin_lines) == number, errcode
        counted = "synapse_roomkeys_refused_requests_total"
        assert metric(recorded.metrics, counted, errcode=errcode) == number


def test_transactions(recorded: Recorded) -> None:
    """A download's database transactions are accounted to its request.

    Transactions that begin only when a slow client reads on are included.
    """
    whole = recorded.requests("GET .*/keys.version=" + recorded.version)
    transactions = [int(re.findall(r"/(\d+)\)", line)[-1]) for line in whole]
    assert max(transactions) >= 2, whole


# Metrics


@pytest.mark.parametrize(
    ("servlet", "method", "path"),
    [
        ("RoomKeysServlet", "PUT", "keys"),
        ("RoomKeysServlet", "GET", "keys"),
        ("RoomKeysServlet", "DELETE", "keys"),
        ("RoomKeysVersionServlet", "GET", "version"),
        ("RoomKeysVersionServlet", "PUT", "version"),
        ("RoomKeysVersionServlet", "DELETE", "version"),
        ("RoomKeysNewVersionServlet", "POST", "version"),
    ],
)
def test_servlets(servlet: str, method: str, path: str, recorded: Recorded) -> None:
    """Each request is logged once and counted under the name of its servlet."""
    lines = recorded.requests(rf"{method} /_matrix/client/v3/room_keys/{path}\b")
    responses = "synapse_http_server_response_count_total"
    labels = {"servlet": servlet, "method": method}
    assert metric(recorded.metrics, responses, **labels) == len(lines) > 0
    transactions = "synapse_http_server_response_db_txn_count_total"
    assert metric(recorded.metrics, transactions, **labels) > 0


def test_plugin_metrics(recorded: Recorded) -> None:
    """The plugin's metrics are exposed with Synapse's and count keys, bytes and
    aborts."""
    uploaded = "synapse_roomkeys_uploaded_keys_total"
    stored = UPLOADS * KEYS_AN_UPLOAD + CONCURRENT_UPLOADS + 1
    assert metric(recorded.metrics, uploaded, outcome="stored") == stored
    assert metric(recorded.metrics, uploaded, outcome="replaced") == 1
    assert metric(recorded.metrics, uploaded, outcome="kept") == 1
    downloaded = "synapse_roomkeys_download_bytes_total"
    assert metric(recorded.metrics, downloaded) > stored * len(LONG_DATA)
    broken = "synapse_roomkeys_broken_downloads_total"
    assert metric(recorded.metrics, broken, reason="client") == 1
    assert metric(recorded.metrics, broken, reason="server") == 0

"""The service's shutdown: finished, refused and aborted requests."""

from __future__ import annotations

import json
import signal
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import psycopg2
import pytest

from synapse_roomkeys.storage.postgres_statements import TABLE_STATEMENTS

from ..backup_client import Api
from ..contract import Answer
from ..contract.base import (
    ALGORITHM,
    AUTH_DATA,
    PREFIX,
    Rooms,
    accepted,
    key,
    keys_path,
    refused,
    wrapped,
)
from ..reliability.sockets import read_reply
from ..servers.accounts import fetch
from ..servers.fake_homeserver import Homeserver
from ..servers.postgres import PostgresServer
from ..servers.processes import HOST
from ..servers.service import Service

DEADLINE = 20.0
#: Number of keys, of 60 KB each: 24 MB, more than the kernel's buffers for a
#: connection, which hold 10 MB.
KEYS = 400
DATA = "x" * 60_000


class Backup:
    """A user's backup that exceeds the kernel's buffers, and raw connections to the
    service.

    Attributes:
        service: the service.
        token: the user's access token.
        api: the user's client.
        version: the version of the backup.
    """

    def __init__(
        self, service: Service, homeserver: Homeserver, keys: int = KEYS
    ) -> None:
        self.service = service
        self.token = homeserver.new_user().access_token
        self.api = Api(service.url, self.token)
        body = {"algorithm": ALGORITHM, "auth_data": AUTH_DATA}
        self.version: str = self.api.request("POST", "/version", body).json["version"]
        # Small uploads, because larger ones are throttled.
        for start in range(0, keys, 10):
            some = {f"{start + n}": key(data=DATA) for n in range(10)}
            assert self.api.request("PUT", *self.upload({"!a": some})).status == 200

    def upload(self, rooms: Rooms) -> tuple[str, object]:
        """Return the path and the body of an upload."""
        return keys_path(self.version), wrapped(rooms)

    def send(self, method: str, path: str, *headers: str) -> socket.socket:
        """Send the headers of a request on a new connection, without a body."""
        lines = [f"{method} {PREFIX}{path} HTTP/1.1", "Host: a", *headers]
        lines.append(f"Authorization: Bearer {self.token}")
        client = socket.create_connection((HOST, self.service.port), timeout=DEADLINE)
        client.sendall("\r\n".join([*lines, "", ""]).encode())
        return client

    def download(self) -> socket.socket:
        """Start a download and wait for the first bytes of the answer."""
        client = self.send("GET", keys_path(self.version))
        assert client.recv(1000, socket.MSG_PEEK).startswith(b"HTTP/1.1 200")
        return client


@pytest.fixture
def service(homeserver: Homeserver, tmp_path: Path) -> Iterator[Service]:
    """The service with the default shutdown timeout."""
    with Service(tmp_path, homeserver.url) as service:
        yield service
    assert "Traceback" not in service.log()


@pytest.fixture
def short_timeout(homeserver: Homeserver, tmp_path: Path) -> Iterator[Service]:
    """The service with a shutdown timeout of one second."""
    with Service(tmp_path, homeserver.url, settings={"shutdown_seconds": 1}) as service:
        yield service
    assert "Traceback" not in service.log()


def stop(service: Service, number: signal.Signals = signal.SIGTERM) -> None:
    """Send a signal, and wait until ``/ready`` reports that the service is stopping."""
    ready = service.metrics_url.replace("/metrics", "/ready")
    service.send(number)
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        try:
            fetch(ready)
        except RuntimeError as error:
            assert '503 {"database":"ok"' in str(error)
            assert '"service":"stopping"' in str(error)
            return
        time.sleep(0.02)
    raise AssertionError(f"still ready:\n{service.log()}")


def answer_to(client: socket.socket) -> Answer:
    """Read an answer from a connection."""
    with client.makefile("rb") as stream:
        answer = read_reply(stream)
    assert answer is not None, "closed without an answer"
    return answer


def closes(client: socket.socket) -> bool:
    """Return whether the server closes the connection without another byte."""
    return client.recv(1000) == b""


def rest_of(client: socket.socket) -> bytes:
    """Return all bytes until the connection is closed or reset."""
    parts = []
    with suppress(ConnectionResetError):
        while part := client.recv(65536):
            parts.append(part)
    return b"".join(parts)


def test_requests_in_progress_are_finished(
    service: Service, homeserver: Homeserver
) -> None:
    """A download and an upload in progress are finished; later requests are refused.

    New connections are refused, idle connections are closed. A request whose headers
    were incomplete is answered 503 with Retry-After.
    """
    backup = Backup(service, homeserver)
    body = json.dumps(backup.upload({"!b": {"new": key()}})[1]).encode()
    with closing(backup.send("GET", "/version")) as idle:
        assert answer_to(idle).status == 200
        incomplete = backup.send("GET", "/version")
        assert answer_to(incomplete).status == 200
        incomplete.sendall(f"GET {PREFIX}/version HTTP/1.1\r\n".encode())
        upload = backup.send(
            "PUT", keys_path(backup.version), f"Content-Length: {len(body)}"
        )
        upload.sendall(body[:10])
        download = backup.download()
        stop(service)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, service.port))
        assert closes(idle)
    with closing(incomplete):
        incomplete.sendall(b"Host: a\r\n\r\n")
        answer = answer_to(incomplete)
        refused(answer, 503, "M_UNKNOWN")
        assert int(answer.headers["retry-after"]) > 0
        assert answer.headers["connection"] == "close"
        assert answer.headers["access-control-allow-origin"] == "*"
        assert closes(incomplete)
    with closing(upload):
        upload.sendall(body[10:])
        assert accepted(answer_to(upload))["count"] == KEYS + 1
        assert closes(upload)
    with closing(download):
        rooms = accepted(answer_to(download))["rooms"]
        assert len(rooms["!a"]["sessions"]) == KEYS
        assert closes(download)
    assert service.wait(DEADLINE) == 0


def test_a_stalled_download_is_aborted(
    short_timeout: Service, homeserver: Homeserver
) -> None:
    """A download without reads by the client is aborted at the shutdown timeout.

    The final chunk is never sent. Otherwise the client would take the download for
    complete.
    """
    backup = Backup(short_timeout, homeserver)
    with closing(backup.download()) as download:
        stop(short_timeout)
        assert short_timeout.wait(DEADLINE) == 0
        assert not rest_of(download).endswith(b"0\r\n\r\n")
    assert "Dropping 1 connections" in short_timeout.log()
    assert "(broken off)" in short_timeout.log()


def test_a_blocked_transaction_does_not_delay_the_exit(
    short_timeout: Service, homeserver: Homeserver
) -> None:
    """A transaction that waits for a lock does not delay the exit beyond the timeout.

    A thread can't be stopped. The service exits without waiting for the transaction's
    thread.
    """
    backup = Backup(short_timeout, homeserver)
    body = json.dumps(backup.upload({"!b": {"new": key()}})[1]).encode()
    path = short_timeout.directory / "roomkeys.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        length = f"Content-Length: {len(body)}"
        with closing(backup.send("PUT", keys_path(backup.version), length)) as upload:
            upload.sendall(body)
            deadline = time.monotonic() + DEADLINE
            while (
                'state="in_use"} 1.0' not in fetch(short_timeout.metrics_url).decode()
            ):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            short_timeout.send(signal.SIGTERM)
            assert short_timeout.wait(DEADLINE) == 0
    assert "Leaving 1 transactions unfinished" in short_timeout.log()


def test_a_second_signal_exits_immediately(
    service: Service, homeserver: Homeserver
) -> None:
    """A second signal ends the service immediately with exit code 1."""
    backup = Backup(service, homeserver)
    with closing(backup.download()):
        stop(service)
        service.send(signal.SIGINT)
        assert service.wait(5.0) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_idle_service_exits(service: Service, number: signal.Signals) -> None:
    """An idle service exits with 0 on SIGINT, SIGTERM or SIGHUP (closed terminal)."""
    service.send(number)
    assert service.wait(5.0) == 0
    assert "Stopped" in service.log()


def test_a_signal_during_the_start(
    postgres: PostgresServer, homeserver: Homeserver, tmp_path: Path
) -> None:
    """A service that is stopped while it waits for the lock of the tables exits with 0
    and doesn't listen first."""
    database = postgres.create_database()
    service = Service(tmp_path, homeserver.url, database=database)
    with closing(psycopg2.connect(**database)) as connection:
        cursor = connection.cursor()
        cursor.execute(TABLE_STATEMENTS.lock)
        service.start_without_waiting()

        def is_waiting() -> bool:
            cursor.execute("SELECT 1 FROM pg_locks WHERE NOT granted")
            return cursor.fetchone() is not None

        wait_until(is_waiting, service)
        service.send(signal.SIGTERM)
        wait_until(lambda: "Stopping" in service.log(), service)
    assert service.wait(DEADLINE) == 0
    assert "listens on" not in service.log()
    assert "Traceback" not in service.log()


def wait_until(is_true: Callable[[], bool], service: Service) -> None:
    """Wait for a condition. If it doesn't come true, fail with the service's log."""
    deadline = time.monotonic() + DEADLINE
    while not is_true():
        assert time.monotonic() < deadline, service.log()
        time.sleep(0.02)


def test_a_closed_terminal(service: Service, homeserver: Homeserver) -> None:
    """SIGHUP finishes an upload in progress, as any other signal to stop does."""
    backup = Backup(service, homeserver, keys=0)
    body = json.dumps(backup.upload({"!b": {"new": key()}})[1]).encode()
    headers = f"Content-Length: {len(body)}", "Expect: 100-continue"
    with closing(backup.send("PUT", keys_path(backup.version), *headers)) as upload:
        assert upload.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        stop(service, signal.SIGHUP)
        upload.sendall(body)
        assert answer_to(upload).status == 200
    assert service.wait(DEADLINE) == 0


def test_a_service_under_nohup(homeserver: Homeserver, tmp_path: Path) -> None:
    """A service started with SIGHUP ignored keeps running on SIGHUP, as under nohup."""
    service = Service(tmp_path, homeserver.url)
    ignore = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN);"
    run = "import runpy; runpy.run_module('synapse_roomkeys.service', alter_sys=True)"
    service.program = ("-c", f"{ignore}{run}")
    with service:
        service.send(signal.SIGHUP)
        assert json.loads(fetch(f"{service.url}/ready"))["service"] == "ok"
        assert "Stopping" not in service.log()

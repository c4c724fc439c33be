"""The service with more clients than its limit of open files allows."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ..contract import Answer
from ..contract.base import PREFIX
from ..reliability.sockets import connect, exchange, read_reply, request
from ..servers.accounts import fetch
from ..servers.fake_homeserver import Homeserver
from ..servers.service import Service

DEADLINE = 20.0
#: Limits of open files at the start of the process: a soft limit too low for the
#: service, and a hard limit that a test can exceed.
SOFT, HARD = 32, 400
#: Number of connections to open: more than the hard limit.
CLIENTS = 500
#: Program that sets the limits of open files, and then executes the service.
LIMITED_SERVICE = """
import os, resource, sys
limits = tuple(map(int, os.environ.pop("FILES").split()))
resource.setrlimit(resource.RLIMIT_NOFILE, limits)
program = [sys.executable, "-m", "synapse_roomkeys.service", *sys.argv[1:]]
os.execv(sys.executable, program)
"""


def with_file_limits(service: Service, soft: int, hard: int) -> Service:
    """Make a service start with low limits of open files; return the service."""
    service.program = ("-c", LIMITED_SERVICE)
    service.environment = {"FILES": f"{soft} {hard}"}
    return service


@pytest.fixture
def service(homeserver: Homeserver, tmp_path: Path) -> Iterator[Service]:
    """The service with low limits of open files; the log must have no errors."""
    with with_file_limits(Service(tmp_path, homeserver.url), SOFT, HARD) as service:
        yield service
    assert "Traceback" not in service.log()
    assert "ERROR" not in service.log()


def send_get(port: int, path: str) -> Answer:
    """Send a GET request on a connection of its own and return the answer."""
    [reply] = exchange(port, request("GET", path, None), wanted=1).replies
    return reply


def values(service: Service) -> dict[str, float]:
    """Return the metrics without labels, by name."""
    lines = fetch(service.metrics_url).decode().splitlines()
    rows = (line.split(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in rows if "{" not in name}


def wait_for_connections(service: Service, number: int) -> None:
    """Wait until at most `number` client connections are open."""
    deadline = time.monotonic() + DEADLINE
    while values(service)["synapse_roomkeys_connections"] > number:
        assert time.monotonic() < deadline, values(service)
        time.sleep(0.02)


def is_closed(client: socket.socket) -> bool:
    """Return whether the server has closed an idle connection."""
    client.setblocking(False)
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def test_more_clients_than_files(service: Service) -> None:
    """The service raises its soft limit to the hard limit and stays reachable.

    Above the connection limit, ``/health`` and ``/ready`` are answered on both
    listeners, and any other request on a new connection is 503. Existing connections
    are served. After the clients have gone, all requests are served as before.
    """
    assert resource.prlimit(service.pid, resource.RLIMIT_NOFILE) == (HARD, HARD)
    monitoring = service.metrics_port
    max_connections = values(service)["synapse_roomkeys_max_connections"]
    assert 40 < max_connections < HARD / 2
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(service.port)) for _ in range(CLIENTS)]
        for port in (service.port, monitoring) * 3:
            assert send_get(port, "/health").status == 200
            ready = send_get(port, "/ready")
            assert (ready.status, ready.json["database"]) == (200, "ok")
        reply = send_get(service.port, f"{PREFIX}/version")
        assert (reply.status, reply.headers["connection"]) == (503, "close")
        assert int(reply.headers["retry-after"]) > 0
        assert reply.headers["content-type"] == "application/json"
        assert reply.headers["access-control-allow-origin"] == "*"
        # Connections from before the limit was reached are served.
        with clients[0].makefile("rb") as stream:
            clients[0].sendall(request("GET", f"{PREFIX}/version", None))
            first = read_reply(stream)
            assert first is not None and first.status == 401
        found = values(service)
        assert found["synapse_roomkeys_connections"] >= max_connections
        assert (
            found["synapse_roomkeys_refused_connections_total"]
            > CLIENTS - max_connections
        )
        assert found["process_max_fds"] == HARD
        assert len(os.listdir(f"/proc/{service.pid}/fd")) < HARD
        wait_for_connections(service, int(max_connections))
        assert sum(map(is_closed, clients)) == CLIENTS - max_connections
    wait_for_connections(service, 0)
    assert send_get(service.port, f"{PREFIX}/version").status == 401
    assert service.log().count("further connections are refused") == 1


def test_bodies_in_files_are_counted(service: Service) -> None:
    """Open files remain even if each allowed connection keeps its body in a file.

    ``/ready`` succeeds meanwhile, and each upload is read to the end.
    """
    max_connections = int(values(service)["synapse_roomkeys_max_connections"])
    head = f"PUT {PREFIX}/keys?version=1 HTTP/1.1\r\nHost: a\r\nContent-Length: 200000"
    with ExitStack() as stack:
        clients = [
            stack.enter_context(connect(service.port)) for _ in range(max_connections)
        ]
        for client in clients:
            client.sendall(f"{head}\r\n\r\n".encode() + bytes(150_000))
        ready = send_get(service.metrics_port, "/ready")
        assert ready.json == {
            "database": "ok",
            "homeserver": "ok",
            "service": "ok",
        }
        for client in clients:
            with client.makefile("rb") as stream:
                client.sendall(bytes(50_000))
                reply = read_reply(stream)
                assert reply is not None and reply.status == 401
    assert "No room" not in service.log()


def test_too_few_files(homeserver: Homeserver, tmp_path: Path) -> None:
    """With a hard limit that is too low the service exits with 1 and names the
    setting."""
    service = with_file_limits(Service(tmp_path, homeserver.url), 200, 200)
    code, output = service.run_to_end()
    assert code == 1
    assert "Can't start: 200 open files leave no room" in output
    assert "LimitNOFILE" in output

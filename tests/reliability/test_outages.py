"""Metrics, readiness and log lines by which an operator notices an outage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import inlineCallbacks

from ..contract import Answer, Client
from ..contract.base import PREFIX, refused
from ..servers import PostgresServer
from ..servers.accounts import fetch
from ..servers.fake_homeserver import Homeserver
from ..servers.processes import HOST
from ..servers.service import Service
from .faults import WITHIN, Backup, Serve, Served, Steps, later, serving, together

USERS = 10
FAILURES = 'synapse_roomkeys_transaction_failures_total{cause="unreachable"}'
RETRIES = 'synapse_roomkeys_transaction_retries_total{cause="unreachable"}'
LAST_WRITE = "synapse_roomkeys_last_write_timestamp_seconds"
UNANSWERED = 'synapse_roomkeys_whoami_requests_total{outcome="failed"}'


def metric(service: Service, series: str) -> float:
    """Return the value of a metric, by name and labels."""
    lines = fetch(service.metrics_url).decode().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{series} "))
    return float(line.rpartition(" ")[2])


def outage_lines(service: Service, subject: str) -> list[str]:
    """Return the service's log lines about the outages of a named server."""
    return [line for line in service.log().splitlines() if f" {subject} " in line]


@inlineCallbacks
def wait_for_third_line(served: Served, subject: str) -> Steps:
    """Query /ready as a load balancer does until the log has the line about the
    outage's end."""
    end = time.monotonic() + WITHIN
    while len(outage_lines(served.service, subject)) == 2:
        assert time.monotonic() < end
        yield later(0.1, lambda: None)
        yield served.wait_until_ready()


@pytest.fixture
def own_postgres(tmp_path: Path) -> Iterator[PostgresServer]:
    """A PostgreSQL server for a single test, which the test may stop."""
    with PostgresServer(tmp_path / "own") as server:
        yield server


@inlineCallbacks
def test_a_database_outage(own_postgres: PostgresServer, serve: Serve) -> Steps:
    """A database outage with failing uploads of ten users moves the metrics of the
    outage's cause, leaves the time of the last write unchanged, and takes three log
    lines with the address."""
    database = own_postgres.create_database()
    served = serve(database)
    service = served.service
    address = f"Database {HOST}:{database['port']}"
    backups: list[Backup] = yield served.new_backups(USERS)
    assert metric(service, FAILURES) == metric(service, RETRIES) == 0
    written = metric(service, LAST_WRITE)
    assert time.time() - WITHIN < written <= time.time()

    own_postgres.stop()
    yield together([backup.refuse() for backup in backups])
    assert (yield served.ask_if_ready())["database"] == "unavailable"
    assert metric(service, FAILURES) == USERS
    assert metric(service, RETRIES) >= USERS
    assert metric(service, LAST_WRITE) == written
    begin, given_up = outage_lines(service, address)
    assert "fails (unreachable), trying again: " in begin
    assert "fails (unreachable), giving up: " in given_up

    own_postgres.start()
    yield together([backup.upload() for backup in backups])
    assert metric(service, LAST_WRITE) > written
    yield wait_for_third_line(served, address)
    last = outage_lines(service, address)[2]
    assert "is back (unreachable) after " in last
    assert f"{USERS} requests given up" in last


class ProxiedHomeserver(Homeserver):
    """A homeserver behind a reverse proxy.

    Attributes:
        is_away: whether the proxy answers 502 instead of forwarding requests.
    """

    is_away = False

    def _answer(self, path: str, token: str) -> tuple[int, dict[str, Any]]:
        return (502, {}) if self.is_away else super()._answer(path, token)


@pytest.fixture
def own_homeserver() -> Iterator[ProxiedHomeserver]:
    """A homeserver for a single test, which the test may cut off."""
    with ProxiedHomeserver() as homeserver:
        yield homeserver


@pytest.fixture
def own_serve(own_homeserver: ProxiedHomeserver, tmp_path: Path) -> Iterator[Serve]:
    """A function that starts the service with the homeserver behind a proxy."""
    with serving(own_homeserver, tmp_path / "service") as serve:
        yield serve


@inlineCallbacks
def test_a_homeserver_outage(
    own_homeserver: ProxiedHomeserver, own_serve: Serve
) -> Steps:
    """A homeserver outage with failing requests of ten users moves the homeserver's
    metric and takes three log lines with the address; the first two lines have the
    status."""
    served = own_serve()
    service = served.service
    clients = [Client(served.host, served.host.new_user()) for _ in range(USERS)]
    assert metric(service, UNANSWERED) == 0
    own_homeserver.is_away = True
    yield together([refuse(client) for client in clients])
    assert (yield served.ask_if_ready())["homeserver"] == "unavailable"
    assert metric(service, UNANSWERED) >= USERS
    address = f"Homeserver {own_homeserver.url}"
    begin, given_up = outage_lines(service, address)
    assert "fails (away), trying again: " in begin
    assert "fails (away), giving up: " in given_up
    assert "status 502" in begin and "status 502" in given_up
    own_homeserver.is_away = False
    yield wait_for_third_line(served, address)
    assert "is back (away) after " in outage_lines(service, address)[2]


@inlineCallbacks
def refuse(client: Client) -> Steps:
    """Send a request; the answer must be a 503."""
    token = client.user.access_token
    path = f"{PREFIX}/version"
    answer: Answer = yield client.host.request("GET", path, token=token)
    refused(answer, 503, "M_UNKNOWN")

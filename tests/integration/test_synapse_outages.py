"""Database outages under a Synapse with the plugin."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from pytest_twisted import blockon
from twisted.internet.defer import gatherResults, inlineCallbacks

from ..client import HttpHost
from ..contract import Answer, Client
from ..contract.base import Steps, key, keys_path, wrapped
from ..servers import PostgresServer, Synapse
from .conftest import host_of

ROOM = "!room"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A PostgreSQL for this module alone, because the tests stop the server."""
    with PostgresServer(tmp_path_factory.mktemp("postgres"), durable=True) as server:
        yield server


@pytest.fixture(scope="module")
def host(
    server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HttpHost]:
    """A Synapse with the plugin on the PostgreSQL of this module."""
    directory = tmp_path_factory.mktemp("synapse")
    with Synapse(directory, database=server.create_database()) as synapse:
        host = host_of(synapse)
        yield host
        blockon(host.close())


@inlineCallbacks
def test_a_restart_fails_no_request(host: HttpHost, server: PostgresServer) -> Steps:
    """After a restart or crash of the database, all requests succeed.

    The requests are concurrent, to use each broken connection of the pool.
    """
    client = Client(host, host.new_user())
    version: str = yield client.create_version()
    for number, stop_or_restart in enumerate((server.restart, server.kill)):
        yield gatherResults([client.info() for _ in range(20)])
        stop_or_restart()
        if stop_or_restart == server.kill:
            server.start()
        rooms = {ROOM: {f"{number}.{i}": key() for i in range(10)}}
        uploads = [
            client.put(keys_path(version), wrapped({ROOM: {session: one}}))
            for session, one in rooms[ROOM].items()
        ]
        answers = yield gatherResults([*uploads, client.get("/version")])
        assert [answer.status for answer in answers] == [200] * len(answers)
    info: dict[str, Any] = yield client.info()
    assert (info["etag"], info["count"]) == ("20", 20)


@inlineCallbacks
def test_an_outage_is_503(host: HttpHost, server: PostgresServer) -> Steps:
    """While the database is stopped, requests are answered 503 with Retry-After.

    Uploads store no key, and no answer says that a backup does not exist.
    """
    client = Client(host, host.new_user())
    version: str = yield client.create_version()
    server.stop()
    try:
        path = keys_path(version)
        requests = [
            ("GET", "/version", None),
            ("GET", path, None),
            ("PUT", path, wrapped({ROOM: {"s": key()}})),
            ("DELETE", path, None),
        ]
        answers: list[Answer] = yield gatherResults(
            [
                host.request(
                    method,
                    client.prefix + path_below,
                    token=client.user.access_token,
                    body=None if body is None else json.dumps(body).encode(),
                )
                for method, path_below, body in requests
            ]
        )
    finally:
        server.start()
    for answer in answers:
        assert answer.status == 503, answer
        assert int(answer.headers["retry-after"]) > 0
        assert answer.headers["content-type"] == "application/json"
        assert answer.json["errcode"] == "M_UNKNOWN"
    assert (yield client.tally()) == (0, 0)
    assert (yield client.upload(version, {ROOM: {"s": key()}})) == (1, 1)

"""Tokens, session_data and auth_data appear nowhere but in answers to their owner."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg2
import pytest

from ..contract.base import ALGORITHM, PREFIX, key, wrapped
from ..servers import PostgresServer
from ..servers.accounts import fetch
from ..servers.fake_homeserver import Homeserver
from ..servers.processes import HOST
from ..servers.service import Service
from .sockets import Exchange, connect, exchange, new_version, request, upload

#: A substring of every secret sent by the tests.
MARKER = "MaRkEr"
SECRET = f"{MARKER}-secret"
DATA = {"ciphertext": SECRET, SECRET: [SECRET]}


def requests_with_secrets(version: str) -> Iterator[tuple[str, str, bytes]]:
    """Yield valid and invalid requests (method, path, body) that contain secrets."""
    good = wrapped({"!a:h": {"s": key(data=DATA)}})
    right = json.dumps(good).encode()
    info = {"algorithm": ALGORITHM, "auth_data": DATA, "version": version}
    path = f"/keys?version={version}"
    secret = json.dumps(SECRET).encode()
    for body in (
        right,
        right.replace(b"false", b"true"),
        right[:-1],
        right + b"x",
        right.replace(b"false", secret),
        right.replace(
            b'"first_message_index": 0', b'"first_message_index": %b' % secret
        ),
        right.replace(secret, b'"\\ud800%b"' % SECRET.encode()),
        right.replace(secret, b'"\xff%b"' % SECRET.encode()),
        right.replace(secret, b'"\\x%b"' % SECRET.encode()),
        right.replace(secret, json.dumps(SECRET * 10_000).encode()),
        json.dumps({"rooms": SECRET}).encode(),
        json.dumps({"rooms": {"!a:h": SECRET}}).encode(),
        json.dumps({"rooms": {"!a:h": {"sessions": {"s": SECRET}}}}).encode(),
        secret,
        SECRET.encode(),
    ):
        yield "PUT", path, body
        yield "PUT", "/keys?version=1", body
    for method, path in (("POST", "/version"), ("PUT", f"/version/{version}")):
        for change in (
            info,
            {**info, "algorithm": [SECRET]},
            {**info, "version": SECRET},
            {**info, "auth_data": None, "more": SECRET},
            SECRET,
            [DATA],
        ):
            yield method, path, json.dumps(change).encode()
    yield "GET", f"/keys/!a:h/s?version={version}", b""
    yield "DELETE", f"/keys?version={version}", b""


def check(got: Exchange) -> None:
    """Check that errors contain no secret; downloads of keys may, as their owner
    asks."""
    assert got.replies
    for reply in got.replies:
        if reply.status >= 400:
            assert MARKER.encode() not in reply.body, reply
            assert MARKER not in str(reply.headers), reply


def send_secrets(port: int, token: str) -> int:
    """Send secrets in every place of a request and return the number of requests."""
    number = 0
    version = new_version(port, token)
    for method, path, body in requests_with_secrets(version):
        check(exchange(port, request(method, PREFIX + path, token, body), wanted=1))
        query = f"{path}{'&' if '?' in path else '?'}access_token="
        for sent in (
            request(method, PREFIX + query + token, None, body),
            request(method, PREFIX + query + SECRET, None, body),
            request(method, PREFIX + path, SECRET, body),
        ):
            check(exchange(port, sent, wanted=1))
            number += 1
    path = PREFIX + "/version"
    for header in (
        f"Authorization: Basic {SECRET}",
        f"Authorization: {SECRET}",
        f"authorization: bearer {SECRET}",
        f"Authorization: Bearer  {SECRET}",
        f"Authorization: Bearer {SECRET} {SECRET}",
        f"Authorization: Bearer {SECRET}\xe9",
        f"Cookie: {SECRET}",
        f"X-Forwarded-For: {SECRET}",
        f"X-Request-ID: {SECRET} ",
    ):
        check(exchange(port, request("GET", path, None, b"", header), wanted=1))
        number += 1
    for target in (f"/{path}?access_token={SECRET}", f"{path}?%61ccess_token={SECRET}"):
        check(exchange(port, request("BREW", target, None), wanted=1))
    with connect(port) as client:
        client.sendall(request("PUT", path, SECRET, SECRET.encode() * 9)[:-5])
    return number + 3


def check_log(service: Service, token: str) -> None:
    """Check the log: no line contains a secret or the token."""
    for line in service.log().splitlines():
        assert MARKER not in line and token not in line, line


def check_record(path: Path) -> None:
    """Check the record: uploads, replaced keys and deletions are recorded, and no row
    contains a secret or a client's address."""
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT * FROM roomkeys_changes").fetchall()
    acts = {row[4] for row in rows}
    assert {"create_version", "update_version", "upload", "delete_keys"} <= acts
    assert any(row[8] for row in rows), "no replaced key"
    text = str(rows)
    for secret in (MARKER, "token_", HOST):
        assert secret not in text, text


@pytest.mark.parametrize("level", ["INFO", "DEBUG"])
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_secret_leaks(log_format: str, level: str, tmp_path: Path) -> None:
    """No secret appears in the log, the metrics, the status or an error, with each log
    format and level."""
    settings = {
        "log": {"format": log_format, "level": level},
        "limits": {"max_session_data_bytes": 10_000},
    }
    with Homeserver() as homeserver:
        token = homeserver.new_user().access_token
        with Service(tmp_path, homeserver.url, settings=settings) as service:
            number = send_secrets(service.port, token)
            for url in (f"{service.url}/ready", service.metrics_url):
                text = fetch(url).decode()
                assert MARKER not in text and token not in text, text
        assert service.log().count("synapse_roomkeys.access") >= number
        stored = b"".join(path.read_bytes() for path in tmp_path.glob("*.db*"))
        assert MARKER.encode() in stored and token.encode() not in stored
        check_record(tmp_path / "roomkeys.db")
        check_log(service, token)
    print(f"{number} requests")


def test_a_failing_statement_leaks_no_secret(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    """No secret appears in the log or an error when a statement fails, although
    PostgreSQL's error contains the refused row and psycopg2's the statement."""
    database = postgres.create_database()
    with Homeserver() as homeserver:
        token = homeserver.new_user().access_token
        with Service(tmp_path, homeserver.url, database=database) as service:
            connection = psycopg2.connect(**database)
            with connection, connection.cursor() as cursor:
                cursor.execute(
                    "ALTER TABLE e2e_room_keys ADD CHECK (session_id <> 's');"
                    "ALTER TABLE e2e_room_keys_versions ADD CHECK (algorithm = 'a')"
                )
            connection.close()
            for method, path, body in requests_with_secrets("1"):
                sent = request(method, PREFIX + path, token, body)
                check(exchange(service.port, sent, wanted=1))
            info = json.dumps({"algorithm": "a", "auth_data": DATA}).encode()
            sent = request("POST", PREFIX + "/version", token, info)
            [reply] = exchange(service.port, sent, wanted=1).replies
            sent = upload(reply.json["version"], token, DATA)
            [reply] = exchange(service.port, sent, wanted=1).replies
            assert reply.status == 500, reply
        for table in ("e2e_room_keys", "e2e_room_keys_versions"):
            refused = f'relation "{table}" violates check constraint'
            assert refused in service.log()
        check_log(service, token)

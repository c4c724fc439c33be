"""The users of a Synapse with the plugin: allowed, refused and deactivated users."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import attrs
import psycopg2
import pytest
from pytest_twisted import blockon
from twisted.internet.defer import Deferred, inlineCallbacks

from ..client import HttpHost
from ..contract import Answer, Client, User
from ..contract.base import (
    ALGORITHM,
    AUTH_DATA,
    PREFIX,
    Steps,
    accepted,
    encoded,
    key,
    keys_path,
    quoted,
    refused,
    same,
    tally,
    version_path,
    wrapped,
)
from ..servers import PostgresServer, Synapse
from ..servers.accounts import fetch
from .conftest import host_of

AS_TOKEN = "the-token-of-the-application-service"
IN_NAMESPACE = "@bridged_one:test.example"
ROOMS = {"!room:test.example": {"one": key(1), "two": key(2)}}
SYNAPSE = tuple(int(part) for part in version_of("matrix-synapse").split(".")[:2])
DEADLINE = 20.0

TABLES = ("e2e_room_keys", "e2e_room_keys_versions", "roomkeys_counts")
PROBLEM = re.compile(
    r"log ?context|logging context|sentinel context|Traceback"
    r"|^\S+ \S+ (ERROR|CRITICAL) ",
    re.IGNORECASE,
)


def query(synapse: Synapse, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """Run a statement on a Synapse's database, in a connection of the test's own."""
    if synapse.database is None:
        connection: Any = sqlite3.connect(synapse.directory / "homeserver.db")
    else:
        connection = psycopg2.connect(**synapse.database)
        statement = statement.replace("?", "%s")
    with closing(connection), connection:
        cursor = connection.cursor()
        cursor.execute(statement, parameters)
        return list(cursor.fetchall()) if cursor.description else []


def count_rows(synapse: Synapse, table: str, user_id: str) -> int:
    """Return the number of a user's rows in a table."""
    statement = f"SELECT COUNT(*) FROM {table} WHERE user_id = ?"
    count: int = query(synapse, statement, user_id)[0][0]
    return count


def rows_by_table(synapse: Synapse, user_id: str) -> list[int]:
    """Return the number of a user's rows in each of `TABLES`."""
    return [count_rows(synapse, table, user_id) for table in TABLES]


def problem_lines(log: str) -> list[str]:
    """Return the log lines about errors, tracebacks and log contexts."""
    return [line for line in log.splitlines() if PROBLEM.search(line)]


@attrs.frozen
class Pair:
    """A Synapse with the plugin and a Synapse without, on the same database.

    Attributes:
        synapse: the Synapse with the plugin.
        builtin: the Synapse with Synapse's own endpoints.
        plugin_host: `synapse` as a server under test.
        builtin_host: `builtin` as a server under test.
    """

    synapse: Synapse
    builtin: Synapse
    plugin_host: HttpHost
    builtin_host: HttpHost

    @property
    def hosts(self) -> tuple[HttpHost, HttpHost]:
        """Both servers under test, first with the plugin, then without."""
        return self.plugin_host, self.builtin_host


def registration(directory: Path) -> Path:
    """Write the registration file of an application service; return the path."""
    users = [{"exclusive": True, "regex": "@bridged_.*"}]
    file = directory / "bridge.yaml"
    settings = {
        "id": "bridge",
        "url": None,
        "as_token": AS_TOKEN,
        "hs_token": "the-token-of-the-homeserver",
        "sender_localpart": "bridge",
        "namespaces": {"users": users, "aliases": [], "rooms": []},
    }
    file.write_text(json.dumps(settings))
    return file


@pytest.fixture(scope="module")
def pair(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """Two Synapses with an application service, on one database, for comparison."""
    directory = tmp_path_factory.mktemp("pair")
    database = postgres.create_database()
    extra = {
        "app_service_config_files": [str(registration(directory))],
        "experimental_features": {"msc3823_account_suspension": True},
    }
    with (
        Synapse(directory / "1", database=database, extra_config=extra) as synapse,
        Synapse(
            directory / "2", database=database, extra_config=extra, module_config=None
        ) as builtin,
    ):
        pair = Pair(synapse, builtin, host_of(synapse), host_of(builtin))
        yield pair
        for host in pair.hosts:
            blockon(host.close())


def call(
    pair: Pair, method: str, path: str, body: object, token: str | None
) -> dict[str, Any]:
    """Send a request to an endpoint of Synapse's own; return the JSON object."""
    url = pair.synapse.url + path
    answer: dict[str, Any] = json.loads(
        fetch(url, method=method, token=token, body=body)
    )
    return answer


def administer(pair: Pair, method: str, path: str, body: object = None) -> None:
    """Send a request as a server administrator."""
    admin = pair.synapse.register(f"admin{time.monotonic_ns()}", admin=True)
    call(pair, method, "/_synapse/admin" + path, body, admin.access_token)


# Deactivation


@inlineCallbacks
def test_deactivation(synapse: Synapse, synapse_host: HttpHost) -> Steps:
    """A deactivated user's rows are deleted, except the last version number.

    Other users' rows are unchanged.
    """
    users = [synapse.register(f"deactivated{n}") for n in range(2)]
    versions: list[str] = []
    for user in users:
        client = Client(synapse_host, User(user.user_id, user.access_token))
        versions.append((yield client.create_version()))
        yield client.upload(versions[-1], ROOMS)
        assert rows_by_table(synapse, user.user_id) == [2, 1, 1]
    synapse.deactivate(users[0])
    assert rows_by_table(synapse, users[0].user_id) == [0, 0, 0]
    numbers = "SELECT last_version FROM roomkeys_numbers WHERE user_id = ?"
    assert query(synapse, numbers, users[0].user_id) == [(int(versions[0]),)]
    assert rows_by_table(synapse, users[1].user_id) == [2, 1, 1]


# Refused users


def no_token(pair: Pair) -> None:
    """Return no token."""


def unknown_token(pair: Pair) -> str:
    """Return a token never issued by the homeserver."""
    return "syt_c3RyYW5nZXI_AAAAAAAAAAAAAAAAAAAA_0aaaaa"


def logged_out(pair: Pair) -> str:
    """Return the token of a device after a logout."""
    user = pair.synapse.register("logged_out")
    device = pair.synapse.login(user)
    pair.synapse.logout(device)
    return device.access_token


def expired(pair: Pair) -> str:
    """Return an expired, refreshable token."""
    user = pair.synapse.register("expired")
    token = pair.synapse.login(user, refreshable=True).access_token
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        try:
            call(pair, "GET", "/_matrix/client/v3/account/whoami", None, token)
        except RuntimeError:
            return token
    raise AssertionError(f"the token is still valid after {DEADLINE} s")


def guest(pair: Pair) -> str:
    """Return a guest's token."""
    return pair.synapse.guest().access_token


def locked(pair: Pair) -> str:
    """Return the token of a user locked by an administrator."""
    user = pair.synapse.register("locked")
    administer(pair, "PUT", f"/v2/users/{quoted(user.user_id)}", {"locked": True})
    return user.access_token


def deactivated(pair: Pair) -> str:
    """Return the token of a deactivated user."""
    user = pair.synapse.register("deactivated")
    pair.synapse.deactivate(user)
    return user.access_token


@pytest.mark.parametrize(
    ("token_of", "status", "errcodes", "soft_logout"),
    [
        (no_token, 401, {"M_MISSING_TOKEN"}, None),
        (unknown_token, 401, {"M_UNKNOWN_TOKEN"}, False),
        (logged_out, 401, {"M_UNKNOWN_TOKEN"}, False),
        (expired, 401, {"M_UNKNOWN_TOKEN"}, True),
        (guest, 403, {"M_GUEST_ACCESS_FORBIDDEN"}, None),
        (locked, 401, {"M_USER_LOCKED", "ORG_MATRIX_MSC3939_USER_LOCKED"}, True),
        (deactivated, 401, {"M_UNKNOWN_TOKEN"}, False),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@inlineCallbacks
def test_refused(
    token_of: Callable[[Pair], str | None],
    status: int,
    errcodes: set[str],
    soft_logout: bool | None,
    pair: Pair,
) -> Steps:
    """Each endpoint refuses the same users as Synapse's own, with the same errors."""
    token = token_of(pair)
    upload = encoded(wrapped(ROOMS))
    new = encoded({"algorithm": ALGORITHM, "auth_data": AUTH_DATA})
    for method, path, body in (
        ("PUT", keys_path("1"), upload),
        ("GET", keys_path("1"), None),
        ("DELETE", keys_path("1"), None),
        ("POST", "/version", new),
        ("GET", "/version", None),
        ("PUT", version_path("1"), new),
        ("DELETE", version_path("1"), None),
    ):
        answers: list[Answer] = []
        for host in pair.hosts:
            sent = host.request(method, PREFIX + path, token=token, body=body)
            answers.append((yield sent))
        got = refused(answers[0], status, *errcodes, row=path)
        assert got.get("soft_logout") is soft_logout, got
        same(got, refused(answers[1], status, *errcodes), path)


# Users with access


@inlineCallbacks
def use_backup(
    host: HttpHost, token: str, user_id: str | None = None
) -> Generator[Deferred[Any], Any, Answer]:
    """Create a backup, upload two keys, download both and delete a key.

    Args:
        host: the server under test.
        token: the access token.
        user_id: the user to act as, for an application service, or None.

    Returns:
        A Deferred that fires with the answer about the current version.
    """

    def send(method: str, path: str, body: Any = None) -> Deferred[Answer]:
        if user_id is not None:
            path += f"{'&' if '?' in path else '?'}user_id={quoted(user_id)}"
        return host.request(method, PREFIX + path, token=token, body=encoded(body))

    body = {"algorithm": ALGORITHM, "auth_data": AUTH_DATA}
    version = accepted((yield send("POST", "/version", body)))["version"]
    stored = tally((yield send("PUT", keys_path(version), wrapped(ROOMS))))
    assert stored[1] == 2
    same(accepted((yield send("GET", keys_path(version)))), wrapped(ROOMS))
    tally((yield send("DELETE", keys_path(version, next(iter(ROOMS)), "two"))))
    info: Answer = yield send("GET", "/version")
    same((accepted(info)["version"], accepted(info)["count"]), (version, 1))
    return info


def shadow_ban(pair: Pair, user_id: str) -> None:
    """Shadow-ban a user: other users don't receive the user's messages any more."""
    administer(pair, "POST", f"/v1/users/{quoted(user_id)}/shadow_ban")


def suspend(pair: Pair, user_id: str) -> None:
    """Suspend a user: reads are allowed, writes are refused."""
    administer(pair, "PUT", f"/v1/suspend/{quoted(user_id)}", {"suspend": True})


SANCTIONS = (shadow_ban, suspend) if SYNAPSE >= (1, 120) else (shadow_ban,)


@pytest.mark.parametrize("sanction", SANCTIONS)
@inlineCallbacks
def test_sanctioned(sanction: Callable[[Pair, str], None], pair: Pair) -> Steps:
    """Users barred from sending messages can use a backup, as with Synapse's own
    endpoints."""
    user = pair.synapse.register(sanction.__name__)
    sanction(pair, user.user_id)
    for host in pair.hosts:
        yield use_backup(host, user.access_token)


@inlineCallbacks
def test_appservice(pair: Pair) -> Steps:
    """An application service acts as a user of its namespace, named in the query."""
    login = {"type": "m.login.application_service"}
    body = {**login, "username": "bridged_one"}
    call(pair, "POST", "/_matrix/client/v3/register", body, AS_TOKEN)
    info = yield use_backup(pair.plugin_host, AS_TOKEN, IN_NAMESPACE)
    versions = "SELECT user_id FROM e2e_room_keys_versions WHERE version = ?"
    owners = query(pair.synapse, versions, int(info.json["version"]))
    assert (IN_NAMESPACE,) in owners, owners
    path = f"{PREFIX}/version?user_id={quoted(IN_NAMESPACE)}"
    builtin = yield pair.builtin_host.request("GET", path, token=AS_TOKEN)
    same(info.json, accepted(builtin))


@inlineCallbacks
def test_appservice_as_itself(pair: Pair) -> Steps:
    """An application service that names no user has a backup of its own."""
    yield use_backup(pair.plugin_host, AS_TOKEN)
    assert count_rows(pair.synapse, "e2e_room_keys", "@bridge:test.example") == 1


@inlineCallbacks
def test_appservice_as_stranger(pair: Pair) -> Steps:
    """An application service can't act as a user outside the namespace."""
    user = pair.synapse.register("not_bridged")
    path = f"{PREFIX}/version?user_id={quoted(user.user_id)}"
    answers: list[Answer] = []
    for host in pair.hosts:
        answers.append((yield host.request("GET", path, token=AS_TOKEN)))
    got = refused(answers[0], 403, "M_FORBIDDEN")
    same(got, refused(answers[1], 403, "M_FORBIDDEN"))

"""Authentication by a homeserver's whoami, with a faulty and a real homeserver."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from pytest_twisted import blockon
from twisted.internet import reactor
from twisted.internet.defer import (
    Deferred,
    DeferredList,
    gatherResults,
    inlineCallbacks,
)
from twisted.internet.task import deferLater
from twisted.web.server import Site

from synapse_roomkeys.clock import Clock
from synapse_roomkeys.errors import TokenError, UnavailableError
from synapse_roomkeys.homeserver import HomeserverOptions
from synapse_roomkeys.request_queue import MAX_CONNECTIONS
from synapse_roomkeys.types import Requester
from synapse_roomkeys.whoami import WhoamiAuth

from .. import blocking_http
from ..contract.base import PREFIX, Steps, quoted, refused
from ..faulty_homeserver import (
    FAULTS,
    Fault,
    FaultyHomeserver,
    client_request,
    stall,
    stall_in_body,
)
from ..servers import Synapse, User
from ..servers.accounts import fetch
from ..servers.fake_homeserver import Homeserver
from ..servers.processes import HOST, free_port
from ..servers.service import Service
from .test_synapse import AS_TOKEN, DEADLINE, IN_NAMESPACE, SYNAPSE, registration

USER = Requester("@user:test.example", "DEVICE")
CACHE_SECONDS = 2
#: Seconds allowed for a whoami request on a loaded machine.
SLACK = 2.0


def new_auth(url: str, **options: Any) -> WhoamiAuth:
    """Return an authenticator for a homeserver, with an empty cache."""
    real: Any = reactor
    return WhoamiAuth(real, Clock(real), HomeserverOptions(url, **options))


# A faulty homeserver


class ListeningHomeserver:
    """A fake homeserver on a port, and an authenticator for the homeserver.

    Attributes:
        homeserver: the fake homeserver.
        url: the base URL of the homeserver.
        auth: the authenticator, with timeouts of one second.
    """

    def __init__(self) -> None:
        self.homeserver = FaultyHomeserver()
        self.homeserver.answers["token"] = 200, attrs.asdict(USER)
        self._number = free_port()
        self.url = f"http://127.0.0.1:{self._number}"
        self.auth = new_auth(self.url, timeout_seconds=1, retry_seconds=1)
        self.start()

    def start(self) -> None:
        """Listen, on the same port each time."""
        listen: Any = reactor.listenTCP
        site = Site(self.homeserver)
        self._port: Any = listen(self._number, site, interface="127.0.0.1")

    @inlineCallbacks
    def stop(self) -> Steps:
        """Stop listening and close all connections."""
        yield self.auth.close()
        yield self._port.stopListening()

    def ask(self) -> Deferred[Requester]:
        """Authenticate a request."""
        return self.auth.get_user_by_req(client_request("token"))


@inlineCallbacks
def fail_and_recover(fault: Fault) -> Steps:
    """Check that a fault leads to 503, and that requests succeed after the fault.

    In a second run the fault ends before the retries of a request end; the request
    succeeds.
    """
    target = ListeningHomeserver()
    target.homeserver.fault = fault
    try:
        yield target.ask()
        raise AssertionError("the token was accepted in spite of the fault")
    except UnavailableError as error:
        assert error.code == 503
        assert int(error.headers()["Retry-After"]) > 0
    target.homeserver.fault = None
    assert (yield target.ask()) == USER
    yield target.auth.close()
    target.auth = new_auth(target.url, timeout_seconds=1, retry_seconds=30)
    target.homeserver.fault = fault
    asked = len(target.homeserver.asked)
    done = target.ask()
    end = time.monotonic() + DEADLINE
    while len(target.homeserver.asked) == asked:
        assert time.monotonic() < end
        yield deferLater(reactor, 0.05)
    target.homeserver.fault = None
    assert (yield done) == USER
    yield target.stop()


@inlineCallbacks
def test_faults() -> Steps:
    """Each fault of the homeserver leads to 503, and requests succeed after the
    fault."""
    faults = {**FAULTS, "stall": stall, "stall in body": stall_in_body}
    results = yield DeferredList(
        [fail_and_recover(fault) for fault in faults.values()], consumeErrors=True
    )
    failures = {
        name: str(result)
        for name, (succeeded, result) in zip(faults, results, strict=True)
        if not succeeded
    }
    assert not failures


@inlineCallbacks
def test_an_unreachable_homeserver() -> Steps:
    """Requests are refused with 503 without a homeserver, and succeed after the
    start."""
    target = ListeningHomeserver()
    assert (yield target.auth.check()) is None
    yield target.stop()
    for ask in (target.ask, target.auth.check):
        with pytest.raises(UnavailableError):
            yield ask()
    done = target.ask()
    target.start()
    assert (yield done) == USER
    yield target.stop()


@inlineCallbacks
def test_many_concurrent_users() -> Steps:
    """1,000 concurrent requests of 500 users share few connections and all succeed.

    Two requests with the same token cause one whoami request.
    """
    target = ListeningHomeserver()
    # The default of ListeningHomeserver, one second, is too short on a loaded machine.
    target.auth = new_auth(target.url)
    homeserver = target.homeserver
    for number in range(500):
        user_id = f"@user{number}:test.example"
        homeserver.answers[str(number)] = 200, {"user_id": user_id}
    requests = [client_request(str(number)) for number in range(500) for _ in range(2)]
    found = yield gatherResults([target.auth.get_user_by_req(r) for r in requests])
    assert [requester.user_id for requester in found] == [
        f"@user{number}:test.example" for number in range(500) for _ in range(2)
    ]
    assert len(homeserver.asked) == 500
    assert 1 < len(homeserver.peers) <= MAX_CONNECTIONS
    yield target.stop()


# A real homeserver


@pytest.fixture(scope="module")
def builtin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Synapse]:
    """A Synapse without the plugin, with an application service."""
    directory = tmp_path_factory.mktemp("builtin")
    extra = {"app_service_config_files": [str(registration(directory))]}
    with Synapse(directory / "1", module_config=None, extra_config=extra) as synapse:
        yield synapse


@pytest.fixture
def auth(builtin: Synapse) -> Iterator[WhoamiAuth]:
    """An authenticator for the real homeserver, with an empty cache."""
    auth = new_auth(builtin.url, cache_seconds=CACHE_SECONDS)
    yield auth
    blockon(auth.close())


@inlineCallbacks
def refusal(auth: WhoamiAuth, *args: Any, **query: str) -> Any:
    """Return status, errcode and soft_logout of a request, and fail if the request
    succeeds."""
    try:
        found = yield auth.get_user_by_req(client_request(*args, **query))
    except TokenError as error:
        return error.code, error.errcode, error.soft_logout
    raise AssertionError(f"{found} was let in")


def logout(synapse: Synapse, user: User) -> None:
    """Log the user's device out."""
    synapse.logout(user)


def delete_device(synapse: Synapse, user: User) -> None:
    """Delete the user's device as an administrator."""
    path = f"/v2/users/{quoted(user.user_id)}/devices/{quoted(user.device_id)}"
    administer(synapse, "DELETE", path)


def deactivate(synapse: Synapse, user: User) -> None:
    """Deactivate the user's account."""
    synapse.deactivate(user)


def lock(synapse: Synapse, user: User) -> None:
    """Lock the user's account as an administrator."""
    path = f"/v2/users/{quoted(user.user_id)}"
    administer(synapse, "PUT", path, {"locked": True})


def administer(synapse: Synapse, method: str, path: str, body: object = None) -> Any:
    """Send a request as a server administrator; return the JSON value of the answer."""
    admin = synapse.register(f"admin{time.monotonic_ns()}", admin=True)
    url = f"{synapse.url}/_synapse/admin{path}"
    return json.loads(fetch(url, method=method, token=admin.access_token, body=body))


@pytest.mark.parametrize(
    ("end", "errcodes", "soft_logout"),
    [
        (logout, {"M_UNKNOWN_TOKEN"}, False),
        (delete_device, {"M_UNKNOWN_TOKEN"}, False),
        (deactivate, {"M_UNKNOWN_TOKEN"}, False),
        (lock, {"M_USER_LOCKED", "ORG_MATRIX_MSC3939_USER_LOCKED"}, True),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@inlineCallbacks
def test_invalidated_tokens(
    end: Callable[[Synapse, User], None],
    errcodes: set[str],
    soft_logout: bool,
    builtin: Synapse,
    auth: WhoamiAuth,
) -> Steps:
    """A token that became invalid is refused at the latest when its cache entry
    expires."""
    user = builtin.register(f"ended_by_{end.__name__}")
    request = client_request(user.access_token)
    found = yield auth.get_user_by_req(request)
    assert found == Requester(user.user_id, user.device_id)
    end(builtin, user)
    deadline = time.monotonic() + CACHE_SECONDS + SLACK
    while True:
        began = time.monotonic()
        try:
            yield auth.get_user_by_req(request)
        except TokenError as error:
            assert error.code == 401
            assert error.errcode in errcodes
            assert error.soft_logout is soft_logout
            break
        assert began < deadline, "still let in"
        yield deferLater(reactor, 0.1)


@inlineCallbacks
def test_unknown_tokens_and_guests_are_refused(
    builtin: Synapse, auth: WhoamiAuth
) -> Steps:
    """Unknown tokens, missing tokens and guests are refused."""
    stranger = "syt_c3RyYW5nZXI_AAAAAAAAAAAAAAAAAAAA_0aaaaa"
    assert (yield refusal(auth, None)) == (401, "M_MISSING_TOKEN", None)
    assert (yield refusal(auth, stranger)) == (401, "M_UNKNOWN_TOKEN", False)
    guest = builtin.guest().access_token
    assert (yield refusal(auth, guest)) == (403, "M_GUEST_ACCESS_FORBIDDEN", None)


@inlineCallbacks
def test_expired_tokens(builtin: Synapse, auth: WhoamiAuth) -> Steps:
    """An expired, refreshable token is refused with soft_logout."""
    user = builtin.login(builtin.register("expired"), refreshable=True)
    deadline = time.monotonic() + DEADLINE
    while True:
        try:
            yield auth.get_user_by_req(client_request(user.access_token))
        except TokenError as error:
            assert (error.errcode, error.soft_logout) == ("M_UNKNOWN_TOKEN", True)
            break
        assert time.monotonic() < deadline, "still let in"
        yield deferLater(reactor, 0.1)


@inlineCallbacks
def test_two_devices(builtin: Synapse, auth: WhoamiAuth) -> Steps:
    """Each token belongs to its own device, in the header as well as in the query."""
    first = builtin.register("two_devices")
    second = builtin.login(first)
    for user in (first, second):
        expected = Requester(user.user_id, user.device_id)
        by_header = client_request(user.access_token)
        by_query = client_request(None, access_token=user.access_token)
        for request in (by_header, by_query):
            assert (yield auth.get_user_by_req(request)) == expected


@inlineCallbacks
def test_application_service(builtin: Synapse, auth: WhoamiAuth) -> Steps:
    """An application service acts as itself or as a user of its namespace.

    Other users are refused with 403. An ordinary user's ``user_id`` parameter has no
    effect.
    """
    body = {"type": "m.login.application_service", "username": "bridged_one"}
    url = f"{builtin.url}/_matrix/client/v3/register"
    fetch(url, method="POST", token=AS_TOKEN, body=body)
    user = builtin.register("not_bridged")
    for query, expected in (
        ({}, "@bridge:test.example"),
        ({"user_id": IN_NAMESPACE}, IN_NAMESPACE),
    ):
        request = client_request(AS_TOKEN, None, **query)
        found = yield auth.get_user_by_req(request)
        assert found.user_id == expected
    refused = yield refusal(auth, AS_TOKEN, user_id=user.user_id)
    assert refused == (403, "M_FORBIDDEN", None)
    if SYNAPSE >= (1, 163):  # Older versions ignore device_id.
        mask = {"user_id": IN_NAMESPACE, "device_id": "NONE"}
        assert (yield refusal(auth, AS_TOKEN, **mask))[0] == 400
    request = client_request(user.access_token, user_id=IN_NAMESPACE)
    found = yield auth.get_user_by_req(request)
    assert found.user_id == user.user_id


@inlineCallbacks
def test_registered_after_a_refusal(builtin: Synapse, auth: WhoamiAuth) -> Steps:
    """A refusal is not cached.

    An application service is accepted for a user as soon as the user is registered. A
    user is accepted as soon as an administrator has removed the lock.
    """
    new = {"user_id": "@bridged_new:test.example"}
    assert (yield refusal(auth, AS_TOKEN, **new))[0] == 403
    body = {"type": "m.login.application_service", "username": "bridged_new"}
    url = f"{builtin.url}/_matrix/client/v3/register"
    fetch(url, method="POST", token=AS_TOKEN, body=body)
    found = yield auth.get_user_by_req(client_request(AS_TOKEN, None, **new))
    assert found.user_id == new["user_id"]
    user = builtin.register("locked_for_a_moment")
    lock(builtin, user)
    assert (yield refusal(auth, user.access_token))[0] == 401
    path = f"/v2/users/{quoted(user.user_id)}"
    administer(builtin, "PUT", path, {"locked": False})
    found = yield auth.get_user_by_req(client_request(user.access_token))
    assert found.user_id == user.user_id


def test_two_authorization_headers(homeserver: Homeserver, tmp_path: Path) -> None:
    """The service refuses a request with two Authorization headers and uses neither
    token."""
    headers = [f"Authorization: Bearer {homeserver.new_user().access_token}"] * 2
    lines = ["GET /_matrix/client/v3/room_keys/version HTTP/1.1", "Host: a", *headers]
    with (
        Service(tmp_path, homeserver.url) as service,
        socket.create_connection((HOST, service.port), timeout=DEADLINE) as client,
    ):
        client.sendall("\r\n".join([*lines, "Connection: close", "", ""]).encode())
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"M_MISSING_TOKEN" in answer
    assert b"Too many Authorization headers" in answer


def test_last_seen(builtin: Synapse, tmp_path: Path) -> None:
    """The homeserver's "last seen" shows address and user agent of the service's
    client.

    The client is behind a trusted proxy of the service.
    """
    user = builtin.register("seen")
    settings = {"trusted_proxies": ["127.0.0.0/8"]}
    with Service(tmp_path, builtin.url, settings=settings) as service:
        for host, agent in (("203.0.113.9", "Thief/1.0"), ("2001:db8::9", "Owner/2")):
            headers = {
                "Authorization": f"Bearer {user.access_token}",
                "X-Forwarded-For": f"198.51.100.1, {host}",
                "User-Agent": agent,
            }
            answer = blocking_http.send("GET", f"{service.url}{PREFIX}/keys", headers)
            # Authentication passed: only the version is missing.
            refused(answer, 400, "M_MISSING_PARAM")
            path = f"/v2/users/{quoted(user.user_id)}/devices/{user.device_id}"
            device = administer(builtin, "GET", path)
            assert device["last_seen_ip"] == host
            if SYNAPSE >= (1, 163):  # Older versions may omit the agent.
                assert device["last_seen_user_agent"] == agent
    assert "lacks an x-forwarded-proto header" not in builtin.log()


@inlineCallbacks
def test_check(auth: WhoamiAuth) -> Steps:
    """The check succeeds with a real homeserver."""
    assert (yield auth.check()) is None

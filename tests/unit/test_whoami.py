"""Tests of authentication by the whoami endpoint of a homeserver, over connections in
memory."""

import gc
import logging
import weakref
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from prometheus_client import REGISTRY
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.http import Request
from twisted.web.server import NOT_DONE_YET

from synapse_roomkeys.claims import MAX_USER_AGENT_BYTES
from synapse_roomkeys.clock import Clock
from synapse_roomkeys.errors import LimitExceededError, TokenError, UnavailableError
from synapse_roomkeys.homeserver import HomeserverOptions
from synapse_roomkeys.request_queue import FIRST_INTERVAL, MAX_CONNECTIONS
from synapse_roomkeys.types import Requester
from synapse_roomkeys.whoami import WhoamiAuth

from ..faulty_homeserver import (
    FAULTS,
    VERSIONS,
    WHOAMI,
    FaultyHomeserver,
    TokenBucket,
    answering,
    client_request,
    stall,
    stall_in_body,
)
from ..memory_network import MemoryNetwork

TOKEN = "syt_VGhpcyBpcyBhIHRva2Vu_0123456789abcdef"
USER = {"user_id": "@User:test.example", "device_id": "DEVICE"}


def outcomes() -> dict[str, float]:
    """Number of token lookups by outcome, from the metrics."""
    return {
        outcome: REGISTRY.get_sample_value(
            "synapse_roomkeys_whoami_requests_total", {"outcome": outcome}
        )
        or 0
        for outcome in ("answered", "refused", "failed", "throttled", "cached")
    }


class WhoamiTests(SynchronousTestCase):
    """Tests of `WhoamiAuth` with a homeserver, without a socket."""

    def setUp(self) -> None:
        self.homeserver = FaultyHomeserver()
        self.homeserver.answers[TOKEN] = 200, USER
        self.network = MemoryNetwork(self.homeserver)
        self.auth = self.new_auth()

    def new_auth(self, **options: Any) -> WhoamiAuth:
        """A `WhoamiAuth` with an empty cache."""
        return WhoamiAuth(
            self.network,
            Clock(self.network),
            HomeserverOptions("http://hs.test.example/", **options),
        )

    def begin(
        self, token: str | None = TOKEN, *args: Any, **query: Any
    ) -> Deferred[Requester]:
        """Authenticate a request and deliver all bytes; return the Deferred."""
        done = self.auth.get_user_by_req(client_request(token, *args, **query))
        self.network.turn()
        return done

    def user(self, *args: Any, **query: Any) -> str:
        """Authenticate a request and return its user id."""
        return self.successResultOf(self.begin(*args, **query)).user_id

    def error(self, done: Deferred[Requester]) -> dict[str, Any]:
        """The status and the body of a failed authentication's answer, without the
        token."""
        error = self.failureResultOf(done, TokenError).value
        self.assertNotIn(TOKEN, str(error.error_dict()))
        return {"status": error.code, **error.error_dict()}

    def refusal(self, *args: Any, **query: Any) -> tuple[int, str]:
        """Authenticate a request that is refused; return status and errcode."""
        error = self.error(self.begin(*args, **query))
        return error["status"], error["errcode"]

    def tokens(self) -> list[str | None]:
        """The tokens of the received requests, in order."""
        return [asked.token for asked in self.homeserver.asked]

    def begin_and_wait(self, seconds: float) -> Deferred[Requester]:
        """Authenticate a request and let time pass; return the Deferred."""
        done = self.begin()
        self.network.turn(seconds)
        return done

    # Tokens

    def test_a_known_token_has_user_and_device(self) -> None:
        """A known token is resolved to user and device, and is sent to the homeserver
        in the header alone."""
        found = self.successResultOf(self.begin())
        self.assertEqual(found, Requester("@User:test.example", "DEVICE"))
        (asked,) = self.homeserver.asked
        self.assertEqual((asked.path, asked.token, asked.query), (WHOAMI, TOKEN, {}))

    def test_a_token_without_a_device_is_accepted(self) -> None:
        """A token without a device is accepted."""
        self.homeserver.answers[TOKEN] = 200, {"user_id": "@bot:test.example"}
        found = self.successResultOf(self.begin())
        self.assertEqual(found, Requester("@bot:test.example", None))

    def test_a_token_in_the_query_is_accepted(self) -> None:
        """A token in the query is accepted, and is sent to the homeserver in the
        header."""
        self.assertEqual(self.user(None, access_token=TOKEN), USER["user_id"])
        (asked,) = self.homeserver.asked
        self.assertEqual((asked.token, asked.query), (TOKEN, {}))

    def test_two_tokens_are_refused(self) -> None:
        """A request with two tokens is refused, as Synapse refuses it, because a proxy
        may have checked the other token."""
        two_headers = client_request(TOKEN)
        two_headers.requestHeaders.addRawHeader(b"Authorization", b"Bearer other")
        same_twice = client_request(TOKEN)
        same_twice.requestHeaders.addRawHeader(
            b"authorization", b"Bearer " + TOKEN.encode()
        )
        two_parameters = client_request(None, access_token=TOKEN)
        two_parameters.args[b"access_token"].append(b"other")
        both = client_request(TOKEN, access_token=TOKEN)
        basic = client_request(None, f"Basic {TOKEN}")
        for request, msg in (
            (two_headers, "Too many Authorization headers"),
            (same_twice, "Too many Authorization headers"),
            (two_parameters, "Too many access_token parameters"),
            (both, "Both an Authorization header and access_token"),
            (basic, "Invalid Authorization header"),
        ):
            error = self.error(self.auth.get_user_by_req(request))
            self.assertEqual(error["status"], 401)
            self.assertEqual(error["errcode"], "M_MISSING_TOKEN")
            self.assertEqual(error["error"], msg)
        self.assertEqual(self.homeserver.asked, [])

    def test_the_authentication_scheme_is_case_insensitive(self) -> None:
        """The name of the authentication scheme is case-insensitive (RFC 9110,
        11.1)."""
        for scheme in ("Bearer", "bearer", "BEARER", "bEARER "):
            self.assertEqual(self.user(None, f"{scheme} {TOKEN}"), USER["user_id"])

    def test_a_request_without_a_token_is_refused(self) -> None:
        """A request without a token, or with a text that cannot be a token, is refused
        without a request to the homeserver."""
        for header in (
            None,
            "",
            "Bearer",
            "Bearer \xff",
            "Bearer ",
            "Bearer a b",
            f"Basic {TOKEN}",
        ):
            self.assertEqual(self.refusal(None, header), (401, "M_MISSING_TOKEN"))
        for token in ("", "a b", "a\r\nHost: b", "t\u00f6ken", "a\0"):
            self.assertEqual(
                self.refusal(None, access_token=token), (401, "M_MISSING_TOKEN")
            )
        self.assertEqual(self.homeserver.asked, [])

    def test_an_unknown_token_is_401(self) -> None:
        """Status and errcode of the homeserver for an unknown token are passed on,
        without its text."""
        error = self.error(self.begin("another"))
        self.assertEqual((error["status"], error["errcode"]), (401, "M_UNKNOWN_TOKEN"))
        self.assertNotIn("another", error["error"])
        self.assertNotIn("soft_logout", error)

    def test_refusals_of_the_homeserver_are_passed_on(self) -> None:
        """Every refusal of the homeserver about the user is passed on with status,
        errcode and soft_logout."""
        for code, errcode, soft_logout in (
            (401, "M_UNKNOWN_TOKEN", True),
            (401, "M_UNKNOWN_TOKEN", False),
            (401, "M_USER_LOCKED", True),
            (403, "M_FORBIDDEN", None),
            (403, "M_EXCLUSIVE", None),
            (400, "ORG.MATRIX.MSC4326.M_UNKNOWN_DEVICE", None),
        ):
            body = {"errcode": errcode, "error": "x" * 1000, "soft_logout": soft_logout}
            self.homeserver.answers[TOKEN] = code, body
            self.auth = self.new_auth()
            error = self.error(self.begin())
            self.assertEqual((error["status"], error["errcode"]), (code, errcode))
            self.assertEqual(error.get("soft_logout"), soft_logout)

    def test_guests_are_refused(self) -> None:
        """Guests are refused; ``is_guest`` may be missing, null or a number."""
        for is_guest in (True, 1):
            self.homeserver.answers[TOKEN] = 200, {**USER, "is_guest": is_guest}
            self.assertEqual(self.refusal(), (403, "M_GUEST_ACCESS_FORBIDDEN"))
        for number, no_guest in enumerate((False, 0, None)):
            answer = 200, {**USER, "is_guest": no_guest}
            self.homeserver.answers[f"token{number}"] = answer
            self.assertEqual(self.user(f"token{number}"), USER["user_id"])

    def test_guests_are_accepted_without_has_guests(self) -> None:
        """If `has_guests` is false, a user whom the homeserver calls a guest is
        accepted."""
        self.homeserver.answers[TOKEN] = 200, {**USER, "is_guest": True}
        self.auth = self.new_auth(has_guests=False)
        self.assertEqual(self.user(), USER["user_id"])

    def test_no_refusal_disables_a_backup(self) -> None:
        """No answer has an errcode at which clients disable their backup."""
        for code, errcode in (
            (404, "M_NOT_FOUND"),
            (400, "M_NOT_FOUND"),
            (403, "M_WRONG_ROOM_KEYS_VERSION"),
        ):
            answer = code, {"errcode": errcode, "error": "User does not exist."}
            self.homeserver.answers[TOKEN] = answer
            for query in ({}, {"user_id": "@new:test.example"}):
                self.homeserver.asked.clear()
                self.assertEqual(self.refusal(**query), (403, "M_FORBIDDEN"))
                self.assertEqual(len(self.homeserver.asked), 1)

    # The client's address

    def test_the_homeserver_receives_address_and_user_agent(self) -> None:
        """The homeserver receives the client's address and user agent."""
        for peer, host in (
            (IPv4Address("TCP", "192.0.2.7", 1), [b"192.0.2.7"]),
            (IPv6Address("TCP", "2001:db8::7", 1), [b"2001:db8::7"]),
            (IPv6Address("TCP", "::ffff:192.0.2.8", 1), [b"192.0.2.8"]),
            (IPv6Address("TCP", "fe80::1%eth0", 1), [b"fe80::1"]),
            (UNIXAddress("/run/roomkeys.sock"), []),
        ):
            request = client_request(TOKEN)
            request.client = peer
            request.requestHeaders.addRawHeader(b"User-Agent", b"Element/1.2 \xe2\x9c")
            done = self.auth.get_user_by_req(request)
            self.network.turn()
            self.successResultOf(done)
            asked = self.homeserver.asked[-1]
            self.assertEqual(asked.forwarded_for, host)
            self.assertEqual(asked.user_agent, [b"Element/1.2 \xe2\x9c"])

    def test_the_user_agent_is_bounded_and_printable(self) -> None:
        """The user agent sent to the homeserver has a bounded length and no control
        characters."""
        for sent, passed_on in (
            ([], []),
            ([b""], []),
            ([b"\x00\t\x7f"], []),
            ([b"a\x00b\tc\x1b[31md\xff"], [b"abc[31md\xff"]),
            ([b"a" * 16000], [b"a" * MAX_USER_AGENT_BYTES]),
            ([b"first", b"last"], [b"last"]),
        ):
            request = client_request("other")
            request.requestHeaders.setRawHeaders(b"User-Agent", sent)
            done = self.auth.get_user_by_req(request)
            self.network.turn()
            self.homeserver.answers["other"] = 200, USER
            done.addErrback(lambda _: None)
            self.assertEqual(self.homeserver.asked[-1].user_agent, passed_on)
            self.auth = self.new_auth()

    def test_each_address_is_sent_to_the_homeserver(self) -> None:
        """A cached answer and a shared request are for one client address, so the
        homeserver receives each address that uses a token."""
        done = []
        for _ in range(2):
            for host in ("192.0.2.7", "192.0.2.8", "192.0.2.7"):
                request = client_request(TOKEN)
                request.client = IPv4Address("TCP", host, 1)
                done.append(self.auth.get_user_by_req(request))
            self.network.turn()
        for one in done:
            self.successResultOf(one)
        heard = [asked.forwarded_for for asked in self.homeserver.asked]
        self.assertEqual(heard, [[b"192.0.2.7"], [b"192.0.2.8"]])

    # Application services

    def test_the_user_of_an_application_service_is_cached_separately(self) -> None:
        """The homeserver decides which user an application service may act as, and each
        user and device is cached separately."""
        queries = [
            {},
            {"user_id": "@a&b:test.example"},
            {"user_id": "@b:test.example"},
            {"user_id": "@b:test.example", "device_id": "D\u00e9"},
            {"device_id": "D\u00e9"},
        ]
        for _ in range(2):
            for query in queries:
                self.user(version="1", **query)
        self.assertEqual(
            [dict(asked.query) for asked in self.homeserver.asked], queries
        )

    def test_the_homeserver_names_the_user(self) -> None:
        """The user of a request is the user that the homeserver names, not the user in
        the query."""
        self.assertEqual(self.user(user_id="@victim:test.example"), USER["user_id"])

    # Cache

    def test_an_answer_is_cached(self) -> None:
        """An answer is cached for `cache_seconds`; afterwards a revoked token is
        refused."""
        self.assertEqual(self.user(), USER["user_id"])
        del self.homeserver.answers[TOKEN]
        self.network.turn(59.9)
        self.assertEqual(self.user(), USER["user_id"])
        self.network.turn(0.2)
        self.assertEqual(self.refusal(), (401, "M_UNKNOWN_TOKEN"))

    def test_the_cache_time_begins_with_the_request(self) -> None:
        """The cache time of an answer begins when the request to the homeserver is
        sent, not when the answer arrives."""
        waiting: list[Request] = []

        def wait(request: Request) -> int | bytes:
            waiting.append(request)
            return stall(request)

        self.homeserver.fault = wait
        done = self.begin()
        self.network.turn(9)
        waiting[0].write(answering(200, USER)(waiting[0]))
        waiting[0].finish()
        self.network.turn()
        self.successResultOf(done)
        self.homeserver.fault = None
        del self.homeserver.answers[TOKEN]
        self.network.turn(51.2)
        self.assertEqual(self.refusal(), (401, "M_UNKNOWN_TOKEN"))

    def test_an_unknown_token_is_cached_for_a_shorter_time(self) -> None:
        """An unknown token is cached for a shorter time, because the token may become
        known: an application service is added, or a database replica of the homeserver
        lags."""
        del self.homeserver.answers[TOKEN]
        self.assertEqual(self.refusal(), (401, "M_UNKNOWN_TOKEN"))
        self.homeserver.answers[TOKEN] = 200, USER
        self.network.turn(9.9)
        self.assertEqual(self.refusal(), (401, "M_UNKNOWN_TOKEN"))
        self.assertEqual(len(self.homeserver.asked), 1)
        self.network.turn(0.2)
        self.assertEqual(self.user(), USER["user_id"])

    def test_only_an_unknown_token_is_cached(self) -> None:
        """Of the refusals only that of an unknown token without user_id or device_id is
        cached, because the client may create the user or device, or unlock the account,
        and retry immediately."""
        for code, errcode, query in (
            (403, "M_FORBIDDEN", {"user_id": "@new:test.example"}),
            (400, "ORG.MATRIX.MSC4326.M_UNKNOWN_DEVICE", {"device_id": "NEW"}),
            (400, "M_UNKNOWN_DEVICE", {"device_id": "NEW"}),
            (401, "M_UNKNOWN_TOKEN", {"user_id": "@new:test.example"}),
            (404, "M_NOT_FOUND", {"user_id": "@new:test.example"}),
            (401, "M_USER_LOCKED", {}),
            (403, "M_USER_SUSPENDED", {}),
            (403, "M_USER_DEACTIVATED", {}),
            (403, "M_FORBIDDEN", {}),
            (403, "M_EXCLUSIVE", {}),
            (400, "M_UNKNOWN", {}),
        ):
            self.auth = self.new_auth()
            body = {"errcode": errcode, "error": "No"}
            self.homeserver.answers[TOKEN] = code, body
            self.refusal(**query)
            self.homeserver.answers[TOKEN] = 200, {**USER, "is_guest": True}
            self.assertEqual(self.refusal(**query), (403, "M_GUEST_ACCESS_FORBIDDEN"))
            self.homeserver.answers[TOKEN] = 200, USER
            self.assertEqual(self.user(**query), USER["user_id"], errcode)

    def test_the_cache_expires_when_the_clock_is_set_back(self) -> None:
        """An answer cached at a time in the future is expired."""
        self.network.turn(1)
        self.user()
        self.network.rightNow -= 3600
        self.user()
        self.assertEqual(len(self.homeserver.asked), 2)

    def test_the_cache_is_bounded(self) -> None:
        """The oldest answer is removed from a full cache."""
        self.auth = self.new_auth(cache_entries=2)
        self.homeserver.answers["2"] = 200, USER
        for token in (TOKEN, "2", "3", "2", "3", TOKEN):
            self.begin(token).addErrback(lambda _: None)
            self.assertLessEqual(len(self.auth._answers), 2)
        self.assertEqual(self.tokens(), [TOKEN, "2", "3", TOKEN])

    def test_a_renewed_answer_is_the_newest(self) -> None:
        """An answer that was renewed is not the oldest in the cache."""
        self.auth = self.new_auth(cache_entries=2)
        self.user()
        self.network.turn(40)
        self.begin("2").addErrback(lambda _: None)
        self.network.turn(20.1)
        self.user()
        self.begin("3").addErrback(lambda _: None)
        asked = len(self.homeserver.asked)
        self.user()
        self.assertEqual(len(self.homeserver.asked), asked)

    def test_no_token_is_kept_in_memory(self) -> None:
        """Neither tokens nor requests stay in memory after the answer; the cache holds
        hashes."""
        requests = [
            client_request(TOKEN),
            client_request("other"),
            client_request("other"),
        ]
        kept = [weakref.ref(request) for request in requests]
        while requests:
            done = self.auth.get_user_by_req(requests.pop())
            self.network.turn()
            done.addErrback(lambda _: None)
        del done
        gc.collect()
        self.assertEqual([ref() for ref in kept], [None] * 3)
        self.assertEqual({len(key) for key in self.auth._answers}, {32})
        held = repr((self.auth._answers, self.auth._questions))
        self.assertNotIn(TOKEN, held)
        self.assertNotIn("other", held)

    # Concurrent requests

    def test_concurrent_requests_share_one_request(self) -> None:
        """Concurrent requests with one token cause a single request to the
        homeserver."""
        done = [self.auth.get_user_by_req(client_request(TOKEN)) for _ in range(50)]
        self.network.turn()
        found = {self.successResultOf(one) for one in done}
        self.assertEqual(found, {Requester("@User:test.example", "DEVICE")})
        self.assertEqual(len(self.homeserver.asked), 1)

    def test_each_waiting_request_has_its_own_error(self) -> None:
        """Requests that share a refusal each fail with a separate exception object."""
        done = [self.auth.get_user_by_req(client_request("other")) for _ in range(3)]
        self.network.turn()
        errors = [self.failureResultOf(one, TokenError).value for one in done]
        self.assertEqual(len({id(error) for error in errors}), 3)
        self.assertEqual(len(self.homeserver.asked), 1)

    def test_waiting_requests_share_a_failure(self) -> None:
        """Requests that share a request to an unreachable homeserver all fail after the
        last retry."""
        self.network.refusing = True
        done = [self.auth.get_user_by_req(client_request(TOKEN)) for _ in range(3)]
        self.network.turn(5.5)
        for one in done:
            self.failureResultOf(one, UnavailableError)
        self.assertEqual(self.auth._questions, {})

    def test_connections_are_bounded(self) -> None:
        """Requests of many users wait for one of `MAX_CONNECTIONS` connections; after a
        timeout they fail with a 503."""
        self.homeserver.fault = stall
        done = [self.begin(f"token{number}") for number in range(50)]
        self.assertEqual(len(self.homeserver.asked), MAX_CONNECTIONS)
        self.assertEqual(self.network.connections, MAX_CONNECTIONS)
        for _ in range(155):
            self.network.turn(0.1)
            self.assertLessEqual(self.network.connections, MAX_CONNECTIONS)
        for one in done:
            self.failureResultOf(one, UnavailableError)
        self.homeserver.fault = None
        self.assertEqual(self.user(), USER["user_id"])

    def test_a_connection_is_reused_until_close(self) -> None:
        """Sequential requests reuse one connection, until `close` closes the
        connection."""
        for number in range(5):
            self.begin(f"token{number}").addErrback(lambda _: None)
        self.assertEqual(len(self.network.tcpClients), 1)
        closed = self.auth.close()
        self.network.turn()
        self.successResultOf(closed)
        self.assertEqual(self.network.connections, 0)

    def test_cookies_are_not_sent_back(self) -> None:
        """A cookie in one user's answer is not sent with the next request."""
        self.homeserver.fault = answering(200, USER, Set_Cookie="a=b; Path=/")
        self.user()
        self.user("other")
        self.assertEqual([asked.cookie for asked in self.homeserver.asked], [None] * 2)

    # A faulty homeserver

    def inject_faults(self) -> Iterator[str]:
        """Inject each fault in turn, each with an empty cache, and yield its name."""
        for name, fault in FAULTS.items():
            self.auth = self.new_auth(timeout_seconds=2, retry_seconds=1)
            self.homeserver.fault = fault
            self.homeserver.asked.clear()
            yield name
        self.homeserver.fault = None
        self.network.refusing = True
        self.auth = self.new_auth(timeout_seconds=2, retry_seconds=1)
        yield "refusing"

    def test_a_faulty_homeserver_is_503(self) -> None:
        """If the homeserver gives no valid answer about the user, the request is
        neither accepted nor refused but a 503, and the next request asks the homeserver
        again."""
        for name in self.inject_faults():
            done = self.begin()
            self.assertNoResult(done)
            self.network.turn(1.5)
            error = self.failureResultOf(done, UnavailableError).value
            self.assertEqual(error.code, 503, name)
            self.assertGreater(int(error.headers()["Retry-After"]), 0)
            paths = {asked.path for asked in self.homeserver.asked}
            self.assertLessEqual(paths, {WHOAMI}, name)
            self.homeserver.fault = None
            self.network.refusing = False
            self.assertEqual(self.user(), USER["user_id"], name)

    def test_a_homeserver_that_recovers_answers_the_request(self) -> None:
        """A request is answered if the homeserver recovers before the retries end."""
        for name in self.inject_faults():
            done = self.begin()
            self.network.turn(0.5)
            self.assertNoResult(done)
            self.homeserver.fault = None
            self.network.refusing = False
            self.network.turn(0.6)
            found = self.successResultOf(done)
            self.assertEqual(found, Requester("@User:test.example", "DEVICE"), name)

    def test_retries_have_growing_delays(self) -> None:
        """The delays between retries double, and the last retry is at the end of
        `retry_seconds`."""
        times: list[float] = []

        def note_time(request: Request) -> int | bytes:
            times.append(round(self.network.seconds(), 6))
            return FAULTS["502"](request)

        self.homeserver.fault = note_time
        done = self.begin()
        self.network.turn(5)
        self.failureResultOf(done, UnavailableError)
        self.assertEqual(times, [0, 0.1, 0.3, 0.7, 1.5, 3.1, 5])

    def test_a_stalled_connection_is_closed(self) -> None:
        """The connection to a homeserver that sends no more bytes is closed after the
        timeout."""
        for fault in (stall, stall_in_body):
            self.auth = self.new_auth(timeout_seconds=2, retry_seconds=1)
            self.homeserver.fault = fault
            done = self.begin()
            self.network.turn(1.8)
            self.assertEqual(self.network.connections, 1)
            self.assertNoResult(done)
            self.network.turn(0.3)
            self.failureResultOf(done, UnavailableError)
            self.assertEqual(self.network.connections, 0)

    def test_a_response_over_the_limit_closes_the_connection(self) -> None:
        """The connection to a homeserver that sends too long a response is closed
        before the end of the response."""

        def say_much(request: Request) -> int:
            for _ in range(3):
                request.write(b" " * 100_000)
            return NOT_DONE_YET

        self.homeserver.fault = say_much
        done = self.begin()
        self.assertEqual(self.network.connections, 0)
        self.homeserver.fault = None
        self.network.turn(0.1)
        self.successResultOf(done)

    def test_the_check_requires_a_200(self) -> None:
        """`check` succeeds if the homeserver answers 200, and fails otherwise."""
        done = self.auth.check()
        self.network.turn()
        self.assertIsNone(self.successResultOf(done))
        self.assertEqual([asked.path for asked in self.homeserver.asked], [VERSIONS])
        for fault in (stall, stall_in_body, answering(502, b""), answering(401, {})):
            self.homeserver.fault = fault
            done = self.auth.check()
            self.network.turn(10.1)
            self.failureResultOf(done, UnavailableError)

    def test_the_log_names_the_fault_and_the_option(self) -> None:
        """The log names the homeserver's address, its response, and the option to
        change."""
        api = "https://matrix.example.org/_matrix/client"
        html = {"Content_Type": "text/html; charset=utf-8"}
        for fault, expected in (
            (
                answering(308, b"", Location=api + "/v3/account/whoami?user_id=@a:b"),
                f"a redirect to {api}/v3/account/whoami, which isn't followed: set"
                " homeserver.url to https://matrix.example.org",
            ),
            (
                answering(301, b"", Location="https://a.example/b" + "c" * 10_000),
                "set homeserver.url to https://a.example/bc",
            ),
            (
                answering(404, {"errcode": "M_UNRECOGNIZED"}),
                "status 404 (M_UNRECOGNIZED): homeserver.url has no client-server API",
            ),
            (
                answering(200, b"<html>", **html),
                "status 200 (text/html), no answer of a Matrix homeserver",
            ),
            (answering(401, b"<html>", **html), "status 401 (text/html), no answer of"),
            (answering(401, b""), "status 401 (no Content-Type), no answer of"),
            (answering(502, {"errcode": "M_UNKNOWN"}), "status 502 (M_UNKNOWN)"),
            (
                answering(200, {"errcode": "M_UNKNOWN_TOKEN"}),
                "status 200 (M_UNKNOWN_TOKEN)",
            ),
        ):
            self.homeserver.fault = fault
            self.auth = self.new_auth(retry_seconds=1)
            with self.assertLogs(level=logging.WARNING) as logs:
                self.failureResultOf(self.begin_and_wait(2), UnavailableError)
            for line in logs.output:
                self.assertIn("http://hs.test.example", line)
                self.assertIn(expected, line)
                self.assertLess(len(line), 700)

    def test_a_check_names_the_target_of_a_redirect(self) -> None:
        """The log of ``check`` names the value for `homeserver.url` after a
        redirect."""
        target = "https://matrix.example.org/_matrix/client/versions"
        self.homeserver.fault = answering(301, b"", Location=target)
        with self.assertLogs(level=logging.WARNING) as logs:
            done = self.auth.check()
            self.network.turn()
            self.failureResultOf(done, UnavailableError)
        (line,) = logs.output
        self.assertIn("set homeserver.url to https://matrix.example.org", line)
        self.assertNotIn("_matrix/client", line.rpartition("set homeserver.url")[2])

    # A homeserver that throttles

    def throttle(self, times: int, value: Any = b"", **headers: str) -> None:
        """Let the homeserver answer 429 a number of times, and valid answers
        afterwards."""
        left = times

        def answer(request: Request) -> int | bytes:
            nonlocal left
            left -= 1
            if left < 0:
                return answering(200, USER)(request)
            return answering(429, value, **headers)(request)

        self.homeserver.fault = answer

    def throttled(self, done: Deferred[Requester]) -> int:
        """Check the 429 of a request and return the seconds of its Retry-After."""
        error = self.failureResultOf(done, LimitExceededError).value
        seconds = int(error.headers()["Retry-After"])
        body = {
            "errcode": "M_LIMIT_EXCEEDED",
            "error": "Too many requests to the homeserver",
            "retry_after_ms": seconds * 1000,
        }
        self.assertEqual((error.code, error.error_dict()), (429, body))
        return seconds

    def test_a_request_waits_for_a_short_pause(self) -> None:
        """A request waits as long as the 429 of the homeserver says, and is then
        answered."""
        date = "Sun, 06 Nov 1994 08:49:37 GMT"
        later = "Sun, 06 Nov 1994 08:49:40 GMT"
        body = {"errcode": "M_LIMIT_EXCEEDED", "retry_after_ms": 2500}
        for value, headers, seconds in (
            (body, {}, 2.5),
            (body, {"Retry_After": "4"}, 4),
            (b"<html>", {"Retry_After": "2"}, 2),
            (body, {"Retry_After": later, "Date": date}, 3),
            (body, {"Retry_After": later, "Date": ""}, 2.5),
            ({"retry_after_ms": None}, {"Retry_After": "\u0664"}, 1),
            (body, {"Retry_After": "soon"}, 2.5),
            (b"\xff", {"Retry_After": "-1"}, 1),
            ({"retry_after_ms": -5}, {}, FIRST_INTERVAL),
        ):
            self.homeserver.asked.clear()
            self.auth = self.new_auth()
            self.throttle(1, value, **headers)
            done = self.begin()
            self.network.turn(seconds - 0.01)
            self.assertEqual(len(self.homeserver.asked), 1)
            self.assertNoResult(done)
            self.network.turn(0.02)
            self.assertEqual(self.successResultOf(done).user_id, USER["user_id"])
            self.assertEqual(len(self.homeserver.asked), 2)

    def test_a_long_pause_is_429_for_all_requests(self) -> None:
        """If a pause ends after `retry_seconds`, all requests are answered 429
        immediately; a pause is at most `MAX_PAUSE`."""
        for named, told in (("6", 6), ("60", 60), ("86400", 60), ("9" * 400, 60)):
            self.homeserver.asked.clear()
            self.auth = self.new_auth()
            self.throttle(1, Retry_After=named)
            self.assertEqual(self.throttled(self.begin()), told)
            self.assertEqual(self.throttled(self.begin("other")), told)
            self.network.turn(told - 5.5)
            self.assertEqual(self.throttled(self.begin("third")), 6)
            self.assertEqual(len(self.homeserver.asked), 1)
            self.network.turn(5.6)
            self.assertEqual(self.user(), USER["user_id"])

    def test_requests_share_a_429(self) -> None:
        """Requests that share a request to the homeserver share a 429 as well."""
        self.throttle(1, Retry_After="9")
        done = [self.auth.get_user_by_req(client_request(TOKEN)) for _ in range(3)]
        self.network.turn()
        self.assertEqual([self.throttled(one) for one in done], [9] * 3)

    def test_a_429_is_no_outage(self) -> None:
        """`check` succeeds on a 429, and sends no request during a pause."""
        self.throttle(1, Retry_After="3")
        for _ in range(2):
            done = self.auth.check()
            self.network.turn()
            self.assertIsNone(self.successResultOf(done))
        self.assertEqual(len(self.homeserver.asked), 1)

    def test_a_pause_ends_when_the_clock_is_set_back(self) -> None:
        """A pause does not last longer if the reactor's time is set back."""
        self.throttle(1, Retry_After="9")
        self.throttled(self.begin())
        self.network.rightNow -= 3600
        self.assertEqual(self.user(), USER["user_id"])

    def test_300_concurrent_users_of_a_throttling_homeserver(self) -> None:
        """A homeserver that allows 20 requests a second serves at least 80 users in the
        5 seconds of `retry_seconds`, and refuses two full sets of connections at most.
        The other users receive a 429 with a Retry-After."""
        self.homeserver.fault = bucket = TokenBucket(
            self.network.seconds, 20, answering(200, USER), Retry_After="1"
        )
        done = [
            self.auth.get_user_by_req(client_request(f"token{number}"))
            for number in range(300)
        ]
        self.network.turn(5.1)
        served = 0
        told: list[int] = []

        def note(failure: Failure) -> None:
            failure.trap(LimitExceededError)
            error: Any = failure.value
            told.append(error.retry_after)

        for one in done:
            one.addErrback(note)
            served += isinstance(self.successResultOf(one), Requester)
        self.assertGreaterEqual(served, 80)
        self.assertLessEqual(bucket.refused, 2 * MAX_CONNECTIONS)
        self.assertGreaterEqual(len(set(told)), 3)

    def test_requests_after_a_pause_are_spaced(self) -> None:
        """After a pause, the requests of many users are sent one at a time, with
        gaps."""
        times: list[float] = []
        knows = answering(200, USER)

        def answer(request: Request) -> int | bytes:
            times.append(self.network.seconds())
            return knows(request)

        self.throttle(1, Retry_After="1")
        done = [self.begin()]
        self.homeserver.fault = answer
        done += [self.begin(f"token{number}") for number in range(9)]
        self.network.turn(0.99)
        self.assertEqual(times, [])
        self.network.turn(1)
        for one in done:
            self.successResultOf(one)
        gaps = [later - time for time, later in pairwise(times)]
        self.assertGreaterEqual(min(gaps), FIRST_INTERVAL / 2)

    # Metrics and log

    def test_every_lookup_is_counted_by_outcome(self) -> None:
        """Every token lookup is counted by its outcome."""
        before = outcomes()
        for token in (TOKEN, TOKEN, "other"):
            self.begin(token).addErrback(lambda _: None)
        done = [self.auth.get_user_by_req(client_request("3")) for _ in range(4)]
        self.network.turn()
        self.homeserver.fault = FAULTS["502"]
        done.append(self.begin("4"))
        self.network.turn(5.5)
        for one in done:
            self.failureResultOf(one)
        counted = {name: count - before[name] for name, count in outcomes().items()}
        expected = {"answered": 1, "refused": 2, "cached": 4, "failed": 7}
        self.assertEqual(counted, {**expected, "throttled": 0})

    def test_no_token_is_logged(self) -> None:
        """The log names the fault of the homeserver, and holds no token."""
        with self.assertLogs(level=logging.DEBUG) as logs:
            for _ in self.inject_faults():
                done = self.begin(), self.begin(None, access_token=TOKEN + "2")
                self.network.turn(1.5)
                for one in done:
                    self.failureResultOf(one, UnavailableError)
                self.network.refusing = False
        text = "\n".join(logs.output)
        for reason in ("status 502", "refused", "over 65536 bytes", "ResponseFailed"):
            self.assertIn(reason, text)
        self.assertNotIn(TOKEN, text)

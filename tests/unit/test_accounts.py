"""The accounts of a Synapse, for the command ``sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.http import Request
from twisted.web.http_headers import Headers

from synapse_roomkeys.clock import Clock
from synapse_roomkeys.homeserver import HomeserverOptions, Response
from synapse_roomkeys.request_queue import UnusableResponseError
from synapse_roomkeys.tools.accounts import USERS, Accounts, is_gone, read_token
from synapse_roomkeys.tools.session import AWAY, USAGE, ToolError

from ..faulty_homeserver import (
    FAULTS,
    FaultyHomeserver,
    TokenBucket,
    answering,
    hang_up,
    stall,
)
from ..memory_network import MemoryNetwork

TOKEN = "syt_an_administrators_token"
ACTIVE = "@a/b:test.example"
GONE = "@gone:test.example"
UNKNOWN = "@unknown:test.example"
#: The account of each known user, by path.
ACCOUNTS = {
    f"{USERS}/%40a%2Fb%3Atest.example": {"name": ACTIVE, "deactivated": False},
    f"{USERS}/%40gone%3Atest.example": {"name": GONE, "deactivated": True},
}


def answer_as_synapse(request: Request) -> int | bytes:
    """Answer as a Synapse's admin API."""
    path = request.path.decode()
    if path == USERS:
        return answering(200, {"users": [*ACCOUNTS.values()], "total": 2})(request)
    if path in ACCOUNTS:
        return answering(200, ACCOUNTS[path])(request)
    return answering(404, {"errcode": "M_NOT_FOUND", "error": "User not found"})(
        request
    )


def response(code: int, body: bytes) -> Response:
    """Return a complete response."""
    return Response(code, Headers({"Content-Type": ["application/json"]}), body)


class DecisionTests(SynchronousTestCase):
    """Tests of `is_gone`."""

    def test_synapses_answers(self) -> None:
        """A deactivated account, or an unknown user, is gone."""
        name = b'"name": "@a:b.c"'
        for code, body, expected in (
            (200, b'{%b, "deactivated": false}' % name, False),
            (200, b'{%b, "deactivated": true}' % name, True),
            (200, b'{%b, "deactivated": 0}' % name, False),
            (200, b'{%b, "deactivated": 1, "locked": false}' % name, True),
            (404, b'{"errcode": "M_NOT_FOUND", "error": "User not found"}', True),
        ):
            self.assertIs(is_gone("@a:b.c", response(code, body)), expected, body)

    def test_other_answers(self) -> None:
        """An answer of another form is unusable: the account may be active."""
        gone = b'{"name": "@a:b.c", "deactivated": true}'
        for code, body in (
            (404, b'{"errcode": "M_UNRECOGNIZED"}'),
            (404, b"<html>Not Found</html>"),
            (404, b'{"error": "Not Found"}'),
            (404, b'["M_NOT_FOUND"]'),
            (404, b""),
            (404, gone),
            (200, b'{"errcode": "M_NOT_FOUND"}'),
            (200, b'{"name": "@other:b.c", "deactivated": true}'),
            (200, b'{"name": "@a:b.c"}'),
            (200, b'{"name": "@a:b.c", "deactivated": null}'),
            (200, b'{"name": "@a:b.c", "deactivated": "true"}'),
            (200, b'{"name": "@a:b.c", "deactivated": 2}'),
            (200, gone[:-1]),
            (200, b'{"name": "@a:b.c\xff", "deactivated": true}'),
            (400, b'{"errcode": "M_NOT_FOUND"}'),
            (410, gone),
            (500, gone),
            (502, b"<html>Bad Gateway</html>"),
        ):
            with self.subTest(code=code, body=body):
                answer = response(code, body)
                self.assertRaises(UnusableResponseError, is_gone, "@a:b.c", answer)


class AccountsTests(SynchronousTestCase):
    """Tests of `Accounts` with a homeserver, without a socket."""

    def setUp(self) -> None:
        self.homeserver = FaultyHomeserver()
        self.homeserver.fault = answer_as_synapse
        self.network = MemoryNetwork(self.homeserver)
        options = HomeserverOptions("http://hs.test.example")
        clock = Clock(self.network)
        self.accounts = Accounts(self.network, clock, options, TOKEN)

    def wait(self, done: Deferred[Any]) -> Deferred[Any]:
        """Let more time pass than a request may take."""
        self.network.turn(11)
        return done

    def refuse(self, done: Deferred[Any]) -> ToolError:
        """Return the error of a request."""
        failure = self.failureResultOf(self.wait(done), ToolError)
        error = failure.value
        assert isinstance(error, ToolError)
        self.assertIn("http://hs.test.example", str(error))
        for secret in (TOKEN, "\n"):
            self.assertNotIn(secret, str(error))
        return error

    def test_users_are_asked_for(self) -> None:
        """Each user is asked for by the whole name, with the token."""
        names = [ACTIVE, GONE, UNKNOWN]
        self.assertIsNone(self.successResultOf(self.wait(self.accounts.check())))
        found = self.wait(self.accounts.find_gone(names))
        self.assertEqual(self.successResultOf(found), {GONE, UNKNOWN})
        paths = [USERS, *ACCOUNTS, f"{USERS}/%40unknown%3Atest.example"]
        self.assertEqual([asked.path for asked in self.homeserver.asked], paths)
        self.assertEqual({asked.token for asked in self.homeserver.asked}, {TOKEN})

    def test_a_token_is_refused(self) -> None:
        """A refused token is a wrong usage, and the text describes the right token."""
        for code, errcode in ((401, "M_UNKNOWN_TOKEN"), (403, "M_FORBIDDEN")):
            self.homeserver.fault = answering(code, {"errcode": errcode})
            for done in (self.accounts.check(), self.accounts.find_gone([UNKNOWN])):
                error = self.refuse(done)
                self.assertEqual(error.code, USAGE)
                self.assertIn(f"status {code} ({errcode}): give the", str(error))

    def test_faults(self) -> None:
        """Each fault of a homeserver or a proxy ends the command."""
        for name, fault in {**FAULTS, "no answer": stall, "no more": hang_up}.items():
            self.homeserver.fault = fault
            for done in (self.accounts.check(), self.accounts.find_gone([UNKNOWN])):
                error = self.refuse(done)
                refused = name in ("401 of a proxy", "403 of a proxy", "404 as 401")
                self.assertEqual(error.code, USAGE if refused else AWAY, name)

    def test_a_refused_connection(self) -> None:
        """A stopped homeserver ends the command."""
        self.network.refusing = True
        error = self.refuse(self.accounts.check())
        self.assertEqual(error.code, AWAY)
        self.assertIn("ConnectionRefusedError", str(error))

    def test_a_server_without_the_admin_api(self) -> None:
        """A list of accounts is required before the first user."""
        for code, body in (
            (404, {"errcode": "M_NOT_FOUND"}),
            (200, {"users": [], "total": 0}),
            (200, {"total": 5}),
            (200, {}),
        ):
            self.homeserver.fault = answering(code, body)
            self.assertEqual(self.refuse(self.accounts.check()).code, AWAY, body)

    def test_the_first_fault_ends_a_page(self) -> None:
        """After an unusable answer no other user is asked for, and the error names the
        user."""

        def fail_for_the_second(request: Request) -> int | bytes:
            if request.path.endswith(b"gone%3Atest.example"):
                return answering(404, {"errcode": "M_UNRECOGNIZED"})(request)
            return answer_as_synapse(request)

        self.homeserver.fault = fail_for_the_second
        error = self.refuse(self.accounts.find_gone([UNKNOWN, GONE, UNKNOWN]))
        self.assertEqual(len(self.homeserver.asked), 2)
        self.assertIn(
            "status 404 (M_UNRECOGNIZED): homeserver.url has no admin API of a Synapse"
            f" (for {GONE})",
            str(error),
        )

    def test_a_redirect_names_the_address(self) -> None:
        """A redirect isn't followed; the error has the address to set."""
        target = f"https://b.example{USERS}?limit=1"
        self.homeserver.fault = answering(308, b"", Location=target)
        error = self.refuse(self.accounts.check())
        self.assertIn("set homeserver.url to https://b.example:", str(error))

    def test_a_rate_limit_is_waited_for(self) -> None:
        """A throttled request is sent again."""
        bucket = TokenBucket(self.network.seconds, 1, answer_as_synapse)
        self.homeserver.fault = bucket
        found = self.wait(self.accounts.find_gone([ACTIVE, UNKNOWN]))
        self.assertEqual(self.successResultOf(found), {UNKNOWN})
        self.assertEqual(bucket.refused, 1)


class TokenTests(SynchronousTestCase):
    """Tests of `read_token`."""

    def test_the_file_has_a_token_alone(self) -> None:
        """A line break is left out; other text is refused, and isn't quoted."""
        path = Path(self.mktemp())
        path.write_text(f"{TOKEN}\n")
        self.assertEqual(read_token(path), TOKEN)
        for text in ("", "\n", "a b", "a\nsecret", "ä", "token: secret"):
            path.write_text(text, encoding="utf-8")
            error = self.assertRaises(ToolError, read_token, path)
            self.assertEqual((error.code, "secret" in str(error)), (USAGE, False))
        path.unlink()
        self.assertRaises(ToolError, read_token, path)

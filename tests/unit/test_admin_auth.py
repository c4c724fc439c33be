"""Tests of the authentication of operators at the service, with a homeserver over
connections in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.http import Request

from synapse_roomkeys.clock import Clock
from synapse_roomkeys.errors import ForbiddenError, TokenError, UnavailableError
from synapse_roomkeys.homeserver import HomeserverOptions
from synapse_roomkeys.service.admin_auth import TOKEN_OPERATOR, ServiceAdminAuth
from synapse_roomkeys.service.config import AdminConfig
from synapse_roomkeys.whoami import WhoamiAuth

from ..faulty_homeserver import (
    FAULTS,
    WHOAMI,
    Fault,
    FaultyHomeserver,
    answering,
    client_request,
)
from ..memory_network import MemoryNetwork

TOKEN = "syt_YW5fYWRtaW4_0123456789abcdef"
ADMIN = "@admin:test.example"
ACCOUNT = "/_synapse/admin/v2/users/%40admin%3Atest.example"
FILE_TOKEN = "0123456789abcdef" * 4


class ServiceAdminAuthTests(SynchronousTestCase):
    """A homeserver with one user. Each test sets the answer about administrators."""

    def setUp(self) -> None:
        self.homeserver = FaultyHomeserver()
        self.homeserver.fault = self.answer
        # With the Matrix Authentication Service, ``admin`` is false for all users.
        self.account: Fault = answering(200, {"name": ADMIN, "admin": False})
        self.network = MemoryNetwork(self.homeserver)
        options = HomeserverOptions("http://hs.test.example/")
        self.whoami = WhoamiAuth(self.network, Clock(self.network), options)

    def answer(self, request: Request) -> int | bytes:
        """Answer as a homeserver does."""
        if request.path.decode() == WHOAMI:
            return answering(200, {"user_id": ADMIN})(request)
        return self.account(request)

    def begin(
        self, token: str = TOKEN, *, synapse_admins: bool = True, **query: Any
    ) -> Deferred[str]:
        """Authenticate a request and deliver all bytes; return the Deferred."""
        path = Path(self.mktemp())
        path.write_text(f"{FILE_TOKEN}\n")
        config = AdminConfig((), str(path), synapse_admins)
        auth = ServiceAdminAuth(self.whoami, config)
        done = auth.get_operator(client_request(token, **query))
        self.network.turn()
        return done

    def paths(self) -> list[str]:
        """The paths of the received requests, in order."""
        return [asked.path for asked in self.homeserver.asked]

    def test_the_token_of_the_file_is_not_sent_on(self) -> None:
        """The operator with the token is known without the homeserver."""
        self.assertEqual(self.successResultOf(self.begin(FILE_TOKEN)), TOKEN_OPERATOR)
        self.assertEqual(self.paths(), [])

    def test_other_tokens_need_synapse_admins(self) -> None:
        """Without the option, only the whole token of the file is known. The homeserver
        receives no token."""
        for token in (TOKEN, FILE_TOKEN[:-1], FILE_TOKEN + "0", FILE_TOKEN.upper()):
            done = self.begin(token, synapse_admins=False)
            error = self.failureResultOf(done, TokenError).value
            self.assertEqual((error.code, error.errcode), (401, "M_UNKNOWN_TOKEN"))
        self.assertEqual(self.paths(), [])

    def test_each_request_asks_whether_the_user_is_an_administrator(self) -> None:
        """A withdrawn right ends immediately, although the user is remembered. The
        query can't name another user."""
        done = self.begin(user_id="@other:test.example")
        self.assertEqual(self.successResultOf(done), ADMIN)
        self.account = answering(403, {"errcode": "M_FORBIDDEN", "error": "no admin"})
        self.failureResultOf(self.begin(), ForbiddenError)
        self.assertEqual(self.paths(), [WHOAMI, ACCOUNT, ACCOUNT])
        self.assertEqual({tuple(asked.query) for asked in self.homeserver.asked}, {()})

    def test_a_revoked_token_is_401(self) -> None:
        """A remembered token is refused after the homeserver has revoked the token. The
        refusal is no outage of the homeserver."""
        self.successResultOf(self.begin())
        body = {"errcode": "M_UNKNOWN_TOKEN", "error": "revoked", "soft_logout": True}
        self.account = answering(401, body)
        with self.assertNoLogs("synapse_roomkeys"):
            done = self.begin()
        error = self.failureResultOf(done, TokenError).value
        self.assertEqual((error.code, error.errcode), (401, "M_UNKNOWN_TOKEN"))
        self.assertTrue(error.error_dict()["soft_logout"])

    def test_a_faulty_answer_is_503(self) -> None:
        """An answer of another server than Synapse is an outage, for example the 403 of
        a proxy in front of the admin API."""
        other = answering(200, {"name": "@other:test.example", "admin": True})
        for name, fault in {**FAULTS, "another user": other}.items():
            self.setUp()
            self.successResultOf(self.begin())
            self.account = fault
            with self.assertLogs("synapse_roomkeys.outages") as logs:
                done = self.begin()
                self.network.turn(60)
            self.failureResultOf(done, UnavailableError)
            self.assertIn("/_synapse/admin/", logs.output[0], name)
            if name == "404":
                self.assertIn("homeserver.url has no admin API", logs.output[0])

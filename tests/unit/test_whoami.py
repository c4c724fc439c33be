"""Who a token belongs to, asked of a homeserver over connections in memory."""

import gc
import logging
import weakref
from collections.abc import Iterator
from typing import Any

from prometheus_client import REGISTRY
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionRefusedError
from twisted.internet.interfaces import (
    IHostnameResolver,
    IReactorPluggableNameResolver,
)
from twisted.internet.testing import MemoryReactorClock
from twisted.test import iosim
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.http import Request
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site
from zope.interface import implementer

from synapse_roomkeys.clock import Clock
from synapse_roomkeys.errors import TokenError, UnavailableError
from synapse_roomkeys.types import Requester
from synapse_roomkeys.whoami import MAX_CONNECTIONS, HomeserverOptions, WhoamiAuth

from ..homeserver import (
    FAULTS,
    VERSIONS,
    WHOAMI,
    FakeHomeserver,
    answering,
    client_request,
    stall,
    stall_in_body,
)

TOKEN = "syt_VGhpcyBpcyBhIHRva2Vu_0123456789abcdef"
USER = {"user_id": "@User:test.example", "device_id": "DEVICE"}


@implementer(IHostnameResolver)
class Resolver:
    """Finds every name at one address, at once."""

    def resolveHostName(
        self,
        resolutionReceiver: Any,
        hostName: str,
        portNumber: int = 0,
        addressTypes: Any = None,
        transportSemantics: str = "TCP",
    ) -> Any:
        """As `IHostnameResolver.resolveHostName`."""
        resolutionReceiver.resolutionBegan(None)
        resolutionReceiver.addressResolved(IPv4Address("TCP", "192.0.2.1", portNumber))
        resolutionReceiver.resolutionComplete()
        return resolutionReceiver


@implementer(IReactorPluggableNameResolver)
class MemoryNetwork(MemoryReactorClock):
    """A reactor whose connections all lead to one site.

    Attributes:
        refusing: whether connections are refused.
    """

    def __init__(self, resource: Resource) -> None:
        super().__init__()
        # That of an older Twisted has none.
        self.nameResolver: Any = Resolver()
        self.site = Site(resource, reactor=self)
        self.refusing = False
        self._pumps: list[Any] = []

    def callFromThread(self, callable: Any, *args: Any, **kwargs: Any) -> None:
        """As the reactor's, at once."""
        callable(*args, **kwargs)

    def connectTCP(
        self,
        host: Any,
        port: Any,
        factory: Any,
        timeout: Any = 30,
        bindAddress: Any = None,
    ) -> Any:
        """As the reactor's, to the site."""
        connector = super().connectTCP(host, port, factory, timeout, bindAddress)
        if self.refusing:
            factory.clientConnectionFailed(connector, ConnectionRefusedError())
            return connector
        server, client = self.site.buildProtocol(None), factory.buildProtocol(None)
        pipes = iosim.FakeTransport(server, True), iosim.FakeTransport(client, False)
        self._pumps.append(iosim.connect(server, pipes[0], client, pipes[1]))
        return connector

    @property
    def connections(self) -> int:
        """How many are open."""
        return sum(not pump.clientIO.disconnected for pump in self._pumps)

    def turn(self, seconds: float = 0) -> None:
        """Have time pass, from one call that is due to the next, and bytes flow."""
        end = self.seconds() + seconds
        self._flow()
        while due := [
            c.getTime() for c in self.getDelayedCalls() if c.getTime() <= end
        ]:
            self.rightNow = max(min(due), self.seconds())
            self._flow()
        self.rightNow = end

    def _flow(self) -> None:
        moved = True
        while moved:
            self.advance(0)
            moved = sum(pump.flush() for pump in self._pumps) > 0


def outcomes() -> dict[str, float]:
    """How often each outcome was counted."""
    return {
        outcome: REGISTRY.get_sample_value(
            "synapse_roomkeys_whoami_requests_total", {"outcome": outcome}
        )
        or 0
        for outcome in ("answered", "refused", "failed", "cached")
    }


class WhoamiTests(SynchronousTestCase):
    """`WhoamiAuth` and a homeserver, without a socket."""

    def setUp(self) -> None:
        self.homeserver = FakeHomeserver()
        self.homeserver.answers[TOKEN] = 200, USER
        self.network = MemoryNetwork(self.homeserver)
        self.auth = self.new_auth()

    def new_auth(self, **options: int) -> WhoamiAuth:
        """One that remembers nothing yet."""
        return WhoamiAuth(
            self.network,
            Clock(self.network),
            HomeserverOptions("http://hs.test.example/", **options),
        )

    def begin(
        self, token: str | None = TOKEN, *args: Any, **query: Any
    ) -> Deferred[Requester]:
        """Authenticate a request, and have the bytes flow."""
        done = self.auth.get_user_by_req(client_request(token, *args, **query))
        self.network.turn()
        return done

    def user(self, *args: Any, **query: Any) -> str:
        """Whose request it is."""
        return self.successResultOf(self.begin(*args, **query)).user_id

    def error(self, done: Deferred[Requester]) -> dict[str, Any]:
        """The answer to a client who isn't let in, with the status."""
        error = self.failureResultOf(done, TokenError).value
        self.assertNotIn(TOKEN, str(error.error_dict()))
        return {"status": error.code, **error.error_dict()}

    def refusal(self, *args: Any, **query: Any) -> tuple[int, str]:
        """With what status and errcode a request is refused."""
        error = self.error(self.begin(*args, **query))
        return error["status"], error["errcode"]

    def tokens(self) -> list[str | None]:
        """The tokens that the homeserver was asked about."""
        return [asked.token for asked in self.homeserver.asked]

    # Tokens

    def test_user_and_device(self) -> None:
        """The homeserver is asked with the token in the header, nowhere else."""
        found = self.successResultOf(self.begin())
        self.assertEqual(found, Requester("@User:test.example", "DEVICE"))
        (asked,) = self.homeserver.asked
        self.assertEqual((asked.path, asked.token, asked.query), (WHOAMI, TOKEN, {}))

    def test_no_device(self) -> None:
        """A token needs no device."""
        self.homeserver.answers[TOKEN] = 200, {"user_id": "@bot:test.example"}
        found = self.successResultOf(self.begin())
        self.assertEqual(found, Requester("@bot:test.example", None))

    def test_token_of_the_query(self) -> None:
        """It goes to the homeserver in the header as well."""
        self.assertEqual(self.user(None, access_token=TOKEN), USER["user_id"])
        (asked,) = self.homeserver.asked
        self.assertEqual((asked.token, asked.query), (TOKEN, {}))

    def test_the_header_goes_first(self) -> None:
        """A token in the query takes nothing from the one in the header."""
        self.assertEqual(self.user(TOKEN, access_token="other"), USER["user_id"])
        self.assertEqual(self.tokens(), [TOKEN])

    def test_no_token(self) -> None:
        """A request without a token that could be one isn't asked about."""
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

    def test_unknown_token(self) -> None:
        """The homeserver's status and errcode are passed on, not its text."""
        error = self.error(self.begin("another"))
        self.assertEqual((error["status"], error["errcode"]), (401, "M_UNKNOWN_TOKEN"))
        self.assertNotIn("another", error["error"])
        self.assertNotIn("soft_logout", error)

    def test_refusals(self) -> None:
        """Whatever the homeserver says of the user is passed on."""
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

    def test_guests(self) -> None:
        """Guests are refused, at the second time too."""
        self.homeserver.answers[TOKEN] = 200, {**USER, "is_guest": True}
        for _ in range(2):
            self.assertEqual(self.refusal(), (403, "M_GUEST_ACCESS_FORBIDDEN"))
        self.assertEqual(len(self.homeserver.asked), 1)
        self.homeserver.answers["other"] = 200, {**USER, "is_guest": False}
        self.assertEqual(self.user("other"), USER["user_id"])

    # Application services

    def test_masks(self) -> None:
        """Whom an application service acts as is the homeserver's to allow; each is
        remembered apart."""
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

    def test_nobody_becomes_another(self) -> None:
        """The user is the one that the homeserver names."""
        self.assertEqual(self.user(user_id="@victim:test.example"), USER["user_id"])

    # Memory

    def test_remembered(self) -> None:
        """A token is asked about again after its time, and refused once revoked."""
        self.assertEqual(self.user(), USER["user_id"])
        del self.homeserver.answers[TOKEN]
        self.network.turn(59.9)
        self.assertEqual(self.user(), USER["user_id"])
        self.network.turn(0.2)
        self.assertEqual(self.refusal(), (401, "M_UNKNOWN_TOKEN"))

    def test_remembered_since_it_was_asked(self) -> None:
        """The time that the answer took isn't given on top."""
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

    def test_refusals_are_remembered_shorter(self) -> None:
        """A token that wasn't known may be soon."""
        del self.homeserver.answers[TOKEN]
        self.assertEqual(self.refusal(), (401, "M_UNKNOWN_TOKEN"))
        self.homeserver.answers[TOKEN] = 200, USER
        self.network.turn(9.9)
        self.assertEqual(self.refusal(), (401, "M_UNKNOWN_TOKEN"))
        self.assertEqual(len(self.homeserver.asked), 1)
        self.network.turn(0.2)
        self.assertEqual(self.user(), USER["user_id"])

    def test_time_set_back(self) -> None:
        """What was remembered in the future is forgotten."""
        self.network.turn(1)
        self.user()
        self.network.rightNow -= 3600
        self.user()
        self.assertEqual(len(self.homeserver.asked), 2)

    def test_memory_is_bounded(self) -> None:
        """The oldest answer is the first to go."""
        self.auth = self.new_auth(cache_entries=2)
        self.homeserver.answers["2"] = 200, USER
        for token in (TOKEN, "2", "3", "2", "3", TOKEN):
            self.begin(token).addErrback(lambda _: None)
            self.assertLessEqual(len(self.auth._answers), 2)
        self.assertEqual(self.tokens(), [TOKEN, "2", "3", TOKEN])

    def test_asked_again_is_new(self) -> None:
        """An answer that was renewed isn't the oldest."""
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

    def test_no_token_is_kept(self) -> None:
        """Neither tokens nor requests stay in memory after the answer."""
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

    # Many at once

    def test_one_question(self) -> None:
        """Requests with one token at once are one question."""
        done = [self.auth.get_user_by_req(client_request(TOKEN)) for _ in range(50)]
        self.network.turn()
        found = {self.successResultOf(one) for one in done}
        self.assertEqual(found, {Requester("@User:test.example", "DEVICE")})
        self.assertEqual(len(self.homeserver.asked), 1)

    def test_one_refusal_each(self) -> None:
        """Each of those who wait has an error of its own."""
        done = [self.auth.get_user_by_req(client_request("other")) for _ in range(3)]
        self.network.turn()
        errors = [self.failureResultOf(one, TokenError).value for one in done]
        self.assertEqual(len({id(error) for error in errors}), 3)
        self.assertEqual(len(self.homeserver.asked), 1)

    def test_waiters_share_a_failure(self) -> None:
        """Those who wait for a homeserver that is away are told so with the first."""
        self.network.refusing = True
        done = [self.auth.get_user_by_req(client_request(TOKEN)) for _ in range(3)]
        self.network.turn(5.5)
        for one in done:
            self.failureResultOf(one, UnavailableError)
        self.assertEqual(self.auth._questions, {})

    def test_connections_are_bounded(self) -> None:
        """Users who come all at once wait for a connection; those who wait too long
        are told that the homeserver is away."""
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

    def test_connections_are_kept(self) -> None:
        """One after the other, questions take the same connection, until it is
        closed."""
        for number in range(5):
            self.begin(f"token{number}").addErrback(lambda _: None)
        self.assertEqual(len(self.network.tcpClients), 1)
        closed = self.auth.close()
        self.network.turn()
        self.successResultOf(closed)
        self.assertEqual(self.network.connections, 0)

    def test_cookies_are_nobodys(self) -> None:
        """What is set in one user's answer isn't sent with the next question."""
        self.homeserver.fault = answering(200, USER, Set_Cookie="a=b; Path=/")
        self.user()
        self.user("other")
        self.assertEqual([asked.cookie for asked in self.homeserver.asked], [None] * 2)

    # A homeserver that is away

    def faults(self) -> Iterator[str]:
        """Put each fault in force, with nothing remembered."""
        for name, fault in FAULTS.items():
            self.auth = self.new_auth(timeout_seconds=2, retry_seconds=1)
            self.homeserver.fault = fault
            self.homeserver.asked.clear()
            yield name
        self.homeserver.fault = None
        self.network.refusing = True
        self.auth = self.new_auth(timeout_seconds=2, retry_seconds=1)
        yield "refusing"

    def test_away_is_503(self) -> None:
        """A homeserver that says nothing of the user leaves them neither in nor out,
        and is asked again by the next request."""
        for name in self.faults():
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

    def test_recovery(self) -> None:
        """A homeserver that comes back in time costs a moment."""
        for name in self.faults():
            done = self.begin()
            self.network.turn(0.5)
            self.assertNoResult(done)
            self.homeserver.fault = None
            self.network.refusing = False
            self.network.turn(0.6)
            found = self.successResultOf(done)
            self.assertEqual(found, Requester("@User:test.example", "DEVICE"), name)

    def test_delays_grow(self) -> None:
        """It is asked a few times in the seconds there are, the last at their end."""
        times: list[float] = []

        def note_time(request: Request) -> int | bytes:
            times.append(round(self.network.seconds(), 6))
            return FAULTS["502"](request)

        self.homeserver.fault = note_time
        done = self.begin()
        self.network.turn(5)
        self.failureResultOf(done, UnavailableError)
        self.assertEqual(times, [0, 0.1, 0.3, 0.7, 1.5, 3.1, 5])

    def test_stalled(self) -> None:
        """A homeserver that says no more has its connection closed in time."""
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

    def test_too_long(self) -> None:
        """A homeserver that says too much isn't listened to until the end."""

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

    def test_check(self) -> None:
        """It is there when it answers 200, and away otherwise."""
        done = self.auth.check()
        self.network.turn()
        self.assertIsNone(self.successResultOf(done))
        self.assertEqual([asked.path for asked in self.homeserver.asked], [VERSIONS])
        for fault in (stall, stall_in_body, answering(502, b""), answering(401, {})):
            self.homeserver.fault = fault
            done = self.auth.check()
            self.network.turn(10.1)
            self.failureResultOf(done, UnavailableError)

    # What is told of it

    def test_counted(self) -> None:
        """Every token that is looked up is counted by its outcome."""
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
        self.assertEqual(
            counted, {"answered": 1, "refused": 2, "cached": 4, "failed": 7}
        )

    def test_no_token_is_logged(self) -> None:
        """The log says why the homeserver is away, and holds no token."""
        with self.assertLogs(level=logging.DEBUG) as logs:
            for _ in self.faults():
                done = self.begin(), self.begin(None, access_token=TOKEN + "2")
                self.network.turn(1.5)
                for one in done:
                    self.failureResultOf(one, UnavailableError)
                self.network.refusing = False
        text = "\n".join(logs.output)
        for reason in ("status 502", "refused", "over 65536 bytes", "ResponseFailed"):
            self.assertIn(reason, text)
        self.assertNotIn(TOKEN, text)

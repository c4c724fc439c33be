"""Tests of the servlets as Twisted resources."""

from unittest import mock

from prometheus_client import REGISTRY
from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.resource import Resource
from twisted.web.server import Site

from synapse_roomkeys import RoomKeysVersionServlet, register_servlets
from synapse_roomkeys.clock import identity
from synapse_roomkeys.rest import JsonResource
from synapse_roomkeys.types import Limits, Requester

from ..contract import Client
from ..memory import MemoryHost, read_answer

VERSION = "/_matrix/client/v3/room_keys/version"


class MountTests(SynchronousTestCase):
    """Tests of the places where the servlets can be mounted."""

    def test_the_root_resource_can_be_a_child_of_any_resource(self) -> None:
        """The root resource answers its paths below any other resource."""
        host = MemoryHost()
        root, matrix, own = Resource(), Resource(), JsonResource()
        register_servlets(host.hs, own)
        root.putChild(b"_matrix", matrix)
        matrix.putChild(b"client", own)
        host.site = Site(root)
        user = host.new_user()
        answer = self.successResultOf(
            host.request("GET", VERSION, token=user.access_token)
        )
        self.assertEqual(answer.json["errcode"], "M_NOT_FOUND")

    def test_a_servlet_is_a_resource_of_its_own(self) -> None:
        """A servlet alone answers its own paths, and no other path or method."""
        host = MemoryHost()
        host.site = Site(RoomKeysVersionServlet(host.hs))
        token = host.new_user().access_token
        answer = self.successResultOf(host.request("GET", VERSION, token=token))
        self.assertEqual(answer.status, 404)
        self.assertEqual(answer.json["errcode"], "M_NOT_FOUND")
        answer = self.successResultOf(host.request("POST", VERSION, token=token))
        self.assertEqual(answer.status, 405)


class FaultTests(SynchronousTestCase):
    """Tests of answers to faulty requests and after internal errors."""

    def test_an_unexpected_error_is_500_without_details(self) -> None:
        """An unexpected error is logged, and the client receives a 500 without the
        message of the error."""
        host = MemoryHost()
        host.database.fault = ZeroDivisionError("secret detail")
        token = host.new_user().access_token
        with self.assertLogs("synapse_roomkeys", "ERROR") as logged:
            answer = self.successResultOf(host.request("GET", VERSION, token=token))
        self.assertEqual(answer.status, 500)
        self.assertEqual(answer.json["errcode"], "M_UNKNOWN")
        self.assertNotIn(b"secret", answer.body)
        self.assertIn("ZeroDivisionError", logged.output[0])

    def test_a_body_over_the_limit_is_413(self) -> None:
        """An upload over `max_body_bytes` is refused before the body is parsed."""
        host = MemoryHost(Limits(max_body_bytes=1000))
        client = Client(host, host.new_user())
        version = self.successResultOf(client.create_version())
        body = b'{"rooms": {}}' + b" " * 1000
        answer = self.successResultOf(client.put(f"/keys?version={version}", body))
        self.assertEqual((answer.status, answer.json["errcode"]), (413, "M_TOO_LARGE"))

    def test_a_disconnect_during_authentication_logs_no_error(self) -> None:
        """If a client disconnects during authentication, the lost request body is not
        logged as an error."""
        host = MemoryHost()
        user = host.new_user()
        version = self.successResultOf(Client(host, user).create_version())
        asked: Deferred[Requester] = Deferred()
        auth = host.hs.get_auth()
        with mock.patch.object(type(auth), "get_user_by_req", lambda *_: asked):
            path = f"/_matrix/client/v3/room_keys/keys?version={version}"
            transport = host.send("PUT", path, token=user.access_token, body=b"{}")
            transport.loseConnection()
            with self.assertNoLogs("synapse_roomkeys", "INFO"):
                asked.callback(Requester(user.user_id, None))
        self.assertEqual(transport.value(), b"")

    def test_a_disconnect_before_the_answer_logs_no_error(self) -> None:
        """If a client disconnects before the answer, no bytes are written and no
        warning is logged."""
        host = MemoryHost()
        user = host.new_user()
        version = self.successResultOf(Client(host, user).create_version())
        keys = f"/_matrix/client/v3/room_keys/keys?version={version}"
        for method, path in (("GET", VERSION), ("GET", keys), ("HEAD", keys)):
            turn: Deferred[None] = Deferred()
            host.handler._reads.run(user.user_id, identity, turn)
            transport = host.send(method, path, token=user.access_token)
            self.assertEqual(transport.value(), b"")
            transport.loseConnection()
            with self.assertNoLogs("synapse_roomkeys", "WARNING"):
                turn.callback(None)
                host.reactor.advance(0)
            self.assertEqual(transport.value(), b"")

    def test_options_need_no_token(self) -> None:
        """A preflight request of a browser is answered without a token."""
        transport = MemoryHost().send("OPTIONS", VERSION, token=None)
        answer = read_answer(transport.value(), "OPTIONS")
        self.assertEqual(answer.status, 204)
        self.assertEqual(answer.headers["access-control-allow-origin"], "*")


class MetricsTests(SynchronousTestCase):
    """Tests of the request metrics of a host without request metrics of its own."""

    def sample(self, name: str, **labels: str) -> float:
        """The value of a time series, or 0 if the series does not exist yet."""
        return REGISTRY.get_sample_value(f"synapse_roomkeys_{name}", labels) or 0

    def test_a_request_is_in_flight_until_it_is_answered_or_dropped(self) -> None:
        """A request counts as in flight until its answer or its disconnect, and as
        waiting while it waits for other requests of the user."""
        host = MemoryHost()
        servlet = {"servlet": "RoomKeysVersionServlet", "method": "GET"}
        names = ("404", "dropped")
        before = [self.sample("requests_total", status=n, **servlet) for n in names]
        timed = self.sample("request_seconds_count", **servlet)
        in_flight = self.sample("requests_in_flight", method="GET")
        waiting = self.sample("waiting_requests")
        turn: Deferred[None] = Deferred()
        host.handler._reads.run("@user0:test.example", lambda: turn)
        token = host.new_user().access_token
        left = host.send("GET", VERSION, token=token)
        host.send("GET", VERSION, token=token)
        self.assertEqual(self.sample("requests_in_flight", method="GET"), in_flight + 2)
        self.assertEqual(self.sample("waiting_requests"), waiting + 2)
        left.loseConnection()
        self.assertEqual(self.sample("requests_in_flight", method="GET"), in_flight + 1)
        turn.callback(None)
        host.reactor.advance(0)
        self.assertEqual(self.sample("requests_in_flight", method="GET"), in_flight)
        self.assertEqual(self.sample("waiting_requests"), waiting)
        after = [self.sample("requests_total", status=n, **servlet) for n in names]
        self.assertEqual(after, [count + 1 for count in before])
        self.assertEqual(self.sample("request_seconds_count", **servlet), timed + 2)

    def test_unknown_methods_and_paths_share_one_label(self) -> None:
        """All unknown methods and paths share one label each, so clients cannot add
        series."""
        host = MemoryHost()
        unknown = {"servlet": "none", "method": "other", "status": "404"}
        before = self.sample("requests_total", **unknown)
        for number in range(3):
            host.send(f"BREW{number}", f"/{number}", token=None)
        self.assertEqual(self.sample("requests_total", **unknown), before + 3)

"""The servlets as Twisted resources."""

from unittest import mock

from prometheus_client import REGISTRY
from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.resource import Resource
from twisted.web.server import Site

from synapse_roomkeys import RoomKeysVersionServlet, register_servlets
from synapse_roomkeys.clock import as_it_is
from synapse_roomkeys.rest import JsonResource
from synapse_roomkeys.types import Limits, Requester

from ..contract import Client
from ..memory import MemoryHost, read_answer

VERSION = "/_matrix/client/v3/room_keys/version"


class MountTests(SynchronousTestCase):
    """Where the servlets can be put."""

    def test_any_site_can_have_them_as_a_child(self) -> None:
        """The root resource answers for its paths below any other resource."""
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
        """One servlet alone answers for its paths, and for no others."""
        host = MemoryHost()
        host.site = Site(RoomKeysVersionServlet(host.hs))
        token = host.new_user().access_token
        answer = self.successResultOf(host.request("GET", VERSION, token=token))
        self.assertEqual(answer.status, 404)
        self.assertEqual(answer.json["errcode"], "M_NOT_FOUND")
        answer = self.successResultOf(host.request("POST", VERSION, token=token))
        self.assertEqual(answer.status, 405)


class FaultTests(SynchronousTestCase):
    """What is answered when something goes wrong."""

    def test_a_defect_is_500_and_tells_nothing(self) -> None:
        """An unexpected error is logged, and the client reads no more than its code."""
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
        """An upload larger than the operator allows is refused before it is read."""
        host = MemoryHost(Limits(max_body_bytes=1000))
        client = Client(host, host.new_user())
        version = self.successResultOf(client.create_version())
        body = b'{"rooms": {}}' + b" " * 1000
        answer = self.successResultOf(client.put(f"/keys?version={version}", body))
        self.assertEqual((answer.status, answer.json["errcode"]), (413, "M_TOO_LARGE"))

    def test_a_client_that_leaves_while_its_user_is_asked_for(self) -> None:
        """Its body is gone with it, which is no defect."""
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

    def test_a_client_that_left_is_not_answered(self) -> None:
        """A connection that closes before the answer does no harm."""
        host = MemoryHost()
        user = host.new_user()
        version = self.successResultOf(Client(host, user).create_version())
        keys = f"/_matrix/client/v3/room_keys/keys?version={version}"
        for method, path in (("GET", VERSION), ("GET", keys), ("HEAD", keys)):
            turn: Deferred[None] = Deferred()
            host.handler._reads.run(user.user_id, as_it_is, turn)
            transport = host.send(method, path, token=user.access_token)
            self.assertEqual(transport.value(), b"")
            transport.loseConnection()
            with self.assertNoLogs("synapse_roomkeys", "WARNING"):
                turn.callback(None)
                host.reactor.advance(0)
            self.assertEqual(transport.value(), b"")

    def test_options_need_no_token(self) -> None:
        """A browser's preflight is answered to anyone."""
        transport = MemoryHost().send("OPTIONS", VERSION, token=None)
        answer = read_answer(transport.value(), "OPTIONS")
        self.assertEqual(answer.status, 204)
        self.assertEqual(answer.headers["access-control-allow-origin"], "*")


class MetricsTests(SynchronousTestCase):
    """What a host without measures of its own counts of each request."""

    def sample(self, name: str, **labels: str) -> float:
        """The value of a series, 0 where there is none yet."""
        return REGISTRY.get_sample_value(f"synapse_roomkeys_{name}", labels) or 0

    def test_a_request_is_in_flight_until_it_is_answered_or_dropped(self) -> None:
        """And those that wait for their user's others are counted meanwhile."""
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

    def test_what_nobody_knows_has_few_labels(self) -> None:
        """However many paths and methods clients come up with."""
        host = MemoryHost()
        unknown = {"servlet": "none", "method": "other", "status": "404"}
        before = self.sample("requests_total", **unknown)
        for number in range(3):
            host.send(f"BREW{number}", f"/{number}", token=None)
        self.assertEqual(self.sample("requests_total", **unknown), before + 3)

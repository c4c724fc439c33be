"""Tests of the service's connections, with a fake clock."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from ipaddress import ip_network
from typing import Any, cast
from unittest import mock

from prometheus_client import REGISTRY
from twisted.internet.address import IPv4Address, UNIXAddress
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import Clock as FakeReactor
from twisted.internet.testing import StringTransportWithDisconnection
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.http import Request
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET

from synapse_roomkeys.service.logs import WARNING_SECONDS
from synapse_roomkeys.service.request import MEMORY_BYTES
from synapse_roomkeys.service.site import (
    BODY_SECONDS,
    HEADERS_SECONDS,
    IDLE_SECONDS,
    LAST_CALL_SECONDS,
    LINGER_SECONDS,
    SPARE_SECONDS,
    Channel,
    ConnectionLimits,
    ServiceSite,
)

LIMIT = 100
HEALTH = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
#: Largest number of connections, and of additional connections for the status.
MOST, SPARE = 8, 6
#: Seconds for which a client may read nothing.
STALL_SECONDS = 300
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
PUT = b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"


class PendingRequests(Resource):
    """A resource that keeps its requests for the test to answer."""

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[Request] = []

    def render(self, request: Request) -> int:
        """Keep a request; `Resource` calls this method."""
        self.requests.append(request)
        return NOT_DONE_YET


class Transport(StringTransportWithDisconnection):
    """A connection of which the writing half can be closed."""

    half_closed = False

    def loseConnection(self) -> None:
        """Close the connection, as `ITransport.loseConnection` does."""
        self.disconnecting = True
        super().loseConnection()

    def loseWriteConnection(self) -> None:
        """Close the writing half, as `ITCPTransport.loseWriteConnection` does."""
        self.half_closed = True


class FullFile:
    """A file on a disk with little free space.

    Attributes:
        is_closed: whether the file is closed.
    """

    def __init__(self, room: int) -> None:
        self.is_closed = False
        self._room = room

    def write(self, data: memoryview) -> int:
        """Take as many bytes as fit, as `RawIOBase.write` does, and then raise
        ENOSPC."""
        taken = min(self._room, len(data))
        self._room -= taken
        if not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return taken

    def close(self) -> None:
        """Close the file."""
        self.is_closed = True


class SiteTests(SynchronousTestCase):
    """Tests of `ServiceSite` and `Channel`."""

    def setUp(self) -> None:
        self.reactor = FakeReactor()
        self.resource = PendingRequests()
        time = cast(IReactorTime, self.reactor)
        self.site = ServiceSite(
            self.resource, time, LIMIT, (), ConnectionLimits(MOST, SPARE, STALL_SECONDS)
        )

    def connect(self) -> tuple[Channel, Transport]:
        """Connect to the site; return the channel and the transport."""
        address = IPv4Address("TCP", "192.0.2.1", 40000)
        channel: Any = self.site.buildProtocol(address)
        transport = Transport(peerAddress=address)
        transport.protocol = channel
        channel.makeConnection(transport)
        return channel, transport

    def dribble(self, channel: Channel, transport: Transport, most: int) -> int:
        """Send a byte every ten seconds; return the seconds until the connection is
        closed."""
        for seconds in range(0, 2 * most, 10):
            if not transport.connected:
                return seconds
            channel.dataReceived(b"x")
            self.reactor.pump([1] * 10)
        raise AssertionError("it lasts")

    def answer(self) -> None:
        """Answer the last request."""
        request = self.resource.requests.pop()
        request.write(b"done")
        request.finish()

    def test_headers_have_a_timeout(self) -> None:
        """The headers must arrive within a minute, however steadily their bytes
        arrive."""
        for start in (b"", b"G", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nA: "):
            channel, transport = self.connect()
            if start:
                channel.dataReceived(start)
            lasted = self.dribble(channel, transport, HEADERS_SECONDS)
            self.assertEqual(lasted, HEADERS_SECONDS)

    def test_a_body_has_a_timeout(self) -> None:
        """The body must arrive within five minutes after the headers."""
        channel, transport = self.connect()
        channel.dataReceived(PUT % LIMIT)
        lasted = self.dribble(channel, transport, BODY_SECONDS)
        self.assertEqual(lasted, BODY_SECONDS)
        self.assertEqual(self.resource.requests, [])

    def test_an_answer_has_no_timeout(self) -> None:
        """An answer has no timeout, and the next request on the connection has its full
        timeouts."""
        channel, transport = self.connect()
        for _ in range(3):
            channel.dataReceived(PUT[:10])
            self.reactor.advance(HEADERS_SECONDS - 1)
            channel.dataReceived(PUT[10:] % 4)
            for _ in range(4):
                self.reactor.advance(BODY_SECONDS / 4 - 1)
                channel.dataReceived(b"x")
            self.reactor.advance(10 * BODY_SECONDS)
            self.answer()
            self.reactor.advance(IDLE_SECONDS - 1)
            self.assertTrue(transport.connected)
        self.reactor.advance(1)
        self.assertFalse(transport.connected)

    def test_a_pipelined_request_has_its_full_timeout(self) -> None:
        """The timeout of a pipelined request begins after the answer to the previous
        request, because the wait is not caused by the client."""
        channel, transport = self.connect()
        channel.dataReceived(GET + GET[:10])
        self.reactor.advance(10 * HEADERS_SECONDS)
        self.answer()
        self.reactor.advance(HEADERS_SECONDS - 1)
        self.assertTrue(transport.connected)
        channel.dataReceived(GET[10:])
        self.answer()
        self.assertEqual(transport.value().count(b"200 OK"), 2)

    def test_a_pipelined_request_waits_until_answers_are_read(self) -> None:
        """While the transport's buffer is full, the next request isn't begun. If the
        client reads, the requests are answered in order; if it reads nothing, the
        connection is dropped after the stall timeout. Each answer has one access
        line."""
        channel, transport = self.connect()
        with self.assertLogs("synapse_roomkeys.access") as logged:
            channel.dataReceived(GET * 3)
            channel.pauseProducing()
            self.answer()
            self.reactor.pump([STALL_SECONDS / 20] * 19)
            self.assertEqual(self.resource.requests, [])
            channel.resumeProducing()
            self.answer()
            self.assertEqual(len(self.resource.requests), 1)
            channel.pauseProducing()
            self.answer()
            self.reactor.pump([STALL_SECONDS / 20] * 19)
            self.assertTrue(transport.connected)
            self.reactor.pump([STALL_SECONDS / 20] * 2)
            self.assertFalse(transport.connected)
        self.assertEqual(len(logged.output), 3)
        self.assertNotIn("broken off", "".join(logged.output))
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_the_rest_of_a_refused_body_is_discarded(self) -> None:
        """After a body is refused, the rest of the body is discarded for
        `LINGER_SECONDS`, so that the client can read the answer."""
        channel, transport = self.connect()
        channel.dataReceived(PUT % (LIMIT + 1))
        self.assertIn(b"413 Request Entity Too Large", transport.value())
        self.assertIn(b"M_TOO_LARGE", transport.value())
        self.assertTrue(transport.half_closed)
        channel.dataReceived(b"x" * 1_000_000)
        self.assertEqual(channel._dataBuffer, [])
        self.reactor.advance(LINGER_SECONDS - 1)
        self.assertTrue(transport.connected)
        self.reactor.advance(1)
        self.assertFalse(transport.connected)
        self.assertEqual(self.site.channels, set())

    def test_a_chunked_body_over_the_limit_is_refused(self) -> None:
        """A body of unknown length is refused as soon as its size exceeds the limit."""
        channel, transport = self.connect()
        channel.dataReceived(
            b"PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        channel.dataReceived(b"64\r\n" + b"x" * LIMIT + b"\r\n")
        self.assertEqual(transport.value(), b"")
        channel.dataReceived(b"1\r\nx\r\n")
        self.assertEqual(transport.value().count(b"M_TOO_LARGE"), 1)
        channel.dataReceived(b"0\r\n\r\n" + GET)
        self.assertEqual(transport.value().count(b"HTTP/1.1"), 1)
        self.assertEqual(self.resource.requests, [])

    def test_a_form_body_is_not_parsed(self) -> None:
        """A form body is left to the servlets, and only the query has parameters."""
        channel, _ = self.connect()
        channel.dataReceived(
            b"POST /?a=1 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n"
            b"Content-Type: application/x-www-form-urlencoded\r\n\r\nb=2"
        )
        (request,) = self.resource.requests
        self.assertEqual(request.args, {b"a": [b"1"]})

    def test_a_request_has_the_address_of_its_client(self) -> None:
        """A request's address is the client's, as trusted proxies state it."""
        unix, near = UNIXAddress("/s"), IPv4Address("TCP", "192.0.2.1", 40000)
        self.site.trusted_proxies = (ip_network("192.0.2.1"),)
        for peer, header, host in (
            (near, b"", "192.0.2.1"),
            (near, b"X-Forwarded-For: 2001:db8::1\r\n", "2001:db8::1"),
            (unix, b"X-Forwarded-For: 203.0.113.9\r\n", "203.0.113.9"),
        ):
            channel: Any = self.site.buildProtocol(peer)
            transport = Transport(peerAddress=peer)
            transport.protocol = channel
            channel.makeConnection(transport)
            channel.dataReceived(GET[:-2] + header + b"\r\n")
            address: Any = self.resource.requests.pop().getClientAddress()
            self.assertEqual(address.host, host)
        channel = self.site.buildProtocol(unix)
        channel.makeConnection(Transport(peerAddress=unix))
        channel.dataReceived(GET)
        self.assertEqual(self.resource.requests.pop().getClientAddress(), unix)

    def test_a_header_may_be_any_bytes(self) -> None:
        """A request with a header of any bytes is answered, also from a trusted
        proxy."""
        self.site.trusted_proxies = (ip_network("192.0.2.0/24"),)
        for name in (b"X-Forwarded-For", b"X-Request-ID", b"Authorization", b"Cookie"):
            for value in (b"\xff", b"\xed\xa0\x80", b"\x01\x1b[31m", b"", b"%" * 999):
                channel, transport = self.connect()
                line = b"\r\n%s: %s\r\n\r\n" % (name, value)
                channel.dataReceived(GET.replace(b"\r\n\r\n", line))
                self.answer()
                self.assertIn(b" 200 OK\r\n", transport.value(), (name, value))
                channel.drop()

    def test_a_very_long_content_length_is_400(self) -> None:
        """A Content-Length of more digits than Python parses is a bad request."""
        channel, transport = self.connect()
        channel.dataReceived(PUT.replace(b"%d", b"5" * 5000) + GET)
        self.assertEqual(transport.value(), b"HTTP/1.1 400 Bad Request\r\n\r\n")
        self.assertFalse(transport.connected)

    def test_an_unexpected_error_is_answered_and_logged(self) -> None:
        """An unexpected error in the resource is a 500 in JSON, and in the channel a
        400; both are logged."""
        channel, transport = self.connect()
        with (
            mock.patch.object(self.resource, "render", side_effect=ZeroDivisionError),
            self.assertLogs("synapse_roomkeys", "ERROR"),
        ):
            channel.dataReceived(GET)
        self.assertIn(b" 500 Internal Server Error\r\n", transport.value())
        self.assertIn(b'"M_UNKNOWN"', transport.value())
        channel, transport = self.connect()
        with (
            mock.patch.object(Channel, "checkPersistence", side_effect=KeyError),
            self.assertLogs("synapse_roomkeys", "ERROR"),
        ):
            channel.dataReceived(GET)
        self.assertEqual(transport.value(), b"HTTP/1.1 400 Bad Request\r\n\r\n")
        self.assertFalse(transport.connected)

    def refuse_body(self, file: Callable[..., Any], sent: bytes) -> Transport:
        """Send an upload with this function to create its temporary file, check the
        503, and return the transport."""
        self.site.max_body_bytes = 10 * MEMORY_BYTES
        channel, transport = self.connect()
        with mock.patch.object(tempfile, "TemporaryFile", file):
            channel.dataReceived(sent)
        self.assertIn(b" 503 Service Unavailable\r\n", transport.value())
        self.assertIn(b"\r\nRetry-After: 10\r\n", transport.value())
        self.assertIn(b"\r\nContent-Type: application/json\r\n", transport.value())
        self.assertTrue(transport.half_closed)
        channel.dataReceived(b"x" * 10 * MEMORY_BYTES)
        self.reactor.advance(LINGER_SECONDS)
        self.assertFalse(transport.connected)
        self.assertEqual(self.resource.requests, [])
        return transport

    def test_a_body_without_disk_space_is_503(self) -> None:
        """A body is answered 503 if its temporary file cannot be created or is full."""
        large = PUT % MEMORY_BYTES
        chunked = b"PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        files: list[FullFile] = []

        def full(buffering: int) -> FullFile:
            files.append(FullFile(3))
            return files[-1]

        no_file = mock.Mock(side_effect=OSError(errno.EMFILE, "Too many open files"))
        with self.assertLogs("synapse_roomkeys", "WARNING") as logged:
            for head in (large, chunked):
                self.refuse_body(no_file, head)
            for head in (large + b"12345", chunked + b"5\r\n12345"):
                self.refuse_body(full, head)
        self.assertEqual([file.is_closed for file in files], [True, True])
        (line,) = logged.output
        self.assertIn("Too many open files", line)

    def test_a_small_body_needs_no_file(self) -> None:
        """A small body is kept in memory, without a temporary file."""
        self.site.max_body_bytes = MEMORY_BYTES
        channel, _ = self.connect()
        with mock.patch.object(tempfile, "TemporaryFile", side_effect=OSError):
            channel.dataReceived(PUT % (MEMORY_BYTES - 1) + bytes(MEMORY_BYTES - 1))
        (request,) = self.resource.requests
        content: Any = request.content
        self.assertEqual(content.read(), bytes(MEMORY_BYTES - 1))

    def fill(self) -> None:
        """Open the largest number of connections."""
        for _ in range(MOST):
            self.connect()

    def test_a_connection_over_the_limit_is_503(self) -> None:
        """A connection over the limit is answered 503 and closed, or serves a request
        for the status; a connection below the limit is served."""
        self.fill()
        channel, transport = self.connect()
        channel.dataReceived(PUT % LIMIT)
        self.assertIn(b" 503 Service Unavailable\r\n", transport.value())
        self.assertIn(b"\r\nRetry-After: 5\r\n", transport.value())
        self.assertIn(b"\r\nConnection: close\r\n", transport.value())
        self.assertTrue(transport.half_closed)
        channel, transport = self.connect()
        channel.dataReceived(HEALTH)
        self.answer()
        self.assertIn(b" 200 OK\r\n", transport.value())
        self.assertFalse(transport.connected)
        next(iter(self.site.channels - self.site._spares.keys())).drop()
        channel, transport = self.connect()
        channel.dataReceived(GET)
        self.answer()
        self.assertIn(b" 200 OK\r\n", transport.value())
        self.assertTrue(transport.connected)

    def test_a_flood_of_connections_leaves_the_status_reachable(self) -> None:
        """During a flood of connections the status stays reachable, and the log has a
        single line."""
        self.fill()
        counter = "synapse_roomkeys_refused_connections_total"
        before = REGISTRY.get_sample_value(counter) or 0
        with self.assertLogs("synapse_roomkeys", "WARNING") as logged:
            flood = [self.connect()[1] for _ in range(100)]
        self.assertEqual(len(logged.output), 1)
        self.assertEqual(REGISTRY.get_sample_value(counter), before + 100)
        left = [transport for transport in flood if transport.connected]
        self.assertEqual(left, flood[-SPARE // 2 :])
        channel, transport = self.connect()
        channel.dataReceived(HEALTH)
        for _ in range(100):
            self.connect()
        self.answer()
        self.assertIn(b" 200 OK\r\n", transport.value())
        self.reactor.advance(SPARE_SECONDS)
        self.assertEqual(len(self.site.channels), MOST)
        self.reactor.advance(WARNING_SECONDS)
        with self.assertLogs("synapse_roomkeys", "WARNING") as logged:
            self.connect()
        self.assertIn("200 times more since", logged.output[0])

    def test_connections_over_the_spare_ones_are_closed(self) -> None:
        """A connection over the spare connections is closed without a byte while the
        connections before are being closed."""
        self.fill()
        with mock.patch.object(Transport, "abortConnection"):
            for _ in range(SPARE):
                self.connect()
            address = IPv4Address("TCP", "192.0.2.1", 40000)
            self.assertIsNone(self.site.buildProtocol(address))

    def test_a_drain_fires_after_the_last_connection(self) -> None:
        """`drain` closes idle connections after `LAST_CALL_SECONDS`, and fires when the
        last connection is closed."""
        idle = self.connect()[1]
        busy, transport = self.connect()
        busy.dataReceived(GET)
        drained = self.site.drain()
        self.reactor.advance(LAST_CALL_SECONDS)
        self.assertFalse(idle.connected)
        self.assertNoResult(drained)
        self.answer()
        self.assertFalse(transport.connected)
        self.assertIn(b"Connection: close", transport.value())
        self.assertIsNone(self.successResultOf(drained))

    def test_a_drain_without_connections_fires_immediately(self) -> None:
        """`drain` fires immediately if there are no connections."""
        self.assertIsNone(self.successResultOf(self.site.drain()))

    def test_a_request_during_a_drain_is_503(self) -> None:
        """A request during a drain is a 503, except a request for the status, which is
        answered."""
        for path, status in ((b"/a", b"503 "), (b"/health", b"200 ")):
            self.site.draining = False
            channel, transport = self.connect()
            drained = self.site.drain()
            channel.dataReceived(GET.replace(b"/ ", path + b" "))
            if path == b"/health":
                self.answer()
            self.assertTrue(transport.value().startswith(b"HTTP/1.1 " + status))
            self.assertIn(b"Connection: close", transport.value())
            self.assertFalse(transport.connected)
            self.successResultOf(drained)

"""The service's connections, on a clock of the tests' own."""

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

from synapse_roomkeys.service.logs import RARE_SECONDS
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
#: How many connections there may be, and how many more to ask for the status.
MOST, SPARE = 8, 6
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
PUT = b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"


class Resources(Resource):
    """Keeps its requests, for the tests to answer."""

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[Request] = []

    def render(self, request: Request) -> int:
        self.requests.append(request)
        return NOT_DONE_YET


class Transport(StringTransportWithDisconnection):
    """A connection of which one direction can be closed."""

    half_closed = False

    def loseConnection(self) -> None:
        """As `ITransport.loseConnection`."""
        self.disconnecting = True
        super().loseConnection()

    def loseWriteConnection(self) -> None:
        """As `ITCPTransport.loseWriteConnection`."""
        self.half_closed = True


class FullFile:
    """A file on a disk that takes some bytes still."""

    def __init__(self, room: int) -> None:
        self.is_closed = False
        self._room = room

    def write(self, data: memoryview) -> int:
        """As `RawIOBase.write`: take a part, then nothing."""
        taken = min(self._room, len(data))
        self._room -= taken
        if not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return taken

    def close(self) -> None:
        """As `RawIOBase.close`."""
        self.is_closed = True


class SiteTests(SynchronousTestCase):
    """`ServiceSite` and `Channel`."""

    def setUp(self) -> None:
        self.reactor = FakeReactor()
        self.resource = Resources()
        time = cast(IReactorTime, self.reactor)
        self.site = ServiceSite(
            self.resource, time, LIMIT, (), ConnectionLimits(MOST, SPARE)
        )

    def connect(self) -> tuple[Channel, Transport]:
        """A connection to the site."""
        address = IPv4Address("TCP", "192.0.2.1", 40000)
        channel: Any = self.site.buildProtocol(address)
        transport = Transport(peerAddress=address)
        transport.protocol = channel
        channel.makeConnection(transport)
        return channel, transport

    def dribble(self, channel: Channel, transport: Transport, most: int) -> int:
        """Send a byte every ten seconds; for how many the connection lasts."""
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

    def test_headers_may_take_a_minute(self) -> None:
        """However steadily they come."""
        for start in (b"", b"G", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nA: "):
            channel, transport = self.connect()
            if start:
                channel.dataReceived(start)
            lasted = self.dribble(channel, transport, HEADERS_SECONDS)
            self.assertEqual(lasted, HEADERS_SECONDS)

    def test_a_body_may_take_five(self) -> None:
        """It counts from the end of the headers."""
        channel, transport = self.connect()
        channel.dataReceived(PUT % LIMIT)
        lasted = self.dribble(channel, transport, BODY_SECONDS)
        self.assertEqual(lasted, BODY_SECONDS)
        self.assertEqual(self.resource.requests, [])

    def test_an_answer_may_take_its_time(self) -> None:
        """And the next request has all of its own."""
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

    def test_a_request_that_came_early_has_no_less_time(self) -> None:
        """It waited for the one before it, through no fault of its own."""
        channel, transport = self.connect()
        channel.dataReceived(GET + GET[:10])
        self.reactor.advance(10 * HEADERS_SECONDS)
        self.answer()
        self.reactor.advance(HEADERS_SECONDS - 1)
        self.assertTrue(transport.connected)
        channel.dataReceived(GET[10:])
        self.answer()
        self.assertEqual(transport.value().count(b"200 OK"), 2)

    def test_a_refused_client_is_heard_out(self) -> None:
        """For a while: the rest of its body goes nowhere."""
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

    def test_a_body_of_unknown_length_is_cut_off(self) -> None:
        """As soon as it is over the limit."""
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

    def test_a_form_is_not_taken_apart(self) -> None:
        """A body is the servlets' to read, and the query alone has parameters."""
        channel, _ = self.connect()
        channel.dataReceived(
            b"POST /?a=1 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n"
            b"Content-Type: application/x-www-form-urlencoded\r\n\r\nb=2"
        )
        (request,) = self.resource.requests
        self.assertEqual(request.args, {b"a": [b"1"]})

    def test_the_clients_address(self) -> None:
        """A request has the address of its client, as trusted proxies tell it."""
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
        """Also of a trusted proxy: each request is answered."""
        self.site.trusted_proxies = (ip_network("192.0.2.0/24"),)
        for name in (b"X-Forwarded-For", b"X-Request-ID", b"Authorization", b"Cookie"):
            for value in (b"\xff", b"\xed\xa0\x80", b"\x01\x1b[31m", b"", b"%" * 999):
                channel, transport = self.connect()
                line = b"\r\n%s: %s\r\n\r\n" % (name, value)
                channel.dataReceived(GET.replace(b"\r\n\r\n", line))
                self.answer()
                self.assertIn(b" 200 OK\r\n", transport.value(), (name, value))
                channel.drop()

    def test_a_length_of_very_many_digits(self) -> None:
        """Python doesn't read it as a number; it is a bad request all the same."""
        channel, transport = self.connect()
        channel.dataReceived(PUT.replace(b"%d", b"5" * 5000) + GET)
        self.assertEqual(transport.value(), b"HTTP/1.1 400 Bad Request\r\n\r\n")
        self.assertFalse(transport.connected)

    def test_a_defect_is_answered(self) -> None:
        """In JSON, wherever it is; the log has it."""
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
        """Send an upload whose temporary file is this; the connection's other end."""
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

    def test_a_body_that_has_no_room(self) -> None:
        """It is answered 503, whether the file can't be made, or gets no further."""
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
        """It is kept in memory."""
        self.site.max_body_bytes = MEMORY_BYTES
        channel, _ = self.connect()
        with mock.patch.object(tempfile, "TemporaryFile", side_effect=OSError):
            channel.dataReceived(PUT % (MEMORY_BYTES - 1) + bytes(MEMORY_BYTES - 1))
        (request,) = self.resource.requests
        content: Any = request.content
        self.assertEqual(content.read(), bytes(MEMORY_BYTES - 1))

    def fill(self) -> None:
        """Open as many connections as there may be."""
        for _ in range(MOST):
            self.connect()

    def test_too_many_connections(self) -> None:
        """One more is answered 503 and closed, or told the status; one less isn't."""
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

    def test_a_flood_of_connections(self) -> None:
        """It keeps nobody from the status, and is one line in the log."""
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
        self.reactor.advance(RARE_SECONDS)
        with self.assertLogs("synapse_roomkeys", "WARNING") as logged:
            self.connect()
        self.assertIn("200 times more since", logged.output[0])

    def test_more_than_the_spare_connections(self) -> None:
        """They are closed at once while the ones before are being closed."""
        self.fill()
        with mock.patch.object(Transport, "abortConnection"):
            for _ in range(SPARE):
                self.connect()
            address = IPv4Address("TCP", "192.0.2.1", 40000)
            self.assertIsNone(self.site.buildProtocol(address))

    def test_the_end(self) -> None:
        """It fires when the last connection is closed, idle ones a little later."""
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

    def test_the_end_with_nobody_there(self) -> None:
        """It is reached at once."""
        self.assertIsNone(self.successResultOf(self.site.drain()))

    def test_what_comes_after_the_end_began(self) -> None:
        """It is told to come again; the status is answered."""
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

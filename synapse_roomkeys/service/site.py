"""The HTTP server: limits of size, time and number, and an orderly end."""

import logging
from collections.abc import Sequence
from typing import Any, cast

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress, IDelayedCall, IReactorTime
from twisted.python.failure import Failure
from twisted.web.http import HTTPChannel
from twisted.web.resource import Resource
from twisted.web.server import Site

from .. import metrics
from ..errors import BUSY_RETRY_AFTER, RoomKeysError, TooLargeError, UnavailableError
from .checks import Network
from .logs import RareLine
from .request import BodyRefusedError, ServiceRequest

logger = logging.getLogger(__name__)

#: How long a connection may be silent, in seconds: more than the 60 for which proxies
#: keep one by default, so that it is the proxy that closes it, between two requests.
IDLE_SECONDS = 90
#: How long a request's headers may take. They are at most 16 KiB: a slower client does
#: it on purpose.
HEADERS_SECONDS = 60
#: How long a request's body may take. A real upload of some 100 KiB takes a minute on
#: the slowest of mobile networks (2 KiB/s); one at the limit of 10 MiB, at 35 KiB/s.
BODY_SECONDS = 300
#: For how long the rest of a refused body is read and thrown away, in seconds. Closing
#: at once would reset the connection, and the client might never see its 413.
LINGER_SECONDS = 5
#: For how long idle connections are kept after the end has begun, in seconds: a request
#: that is on its way is answered 503 instead of being lost.
LAST_CALL_SECONDS = 1
#: Time for a connection over the bound to send its one request, in seconds. A health
#: check sends it at once.
SPARE_SECONDS = 5


class Channel(HTTPChannel):
    """A connection.

    Attributes:
        site: what it came to.
        is_spare: whether it is over the site's bound. It gets one request, which is
            refused unless it is for the status.
        is_dropped: whether `drop` was called.
    """

    site: "ServiceSite"
    is_spare = False
    is_dropped = False
    _arrival: IDelayedCall | None = None
    _refusing = False

    def connectionMade(self) -> None:
        """As `Protocol.connectionMade`."""
        self.site.channels.add(self)
        super().connectionMade()  # type: ignore[no-untyped-call]
        if self.is_spare:
            self._expect(SPARE_SECONDS)

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        """As `Protocol.connectionLost`."""
        self._expect(None)
        super().connectionLost(reason)  # type: ignore[no-untyped-call]
        self.site.forget(self)

    def dataReceived(self, data: bytes) -> None:
        """As `Protocol.dataReceived`."""
        if self._arrival is None and not self._handlingRequest:
            self._expect(HEADERS_SECONDS)
        # An older Twisted does it at whole lines only.
        self.resetTimeout()  # type: ignore[no-untyped-call]
        try:
            super().dataReceived(data)  # type: ignore[no-untyped-call]
        except Exception:
            # The reactor would close the connection without an answer.
            logger.error("Failed to read a request", exc_info=True)
            self._respondToBadRequestAndDisconnect()  # type: ignore[no-untyped-call]

    def headerReceived(self, line: bytes) -> bool:
        """As `HTTPChannel.headerReceived`."""
        try:
            is_good: bool = super().headerReceived(line)  # type: ignore[no-untyped-call]
        except ValueError:
            # `int` refuses a Content-Length of over 4,300 digits.
            self._respondToBadRequestAndDisconnect()  # type: ignore[no-untyped-call]
            return False
        return is_good

    def rawDataReceived(self, data: bytes) -> None:
        """As `LineReceiver.rawDataReceived`."""
        if self._refusing:
            return
        try:
            super().rawDataReceived(data)
        except BodyRefusedError as refusal:
            self._refuse(refusal.answer)
            self.allContentReceived()

    def allHeadersReceived(self) -> None:
        """As `HTTPChannel.allHeadersReceived`."""
        self._expect(BODY_SECONDS)
        if self.site.draining or self.is_spare:
            self._refuse(UnavailableError(BUSY_RETRY_AFTER))
        elif self.length is not None and self.length > self.site.max_body_bytes:
            self._refuse(TooLargeError(self.site.too_large))
        try:
            super().allHeadersReceived()  # type: ignore[no-untyped-call]
        except BodyRefusedError as refusal:
            self._refuse(refusal.answer)

    def allContentReceived(self) -> None:
        """As `HTTPChannel.allContentReceived`."""
        self._expect(None)
        super().allContentReceived()  # type: ignore[no-untyped-call]

    def checkPersistence(self, request: Any, version: bytes) -> bool:
        """As `HTTPChannel.checkPersistence`."""
        kept: bool = super().checkPersistence(request, version)  # type: ignore[no-untyped-call]
        is_last = self.site.draining or self.is_spare
        return kept and self.persistent != 0 and not is_last

    def loseConnection(self) -> None:
        """As `HTTPChannel.loseConnection`; a client that is still sending is heard
        out for some seconds."""
        if not self._refusing:
            super().loseConnection()  # type: ignore[no-untyped-call]
            return
        transport: Any = self.transport
        transport.unregisterProducer()
        transport.loseWriteConnection()
        self._expect(LINGER_SECONDS)

    def last_request(self) -> None:
        """Have the connection closed after the request under way, if there is one."""
        if self.requests:
            self.persistent = 0

    def close_if_idle(self) -> None:
        """Close the connection unless a request is under way."""
        if not self.requests:
            self.loseConnection()

    def is_answering(self) -> bool:
        """Whether a request has come and isn't answered yet."""
        return self._handlingRequest and bool(self.requests)

    def drop(self) -> None:
        """Close the connection at once, whatever is under way."""
        transport: Any = self.transport
        self.is_dropped = True
        transport.abortConnection()

    def _refuse(self, error: RoomKeysError) -> None:
        """Answer a request at once with an error, as if it had no body."""
        request: ServiceRequest = self.requests[-1]
        request.error = error
        request.requestHeaders.removeHeader(b"Expect")
        self._refusing = self.length != 0
        self.persistent = 0
        self._transferDecoder = None
        self.length = 0

    def _expect(self, seconds: float | None) -> None:
        """Drop the connection after some seconds, unless something else is expected
        by then, or nothing."""
        if self._arrival is not None and self._arrival.active():
            self._arrival.cancel()
        self._arrival = None
        if seconds is not None:
            self._arrival = self.site.reactor.callLater(seconds, self.drop)


class ServiceSite(Site):
    """All the connections to some listeners.

    A connection over the bound is a spare one: its first request is answered if it is
    for the status, else refused with 503, and it is closed. A spare connection without
    a request is dropped after `SPARE_SECONDS`, or earlier for newer ones.

    Attributes:
        draining: whether the end has begun.
        channels: the connections that there are.
        too_large: what is said of a body that is over the limit.
        no_room: the log line about bodies that have no room.
    """

    protocol = Channel  # type: ignore[assignment]

    def __init__(
        self,
        resource: Resource,
        reactor: IReactorTime,
        max_body_bytes: int,
        trusted_proxies: Sequence[Network],
        max_connections: int,
        spare_connections: int,
    ) -> None:
        """
        Args:
            max_connections: the bound.
            spare_connections: how many spare connections may be open. Beyond half of
                them, each new one has the oldest dropped. The other half is needed as
                the reactor accepts a whole backlog before it closes any.
        """
        super().__init__(  # type: ignore[no-untyped-call]
            resource, ServiceRequest, timeout=IDLE_SECONDS, reactor=reactor
        )
        self.max_body_bytes = max_body_bytes
        self.too_large = f"The body is over {max_body_bytes} bytes"
        self.trusted_proxies = trusted_proxies
        self.draining = False
        self.channels: set[Channel] = set()
        self.no_room = RareLine(logger, reactor.seconds)
        self._max_connections = max_connections
        self._spare_connections = spare_connections
        #: Connections over the bound, the oldest first.
        self._spares: dict[Channel, None] = {}
        self._refused = RareLine(logger, reactor.seconds)
        self._drained: Deferred[None] | None = None

    def buildProtocol(  # type: ignore[override]
        self, addr: IAddress | None
    ) -> Channel | None:
        """As `Site.buildProtocol`. None, which closes the connection, if all spare
        ones are taken."""
        if len(self.channels) - len(self._spares) < self._max_connections:
            return self._build_channel(addr)
        metrics.refused_connections.inc()
        self._refused.warn(
            "%d connections are open, as many as the limit of open files allows"
            " (LimitNOFILE, ulimit -n): further ones are refused. This one is from %s",
            *(len(self.channels), getattr(addr, "host", "a unix socket")),
        )
        if len(self._spares) == self._spare_connections:
            return None
        if len(self._spares) >= self._spare_connections // 2:
            self._drop_oldest_spare()
        channel = self._build_channel(addr)
        channel.is_spare = True
        self._spares[channel] = None
        return channel

    def log(self, request: Any) -> None:
        """As `Site.log`, to the logger."""
        request.log()

    def forget(self, channel: Channel) -> None:
        """Note that a connection is gone."""
        self.channels.discard(channel)
        self._spares.pop(channel, None)
        self._see_if_drained()

    def drain(self) -> "Deferred[None]":
        """Answer no more requests but those under way; fires when all connections
        are closed."""
        self.draining = True
        self._drained = drained = Deferred[None]()
        for channel in list(self.channels):
            channel.last_request()
        self.reactor.callLater(LAST_CALL_SECONDS, self._close_idle)
        self._see_if_drained()
        return drained

    def abort(self) -> None:
        """Break the connections that are left."""
        for channel in list(self.channels):
            channel.drop()

    def _build_channel(self, addr: IAddress | None) -> Channel:
        channel: Any = super().buildProtocol(addr)  # type: ignore[no-untyped-call]
        return cast(Channel, channel)

    def _drop_oldest_spare(self) -> None:
        """Drop the spare connection that has waited longest without a request."""
        for channel in self._spares:
            if not channel.is_dropped and not channel.is_answering():
                channel.drop()
                break

    def _close_idle(self) -> None:
        for channel in list(self.channels):
            channel.close_if_idle()

    def _see_if_drained(self) -> None:
        if self._drained is not None and not self.channels:
            drained, self._drained = self._drained, None
            drained.callback(None)

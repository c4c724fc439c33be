"""The HTTP server: limits of size, time and number, and a graceful stop."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress, IDelayedCall, IReactorTime
from twisted.python.failure import Failure
from twisted.web.http import HTTPChannel
from twisted.web.resource import Resource
from twisted.web.server import Site

from .. import metrics
from ..errors import BUSY_RETRY_AFTER, RoomKeysError, TooLargeError, UnavailableError
from ..rest.streaming import StallWatch, limit_unsent
from .forwarded import Network
from .logs import RateLimitedWarning
from .request import BodyRefusedError, ServiceRequest

logger = logging.getLogger(__name__)

#: Idle timeout of a connection in seconds. Proxies close an idle connection after 60
#: seconds by default. The longer timeout lets the proxy close first: otherwise a proxy
#: could send a request on a connection that the service closes at that moment.
IDLE_SECONDS = 90
#: Timeout of a request's headers in seconds. Headers have at most 16 KiB, so a slower
#: client is slow on purpose.
HEADERS_SECONDS = 60
#: Timeout of a request's body in seconds. A real upload of some 100 KiB takes a minute
#: on the slowest mobile networks (2 KiB/s). An upload at the limit of 10 MiB needs
#: 35 KiB/s.
BODY_SECONDS = 300
#: Seconds for which the rest of a refused body is read and discarded. An immediate
#: close would reset the connection, and the client could lose the 413.
LINGER_SECONDS = 5
#: Seconds for which idle connections stay open during a stop: a request that was
#: already sent is answered 503 and isn't lost.
LAST_CALL_SECONDS = 1
#: Seconds in which a spare connection must send its request. A health check sends the
#: request immediately.
SPARE_SECONDS = 5


class Channel(HTTPChannel):
    """A connection of a client, with timeouts for each phase of a request.

    Attributes:
        site: the site whose limits hold for the connection.
        is_spare: whether the connection is over the site's limit. A spare connection is
            closed after one request, which is refused unless its path is one of
            `STATUS_PATHS`.
        is_dropped: whether `drop` was called.
    """

    site: "ServiceSite"
    is_spare = False
    is_dropped = False
    #: Timeout of the current phase.
    _phase_timeout: IDelayedCall | None = None
    #: Whether a request was refused before its body was received.
    _refusing = False
    #: A request that is done, and whose answer fills the transport's buffer.
    _unsent: ServiceRequest | None = None
    #: Set while the connection waits for its client to read.
    _stall: StallWatch | None = None

    def connectionMade(self) -> None:
        """As `Protocol.connectionMade`."""
        self.site.channels.add(self)
        limit_unsent(self)
        super().connectionMade()  # type: ignore[no-untyped-call]
        if self.is_spare:
            self._set_phase_timeout(SPARE_SECONDS)

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        """As `Protocol.connectionLost`."""
        self._set_phase_timeout(None)
        if self._unsent is not None:
            # The request is done already.
            self.requests.remove(self._unsent)
            self._unsent = None
        super().connectionLost(reason)  # type: ignore[no-untyped-call]
        self.site.forget(self)

    def dataReceived(self, data: bytes) -> None:
        """As `Protocol.dataReceived`."""
        if self._phase_timeout is None and not self._handlingRequest:
            self._set_phase_timeout(HEADERS_SECONDS)
        # Older versions of Twisted reset the timeout only after a complete line.
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
        # During an answer, Twisted buffers what the client sends. While the client
        # doesn't read the answer, Twisted never stops reading.
        if self._handlingRequest and self._waitingForTransport:
            buffered = sum(map(len, self._dataBuffer))
            if buffered > self._optimisticEagerReadSize:
                producer: Any = self._networkProducer
                producer.pauseProducing()

    def allHeadersReceived(self) -> None:
        """As `HTTPChannel.allHeadersReceived`."""
        self._set_phase_timeout(BODY_SECONDS)
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
        self._set_phase_timeout(None)
        super().allContentReceived()  # type: ignore[no-untyped-call]

    def checkPersistence(self, request: Any, version: bytes) -> bool:
        """As `HTTPChannel.checkPersistence`."""
        is_persistent: bool = super().checkPersistence(request, version)  # type: ignore[no-untyped-call]
        is_last = self.site.draining or self.is_spare
        return is_persistent and self.persistent != 0 and not is_last

    def requestDone(self, request: Any) -> None:
        """As `HTTPChannel.requestDone`. If the transport's buffer is full (64 KiB), the
        connection's next request isn't begun until the client has read the buffered
        answers. If the client reads nothing, drop the connection."""
        if self._waitingForTransport:
            self._unsent = request
            self._await_reading()
        else:
            super().requestDone(request)  # type: ignore[no-untyped-call]

    def resumeProducing(self) -> None:
        """As `HTTPChannel.resumeProducing`. The transport's buffer is empty."""
        super().resumeProducing()  # type: ignore[no-untyped-call]
        request, self._unsent = self._unsent, None
        if request is not None:
            self._set_phase_timeout(None)
            super().requestDone(request)  # type: ignore[no-untyped-call]

    def loseConnection(self) -> None:
        """As `HTTPChannel.loseConnection`. If the client doesn't read the buffered
        answers, drop the connection. After a refusal, read and discard the rest of the
        body for `LINGER_SECONDS`, so that the client can read the response."""
        if not self._refusing:
            self._await_reading()
            super().loseConnection()  # type: ignore[no-untyped-call]
            return
        transport: Any = self.transport
        transport.unregisterProducer()
        transport.loseWriteConnection()
        self._set_phase_timeout(LINGER_SECONDS)

    def last_request(self) -> None:
        """Close the connection after the request under way, if there is one."""
        if self.requests:
            self.persistent = 0

    def close_if_idle(self) -> None:
        """Close the connection unless a request is under way."""
        if not self.requests:
            self.loseConnection()

    def is_answering(self) -> bool:
        """Whether a complete request was received and isn't answered yet."""
        return self._handlingRequest and bool(self.requests)

    def drop(self) -> None:
        """Reset the connection. A request under way isn't answered."""
        transport: Any = self.transport
        self.is_dropped = True
        transport.abortConnection()

    def _refuse(self, error: RoomKeysError) -> None:
        """Answer a request with an error before its body is received."""
        request: ServiceRequest = self.requests[-1]
        request.error = error
        request.requestHeaders.removeHeader(b"Expect")
        self._refusing = self.length != 0
        self.persistent = 0
        self._transferDecoder = None
        self.length = 0

    def _await_reading(self) -> None:
        """Drop the connection as soon as the client has read nothing for the site's
        stall timeout."""
        site = self.site
        self._stall = StallWatch(site.reactor.seconds, site.stall_seconds)
        self._set_phase_timeout(self._stall.interval, self._check_reading)

    def _check_reading(self) -> None:
        assert self._stall is not None
        left = self._stall.seconds_left(self)
        if left <= 0:
            self.drop()
        else:
            seconds = min(left, self._stall.interval)
            self._set_phase_timeout(seconds, self._check_reading)

    def _set_phase_timeout(
        self, seconds: float | None, call: Callable[[], None] | None = None
    ) -> None:
        """Replace the timeout of the connection's phase.

        Args:
            seconds: the new timeout, or None for none.
            call: called after the timeout; by default `drop`.
        """
        if self._phase_timeout is not None and self._phase_timeout.active():
            self._phase_timeout.cancel()
        self._phase_timeout = None
        if seconds is not None:
            self._phase_timeout = self.site.reactor.callLater(
                seconds, call or self.drop
            )


@attrs.frozen
class ConnectionLimits:
    """Limits of the open connections of a site.

    Attributes:
        regular: limit of the connections without the spare connections.
        spare: limit of the spare connections. If half of them are open, each new spare
            connection replaces the oldest. The other half is a reserve: the reactor
            accepts a whole backlog before it closes any connection.
        stall_seconds: seconds for which a client may read nothing before its connection
            is dropped.
    """

    regular: int
    spare: int
    stall_seconds: float


class ServiceSite(Site):
    """The HTTP server of some listeners, with a limit of connections.

    A connection over the limit is a spare connection. Its first request is answered if
    the path is one of `STATUS_PATHS`, and is refused with 503 otherwise. The connection
    is then closed. A spare connection without a request is dropped after
    `SPARE_SECONDS`, or earlier to make room for newer spare connections.

    Attributes:
        draining: whether a stop has begun.
        channels: the open connections.
        too_large: text of the error for a body over the limit.
        disk_warning: log line about bodies that can't be stored.
        stall_seconds: as in `ConnectionLimits`.
    """

    protocol = Channel  # type: ignore[assignment]

    def __init__(
        self,
        resource: Resource,
        reactor: IReactorTime,
        max_body_bytes: int,
        trusted_proxies: Sequence[Network],
        connections: ConnectionLimits,
    ) -> None:
        """
        Args:
            max_body_bytes: limit of a body.
            trusted_proxies: networks of the proxies whose headers are believed.
            connections: limits of the open connections.
        """
        super().__init__(  # type: ignore[no-untyped-call]
            resource, ServiceRequest, timeout=IDLE_SECONDS, reactor=reactor
        )
        self.max_body_bytes = max_body_bytes
        self.too_large = f"The body is over {max_body_bytes} bytes"
        self.trusted_proxies = trusted_proxies
        self.draining = False
        self.channels: set[Channel] = set()
        self.disk_warning = RateLimitedWarning(logger, reactor.seconds)
        self.stall_seconds = connections.stall_seconds
        self._limits = connections
        #: Spare connections, the oldest first.
        self._spares: dict[Channel, None] = {}
        self._refused = RateLimitedWarning(logger, reactor.seconds)
        self._drained: Deferred[None] | None = None

    def buildProtocol(  # type: ignore[override]
        self, addr: IAddress | None
    ) -> Channel | None:
        """As `Site.buildProtocol`. Return None, which closes the connection, if all
        spare connections are in use."""
        if len(self.channels) - len(self._spares) < self._limits.regular:
            return self._build_channel(addr)
        metrics.refused_connections.inc()
        self._refused.warn(
            "%d connections are open, as many as the limit of open files allows"
            " (LimitNOFILE, ulimit -n): further connections are refused. The newest is"
            " from %s",
            len(self.channels),
            getattr(addr, "host", "a unix socket"),
        )
        if len(self._spares) == self._limits.spare:
            return None
        if len(self._spares) >= self._limits.spare // 2:
            self._drop_oldest_spare()
        channel = self._build_channel(addr)
        channel.is_spare = True
        self._spares[channel] = None
        return channel

    def log(self, request: Any) -> None:
        """As `Site.log`, with the access line of the request."""
        request.log()

    def forget(self, channel: Channel) -> None:
        """Remove a closed connection."""
        self.channels.discard(channel)
        self._spares.pop(channel, None)
        self._fire_if_drained()

    def drain(self) -> "Deferred[None]":
        """Begin a stop: finish the requests under way, and answer new requests 503.

        Fire with None when all connections are closed.
        """
        self.draining = True
        self._drained = drained = Deferred[None]()
        for channel in list(self.channels):
            channel.last_request()
        self.reactor.callLater(LAST_CALL_SECONDS, self._close_idle)
        self._fire_if_drained()
        return drained

    def abort(self) -> None:
        """Drop all open connections."""
        for channel in list(self.channels):
            channel.drop()

    def _build_channel(self, addr: IAddress | None) -> Channel:
        channel: Any = super().buildProtocol(addr)  # type: ignore[no-untyped-call]
        return cast(Channel, channel)

    def _drop_oldest_spare(self) -> None:
        """Drop the oldest spare connection that isn't answering a request."""
        for channel in self._spares:
            if not channel.is_dropped and not channel.is_answering():
                channel.drop()
                break

    def _close_idle(self) -> None:
        for channel in list(self.channels):
            channel.close_if_idle()

    def _fire_if_drained(self) -> None:
        """Fire the Deferred of `drain` if the last connection is closed."""
        if self._drained is not None and not self.channels:
            drained, self._drained = self._drained, None
            drained.callback(None)

"""Requests that have an id, a client and a line in the access log."""

import logging
import time
from contextvars import copy_context
from typing import Any

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.interfaces import IAddress
from twisted.python.failure import Failure
from twisted.web.server import Request

from ..errors import RoomKeysError
from ..rest.resource import note_refusal, respond_error
from .logs import request_id
from .peers import UNIX, choose_request_id, client_address, is_trusted

access_logger = logging.getLogger("synapse_roomkeys.access")

#: What is asked every few seconds, and logged at DEBUG; it is answered to the end.
STATUS_PATHS = (b"/health", b"/ready", b"/metrics")
#: Characters of a path that are logged: a session's has about 150.
MAX_PATH = 1000


class BodyTooLarge(Exception):
    """The body of a request without a Content-Length is over the limit."""


class ServiceRequest(Request):
    """A request, from when its first line has come.

    Attributes:
        error: what it is answered, whatever it asks for, if anything.
        request_id: names it in the log.
        user_id: who sent it, once that is known.
    """

    site: Any

    def __init__(self, channel: Any, *args: Any) -> None:
        super().__init__(channel, *args)  # type: ignore[no-untyped-call]
        self.error: RoomKeysError | None = None
        self.request_id: str | None = None
        self.user_id: str | None = None
        self._client = ""
        self._started = 0.0
        self._received = 0
        self._limit = channel.site.max_body_bytes

    def handleContentChunk(self, data: bytes) -> None:
        """As `twisted.web.http.Request.handleContentChunk`.

        Raises:
            BodyTooLarge: this is more than the limit.
        """
        self._received += len(data)
        if self._received > self._limit:
            raise BodyTooLarge
        super().handleContentChunk(data)  # type: ignore[no-untyped-call]

    def requestReceived(self, command: bytes, path: bytes, version: bytes) -> None:
        """As `twisted.web.http.Request.requestReceived`."""
        # It would take a form apart, for which we have no use and others may have.
        self.requestHeaders.removeHeader(b"Content-Type")
        super().requestReceived(command, path, version)  # type: ignore[no-untyped-call]

    def process(self) -> None:
        """As `twisted.web.http.Request.process`, in a context that knows its id."""
        channel: Any = self.channel
        proxies = channel.site.trusted_proxies
        forwarded = self.requestHeaders.getRawHeaders("X-Forwarded-For") or []
        believed = is_trusted(self.client, proxies)
        sent = self.getHeader("X-Request-ID") if believed else None
        self._started = time.monotonic()
        self._client = client_address(self.client, forwarded, proxies)
        self.request_id = choose_request_id(sent)
        self.responseHeaders.setRawHeaders("X-Request-ID", [self.request_id])
        copy_context().run(self._process)

    def getClientAddress(self) -> IAddress:
        """As `twisted.web.http.Request.getClientAddress`: the client's address, which
        isn't a trusted proxy's. Its port isn't known. Through a unix socket without
        X-Forwarded-For, it is that of the socket."""
        if self._client == UNIX:
            peer: IAddress = self.client
            return peer
        kind = IPv6Address if ":" in self._client else IPv4Address
        return kind("TCP", self._client, 0)

    def write(self, data: bytes) -> None:
        """As `twisted.web.server.Request.write`; a connection's last answer says so."""
        if not self.startedWriting and not self.channel.persistent:
            self.responseHeaders.setRawHeaders("Connection", ["close"])
        super().write(data)  # type: ignore[no-untyped-call]

    def connectionLost(self, reason: Failure) -> None:
        """As `twisted.web.http.Request.connectionLost`."""
        super().connectionLost(reason)  # type: ignore[no-untyped-call]
        if self.request_id is not None:
            self.log(" (broken off)")

    def log(self, remark: str = "") -> None:
        """Log what became of the request, but its query, which may hold a token."""
        path = self.path.decode("latin-1")
        # It may be the connection's end that is at work, not the request's code.
        token = request_id.set(self.request_id)
        access_logger.log(
            logging.DEBUG if self.path in STATUS_PATHS else logging.INFO,
            "%s %s %s %d %d bytes %.3f s %s%s",
            self._client,
            self.method.decode("latin-1"),
            path if len(path) <= MAX_PATH else path[:MAX_PATH] + "...",
            self.code,
            self.sentLength,
            time.monotonic() - self._started,
            self.user_id or "-",
            remark,
        )
        request_id.reset(token)

    def _process(self) -> None:
        request_id.set(self.request_id)
        if self.error is not None and self.path not in STATUS_PATHS:
            note_refusal(self, self.error)
            respond_error(self, self.error)
        else:
            super().process()  # type: ignore[no-untyped-call]

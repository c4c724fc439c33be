"""Requests that have an id, a client and a line in the access log."""

import logging
import tempfile
import time
from contextvars import copy_context
from io import BytesIO
from typing import Any

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.interfaces import IAddress
from twisted.python.failure import Failure
from twisted.web.server import Request

from ..errors import OUTAGE_RETRY_AFTER, RoomKeysError, TooLargeError, UnavailableError
from ..rest.resource import note_refusal, notes_of, respond_defect, respond_error
from .forwarded import UNIX, choose_request_id, client_address, is_trusted
from .logs import request_id

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("synapse_roomkeys.access")

#: Paths that monitoring asks for every few seconds. Their access lines are at DEBUG,
#: and they are answered also while the service stops or has too many connections.
STATUS_PATHS = (b"/health", b"/ready", b"/metrics")
#: Characters of a path that are logged: a session's has about 150.
MAX_PATH = 1000
#: Bodies of a known length below this number of bytes stay in memory, all others go to
#: a temporary file. Twisted has the same bound. A client's 100 keys have some 90 KB.
MEMORY_BYTES = 100_000


class BodyRefusedError(Exception):
    """Reading of a body stops here.

    Attributes:
        answer: the error to answer the request with.
    """

    def __init__(self, answer: RoomKeysError) -> None:
        super().__init__(answer)
        self.answer = answer


class ServiceRequest(Request):
    """A request, from when its first line has come.

    Attributes:
        error: what it is answered, whatever it asks for, if anything.
        request_id: names it in the log.
    """

    site: Any
    channel: Any

    def __init__(self, channel: Any, *args: Any) -> None:
        super().__init__(channel, *args)  # type: ignore[no-untyped-call]
        self.error: RoomKeysError | None = None
        self.request_id: str | None = None
        self._client = ""
        self._started = 0.0
        self._received = 0

    def gotLength(self, length: int | None) -> None:
        """As `twisted.web.http.Request.gotLength`.

        Raises:
            BodyRefusedError: a temporary file can't be made.
        """
        self.content = BytesIO()
        if length is None or length >= MEMORY_BYTES:
            try:
                # An unbuffered file has nothing to write when it is closed, so close
                # can't fail on a full disk.
                self.content = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
            except OSError as error:
                raise self._no_room(error) from None

    def handleContentChunk(self, data: bytes) -> None:
        """As `twisted.web.http.Request.handleContentChunk`.

        Raises:
            BodyRefusedError: the body is over the limit, or can't be written.
        """
        self._received += len(data)
        channel = self.channel
        if self._received > channel.site.max_body_bytes:
            raise BodyRefusedError(TooLargeError(channel.site.too_large))
        content: Any = self.content
        rest = memoryview(data)
        try:
            # Unbuffered writes may be short, as on a disk that is almost full.
            while rest:
                rest = rest[content.write(rest) :]
        except OSError as error:
            content.close()
            self.content = BytesIO()
            raise self._no_room(error) from None

    def requestReceived(self, command: bytes, path: bytes, version: bytes) -> None:
        """As `twisted.web.http.Request.requestReceived`."""
        # It would take a form apart, for which we have no use and others may have.
        self.requestHeaders.removeHeader(b"Content-Type")
        super().requestReceived(command, path, version)  # type: ignore[no-untyped-call]

    def process(self) -> None:
        """As `twisted.web.http.Request.process`, in a context that knows its id."""
        channel = self.channel
        proxies = channel.site.trusted_proxies
        forwarded = self.requestHeaders.getRawHeaders(b"X-Forwarded-For") or []
        believed = is_trusted(self.client, proxies)
        sent: Any = self.getHeader(b"X-Request-ID") if believed else None
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

    def processingFailed(self, reason: Failure) -> Failure:
        """As `twisted.web.server.Request.processingFailed`, in JSON."""
        if self.startedWriting:
            logger.error("Failed to answer a request", exc_info=reason.value)
            self.channel.drop()
        else:
            respond_defect(self, reason.value)
        return reason

    def write(self, data: bytes) -> None:
        """As `twisted.web.server.Request.write`; a connection's last answer says so."""
        if not self.startedWriting and not self.channel.persistent:
            self.responseHeaders.setRawHeaders("Connection", ["close"])
        super().write(data)  # type: ignore[no-untyped-call]

    def connectionLost(self, reason: Failure) -> None:
        """As `twisted.web.http.Request.connectionLost`."""
        super().connectionLost(reason)  # type: ignore[no-untyped-call]
        if self.request_id is not None:
            self.log(is_broken_off=True)

    def log(self, is_broken_off: bool = False) -> None:
        """Log what became of the request, but its query, which may hold a token."""
        path = self.path.decode("latin-1")
        notes = notes_of(self)
        fields = {
            "client": self._client,
            "method": self.method.decode("latin-1"),
            "path": path if len(path) <= MAX_PATH else path[:MAX_PATH] + "...",
            "status": self.code,
            "bytes": self.sentLength,
            "seconds": round(time.monotonic() - self._started, 3),
            **notes,
        }
        details = [f" {name}={notes[name]}" for name in notes if name != "user"]
        if is_broken_off:
            fields["broken_off"] = True
            details.append(" (broken off)")
        # It may be the connection's end that is at work, not the request's code.
        token = request_id.set(self.request_id)
        access_logger.log(
            logging.DEBUG if self.path in STATUS_PATHS else logging.INFO,
            "%(client)s %(method)s %(path)s %(status)d %(bytes)d bytes %(seconds).3f s"
            " %(user)s%(details)s",
            {"user": "-", **fields, "details": "".join(details)},
            extra={"fields": fields},
        )
        request_id.reset(token)

    def _process(self) -> None:
        request_id.set(self.request_id)
        if self.error is not None and self.path not in STATUS_PATHS:
            note_refusal(self, self.error)
            respond_error(self, self.error)
        else:
            super().process()  # type: ignore[no-untyped-call]

    def _no_room(self, error: OSError) -> BodyRefusedError:
        """Log that a body has no room, at most once a minute; returns the refusal."""
        channel = self.channel
        channel.site.no_room.warn(
            "No room for the body of an upload in %s: %s. Uploads of %d bytes or more"
            " are answered 503 until there is some",
            *(tempfile.tempdir or "any directory", error.strerror, MEMORY_BYTES),
        )
        return BodyRefusedError(UnavailableError(OUTAGE_RETRY_AFTER))

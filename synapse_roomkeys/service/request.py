"""Requests of the service: bodies in files, request ids, and the access log."""

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

#: Paths that monitoring requests every few seconds. Their access lines are at DEBUG.
#: Requests for these paths are answered also while the service stops or has too many
#: connections.
STATUS_PATHS = (b"/health", b"/ready", b"/metrics")
#: Limit of a path in the log, in characters. A session's path has about 150.
MAX_PATH = 1000
#: Limit in bytes of a body in memory. Longer bodies and bodies of unknown length are
#: written to a temporary file. Twisted has the same limit. A client uploads 100 keys at
#: once, some 90 KB.
MEMORY_BYTES = 100_000


class BodyRefusedError(Exception):
    """The body of a request isn't read further.

    Attributes:
        answer: the error that the request is answered with.
    """

    def __init__(self, answer: RoomKeysError) -> None:
        super().__init__(answer)
        self.answer = answer


class ServiceRequest(Request):
    """A request whose first line was received.

    Attributes:
        error: an error that the request is answered with, whatever its path and method,
            or None. Requests for `STATUS_PATHS` are answered without this error.
        request_id: id of the request in log lines and in the response's X-Request-ID.
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
            BodyRefusedError: a temporary file can't be created.
        """
        self.content = BytesIO()
        if length is None or length >= MEMORY_BYTES:
            try:
                # Closing an unbuffered file writes nothing, and can't fail on a full
                # disk.
                self.content = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
            except OSError as error:
                raise self._refuse_unstored_body(error) from None

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
            # An unbuffered write may be short, such as on a disk that is almost full.
            while rest:
                rest = rest[content.write(rest) :]
        except OSError as error:
            content.close()
            self.content = BytesIO()
            raise self._refuse_unstored_body(error) from None

    def requestReceived(self, command: bytes, path: bytes, version: bytes) -> None:
        """As `twisted.web.http.Request.requestReceived`."""
        # With this header Twisted would parse a form. No endpoint takes forms, and an
        # attacker could use the parser.
        self.requestHeaders.removeHeader(b"Content-Type")
        super().requestReceived(command, path, version)  # type: ignore[no-untyped-call]

    def process(self) -> None:
        """As `twisted.web.http.Request.process`, in a context with the request's id."""
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
        """As `twisted.web.http.Request.getClientAddress`: the address that
        `client_address` finds, with port 0 because the port is unknown. Without an
        address, return the address of the unix socket."""
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
        """As `twisted.web.server.Request.write`, with ``Connection: close`` in the last
        response of a connection."""
        if not self.startedWriting and not self.channel.persistent:
            self.responseHeaders.setRawHeaders("Connection", ["close"])
        super().write(data)  # type: ignore[no-untyped-call]

    def connectionLost(self, reason: Failure) -> None:
        """As `twisted.web.http.Request.connectionLost`."""
        super().connectionLost(reason)  # type: ignore[no-untyped-call]
        if self.request_id is not None:
            self.log(is_broken_off=True)

    def log(self, is_broken_off: bool = False) -> None:
        """Write the access line, without the query, which may have a token."""
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
        # The caller may be the end of the connection, outside of the request's context.
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

    def _refuse_unstored_body(self, error: OSError) -> BodyRefusedError:
        """Log at most once a minute that a body can't be stored. Return the refusal."""
        channel = self.channel
        channel.site.disk_warning.warn(
            "No room for the body of an upload in %s: %s. Uploads of %d bytes or more"
            " are answered 503 until the directory has room",
            tempfile.tempdir or "any directory",
            error.strerror,
            MEMORY_BYTES,
        )
        return BodyRefusedError(UnavailableError(OUTAGE_RETRY_AFTER))

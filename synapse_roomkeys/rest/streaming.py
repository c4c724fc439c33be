"""Answers that are written as fast as they are read, and no faster."""

import logging
from collections.abc import Generator
from typing import Any

from twisted.internet.defer import Deferred, fail, inlineCallbacks, succeed
from twisted.internet.interfaces import IPushProducer
from twisted.web.http import Request
from zope.interface import implementer

from .. import metrics
from ..clock import Clock, DelayedCall
from ..errors import RoomKeysError
from ..pages import KeyPages
from ..wire import BackupEncoder

logger = logging.getLogger(__name__)


class Disconnected(Exception):
    """The connection is gone, or was dropped because nobody read from it."""


@implementer(IPushProducer)
class PacedWriter:
    """Writes to a request while its connection takes more, and waits otherwise."""

    def __init__(self, request: Request, clock: Clock, patience: float) -> None:
        """
        Args:
            patience: for how many seconds the connection may take nothing before it
                is dropped.
        """
        self._request = request
        self._clock = clock
        self._patience = patience
        self._gone = False
        self._paused = False
        self._waiting: Deferred[None] | None = None
        self._stall: DelayedCall | None = None
        if request._disconnected:
            self._gone = True
        else:
            request.notifyFinish().addErrback(lambda _: self.stopProducing())
            request.registerProducer(self, True)

    def ready(self) -> "Deferred[None]":
        """A Deferred that fires when the connection takes more.

        It fails with `Disconnected` when the connection is gone.
        """
        if self._gone:
            return fail(Disconnected("the client left"))
        if not self._paused:
            return succeed(None)
        self._waiting = Deferred()
        return self._clock.wait(self._waiting)

    def write(self, data: bytes) -> None:
        """Write, unless the connection is gone; `ready` tells when it is time."""
        if not self._gone:
            self._request.write(data)

    def finish(self) -> None:
        """End the answer."""
        if not self._gone:
            self.stopProducing()
            self._request.unregisterProducer()
            self._request.finish()

    def abort(self) -> None:
        """Break the connection, so that nobody takes what was written for a whole."""
        if not self._gone:
            self.stopProducing()
            self._request.channel.forceAbortClient()

    def pauseProducing(self) -> None:
        """The connection takes no more; the transport calls it."""
        if not self._paused and not self._gone:
            self._paused = True
            self._stall = self._clock.call_later(self._patience, self._drop)

    def resumeProducing(self) -> None:
        """The connection takes more again; the transport calls it."""
        self._paused = False
        self._forget_stall()
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.callback(None)

    def stopProducing(self) -> None:
        """The connection is gone; the transport calls it."""
        self._end("the client left")

    def _drop(self) -> None:
        self._stall = None
        self._end(f"the client read nothing for {self._patience} seconds")
        self._request.channel.forceAbortClient()

    def _end(self, reason: str) -> None:
        self._gone = True
        self._forget_stall()
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.errback(Disconnected(reason))

    def _forget_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None


@inlineCallbacks
def stream_pages(
    writer: PacedWriter, pages: KeyPages, encoder: BackupEncoder
) -> "Generator[Deferred[Any], Any, None]":
    """Write the keys of a download, page by page, or break the connection.

    The answer isn't ended before the
    last page is taken: from then on the server waits a minute for the connection's next
    request and drops it, with what a slow reader hasn't read (twisted/twisted#12498).

    Args:
        pages: the first page at hand.
    """
    try:
        while True:
            yield writer.ready()
            chunk = encoder.encode(pages.page)
            if pages.is_last:
                chunk += encoder.finish()
            writer.write(chunk)
            metrics.download_bytes.inc(len(chunk))
            del chunk
            if pages.is_last:
                break
            yield pages.advance()
        yield writer.ready()
        writer.finish()
    except Disconnected as error:
        metrics.broken_downloads.labels("client").inc()
        logger.info("Download broken off: %s", error)
    except RoomKeysError as error:
        metrics.broken_downloads.labels("server").inc()
        logger.warning("Download broken off: %s", error)
        writer.abort()
    except Exception:
        metrics.broken_downloads.labels("server").inc()
        logger.exception("Download broken off")
        writer.abort()

"""Answers that are written as fast as the client reads them, and no faster."""

import fcntl
import logging
import socket
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from twisted.internet.defer import Deferred, fail, inlineCallbacks, succeed
from twisted.internet.interfaces import IPushProducer
from twisted.python.failure import Failure
from twisted.web.http import Request
from zope.interface import implementer

from .. import metrics
from ..clock import Clock, DelayedCall
from ..errors import RoomKeysError
from ..inline import Inline
from ..pages import CONTENDED_HOLD_SECONDS, HOLD_SECONDS, KeyPages
from ..wire import BackupEncoder

logger = logging.getLogger(__name__)

#: Bytes of keys that are written at once, so a transport whose client reads nothing
#: holds no more, or one key that is larger. Twisted sends 128 KiB in one system call,
#: the frame of the chunk among them, and pauses its producer above 64 KiB. With 64 KiB
#: at once, twice as many calls made a download up to 1.15 times as long.
WRITE_SIZE = 127 << 10
#: Bytes that the kernel buffers of a connection while it can't send them. Its default
#: is 2.6 MB for a local client that reads nothing, which counts as memory of the
#: machine or container, not of the process. Twice what is written at once, as Linux
#: takes more when half of it was sent.
UNSENT_SIZE = 256 << 10
#: Part of the stall timeout after which a long pause is looked at again, so a client is
#: dropped a tenth late at most, and the seconds that pass at most: Twisted drops idle
#: connections after 60.
_LOOK_PART = 0.1
_LOOK_SECONDS = 30.0


class Disconnected(Exception):
    """The connection is gone, or was dropped because nobody read from it."""


def limit_unsent(channel: Any) -> None:
    """Have the kernel buffer at most `UNSENT_SIZE` bytes that it can't send yet.

    Only Linux and macOS have the option, and only TCP: a Unix socket's buffer is small
    by itself (208 KiB on Linux).

    Args:
        channel: Twisted's connection of a request.
    """
    with suppress(AttributeError, OSError):
        option = socket.TCP_NOTSENT_LOWAT
        channel.transport.socket.setsockopt(socket.IPPROTO_TCP, option, UNSENT_SIZE)


def unread_bytes(channel: Any) -> int | None:
    """Bytes that the kernel has taken of a connection and the client's kernel has not.

    Linux counts TCP by the byte, also below TLS, and a Unix socket by buffers of up to
    some 100 kB. Behind a proxy, the proxy is the client.

    Args:
        channel: Twisted's connection of a request.

    Returns:
        None if the connection has no socket, or not any more, or the system can't tell.
    """
    try:
        answer = fcntl.ioctl(channel.transport.fileno(), termios.TIOCOUTQ, bytes(4))
    except (AttributeError, OSError, ValueError):
        return None
    return int.from_bytes(answer, sys.byteorder)


@implementer(IPushProducer)
class PacedWriter:
    """Writes to a request while its connection takes more, and waits otherwise.

    Twisted pauses a connection when its transport's buffer is full and resumes it when
    the buffer is empty. A slow client may take longer for that than the stall timeout.
    So a pause is looked at meanwhile: if the number of bytes in the kernel's send
    buffer has changed since the last look, the client has read some.
    """

    def __init__(
        self,
        request: Request,
        clock: Clock,
        stall_timeout: float,
        on_idle: Callable[[float], object],
    ) -> None:
        """
        Args:
            stall_timeout: seconds for which the client may read nothing before the
                connection is dropped.
            on_idle: is called again and again during a pause with its length so far, in
                seconds: every 0.05 seconds (`CONTENDED_HOLD_SECONDS`) in the first one.
        """
        #: None when the connection is gone. Twisted's request refers to its producer,
        #: so both, and the transport's buffer, would wait for the garbage collector.
        self._request: Request | None = None if request._disconnected else request
        self._clock = clock
        self._stall_timeout = stall_timeout
        self._on_idle = on_idle
        self._look_seconds = min(stall_timeout * _LOOK_PART, _LOOK_SECONDS)
        self._chunks: Iterator[bytes] = iter(())
        self._waiting: Deferred[None] | None = None
        #: Reactor time at which the pause began, in seconds, or None.
        self._paused_at: float | None = None
        #: Reactor time at which the client was last seen to read.
        self._read_at = 0.0
        self._unread: int | None = None
        self._timer: DelayedCall | None = None
        if self._request is not None:
            limit_unsent(request.channel)
            request.notifyFinish().addErrback(lambda _: self.stopProducing())
            request.registerProducer(self, True)

    def write_all(self, chunks: Iterator[bytes]) -> "Deferred[None]":
        """Write one chunk after the other, each when the connection takes more.

        There is no Deferred for each chunk: a Synapse switches log contexts at each
        wait, which took a quarter of a download's processor time.

        Returns:
            A Deferred that fires with None when all were written and the connection
            takes more. It fails with `Disconnected` when the connection is gone, and
            with what the iterator raises.
        """
        self._chunks = chunks
        self._write_on()
        if self._request is None:
            return fail(Disconnected("the client left"))
        if self._paused_at is None:
            return succeed(None)
        self._waiting = Deferred()
        return self._clock.wait(self._waiting)

    def finish(self) -> None:
        """End the answer.

        From then on the server waits a minute for the connection's next request and
        drops the connection, together with what a slow client has still to read
        (twisted/twisted#12498). So the minute begins anew while the client reads.
        """
        request = self._request
        if request is None:
            return
        channel = request.channel
        self.stopProducing()
        request.unregisterProducer()
        request.finish()
        self._read_at = self._clock.seconds()
        if unread_bytes(channel) is not None:
            self._look_at_the_rest_after(HOLD_SECONDS, channel)

    def abort(self) -> None:
        """Break the connection, so that nobody takes what was written for a whole."""
        if self._request is not None:
            channel = self._request.channel
            self.stopProducing()
            channel.forceAbortClient()

    def pauseProducing(self) -> None:
        """The connection takes no more; the transport calls it."""
        if self._paused_at is None and self._request is not None:
            self._paused_at = self._read_at = self._clock.seconds()
            if self._timer is None:
                self._look_after(CONTENDED_HOLD_SECONDS)

    def resumeProducing(self) -> None:
        """The connection takes more again; the transport calls it."""
        # The timer goes on: pauses of milliseconds share one.
        self._paused_at = None
        failure: Failure | None = None
        try:
            self._write_on()
        except Exception:
            failure = Failure()
        if self._paused_at is None:
            waiting, self._waiting = self._waiting, None
            if waiting is not None:
                waiting.callback(failure)

    def stopProducing(self) -> None:
        """The connection is gone; the transport calls it."""
        self._end("the client left")

    def _write_on(self) -> None:
        """Write until the connection is paused or gone, or all chunks are written."""
        while self._paused_at is None and self._request is not None:
            chunk = next(self._chunks, None)
            if chunk is None:
                return
            self._request.write(chunk)

    def _look(self) -> None:
        """See how long the pause is, and whether the client reads meanwhile."""
        self._timer = None
        if self._paused_at is None or self._request is None:
            return
        channel = self._request.channel
        paused = self._clock.seconds() - self._paused_at
        self._on_idle(paused)
        left = self._seconds_left(channel)
        if left > 0:
            is_long = paused >= HOLD_SECONDS
            usual = self._look_seconds if is_long else CONTENDED_HOLD_SECONDS
            self._look_after(min(left, usual))
        else:
            self._end(f"the client read nothing for {self._stall_timeout} seconds")
            channel.forceAbortClient()

    def _look_after(self, seconds: float) -> None:
        self._timer = self._clock.call_later(seconds, self._look)

    def _look_at_the_rest(self, channel: Any) -> None:
        """Keep the connection after the answer's end, as long as the client reads."""
        left = self._seconds_left(channel)
        if self._unread and left > 0:
            # It does nothing while the connection's next request is being answered.
            channel.resetTimeout()
            self._look_at_the_rest_after(min(left, self._look_seconds), channel)

    def _look_at_the_rest_after(self, seconds: float, channel: Any) -> None:
        self._clock.call_later(seconds, lambda: self._look_at_the_rest(channel))

    def _seconds_left(self, channel: Any) -> float:
        """Seconds after which the connection has stalled, unless the client reads."""
        unread = unread_bytes(channel)
        now = self._clock.seconds()
        if unread != self._unread:
            self._unread = unread
            self._read_at = now
        return self._read_at + self._stall_timeout - now

    def _end(self, reason: str) -> None:
        self._request = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.errback(Disconnected(reason))


@inlineCallbacks
def stream_pages(
    writer: PacedWriter, pages: KeyPages, encoder: BackupEncoder
) -> Inline[None]:
    """Write the keys of a download, a few at a time, or break the connection.

    A download that waits for a slow client holds no page: the writer's `on_idle` has
    `pages` released. The answer isn't ended before the transport has passed its last
    keys on.

    Args:
        pages: the first page at hand.
    """
    try:
        is_complete = False
        while not is_complete:
            yield pages.advance()
            yield writer.write_all(_encoded(pages, encoder))
            is_complete = pages.is_complete
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


def _encoded(pages: KeyPages, encoder: BackupEncoder) -> Iterator[bytes]:
    """Chunks of the answer, until the keys at hand are taken or released."""
    goes_on = True
    while goes_on:
        keys = pages.take(WRITE_SIZE)
        chunk = encoder.encode(keys)
        if keys.last is None:
            chunk += encoder.finish()
            pages.release()
        metrics.download_bytes.inc(len(chunk))
        yield chunk
        goes_on = pages.has_keys

"""Responses written at the speed at which the client reads."""

import fcntl
import logging
import socket
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Protocol

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
from ..types import KeyPage

logger = logging.getLogger(__name__)

#: Bytes of keys per write. If the client reads nothing, the transport buffers no more
#: than a single write, or a single larger key. 127 KiB and the frame of the HTTP chunk
#: fit into the 128 KiB that Twisted sends per system call; Twisted pauses the producer
#: above 64 KiB. With 64 KiB per write, twice as many system calls made a download up to
#: 1.15 times as long.
WRITE_SIZE = 127 << 10
#: Bytes of a connection that the kernel buffers before sending. The kernel's default is
#: 2.6 MB for a local client that reads nothing, and counts as memory of the machine or
#: container, not of the process. The value is twice the size of a write, because Linux
#: accepts more data when half of the buffer was sent.
UNSENT_SIZE = 256 << 10
#: Interval between two checks of a long pause: a tenth (`_CHECK_PART`) of the stall
#: timeout, but at most 30 seconds (`_MAX_CHECK_SECONDS`). A stalled client is therefore
#: dropped a tenth of the timeout late at most. The maximum is below 60 seconds, after
#: which Twisted drops idle connections.
_CHECK_PART = 0.1
_MAX_CHECK_SECONDS = 30.0


class Disconnected(Exception):
    """The connection is closed, or was dropped because the client stopped reading."""


def limit_unsent(channel: Any) -> None:
    """Limit the unsent bytes in the kernel's buffer to `UNSENT_SIZE`.

    The socket option exists only on Linux and macOS, and only for TCP. A Unix socket's
    buffer is small anyway (208 KiB on Linux).

    Args:
        channel: Twisted's connection of a request.
    """
    with suppress(AttributeError, OSError):
        option = socket.TCP_NOTSENT_LOWAT
        channel.transport.socket.setsockopt(socket.IPPROTO_TCP, option, UNSENT_SIZE)


def unread_bytes(channel: Any) -> int | None:
    """Bytes of a connection that the local kernel has accepted but the client's kernel
    has not received.

    Linux counts TCP by the byte, also below TLS, and a Unix socket by buffers of up to
    about 100 kB. Behind a proxy, the proxy is the client.

    Args:
        channel: Twisted's connection of a request.

    Returns:
        None if the connection has no socket, the socket is closed, or the system has no
        such counter.
    """
    try:
        answer = fcntl.ioctl(channel.transport.fileno(), termios.TIOCOUTQ, bytes(4))
    except (AttributeError, OSError, ValueError):
        return None
    return int.from_bytes(answer, sys.byteorder)


class StallWatch:
    """The time for which a connection's client has read nothing.

    If the number of bytes in the kernel's send buffer has changed since the last check,
    the client has read some bytes.

    Attributes:
        interval: seconds between two checks.
        unread: bytes in the kernel's send buffer at the last check, or None.
    """

    def __init__(self, now: Callable[[], float], stall_timeout: float) -> None:
        """
        Args:
            now: returns the reactor's time in seconds.
            stall_timeout: seconds for which the client may read nothing.
        """
        self.interval = min(stall_timeout * _CHECK_PART, _MAX_CHECK_SECONDS)
        self.unread: int | None = None
        self._now = now
        self._stall_timeout = stall_timeout
        #: Reactor time at which the client was last seen to read.
        self._read_at = now()

    def restart(self) -> None:
        """Restart the stall timeout."""
        self._read_at = self._now()

    def seconds_left(self, channel: Any) -> float:
        """Check the connection. Return the seconds until the stall timeout if the
        client reads nothing until then."""
        unread = unread_bytes(channel)
        if unread != self.unread:
            self.unread = unread
            self.restart()
        return self._read_at + self._stall_timeout - self._now()


@implementer(IPushProducer)
class PacedWriter:
    """Producer that writes a response while the connection accepts data, and waits
    otherwise.

    Twisted pauses the producer when the transport's buffer is full, and resumes the
    producer when the buffer is empty. A slow client may need longer than the stall
    timeout to empty the buffer. A timer therefore checks during a pause whether the
    client reads.
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
            on_idle: called repeatedly during a pause with the length of the pause so
                far, in seconds. During the first second of a pause the interval is
                0.05 seconds (`CONTENDED_HOLD_SECONDS`).
        """
        #: None after the connection was closed. Twisted's request refers to the
        #: producer: with a reference back, both objects and the transport's buffer
        #: would stay in memory until the garbage collector runs.
        self._request: Request | None = None if request._disconnected else request
        self._clock = clock
        self._stall_timeout = stall_timeout
        self._on_idle = on_idle
        self._watch = StallWatch(clock.seconds, stall_timeout)
        self._chunks: Iterator[bytes] = iter(())
        self._waiting: Deferred[None] | None = None
        #: Reactor time at which the pause began, in seconds, or None.
        self._paused_at: float | None = None
        self._timer: DelayedCall | None = None
        if self._request is not None:
            limit_unsent(request.channel)
            request.notifyFinish().addErrback(lambda _: self.stopProducing())
            request.registerProducer(self, True)

    def write_all(self, chunks: Iterator[bytes]) -> "Deferred[None]":
        """Write the chunks in order, each when the connection accepts data.

        A single Deferred covers all chunks: Synapse switches log contexts at each wait,
        and a wait per chunk took a quarter of a download's CPU time.

        Returns:
            A Deferred that fires with None when all chunks were written and the
            connection accepts data again. The Deferred fails with `Disconnected` if the
            connection is closed, and with any exception of the iterator.
        """
        self._chunks = chunks
        self._write_until_paused()
        if self._request is None:
            return fail(Disconnected("the client left"))
        if self._paused_at is None:
            return succeed(None)
        self._waiting = Deferred()
        return self._clock.wait(self._waiting)

    def finish(self) -> None:
        """End the response.

        After the end, Twisted waits a minute for the connection's next request and then
        drops the connection, including data that a slow client has not yet read
        (twisted/twisted#12498). Therefore the minute restarts while the client reads.
        """
        request = self._request
        if request is None:
            return
        channel = request.channel
        self.stopProducing()
        request.unregisterProducer()
        request.finish()
        self._watch.restart()
        if unread_bytes(channel) is not None:
            self._extend_idle_timeout_after(HOLD_SECONDS, channel)

    def abort(self) -> None:
        """Drop the connection, so the client doesn't mistake the partial response for a
        complete response."""
        if self._request is not None:
            channel = self._request.channel
            self.stopProducing()
            channel.forceAbortClient()

    def pauseProducing(self) -> None:
        """Pause. Called by the transport when the transport's buffer is full."""
        if self._paused_at is None and self._request is not None:
            self._paused_at = self._clock.seconds()
            self._watch.restart()
            if self._timer is None:
                self._check_pause_after(CONTENDED_HOLD_SECONDS)

    def resumeProducing(self) -> None:
        """Continue to write. Called by the transport when the transport's buffer is
        empty."""
        # The timer keeps running: pauses of milliseconds share a timer.
        self._paused_at = None
        failure: Failure | None = None
        try:
            self._write_until_paused()
        except Exception:
            failure = Failure()
        if self._paused_at is None:
            waiting, self._waiting = self._waiting, None
            if waiting is not None:
                waiting.callback(failure)

    def stopProducing(self) -> None:
        """Stop writing. Called by the transport when the connection is closed."""
        self._end("the client left")

    def _write_until_paused(self) -> None:
        """Write until the connection is paused or closed, or all chunks are written."""
        while self._paused_at is None and self._request is not None:
            chunk = next(self._chunks, None)
            if chunk is None:
                return
            self._request.write(chunk)

    def _check_pause(self) -> None:
        """Check the pause: report the length to `on_idle`, and drop the connection if
        the client has read nothing for the stall timeout."""
        self._timer = None
        if self._paused_at is None or self._request is None:
            return
        channel = self._request.channel
        paused = self._clock.seconds() - self._paused_at
        self._on_idle(paused)
        left = self._watch.seconds_left(channel)
        if left > 0:
            is_long = paused >= HOLD_SECONDS
            interval = self._watch.interval if is_long else CONTENDED_HOLD_SECONDS
            self._check_pause_after(min(left, interval))
        else:
            self._end(f"the client read nothing for {self._stall_timeout} seconds")
            channel.forceAbortClient()

    def _check_pause_after(self, seconds: float) -> None:
        self._timer = self._clock.call_later(seconds, self._check_pause)

    def _extend_idle_timeout(self, channel: Any) -> None:
        """Restart Twisted's idle timeout after the response's end while the client
        reads."""
        left = self._watch.seconds_left(channel)
        if self._watch.unread and left > 0:
            # No effect while the connection's next request is being answered.
            channel.resetTimeout()
            self._extend_idle_timeout_after(min(left, self._watch.interval), channel)

    def _extend_idle_timeout_after(self, seconds: float, channel: Any) -> None:
        self._clock.call_later(seconds, lambda: self._extend_idle_timeout(channel))

    def _end(self, reason: str) -> None:
        self._request = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.errback(Disconnected(reason))


class Encoder(Protocol):
    """Encoder of keys in the form of an answer."""

    def encode(self, page: KeyPage) -> bytes:
        """Return the next keys."""

    def finish(self) -> bytes:
        """Return the text after the last key."""


@inlineCallbacks
def stream(writer: PacedWriter, write: "Callable[[], Deferred[None]]") -> Inline[None]:
    """Write a response in chunks, and end it. After an error, drop the connection.

    Args:
        write: writes the chunks.
    """
    try:
        yield write()
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


@inlineCallbacks
def write_pages(writer: PacedWriter, pages: KeyPages, encoder: Encoder) -> Inline[None]:
    """Write the keys of a download in chunks.

    While a download waits for a slow client, no page is in memory: the writer's
    `on_idle` releases `pages`. The Deferred fires only after the transport has passed
    the last keys to the kernel.

    Args:
        pages: the keys; the first page has been read already.
    """
    is_complete = False
    while not is_complete:
        yield pages.advance()
        yield writer.write_all(_encode(pages, encoder))
        is_complete = pages.is_complete


def _encode(pages: KeyPages, encoder: Encoder) -> Iterator[bytes]:
    """Yield chunks of the response until the keys of the current page are taken or
    released."""
    has_more = True
    while has_more:
        keys = pages.take(WRITE_SIZE)
        chunk = encoder.encode(keys)
        if keys.last is None:
            chunk += encoder.finish()
            pages.release()
        metrics.download_bytes.inc(len(chunk))
        yield chunk
        has_more = pages.has_keys

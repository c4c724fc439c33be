"""A minimal HTTP client with little overhead beside the measured servers."""

import contextlib
import socket
import time
from types import TracebackType

import attrs

HOST = "127.0.0.1"
_BUFFER_BYTES = 1 << 20
_TIMEOUT_SECONDS = 600.0
_MAX_IDLE_SECONDS = 20.0
_END_OF_HEADERS = b"\r\n\r\n"
_LAST_CHUNK = b"0\r\n\r\n"


class RequestFailed(RuntimeError):
    """A response other than 200, or a connection closed before the response ended."""


@attrs.frozen
class Response:
    """The duration of a request and the size of its response.

    Durations are in seconds from the start of sending, the size is in bytes of body.
    """

    seconds: float
    first_byte_seconds: float
    size: int


class _ResponseParser:
    """Incremental parser that finds the end of an HTTP response."""

    def __init__(self) -> None:
        """Begin before the headers."""
        self.size = 0
        self.headers = b""
        self._received = bytearray()
        self._length: int | None = None
        self._tail = b""

    def feed(self, data: memoryview) -> bool:
        """Parse received bytes, and return whether the response is complete."""
        if not self.headers:
            self._received += data
            end = self._received.find(_END_OF_HEADERS)
            if end < 0:
                return False
            self._read_headers(bytes(self._received[: end + len(_END_OF_HEADERS)]))
            data = memoryview(self._received)[end + len(_END_OF_HEADERS) :]
        self.size += len(data)
        if self._length is not None:
            return self.size >= self._length
        self._tail = (self._tail + bytes(data[-5:]))[-5:]
        return self._tail == _LAST_CHUNK

    @property
    def status(self) -> int:
        """Return the status code; the headers must have been parsed."""
        return int(self.headers.split(b" ", 2)[1])

    def _read_headers(self, headers: bytes) -> None:
        """Store the headers, and the body's length if Content-Length states it."""
        self.headers = headers
        for line in headers.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                self._length = int(line.partition(b":")[2])


class Connection:
    """A kept-alive connection to a server on this machine."""

    def __init__(self, port: int) -> None:
        """Connect to a port."""
        self._port = port
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._socket = self._connect()
        self._last_used = time.monotonic()

    def send(self, request: bytes) -> Response:
        """Send a request, time the response and discard its body."""
        return self._exchange(request, None)

    def fetch(self, request: bytes) -> bytes:
        """Send a request and return the body of the response."""
        raw = bytearray()
        self._exchange(request, raw)
        head, _, content = bytes(raw).partition(_END_OF_HEADERS)
        chunked = b"transfer-encoding: chunked" in head.lower()
        return _join_chunks(content) if chunked else content

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def __enter__(self) -> "Connection":
        """Return this connection, which is already open."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connection."""
        self.close()

    def _exchange(self, request: bytes, copy: bytearray | None) -> Response:
        """Send a request and read its response, into the copy if one is given."""
        self._reconnect_if_idle()
        parser = _ResponseParser()
        first = 0.0
        complete = False
        start = time.perf_counter()
        self._socket.sendall(request)
        while not complete:
            count = self._socket.recv_into(self._buffer)
            if count == 0:
                raise RequestFailed(
                    f"the connection closed after {parser.size} bytes of body"
                )
            complete = parser.feed(self._buffer[:count])
            if copy is not None:
                copy += self._buffer[:count]
            if not first and parser.size:
                first = time.perf_counter()
        end = time.perf_counter()
        self._last_used = time.monotonic()
        if parser.status != 200:
            text = bytes(self._buffer[: min(count, 500)]).decode(errors="replace")
            raise RequestFailed(f"{request[:200].decode()}\n{text}")
        return Response(end - start, (first or end) - start, parser.size)

    def _reconnect_if_idle(self) -> None:
        """Reconnect after a long idle time, before the server closes the connection."""
        if time.monotonic() - self._last_used > _MAX_IDLE_SECONDS:
            self._socket.close()
            self._socket = self._connect()

    def _connect(self) -> socket.socket:
        """Open a socket with a large send buffer and without Nagle's delay."""
        connection = socket.create_connection(
            (HOST, self._port), timeout=_TIMEOUT_SECONDS
        )
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        return connection


def build_request(
    method: str, target: str, token: str, content: bytes = b"", statement: str = ""
) -> bytes:
    """Build a request; the header ``Statement`` is read by the limit alone."""
    lines = [
        f"{method} {target} HTTP/1.1",
        f"Host: {HOST}",
        f"Authorization: Bearer {token}",
    ]
    if content:
        lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    if statement:
        lines.append(f"Statement: {statement}")
    return "\r\n".join([*lines, "", ""]).encode() + content


def _join_chunks(content: bytes) -> bytes:
    """Decode the body of a response with chunked transfer encoding."""
    pieces: list[bytes] = []
    position = 0
    while True:
        end = content.index(b"\r\n", position)
        size = int(content[position:end].partition(b";")[0], 16)
        if size == 0:
            return b"".join(pieces)
        pieces.append(content[end + 2 : end + 2 + size])
        position = end + 2 + size + 2

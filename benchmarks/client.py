"""A minimal HTTP client that costs next to nothing beside what it measures."""

import contextlib
import socket
import time
from types import TracebackType

import attrs

HOST = "127.0.0.1"
_BUFFER_BYTES = 1 << 20
_TIMEOUT = 600.0
_IDLE_LIMIT = 20.0
_HEADERS_END = b"\r\n\r\n"
_CHUNKS_END = b"0\r\n\r\n"


class RequestFailed(RuntimeError):
    """A server answered something else than 200."""


@attrs.frozen
class Answer:
    """What one request took, in seconds, and how much came back."""

    seconds: float
    first_byte: float
    size: int


class _Receiver:
    """Finds the end of one answer in what arrives."""

    def __init__(self) -> None:
        """Expect the headers."""
        self.size = 0
        self.headers = b""
        self._head = bytearray()
        self._length: int | None = None
        self._tail = b""

    def feed(self, data: memoryview) -> bool:
        """Take in what arrived, and tell whether the answer is complete."""
        if not self.headers:
            self._head += data
            end = self._head.find(_HEADERS_END)
            if end < 0:
                return False
            self._read_headers(bytes(self._head[: end + len(_HEADERS_END)]))
            data = memoryview(self._head)[end + len(_HEADERS_END) :]
        self.size += len(data)
        if self._length is not None:
            return self.size >= self._length
        self._tail = (self._tail + bytes(data[-5:]))[-5:]
        return self._tail == _CHUNKS_END

    @property
    def status(self) -> int:
        """Return the status code."""
        return int(self.headers.split(b" ", 2)[1])

    def _read_headers(self, headers: bytes) -> None:
        """Note how the body will end."""
        self.headers = headers
        for line in headers.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                self._length = int(line.partition(b":")[2])


class Connection:
    """One kept-alive connection to a server."""

    def __init__(self, port: int) -> None:
        """Connect to a port of this machine."""
        self._port = port
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._socket = self._connect()
        self._used = time.monotonic()

    def send(self, request: bytes) -> Answer:
        """Send a request and time the answer, whose body is thrown away."""
        return self._exchange(request, None)

    def fetch(self, request: bytes) -> bytes:
        """Send a request and return the body of the answer."""
        raw = bytearray()
        self._exchange(request, raw)
        head, _, content = bytes(raw).partition(_HEADERS_END)
        chunked = b"transfer-encoding: chunked" in head.lower()
        return _join_chunks(content) if chunked else content

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def __enter__(self) -> "Connection":
        """Use the connection, which is open already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connection."""
        self.close()

    def _exchange(self, request: bytes, copy: bytearray | None) -> Answer:
        """Send a request and take in the answer."""
        self._renew()
        receiver = _Receiver()
        first = 0.0
        complete = False
        start = time.perf_counter()
        self._socket.sendall(request)
        while not complete:
            count = self._socket.recv_into(self._buffer)
            if count == 0:
                raise RequestFailed(f"cut after {receiver.size} bytes")
            complete = receiver.feed(self._buffer[:count])
            if copy is not None:
                copy += self._buffer[:count]
            if not first and receiver.size:
                first = time.perf_counter()
        end = time.perf_counter()
        self._used = time.monotonic()
        if receiver.status != 200:
            text = bytes(self._buffer[: min(count, 500)]).decode(errors="replace")
            raise RequestFailed(f"{request[:200].decode()}\n{text}")
        return Answer(end - start, (first or end) - start, receiver.size)

    def _renew(self) -> None:
        """Connect anew if the server may be about to close an idle connection."""
        if time.monotonic() - self._used > _IDLE_LIMIT:
            self._socket.close()
            self._socket = self._connect()

    def _connect(self) -> socket.socket:
        """Open a connection that neither delays nor hoards."""
        connection = socket.create_connection((HOST, self._port), timeout=_TIMEOUT)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        return connection


def build(
    method: str, target: str, token: str, content: bytes = b"", work: str = ""
) -> bytes:
    """Write a request; the kind of work is for the site that is the limit."""
    lines = [
        f"{method} {target} HTTP/1.1",
        f"Host: {HOST}",
        f"Authorization: Bearer {token}",
    ]
    if content:
        lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    if work:
        lines.append(f"Work: {work}")
    return "\r\n".join([*lines, "", ""]).encode() + content


def _join_chunks(content: bytes) -> bytes:
    """Take the framing off a chunked body."""
    pieces: list[bytes] = []
    position = 0
    while True:
        end = content.index(b"\r\n", position)
        size = int(content[position:end].partition(b";")[0], 16)
        if size == 0:
            return b"".join(pieces)
        pieces.append(content[end + 2 : end + 2 + size])
        position = end + 2 + size + 2

"""An HTTP client on plain sockets, for valid and invalid requests."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

import attrs

from ..contract import Answer
from ..contract.base import ALGORITHM, PREFIX
from ..servers.processes import HOST

#: Default timeout of an answer, in seconds.
DEADLINE = 20.0
#: SO_LINGER value: close() resets the connection.
_RESET = struct.pack("ii", 1, 0)


def connect(port: int) -> socket.socket:
    """Open a connection to a server on this machine."""
    return socket.create_connection((HOST, port), timeout=DEADLINE)


def reset(client: socket.socket) -> None:
    """Reset a connection, as the kernel does for a crashed process."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    client.close()


def request(
    method: str, target: str, token: str | None, body: bytes = b"", *headers: str
) -> bytes:
    """Return a request's bytes; without a body there is no Content-Length header."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {HOST}", *headers]
    if token is not None:
        lines.append(f"Authorization: Bearer {token}")
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def read_reply(stream: BinaryIO, method: str = "GET") -> Answer | None:
    """Read the next answer from a connection; None if the connection has ended.

    The values of a repeated header are joined.
    """
    line = stream.readline()
    if not line:
        return None
    assert line.startswith((b"HTTP/1.1 ", b"HTTP/1.0 ")), line
    status = int(line.split()[1])
    headers = _headers(stream)
    if method == "HEAD" or status in (100, 204):
        body = b""
    elif headers.get("transfer-encoding") == "chunked":
        body = b"".join(_chunks(stream))
    elif "content-length" in headers:
        body = _exactly(stream, int(headers["content-length"]))
    else:
        body = stream.read()
    return Answer(status, headers, body)


def _headers(stream: BinaryIO) -> dict[str, str]:
    headers: dict[str, str] = {}
    while line := stream.readline().decode("latin-1").rstrip("\r\n"):
        written, _, value = line.partition(": ")
        name = written.lower()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    while size := int(stream.readline(), 16):
        yield _exactly(stream, size)
        assert stream.read(2) == b"\r\n"
    assert stream.read(2) == b"\r\n"


def _exactly(stream: BinaryIO, size: int) -> bytes:
    content = stream.read(size)
    assert len(content) == size, f"{len(content)} of {size} bytes"
    return content


@attrs.frozen
class Exchange:
    """The answers received over one connection.

    Attributes:
        is_broken: whether the server closed the connection before all bytes were sent.
    """

    replies: list[Answer]
    is_broken: bool

    @property
    def statuses(self) -> list[int]:
        """The statuses of all answers."""
        return [reply.status for reply in self.replies]


def exchange(
    port: int, *parts: bytes, wanted: int = 1000, read_timeout: float = DEADLINE
) -> Exchange:
    """Send bytes unchanged and read answers until the connection ends.

    Args:
        wanted: number of answers after which the client ends its side; later answers
            are returned too.
        read_timeout: seconds without an answer until the client closes the connection.
    """
    replies: list[Answer] = []
    with connect(port) as client, client.makefile("rb") as stream:
        try:
            for part in parts:
                client.sendall(part)
            client.settimeout(read_timeout)
            if not wanted:
                client.shutdown(socket.SHUT_WR)
            while reply := read_reply(stream):
                replies.append(reply)
                if len(replies) == wanted:
                    client.shutdown(socket.SHUT_WR)
        except TimeoutError:
            assert read_timeout < DEADLINE, f"no answer but {replies}"
        except OSError:
            return Exchange(replies, True)
    return Exchange(replies, False)


def new_version(port: int, token: str) -> str:
    """Create a backup version and return the version's number."""
    body = json.dumps({"algorithm": ALGORITHM, "auth_data": {}}).encode()
    sent = request("POST", PREFIX + "/version", token, body, "Connection: close")
    [reply] = exchange(port, sent).replies
    assert reply.status == 200, reply
    version: str = reply.json["version"]
    return version


def upload(version: str, token: str, session_data: Any, *headers: str) -> bytes:
    """Return a request to upload a key."""
    value = {
        "first_message_index": 0,
        "forwarded_count": 0,
        "is_verified": True,
        "session_data": session_data,
    }
    target = f"{PREFIX}/keys/!a:h/s?version={version}"
    return request("PUT", target, token, json.dumps(value).encode(), *headers)

"""Pipelined requests whose answers the client doesn't read, on the service."""

from __future__ import annotations

import fcntl
import json
import socket
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ..contract.base import PREFIX, key, keys_path
from ..reliability.sockets import exchange, new_version, read_reply, request
from ..servers.fake_homeserver import Homeserver
from ..servers.processes import HOST
from ..servers.service import Service

#: Stall timeout of the service in seconds: the shortest valid value.
STALL_SECONDS = 1
#: Bytes of the key that each request asks for, nearly as large as the default limit
#: allows.
KEY_BYTES = 60_000
#: Number of keys of the backup: more than the kernel buffers of a download.
KEYS = 30
#: Number of requests that a client sends at once. Twisted reads up to 64 KiB of
#: requests before the first answer.
REQUESTS = 300
CONNECTIONS = 10
#: Seconds without another byte after which a receive buffer is full.
PAUSE = 0.1
#: Number of requests whose answers fill the buffers of the kernel, but not more.
FEW_REQUESTS = 6
#: Number of answers that a slow client reads with pauses, and the pauses in all, in
#: seconds.
SLOW_REQUESTS = 30
SLOW_SECONDS = 2.5 * STALL_SECONDS
#: Bytes that a client sends without reading any answer. The buffers of the kernel take
#: some MB of them.
SENT = 64 << 20
#: Largest growth of the process in bytes. Each connection buffers two answers and some
#: 80 KB of requests. Without a bound, each connection buffered up to 18 MB.
GROWTH = CONNECTIONS * 600_000


class Pipe:
    """A connection with a small receive buffer to a service with a backup."""

    def __init__(self, service: Service, token: str, version: str) -> None:
        path = PREFIX + keys_path(version, "!a:h", "s0")
        self.get_key = request("GET", path, token)
        self.get_keys = request("GET", PREFIX + keys_path(version), token)
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.settimeout(20)
        self.socket.connect((HOST, service.port))

    def wait_until_full(self) -> None:
        """Wait until the service can't send more: the number of bytes in the receive
        buffer stays the same for `PAUSE` seconds."""
        before = 0
        while (readable := self._count_readable()) == 0 or readable != before:
            before = readable
            time.sleep(PAUSE)

    def _count_readable(self) -> int:
        """Return the number of bytes in the receive buffer."""
        count = fcntl.ioctl(self.socket, termios.FIONREAD, bytes(4))
        return int.from_bytes(count, sys.byteorder)

    def wait_until_dropped(self) -> None:
        """Wait until the service resets the connection."""
        deadline = time.monotonic() + 10 * STALL_SECONDS
        while not self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            assert time.monotonic() < deadline, "never dropped"
            time.sleep(0.02)


class Pipes:
    """Opens connections to a service."""

    def __init__(self, service: Service, token: str) -> None:
        self.service = service
        self._token = token
        self._version = new_version(service.port, token)
        key_data = {**key(), "session_data": "x" * KEY_BYTES}
        sessions = {f"s{number}": key_data for number in range(KEYS)}
        path = PREFIX + keys_path(self._version, "!a:h")
        body = json.dumps({"sessions": sessions}).encode()
        sent = request("PUT", path, token, body, "Connection: close")
        assert exchange(service.port, sent).statuses == [200]

    def open(self, stack: ExitStack) -> Pipe:
        """Open a connection. The stack closes the connection."""
        pipe = Pipe(self.service, self._token, self._version)
        stack.enter_context(pipe.socket)
        return pipe


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipes]:
    """A service that drops stalled clients after `STALL_SECONDS`."""
    directory: Path = tmp_path_factory.mktemp("pipelining")
    with Homeserver() as homeserver:
        settings = {"stalled_download_seconds": STALL_SECONDS}
        with Service(directory, homeserver.url, settings=settings) as service:
            yield Pipes(service, homeserver.new_user().access_token)


def test_unread_answers_take_bounded_memory(pipes: Pipes) -> None:
    """A connection whose client reads no answer buffers two answers, not an answer for
    each request that the client has sent, and is dropped after the stall timeout."""
    before = pipes.service.rss_bytes()
    with ExitStack() as stack:
        opened = [pipes.open(stack) for _ in range(CONNECTIONS)]
        for pipe in opened:
            pipe.socket.sendall(pipe.get_key * REQUESTS)
        largest = before
        for pipe in opened:
            pipe.wait_until_dropped()
            largest = max(largest, pipes.service.rss_bytes())
    assert largest - before < GROWTH, largest - before


def test_a_slow_reader_gets_all_answers(pipes: Pipes) -> None:
    """A client that reads steadily for longer than the stall timeout gets an answer to
    each pipelined request."""
    with ExitStack() as stack:
        pipe = pipes.open(stack)
        sent = threading.Thread(
            target=pipe.socket.sendall, args=(pipe.get_key * REQUESTS,)
        )
        sent.start()
        with pipe.socket.makefile("rb") as stream:
            for number in range(REQUESTS):
                if number < SLOW_REQUESTS:
                    time.sleep(SLOW_SECONDS / SLOW_REQUESTS)
                reply = read_reply(stream)
                assert reply is not None and reply.status == 200, reply
                assert len(reply.body) > KEY_BYTES
        sent.join()


def test_an_unread_last_answer_is_dropped(pipes: Pipes) -> None:
    """The stall timeout also holds for the last answer before the service closes a
    connection."""
    with ExitStack() as stack:
        pipe = pipes.open(stack)
        last = pipe.get_key.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
        pipe.socket.sendall(pipe.get_key * FEW_REQUESTS + last)
        pipe.wait_until_dropped()


def test_requests_during_an_unread_download_take_bounded_memory(pipes: Pipes) -> None:
    """While a client doesn't read a download, the service stops reading what the client
    sends on the same connection."""
    before = pipes.service.rss_bytes()
    with ExitStack() as stack:
        pipe = pipes.open(stack)
        pipe.socket.sendall(pipe.get_keys)
        pipe.wait_until_full()
        pipe.socket.settimeout(STALL_SECONDS / 2)
        with pytest.raises(TimeoutError):
            pipe.socket.sendall(bytes(SENT))
        assert pipes.service.rss_bytes() - before < GROWTH

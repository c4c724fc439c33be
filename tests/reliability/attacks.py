"""Attacks over raw sockets: invalid HTTP, hostile values, floods and resets.

Each attack sends its requests, checks the answers and returns the number of inputs.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Sequence
from random import Random

import attrs

from ..contract import Answer
from ..contract.base import PREFIX
from ..servers.processes import HOST
from ..servers.service import Service
from . import SOAK
from .inputs import HEADER_VALUES, HEADERS, Inputs, header_value
from .sockets import (
    connect,
    exchange,
    new_version,
    read_reply,
    request,
    reset,
    upload,
)

#: Number of random requests, and of requests pipelined over one connection.
REQUESTS = 400_000 if SOAK else 3_000
PIPELINED = 20
#: Number of requests with random changes of their bytes.
GARBLED = 100_000 if SOAK else 600
#: Number of requests with a random value of a header.
RANDOM_HEADERS = 20_000 if SOAK else 300
#: Distance of two reset positions, in bytes.
RESET_STEP = 1 if SOAK else 17
IDLE = 1000
#: Largest request, in bytes, that the server is expected to read as a whole before an
#: error closes the connection.
READ_AT_ONCE = 16_384
#: Default of `max_body_bytes`: largest body accepted by the service, in bytes.
LIMIT = 10 * 1024 * 1024
UNFINISHED = 20
#: The Host header of every request made by `sockets.request`.
HOST_LINE = f"Host: {HOST}\r\n".encode()


@attrs.frozen
class Target:
    """The service under attack, with the access tokens of two users.

    Attributes:
        bystander: token of the user whose requests must stay served.
        attacker: token of the user in whose name the attacks are sent.
    """

    service: Service
    bystander: str
    attacker: str

    def new_version(self) -> str:
        """Create a backup version for the attacker and return its number."""
        return new_version(self.port, self.attacker)

    @property
    def port(self) -> int:
        """The TCP port of the service."""
        return self.service.port


def check(port: int, parts: Sequence[bytes], statuses: Sequence[int]) -> None:
    """Send bytes and check that exactly these statuses come back, in this order.

    Every answer is checked with `check_reply`. If the server closes the connection
    while the client is still sending a long request (over READ_AT_ONCE bytes), the last
    answer may be lost.
    """
    got = exchange(port, *parts, wanted=len(statuses))
    where = f"{parts[0][:300]!r}: want {statuses}, got {got.statuses}"
    if got.is_broken and sum(map(len, parts)) > READ_AT_ONCE:
        assert got.statuses in ([*statuses], [*statuses][:-1]), where
    else:
        assert got.statuses == [*statuses], where
    for reply in got.replies:
        check_reply(reply)


def check_reply(reply: Answer) -> None:
    """Check that an answer is no server error and has no traceback.

    A body must be JSON, and has an ``errcode`` if and only if the status is 400 or
    more. An answer to invalid HTTP has no body.
    """
    shown = f"{reply.status} {reply.headers} {reply.body[:500]!r}"
    assert reply.status < 500, shown
    if reply.body:
        assert reply.headers["content-type"] == "application/json", shown
        assert ("errcode" in reply.json) == (reply.status >= 400), shown
        assert reply.status == 200 or b"Traceback" not in reply.body, shown


def wrong_lengths(target: Target) -> int:
    """Send a wrong Content-Length: too small, too large, negative, duplicate or no
    number."""
    good = upload(target.new_version(), target.attacker, "x")
    length = next(line for line in good.split(b"\r\n") if b"Length" in line)
    number = int(length.split()[1])
    name = b"Content-Length: "
    for value, statuses in (
        (b"-1", (400,)),
        (b"+5", (400,)),
        (b"", (400,)),
        (b"5, 5", (400,)),
        (b"0x10", (400,)),
        (b"1e2", (400,)),
        (b"1_0", (400,)),
        (b"\xd9\xa1", (400,)),
        (b"five", (400,)),
        (b"5" * 3000, (413,)),
        (b"5" * 5000, (400,)),
        (b"%d\r\n%s%d" % (number, name, number + 1), (400,)),
        (b"%d\r\n%s%d" % (number, name, number), (400,)),
        (b"%d\r\nTransfer-Encoding: chunked" % number, (400,)),
        (b"%d\r\nTransfer-Encoding: identity" % number, (200,)),
        (b"%d\r\nTransfer-Encoding: gzip, chunked" % number, (400,)),
        # The server parses the 5 bytes after the body as the next request: invalid.
        (b"%d" % (number - 5), (400,)),
        # The missing 5 bytes never arrive, and the service sends no answer.
        (b"%d" % (number + 5), ()),
    ):
        check(target.port, [good.replace(length, name + value)], statuses)
    return 18


def chunks(target: Target) -> int:
    """Send chunked bodies: valid, malformed, unfinished and too large."""
    head = upload(target.new_version(), target.attacker, "x").partition(b"\r\n\r\n")
    body = head[2]
    lines = [line for line in head[0].split(b"\r\n") if b"Content-Length" not in line]
    start = b"\r\n".join([*lines, b"Transfer-Encoding: chunked", b"", b""])
    right = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    bytewise = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    rows: list[tuple[tuple[bytes, ...], tuple[int, ...]]] = [
        ((right,), (200,)),
        ((bytewise,), (200,)),
        ((b"%x;ext=1\r\n%s\r\n0\r\nTrailer: x\r\n\r\n" % (len(body), body),), (200,)),
        ((b"zz\r\n",), (400,)),
        ((b"-1\r\n",), (400,)),
        ((b"+5\r\n",), (400,)),
        ((b"0x5\r\n",), (400,)),
        ((b"1_0\r\n",), (400,)),
        ((b"\r\n",), (400,)),
        ((b"5\r\nabcdefgh\r\n",), (400,)),
        ((b"f" * 17 + b"\r\nabc",), ()),
        ((b"f" * 5000 + b"\r\n",), (400,)),
        ((b"5;" + b"x" * 100_000,), (400,)),
        ((b"5\r\nab",), ()),
        ((right[:-5] + b"0\r\n" + b"a: b\r\n" * 100_000,), (400,)),
        ((*(b"10000\r\n" + bytes(65536) + b"\r\n" for _ in range(165)),), (413,)),
    ]
    for parts, statuses in rows:
        check(target.port, [start, *parts], statuses)
    return len(rows)


def pipelines(target: Target) -> int:
    """Send several requests in one packet; an invalid request ends the connection."""
    version = target.new_version()
    put = upload(version, target.attacker, "x")
    get = request("GET", f"{PREFIX}/keys?version={version}", target.attacker)
    bad = request("GET", PREFIX + "/keys", target.attacker)
    for sent, statuses in (
        (put + get + put + get, (200,) * 4),
        (bad + get + bad + get, (400, 200) * 2),
        (get * 200, (200,) * 200),
        (get + b"rubbish\r\n\r\n" + get, (200, 400)),
        (b"\r\n" + get + b"\r\n", (200,)),
    ):
        check(target.port, [sent], statuses)
    return 5


def heads(target: Target) -> int:
    """Send invalid request heads: too long, of another HTTP version, or not HTTP."""
    version = target.new_version()
    path = f"{PREFIX}/keys?version={version}"
    get = request("GET", path, target.attacker)
    lines = get.removesuffix(b"\r\n")
    body = upload(version, target.attacker, "x", "Expect: 100-continue")
    hello = bytes.fromhex("16030100b5010000b10303") + bytes(170)
    rows: list[tuple[bytes, tuple[int, ...]]] = [
        (lines + b"A: b\r\n" * 100_000 + b"\r\n", (400,)),
        (lines + b"A: " + b"b" * 1_000_000 + b"\r\n\r\n", ()),
        (lines + b"A" * 1_000_000 + b": b\r\n\r\n", ()),
        (lines + b"no colon\r\n\r\n", (400,)),
        (lines + b": no name\r\n\r\n", (400,)),
        (lines + b" folded into the token\r\n\r\n", (401,)),
        (lines + b"A b: c\r\n\r\n", (400,)),
        (lines + b"A: \0\xff\x1b[31m\r\n\r\n", (400,)),
        (b"GET " + b"/x" * 500_000 + b" HTTP/1.1\r\n\r\n", ()),
        (b"G" * 1_000_000, ()),
        (get.replace(b"GET /", b"GET http://elsewhere.example/"), (404,)),
        (get.replace(b"GET /", b"GET //a:h@b/"), (404,)),
        (get.replace(HOST_LINE, b""), (200,)),
        (get.replace(HOST_LINE, HOST_LINE + b"Host: b\r\n"), (200,)),
        (get.replace(b"HTTP/1.1", b"HTTP/1.0"), (200,)),
        (get.replace(b"HTTP/1.1", b"HTTP/0.9"), (400,)),
        (get.replace(b"HTTP/1.1", b"HTTP/2.0"), (400,)),
        (get.replace(b"HTTP/1.1", b"HTTP/1.1 x"), (400,)),
        (get.replace(b" HTTP/1.1", b""), (400,)),
        (get.replace(b"\r\n", b"\n"), ()),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(100), (400,)),
        (body, (100, 200)),
        (body.replace(b"100-continue", b"200-ok"), (200,)),
        (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", (200,)),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", (404,)),
        (b"GET ../../etc/passwd HTTP/1.1\r\nHost: a\r\n\r\n", (404,)),
        (b"GET /\0\xff%00 HTTP/1.1\r\nHost: a\r\n\r\n", (400,)),
        (
            b"GET / HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
            (404,),
        ),
        (hello, ()),
        (bytes(100_000), ()),
        (b"\r\n" * 100_000, (400,)),
    ]
    for sent, statuses in rows:
        check(target.port, [sent], statuses)
    return len(rows)


def headers(target: Target) -> int:
    """Send arbitrary bytes in headers that the service reads; every request is
    answered."""
    random = Random() if SOAK else Random(3)
    version = target.new_version()
    get = request("GET", f"{PREFIX}/keys?version={version}", target.attacker)
    rows = [(name, value) for name in HEADERS for value in HEADER_VALUES]
    rows += [
        (random.choice(HEADERS), header_value(random)) for _ in range(RANDOM_HEADERS)
    ]
    for name, value in rows:
        line = b"%s%s: %s\r\n" % (HOST_LINE, name, value)
        sent = get.replace(HOST_LINE, line)
        got = exchange(target.port, sent, wanted=1)
        assert got.replies, (name, value)
        check_reply(got.replies[0])
    return len(rows)


def resets(target: Target) -> int:
    """Reset the connection at many byte positions of two requests and of their
    answers."""
    version = target.new_version()
    sent = upload(version, target.attacker, "x" * 100)
    sent += request("GET", f"{PREFIX}/keys?version={version}", target.attacker)
    points = range(0, len(sent) + 1, RESET_STEP)
    for point in points:
        client = connect(target.port)
        client.sendall(sent[:point])
        reset(client)
    for point in points:
        client = connect(target.port)
        client.sendall(sent)
        client.recv(point + 1)
        reset(client)
    return 2 * len(points)


def random_requests(target: Target) -> int:
    """Pipeline random requests, PIPELINED in a packet, and check that each is
    answered."""
    random = Random() if SOAK else Random(1)
    for _ in range(REQUESTS // PIPELINED):
        inputs = Inputs(random, (target.new_version(), target.new_version()))
        rows = [inputs.request() for _ in range(PIPELINED)]
        with connect(target.port) as client, client.makefile("rb") as stream:
            sent = [request(*row[:2], target.attacker, row[2]) for row in rows]
            threading.Thread(target=send, args=(client, b"".join(sent))).start()
            for method, path, body in rows:
                reply = read_reply(stream, method)
                row = f"{method} {path[:300]} {body[:300]!r}"
                assert reply is not None, row
                check_reply(reply)
                if reply.status == 413:
                    break
    return REQUESTS


def send(client: socket.socket, data: bytes) -> None:
    """Send bytes; ignore an error if the server closes the connection."""
    with contextlib.suppress(OSError):
        client.sendall(data)


def garbled(target: Target) -> int:
    """Send requests with bytes changed, removed, inserted or repeated, and random
    bytes."""
    random = Random() if SOAK else Random(2)
    right = upload(target.new_version(), target.attacker, "x", "Connection: close")
    for _ in range(GARBLED):
        sent = bytearray(right if random.random() < 0.95 else random.randbytes(500))
        for _ in range(random.choice((1, 1, 2, 5, 20))):
            at = random.randrange(len(sent))
            sent[at : at + random.choice((0, 0, 1, 1, 9))] = random.choice(
                (
                    b"",
                    random.randbytes(1),
                    random.randbytes(3),
                    bytes(sent[at : at + 30]),
                    b"\r\n",
                    b"\r\n\r\n",
                    b": ",
                )
            )
        # End the headers and the body of a truncated request, to get an answer.
        end = b"\r\n\r\n" + b"x" * 400 + b"\r\n\r\n"
        got = exchange(target.port, bytes(sent) + end, read_timeout=0.2)
        for reply in got.replies:
            check_reply(reply)
    return GARBLED


def slow_clients(target: Target) -> int:
    """Keep IDLE connections open with a part of a request or none; serve another
    client."""
    whole = upload(target.new_version(), target.attacker, "x", "Connection: close")
    clients = [connect(target.port) for _ in range(IDLE)]
    for number, client in enumerate(clients[: IDLE // 2]):
        client.sendall(whole[: number % len(whole)])
    for at in range(0, len(whole), 50):
        clients[-1].sendall(whole[at : at + 50])
        time.sleep(0.02)
    with clients[-1].makefile("rb") as stream:
        reply = read_reply(stream)
        assert reply is not None and reply.status == 200, reply
    for client in clients:
        client.close()
    return IDLE


def large_bodies(target: Target) -> int:
    """Send bodies of the largest size and one byte more, with and without a valid
    token."""
    body = b'"' + b"x" * (LIMIT - 2) + b'"'
    path = f"{PREFIX}/keys?version={target.new_version()}"
    for token, status in ((target.attacker, 400), (None, 401), ("nobodys", 401)):
        check(target.port, [request("PUT", path, token, body)], [status])
        check(target.port, [request("PUT", path, token, body + b" ")], [413])
    return 6


def unfinished_bodies(target: Target) -> int:
    """Send UNFINISHED bodies without an end; the service must not hold the bodies in
    memory."""
    head = f"PUT {PREFIX}/keys?version=1 HTTP/1.1\r\nHost: a\r\n".encode()
    sized = head + b"Content-Length: %d\r\n\r\n" % LIMIT + bytes(LIMIT - 1)
    chunk = b"10000\r\n" + bytes(65536) + b"\r\n"
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * (LIMIT >> 16)
    before = target.service.rss_bytes()
    with contextlib.ExitStack() as clients:
        for sent in (sized, chunked) * (UNFINISHED // 2):
            clients.enter_context(connect(target.port)).sendall(sent)
        assert target.service.rss_bytes() - before < UNFINISHED * LIMIT // 8
    return UNFINISHED


def hostile_values(target: Target) -> int:
    """Send valid HTTP with JSON values and ids on which parsers often fail."""
    keys, version = PREFIX + "/keys/", target.new_version()
    query = f"?version={version}"
    value = '"first_message_index":%s,"forwarded_count":0,"is_verified":true'
    values: list[tuple[str, int]] = [
        ("[" * 100_000 + "]" * 100_000, 400),
        ("[" * 100_000, 400),
        ('{"":' * 100_000 + "1" + "}" * 100_000, 400),
        ('"' + "x" * 10_000_000 + '"', 413),
        ("9" * 10_000, 400),
        ("-" + "9" * 10_000, 400),
        ("0." + "1" * 10_000, 200),
        ("1e" + "9" * 10_000, 400),
        ('"\\ud800"', 400),
        ('"\\udc00\\ud800"', 400),
        ('{"\\udfff":1}', 400),
        ('"\\u0000"', 200),
        ('"\0"', 400),
        ('{"a":1,"a":2}', 200),
        ('1,"session_data":2', 200),
        ('1,"is_verified":"x"', 400),
        ("null", 400),
    ]
    rows: list[tuple[str, str, int]] = [
        ("!a:h/s", f'{{{value % 0},"session_data":{data}}}', status)
        for data, status in values
    ]
    for number in ("9" * 10_000, "-" + "9" * 10_000, "1e9999", "[" * 100_000, '"0"'):
        rows.append(("!a:h/s", f'{{{value % number},"session_data":1}}', 400))
    right = f'{{{value % 0},"session_data":1}}'
    for path, status in (
        ("%2F%2e%2e/s", 200),
        ("%2F%2e%2e/%2F%2e%2e%2F", 200),
        ("../keys/!a:h/s", 404),
        ("!a:h/%00", 400),
        ("a%00b/s", 400),
        ("%ed%a0%80/s", 400),
        ("%c0%af/s", 400),
        ("%ff/s", 400),
        ("/s", 404),
        ("x" * 256 + "/s", 400),
        ("%F0%9F%94%91" * 64 + "/s", 400),
        ("a/b/c", 404),
    ):
        rows.append((path, right, status))
    for path, body, status in rows:
        sent = request("PUT", keys + path + query, target.attacker, body.encode())
        check(target.port, [sent], [status])
    return len(rows)


ATTACKS: list[Callable[[Target], int]] = [
    wrong_lengths,
    chunks,
    pipelines,
    heads,
    headers,
    large_bodies,
    unfinished_bodies,
    hostile_values,
    resets,
    slow_clients,
    garbled,
    random_requests,
]

"""What clients may send that keep to no rule of HTTP's, and how it is answered.

Each attack sends its inputs and returns how many there were.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from random import Random

import attrs

from ..contract.base import PREFIX
from ..servers.service import Service
from . import SOAK
from .inputs import HEADER_VALUES, HEADERS, Inputs, header_value
from .sockets import (
    Reply,
    connect,
    exchange,
    new_version,
    read_reply,
    request,
    reset,
    upload,
)

#: How many requests are made at random, and how many go over one connection.
REQUESTS = 400_000 if SOAK else 3_000
PIPELINED = 20
#: How many garbled requests there are.
GARBLED = 100_000 if SOAK else 600
#: How many requests have a header made at random.
RANDOM_HEADERS = 20_000 if SOAK else 300
#: How many bytes more are sent before each of the resets.
RESET_STEP = 1 if SOAK else 17
IDLE = 1000
#: More bytes than these are not all read at once.
READ_AT_ONCE = 16_384
#: How many bytes a body may have.
LIMIT = 10 * 1024 * 1024
UNFINISHED = 20


@attrs.frozen
class Target:
    """The service, a user who knows its rules, and one who may do anything."""

    service: Service
    bystander: str
    attacker: str

    def new_version(self) -> str:
        """Make a version of the backup of the one who may do anything."""
        return new_version(self.port, self.attacker)

    @property
    def port(self) -> int:
        """Where it listens."""
        return self.service.port


def check(port: int, parts: Sequence[bytes], statuses: Sequence[int]) -> None:
    """Send bytes; these are the answers to them. Errors are in JSON, but to what is no
    HTTP. Of a client that goes on sending, the last answer may be lost."""
    got = exchange(port, *parts, wanted=len(statuses))
    where = f"{parts[0][:300]!r}: want {statuses}, got {got.statuses}"
    if got.is_broken and sum(map(len, parts)) > READ_AT_ONCE:
        assert got.statuses in ([*statuses], [*statuses][:-1]), where
    else:
        assert got.statuses == [*statuses], where
    for reply in got.replies:
        check_reply(reply)


def check_reply(reply: Reply) -> None:
    """No crash, and no traceback."""
    shown = f"{reply.status} {reply.headers} {reply.body[:500]!r}"
    assert reply.status < 500, shown
    if reply.body:
        assert reply.headers["content-type"] == "application/json", shown
        assert ("errcode" in json.loads(reply.body)) == (reply.status >= 400), shown
        assert reply.status == 200 or b"Traceback" not in reply.body, shown


def wrong_lengths(target: Target) -> int:
    """A Content-Length that is too small, negative, twice or no number at all."""
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
        # What is left over begins another request.
        (b"%d" % (number - 5), (400,)),
        # What is missing never comes.
        (b"%d" % (number + 5), ()),
    ):
        check(target.port, [good.replace(length, name + value)], statuses)
    return 18


def chunks(target: Target) -> int:
    """Chunked bodies that are right, wrong, endless or too large."""
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
    """Several requests in one packet; after one that isn't HTTP, no more."""
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
    """Heads of requests that are too long, not HTTP/1.1, or not HTTP."""
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
        (get.replace(b"Host: a\r\n", b""), (200,)),
        (get.replace(b"Host: a", b"Host: a\r\nHost: b"), (200,)),
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
    """Headers that the service reads, with values of any bytes: all are answered."""
    random = Random() if SOAK else Random(3)
    version = target.new_version()
    get = request("GET", f"{PREFIX}/keys?version={version}", target.attacker)
    rows = [(name, value) for name in HEADERS for value in HEADER_VALUES]
    rows += [
        (random.choice(HEADERS), header_value(random)) for _ in range(RANDOM_HEADERS)
    ]
    for name, value in rows:
        line = b"Host: a\r\n%s: %s\r\n" % (name, value)
        sent = get.replace(b"Host: a\r\n", line)
        got = exchange(target.port, sent, wanted=1)
        assert got.replies, (name, value)
        check_reply(got.replies[0])
    return len(rows)


def resets(target: Target) -> int:
    """A connection that is reset at any point of two requests, and of their answers."""
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
    """Requests of every kind, `PIPELINED` in a packet, each with its answer."""
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
    """Send bytes, if the other end takes them."""
    with contextlib.suppress(OSError):
        client.sendall(data)


def garbled(target: Target) -> int:
    """Requests with bytes changed, cut out, put in and doubled, and mere rubbish."""
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
        # What was cut short is made whole by this.
        end = b"\r\n\r\n" + b"x" * 400 + b"\r\n\r\n"
        got = exchange(target.port, bytes(sent) + end, read_timeout=0.2)
        for reply in got.replies:
            check_reply(reply)
    return GARBLED


def slow_clients(target: Target) -> int:
    """Clients that send a byte now and then, or nothing at all."""
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
    """Bodies at the limit and over it, from users and from nobody."""
    body = b'"' + b"x" * (LIMIT - 2) + b'"'
    path = f"{PREFIX}/keys?version={target.new_version()}"
    for token, status in ((target.attacker, 400), (None, 401), ("nobodys", 401)):
        check(target.port, [request("PUT", path, token, body)], [status])
        check(target.port, [request("PUT", path, token, body + b" ")], [413])
    return 6


def unfinished_bodies(target: Target) -> int:
    """Bodies as large as they may be whose end doesn't come: memory isn't filled."""
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
    """Values and ids that are hard on parsers, each in a request that is HTTP."""
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

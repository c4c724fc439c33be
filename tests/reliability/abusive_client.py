"""A user who abuses the service on purpose. Arguments: PORT TOKEN VERSION SECONDS
NAME...

Each NAME is a key of BEHAVIOURS. The program prints a line at the start and, at the
end, a JSON object with the numbers of answers by behaviour and status. The process has
the lowest CPU priority, because a real abuser's client runs on another machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from itertools import count, cycle

import attrs

from ..contract.base import ALGORITHM, PREFIX, keys_path, version_path
from ..servers.processes import HOST
from .paced_users import Connection
from .sockets import request

#: Numbers of concurrent connections for each behaviour.
SLOW_READERS = 50
UPLOADERS = 4
READERS = 50
#: Bytes read by a slow reader in a second, and size of the reader's receive buffer.
SLOW_READ = 1024
SLOW_BUFFER = 4096
#: Largest body and largest key accepted by the service, in bytes.
LARGEST = 10 * 1024 * 1024
LARGEST_KEY = 64 * 1024
#: Size of a body of real keys, in bytes: near the largest size without a throttling
#: pause for a long step.
UNTHROTTLED = 4 * 1024 * 1024
#: Largest invalid body, in bytes, for which the service parses a second time to explain
#: the error.
LARGEST_EXPLAINED = 256 * 1024
#: Depth of nested lists: close to the parser's limit.
NESTING = 900
#: Bytes of data in the smallest keys: with smaller ones, a body of the largest size
#: would exceed the limit of objects.
SMALL_KEY = 110
#: Placeholder of first_message_index in a body. Each upload replaces the placeholder by
#: a lower number, which makes every key better than the stored key.
INDEX = 2_000_000_000
ROOM = "!room:h"
SESSION = "000000"


@attrs.frozen
class User:
    """The abusive user and the answers to the user's requests.

    Attributes:
        version: number of a version with a large backup.
        answers: number of answers by behaviour and status.
    """

    port: int
    token: str
    version: str
    answers: Counter[str] = attrs.field(factory=Counter)

    async def send(
        self, connection: Connection, name: str, method: str, path: str, body: bytes
    ) -> int:
        """Send a request, count the answer and return its status."""
        status = await connection.send(method, path, body)
        self.answers[f"{name} {status}"] += 1
        return status

    def connection(self) -> Connection:
        """Return a new connection of the user."""
        return Connection(self.port, self.token)


async def read_slowly(user: User) -> None:
    """Download whole backups over SLOW_READERS connections at SLOW_READ bytes a
    second."""

    async def loop_forever() -> None:
        loop = asyncio.get_running_loop()
        sent = request("GET", PREFIX + keys_path(user.version), user.token)
        while True:
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_BUFFER)
                client.setblocking(False)
                await loop.sock_connect(client, (HOST, user.port))
                await loop.sock_sendall(client, sent)
                begin = await loop.sock_recv(client, SLOW_READ)
                user.answers[f"read_slowly {begin.split()[1].decode()}"] += 1
                while await loop.sock_recv(client, SLOW_READ):
                    await asyncio.sleep(1)

    await asyncio.gather(*(loop_forever() for _ in range(SLOW_READERS)))


async def read_keys(user: User) -> None:
    """Download the same key in a loop on READERS connections."""
    path = keys_path(user.version, ROOM, SESSION)

    async def loop_forever() -> None:
        connection = user.connection()
        while True:
            await user.send(connection, "read_keys", "GET", path, b"")

    await asyncio.gather(*(loop_forever() for _ in range(READERS)))


async def reset(user: User) -> None:
    """Create and delete versions in a loop."""
    connection = user.connection()
    info = json.dumps({"algorithm": ALGORITHM, "auth_data": {}}).encode()
    while True:
        if await user.send(connection, "reset", "POST", "/version", info) == 200:
            path = version_path(json.loads(connection.body)["version"])
            await user.send(connection, "reset", "DELETE", path, b"")


async def upload(user: User, name: str, bodies: Sequence[bytes]) -> None:
    """Upload the bodies in turn on UPLOADERS connections; each key beats the stored
    key."""
    indexes = count(INDEX - 1, -1)
    turns = cycle(bodies)
    path = keys_path(user.version)

    async def loop_forever() -> None:
        connection = user.connection()
        while True:
            body = next(turns).replace(b"%d" % INDEX, b"%d" % next(indexes))
            await user.send(connection, name, "PUT", path, body)

    await asyncio.gather(*(loop_forever() for _ in range(UPLOADERS)))


async def upload_keys(user: User) -> None:
    """Upload as many keys as a body may have, keys of real size, and deeply nested
    data."""
    small = keys(b'"' + b"x" * SMALL_KEY + b'"')
    bodies = [small, real_keys(), keys(nested_data()), real_keys(UNTHROTTLED)]
    await upload(user, "upload_keys", bodies)


async def upload_rubbish(user: User) -> None:
    """Upload bodies without a valid key whose parsing is slow."""
    lists = b"[" * 100 + b"]" * 100 + b","
    rooms = b",".join(b'"%d":{"sessions":{}}' % n for n in range(LARGEST // 27))
    unfinished = keys(b"0").rpartition(b",")[0]
    bodies = [
        b"[" + lists * (LARGEST // len(lists) - 1) + b"0]",
        b"[" + lists * (LARGEST_EXPLAINED // len(lists) - 1) + b"0]",
        b'{"rooms":{' + rooms + b"}}",
        b'{"rooms":{' + rooms + b',"":0}}',
        unfinished + b"}}}}",
        unfinished + b',"":{}}}}}',
    ]
    await upload(user, "upload_rubbish", bodies)


def keys(session_data: bytes, size: int = LARGEST) -> bytes:
    """Return an upload to one room, filled up to a size in bytes (the largest by
    default)."""
    member = b'"%%06d":{"first_message_index":%d,"forwarded_count":0,' % INDEX
    member += b'"is_verified":false,"session_data":' + session_data + b"},"
    body = b'{"rooms":{"%b":{"sessions":{' % ROOM.encode()
    number = (size - len(body) - 4) // len(member % 0)
    return body + b"".join(member % n for n in range(number))[:-1] + b"}}}}"


def real_keys(size: int = LARGEST) -> bytes:
    """Return an upload of this size in bytes, with keys of real size."""
    return keys(b'{"ciphertext":"' + b"x" * 900 + b'"}', size)


def nested_data() -> bytes:
    """Return the session_data with the highest CPU cost per byte."""
    nested = b"[" * NESTING + b"]" * NESTING
    return b"[" + b",".join([nested] * (LARGEST_KEY // len(nested) - 1)) + b"]"


#: Behaviours by the names of their functions.
BEHAVIOURS: dict[str, Callable[[User], Awaitable[None]]] = {
    function.__name__: function
    for function in (read_slowly, read_keys, reset, upload_keys, upload_rubbish)
}


async def main(port: str, token: str, version: str, seconds: str, *names: str) -> None:
    """Run the named behaviours at the same time for a number of seconds."""
    os.nice(19)
    user = User(int(port), token, version)
    tasks = [asyncio.ensure_future(BEHAVIOURS[name](user)) for name in names]
    # Let each behaviour build its bodies before the start is announced.
    await asyncio.sleep(0)
    print("begins", flush=True)
    done, pending = await asyncio.wait(tasks, timeout=float(seconds))
    for task in pending:
        task.cancel()
    for task in done:
        task.result()
    print(json.dumps(user.answers), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

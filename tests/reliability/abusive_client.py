"""One user who does the worst there is: PORT TOKEN VERSION SECONDS WHAT...

It prints a line when it begins, and at the end how often which answer came to what, as
JSON. It lets others have the processor first: such a user's client runs elsewhere.
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

#: How many connections there are of each kind.
SLOW_READERS = 50
UPLOADERS = 4
READERS = 50
#: How many bytes a second a slow one reads, and how many wait for it at most.
SLOW_READ = 1024
SLOW_BUFFER = 4096
#: The largest body that is taken, in bytes, and the largest key.
LARGEST = 10 * 1024 * 1024
LARGEST_KEY = 64 * 1024
#: One that is nearly as large as it may be without a pause for its largest step.
UNTHROTTLED = 4 * 1024 * 1024
#: The largest one that is read again to say what is wrong with it.
LARGEST_EXPLAINED = 256 * 1024
#: How deep lists are nested: about as deep as they may be.
NESTING = 900
#: The bytes of a key so small that more would be too many objects for a body.
SMALL_KEY = 110
#: What stands for the first_message_index in a body; it is followed by lower ones.
INDEX = 2_000_000_000
ROOM = "!room:h"
SESSION = "000000"


@attrs.frozen
class User:
    """The user, and what came back.

    Attributes:
        version: of a large backup.
        answers: how often each has come, by what they answer.
    """

    port: int
    token: str
    version: str
    answers: Counter[str] = attrs.field(factory=Counter)

    async def send(
        self, connection: Connection, name: str, method: str, path: str, body: bytes
    ) -> int:
        """Send a request and count the answer; its status."""
        status = await connection.send(method, path, body)
        self.answers[f"{name} {status}"] += 1
        return status

    def connection(self) -> Connection:
        """One more connection."""
        return Connection(self.port, self.token)


async def read_slowly(user: User) -> None:
    """Whole backups, as slowly as one reads."""

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
    """The same key again and again."""
    path = keys_path(user.version, ROOM, SESSION)

    async def loop_forever() -> None:
        connection = user.connection()
        while True:
            await user.send(connection, "read_keys", "GET", path, b"")

    await asyncio.gather(*(loop_forever() for _ in range(READERS)))


async def reset(user: User) -> None:
    """New versions, and at once away with them."""
    connection = user.connection()
    info = json.dumps({"algorithm": ALGORITHM, "auth_data": {}}).encode()
    while True:
        if await user.send(connection, "reset", "POST", "/version", info) == 200:
            path = version_path(json.loads(connection.body)["version"])
            await user.send(connection, "reset", "DELETE", path, b"")


async def upload(user: User, name: str, bodies: Sequence[bytes]) -> None:
    """Bodies by turns, on all connections; each key is better than before."""
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
    """As many keys as are taken, as large ones as real ones are, and much data."""
    small = keys(b'"' + b"x" * SMALL_KEY + b'"')
    bodies = [small, real_keys(), keys(nested_data()), real_keys(UNTHROTTLED)]
    await upload(user, "upload_keys", bodies)


async def upload_rubbish(user: User) -> None:
    """What takes long to read and holds no key."""
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
    """As large an upload of a room as there may be, or one of another size in bytes."""
    member = b'"%%06d":{"first_message_index":%d,"forwarded_count":0,' % INDEX
    member += b'"is_verified":false,"session_data":' + session_data + b"},"
    body = b'{"rooms":{"%b":{"sessions":{' % ROOM.encode()
    number = (size - len(body) - 4) // len(member % 0)
    return body + b"".join(member % n for n in range(number))[:-1] + b"}}}}"


def real_keys(size: int = LARGEST) -> bytes:
    """The same, of real keys."""
    return keys(b'{"ciphertext":"' + b"x" * 900 + b'"}', size)


def nested_data() -> bytes:
    """What is the most work for its size."""
    nested = b"[" * NESTING + b"]" * NESTING
    return b"[" + b",".join([nested] * (LARGEST_KEY // len(nested) - 1)) + b"]"


#: What the user may do.
BEHAVIOURS: dict[str, Callable[[User], Awaitable[None]]] = {
    function.__name__: function
    for function in (read_slowly, read_keys, reset, upload_keys, upload_rubbish)
}


async def main(port: str, token: str, version: str, seconds: str, *names: str) -> None:
    """Do some of it for a while."""
    os.nice(19)
    user = User(int(port), token, version)
    tasks = [asyncio.ensure_future(BEHAVIOURS[name](user)) for name in names]
    # By then they have made their bodies.
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

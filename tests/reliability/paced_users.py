"""Well-behaved users with an open-loop load. Arguments: PORT VERSION:TOKEN...

A user's requests are due at fixed times, and each response time counts from the due
time. A request that waits for the previous request therefore counts with the whole
wait. For each request the program prints a line: due time in seconds of the system's
monotonic clock, response time in seconds, and status.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from itertools import count

from ..contract.base import PREFIX, key, keys_path, version_path, wrapped
from ..servers.processes import HOST
from .sockets import request

#: Interval between two requests of a user, in seconds.
INTERVAL = 0.1
#: Number of keys in an upload, and bytes of data in each.
KEYS = 5
KEY_BYTES = 900
ROOM = "!room:h"

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Connection:
    """A user's kept-alive connection, reopened after a failure.

    Attributes:
        body: body of the last answer.
    """

    def __init__(self, port: int, token: str) -> None:
        self.body = b""
        self._port = port
        self._token = token
        self._streams: Streams | None = None

    async def send(self, method: str, path: str, body: bytes = b"") -> int:
        """Send a request and read the answer.

        Args:
            path: path below the endpoints' prefix.

        Returns:
            The status, or 0 if the connection failed.
        """
        try:
            if self._streams is None:
                self._streams = await asyncio.open_connection(HOST, self._port)
            reader, writer = self._streams
            writer.write(request(method, PREFIX + path, self._token, body))
            head = await reader.readuntil(b"\r\n\r\n")
            length = head.lower().partition(b"\r\ncontent-length: ")[2]
            self.body = await reader.readexactly(int(length.partition(b"\r\n")[0]))
            return int(head.split()[1])
        except (OSError, asyncio.IncompleteReadError):
            if self._streams is not None:
                self._streams[1].close()
            self._streams = None
            return 0


def requests_of(version: str) -> Iterator[tuple[str, str, bytes]]:
    """Yield a user's requests without end: method, path and body."""
    for number in count():
        sessions = {f"{number}/{n}": key(data="x" * KEY_BYTES) for n in range(KEYS)}
        body = json.dumps(wrapped({ROOM: sessions})).encode()
        yield "PUT", keys_path(version), body
        yield "GET", keys_path(version, ROOM, f"{number}/0"), b""
        yield "GET", version_path(version), b""


async def run_user(port: int, version: str, token: str, start: float) -> None:
    """Send one user's requests at their due times and print the response times.

    Args:
        start: when the first request is due, in monotonic seconds.
    """
    connection = Connection(port, token)
    for number, row in enumerate(requests_of(version)):
        due = start + number * INTERVAL
        await asyncio.sleep(due - time.monotonic())
        status = await connection.send(*row)
        print(f"{due:.4f} {time.monotonic() - due:.6f} {status}", flush=True)


async def main(port: str, *users: str) -> None:
    """Run all users, with start times spread over one interval, until killed."""
    start = time.monotonic()
    tasks = []
    for number, user in enumerate(users):
        version, token = user.split(":")
        first = start + INTERVAL * number / len(users)
        tasks.append(run_user(int(port), version, token, first))
    await asyncio.gather(*tasks)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

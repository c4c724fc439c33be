"""A way to a server that may be cut: then nothing comes back, not even that it is gone.

It is a network of two in the kernel. At its far end this module, run by itself, passes
connections on to a unix socket: ADDRESS PORT PATH.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import attrs

from ..servers.processes import Process

#: Of the addresses that RFC 2544 has for tests of devices: hardly anybody has them.
NEAR, FAR = "198.18.77.1", "198.18.77.2"
PORT = 5432
#: For how long what passes connections on may take to start, in seconds.
DEADLINE = 10.0


@attrs.frozen
class Link:
    """What leads to `FAR`, at `PORT`.

    Attributes:
        name: of the network.
    """

    name: str

    def cut(self) -> None:
        """Have all that is sent get lost, from either end."""
        ip("-n", self.name, "link", "set", "far", "down")

    def restore(self) -> None:
        """Have it arrive again."""
        ip("-n", self.name, "link", "set", "far", "up")


@contextmanager
def new_link(path: Path, output: Path) -> Iterator[Link]:
    """A cable to a unix socket; it takes root to have one."""
    name = f"rk{os.getpid()}"
    with ExitStack() as stack:
        ip("netns", "add", name)
        stack.callback(ip, "netns", "delete", name)
        far = ("peer", "name", "far", "netns", name)
        ip("link", "add", name, "type", "veth", *far)
        ip("address", "add", f"{NEAR}/30", "dev", name)
        ip("link", "set", name, "up")
        ip("-n", name, "address", "add", f"{FAR}/30", "dev", "far")
        ip("-n", name, "link", "set", "far", "up")
        command = ["ip", "netns", "exec", name, sys.executable, "-m", __name__]
        process = Process(
            [*command, FAR, str(PORT), str(path)],
            output=output,
            cwd=Path(__file__).parents[2],
        )
        stack.callback(process.kill)
        process.wait_until(_accepts, DEADLINE)
        yield Link(name)


def can_make_networks() -> bool:
    """Whether we may make networks."""
    name = f"rkt{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("netns", "delete", name)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def ip(*arguments: str) -> None:
    """Run the command that sets up networks."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _accepts() -> bool:
    with suppress(OSError), socket.create_connection((FAR, PORT), timeout=1):
        return True
    return False


async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Write what can be read, to its end."""
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def main(address: str, port: str, path: str) -> None:
    """Pass connections on until the process is ended."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream = await asyncio.open_unix_connection(path)
        await asyncio.gather(forward(reader, upstream[1]), forward(upstream[0], writer))

    server = await asyncio.start_server(serve, address, int(port))
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

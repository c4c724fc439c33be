"""A network link to a server, which a test can cut: packets then vanish silently.

The link is a pair of virtual network devices in the Linux kernel; the far end has a
network namespace of its own. There, this module runs as a program and forwards TCP
connections to a unix socket. Arguments: ADDRESS PORT PATH.
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

#: Addresses of the range reserved by RFC 2544 for benchmarks of network devices: hardly
#: any machine uses this range.
NEAR, FAR = "198.18.77.1", "198.18.77.2"
PORT = 5432
#: Longest start of the forwarding process, in seconds.
DEADLINE = 10.0


@attrs.frozen
class Link:
    """A network link to FAR, on whose PORT the server can be reached.

    Attributes:
        name: name of the network namespace, and of the near device.
    """

    name: str

    def cut(self) -> None:
        """Drop all packets in both directions, without an error for either end."""
        ip("-n", self.name, "link", "set", "far", "down")

    def restore(self) -> None:
        """Deliver packets again."""
        ip("-n", self.name, "link", "set", "far", "up")


@contextmanager
def new_link(path: Path, output: Path) -> Iterator[Link]:
    """Create a link to a server on a unix socket, and remove the link at the end.

    This needs root.

    Args:
        path: of the server's unix socket.
        output: file for the output of the forwarding process.
    """
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
    """Whether this process may create network namespaces."""
    name = f"rkt{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("netns", "delete", name)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def ip(*arguments: str) -> None:
    """Run the ``ip`` command; raise CalledProcessError on failure."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _accepts() -> bool:
    with suppress(OSError), socket.create_connection((FAR, PORT), timeout=1):
        return True
    return False


async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy bytes from a reader to a writer until the end, then close the writer."""
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def main(address: str, port: str, path: str) -> None:
    """Forward connections from an address and port to a unix socket, until killed."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream = await asyncio.open_unix_connection(path)
        await asyncio.gather(forward(reader, upstream[1]), forward(upstream[0], writer))

    server = await asyncio.start_server(serve, address, int(port))
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

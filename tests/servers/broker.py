"""A minimal Redis server, run as a script with its port as only argument.

It holds what Synapse's replication needs: publish and subscribe, and expiring
values. It exists because no installable package brings a real Redis everywhere.
"""

import asyncio
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

Reply = bytes

OK: Reply = b"+OK\r\n"
NIL: Reply = b"$-1\r\n"
CONSTANTS: dict[bytes, Reply] = {
    b"PING": b"+PONG\r\n",
    b"INFO": b"$0\r\n\r\n",
    b"AUTH": OK,
    b"CLIENT": OK,
    b"QUIT": OK,
    b"SELECT": OK,
}


def bulk(value: bytes) -> Reply:
    """Frame one string."""
    return b"$%d\r\n%b\r\n" % (len(value), value)


def array(*items: Reply) -> Reply:
    """Frame a list of replies already framed."""
    return b"*%d\r\n%b" % (len(items), b"".join(items))


def integer(value: int) -> Reply:
    """Frame one number."""
    return b":%d\r\n" % value


async def read_command(reader: asyncio.StreamReader) -> list[bytes]:
    """Read one command, which clients always send as a list of strings."""
    count = int((await reader.readuntil(b"\r\n"))[1:])
    words = []
    for _ in range(count):
        size = int((await reader.readuntil(b"\r\n"))[1:])
        words.append((await reader.readexactly(size + 2))[:-2])
    return words


class Broker:
    """The values, the channels, and who listens to them."""

    def __init__(self) -> None:
        """Start with nothing stored."""
        self._values: dict[bytes, tuple[bytes, float]] = {}
        self._listeners: defaultdict[bytes, set[asyncio.StreamWriter]]
        self._listeners = defaultdict(set)
        self._commands: dict[bytes, Callable[..., Reply]] = {
            b"GET": self._get,
            b"PUBLISH": self._publish,
            b"SET": self._set,
        }

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Answer one client until it leaves."""
        try:
            while True:
                name, *arguments = await read_command(reader)
                writer.write(self._answer(name.upper(), arguments, writer))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            for listeners in self._listeners.values():
                listeners.discard(writer)
            writer.close()

    def _answer(
        self, name: bytes, arguments: Sequence[bytes], writer: asyncio.StreamWriter
    ) -> Reply:
        """Carry out one command."""
        if name == b"SUBSCRIBE":
            return self._subscribe(arguments, writer)
        if name in self._commands:
            return self._commands[name](*arguments)
        return CONSTANTS.get(name, b"-ERR unknown command\r\n")

    def _subscribe(
        self, channels: Sequence[bytes], writer: asyncio.StreamWriter
    ) -> Reply:
        """Start passing on what is published; confirm each channel."""
        confirmations = []
        for channel in channels:
            self._listeners[channel].add(writer)
            count = sum(writer in others for others in self._listeners.values())
            confirmations.append(
                array(bulk(b"subscribe"), bulk(channel), integer(count))
            )
        return b"".join(confirmations)

    def _publish(self, channel: bytes, message: bytes) -> Reply:
        """Pass a message on; tell how many heard it."""
        listeners = self._listeners[channel]
        for listener in listeners:
            listener.write(array(bulk(b"message"), bulk(channel), bulk(message)))
        return integer(len(listeners))

    def _set(self, key: bytes, value: bytes, *options: bytes) -> Reply:
        """Store a value, for some time if an expiry follows."""
        deadline = float("inf")
        if options:
            unit, amount = options
            seconds = {b"EX": 1.0, b"PX": 0.001}[unit.upper()]
            deadline = time.monotonic() + int(amount) * seconds
        self._values[key] = (value, deadline)
        return OK

    def _get(self, key: bytes) -> Reply:
        """Return a value that has not expired."""
        value, deadline = self._values.get(key, (b"", 0.0))
        return bulk(value) if time.monotonic() < deadline else NIL


async def main(port: int) -> None:
    """Serve until killed."""
    server = await asyncio.start_server(Broker().serve, "127.0.0.1", port)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))

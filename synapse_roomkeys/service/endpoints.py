"""Endpoints of listeners, in Twisted's syntax."""

import re
from typing import Any

from twisted.internet.endpoints import serverFromString
from twisted.internet.interfaces import IStreamServerEndpoint

#: Colon between two parameters of an endpoint. A backslash escapes a colon within a
#: parameter.
_SEPARATOR = re.compile(r"(?<!\\):")
#: Names of the positional parameters of each kind of endpoint, in order.
_POSITIONS = {
    "tcp": ("port", "interface", "backlog"),
    "unix": ("address", "mode", "backlog", "lockfile"),
}


class Endpoint(str):
    """Description of an endpoint: ``tcp:``, ``unix:`` or ``systemd:``."""

    def server(self, reactor: Any) -> IStreamServerEndpoint:
        """Return Twisted's endpoint.

        Raises:
            ValueError, TypeError: the description is wrong.
            LookupError, AttributeError, TypeError: systemd passed no such socket.
        """
        # Twisted takes a subclass of str for bytes.
        endpoint: IStreamServerEndpoint = serverFromString(reactor, str(self))
        return endpoint

    @classmethod
    def parse(cls, text: str) -> "Endpoint":
        """Check a description. The sockets of systemd are found when the service
        starts.

        Raises:
            ValueError: the description is wrong. The error quotes the description.
        """
        endpoint = cls(text)
        kind, _, place = text.partition(":")
        if kind not in ("tcp", "unix", "systemd") or not place:
            raise ValueError(f"{text!r} must begin with tcp:, unix: or systemd:")
        try:
            if kind != "systemd":
                endpoint.server(None)
            if kind == "tcp" and not 0 < int(endpoint.parameters()["port"]) < 65536:
                raise ValueError("the port must be from 1 to 65535")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{text!r}: {error}") from None
        return endpoint

    def parameters(self) -> dict[str, str]:
        """The parameters of a TCP or UNIX endpoint, by their names in Twisted's
        documentation ("Endpoint types included with Twisted")."""
        kind, *parts = _SEPARATOR.split(self)
        names = iter(_POSITIONS[kind])
        pairs = [
            part.split("=", 1) if "=" in part else [next(names), part] for part in parts
        ]
        return {name: re.sub(r"\\(.)", r"\1", value) for name, value in pairs}

"""What the values of the service's options may be.

Each function takes the name of an option and its value as YAML has it, returns the
value as the service uses it, and raises `OptionError`, which names the option.
"""

import re
from collections.abc import Callable
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any

from twisted.internet.endpoints import serverFromString

from ..config import OptionError, positive_integer

Network = IPv4Network | IPv6Network

#: Without a user or a query, and with a path where the homeserver is below one.
_ADDRESS = re.compile(r"https?://([\w.-]+|\[[0-9a-fA-F:.]+\])(:\d+)?(/[^\s?#@]*)?")

#: A colon between two parameters of an endpoint; one in a parameter is escaped.
_SEPARATOR = re.compile(r"(?<!\\):")
#: The names of an endpoint's parameters that may stand there without a name, in order.
_POSITIONS = {
    "tcp": ("port", "interface", "backlog"),
    "unix": ("address", "mode", "backlog", "lockfile"),
}


def one_of(*choices: str) -> Callable[[str, Any], str]:
    """A check that a value is one of some words."""

    def check(option: str, value: Any) -> str:
        if value not in choices:
            raise OptionError(option, f"must be one of {', '.join(choices)}")
        return str(value)

    return check


def address(option: str, value: Any) -> str:
    """The address of a homeserver; a slash at its end goes."""
    if isinstance(value, str) and _ADDRESS.fullmatch(value):
        return value.rstrip("/")
    raise OptionError(option, "must be an address such as https://matrix.example.org")


def boolean(option: str, value: Any) -> bool:
    """True or false."""
    if type(value) is not bool:
        raise OptionError(option, "must be true or false")
    return value


def networks(option: str, value: Any) -> tuple[Network, ...]:
    """Networks of IP addresses; an address alone is a network of one."""
    try:
        return tuple(ip_network(text) for text in _strings(option, value))
    except ValueError as error:
        raise OptionError(option, str(error)) from None


def endpoints(option: str, value: Any) -> tuple[str, ...]:
    """Twisted's descriptions of endpoints. Systemd's sockets are looked up at start."""
    found = _strings(option, value)
    for endpoint in found:
        kind, _, place = endpoint.partition(":")
        if kind not in ("tcp", "unix", "systemd") or not place:
            raise OptionError(option, f"{endpoint!r} isn't of tcp:, unix: or systemd:")
        try:
            if kind != "systemd":
                serverFromString(None, endpoint)
            if kind == "tcp":
                _check_port(int(endpoint_parameters(endpoint)["port"]))
        except (TypeError, ValueError) as error:
            raise OptionError(option, f"{endpoint!r}: {error}") from None
    return found


def endpoint_parameters(endpoint: str) -> dict[str, str]:
    """The parameters of an endpoint, by their names in Twisted's documentation
    ("Endpoint types included with Twisted")."""
    kind, *parts = _SEPARATOR.split(endpoint)
    names = iter(_POSITIONS[kind])
    pairs = [
        part.split("=", 1) if "=" in part else [next(names), part] for part in parts
    ]
    return {name: re.sub(r"\\(.)", r"\1", value) for name, value in pairs}


def _check_port(port: int) -> None:
    if not 0 < port < 65536:
        raise ValueError("the port must be from 1 to 65535")


def some_endpoints(option: str, value: Any) -> tuple[str, ...]:
    """As `endpoints`, one at least."""
    found = endpoints(option, value)
    if not found:
        raise OptionError(option, "must have one at least")
    return found


def count(option: str, value: Any) -> int:
    """A positive integer, which may be a string of digits, as in the environment."""
    is_text = isinstance(value, str) and value.isdecimal()
    return positive_integer(option, int(value) if is_text else value)


def scalar(option: str, value: Any) -> str | int:
    """A string or an integer. Errors don't tell the value, which may be secret."""
    if type(value) not in (str, int):
        raise OptionError(option, "must be a string or an integer")
    return value  # type: ignore[no-any-return]


def _strings(option: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise OptionError(option, "must be a list of strings")
    return tuple(value)

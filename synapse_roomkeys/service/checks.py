"""Checks of the values of the service's options.

A check takes the name of an option and its value from YAML, and returns the value in
the type that the service uses. If the value is wrong, the check raises `OptionError`,
which names the option.
"""

import re
from collections.abc import Callable
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any

from twisted.internet.endpoints import serverFromString

from ..config import OptionError, positive_integer

Network = IPv4Network | IPv6Network

#: HTTP address with an optional port and path, and without a user or a query.
_ADDRESS = re.compile(r"https?://([\w.-]+|\[[0-9a-fA-F:.]+\])(:\d+)?(/[^\s?#@]*)?")

#: Colon between two parameters of an endpoint. A backslash escapes a colon within a
#: parameter.
_SEPARATOR = re.compile(r"(?<!\\):")
#: Names of the positional parameters of each kind of endpoint, in order.
_POSITIONS = {
    "tcp": ("port", "interface", "backlog"),
    "unix": ("address", "mode", "backlog", "lockfile"),
}


def one_of(*choices: str) -> Callable[[str, Any], str]:
    """Return a check for an option with a set of choices."""

    def check(option: str, value: Any) -> str:
        if value not in choices:
            raise OptionError(option, f"must be one of {', '.join(choices)}")
        return str(value)

    return check


def address(option: str, value: Any) -> str:
    """Address of a homeserver. Slashes at the end are removed."""
    if isinstance(value, str) and _ADDRESS.fullmatch(value):
        return value.rstrip("/")
    raise OptionError(option, "must be an address such as https://matrix.example.org")


def boolean(option: str, value: Any) -> bool:
    """Boolean of YAML."""
    if type(value) is not bool:
        raise OptionError(option, "must be true or false")
    return value


def networks(option: str, value: Any) -> tuple[Network, ...]:
    """Networks of IP addresses. A single address is a network of one address."""
    try:
        return tuple(ip_network(text) for text in _strings(option, value))
    except ValueError as error:
        raise OptionError(option, str(error)) from None


def endpoints(option: str, value: Any) -> tuple[str, ...]:
    """Descriptions of endpoints in Twisted's syntax: ``tcp:``, ``unix:`` or
    ``systemd:``. The sockets of systemd are found when the service starts."""
    found = _strings(option, value)
    for endpoint in found:
        kind, _, place = endpoint.partition(":")
        if kind not in ("tcp", "unix", "systemd") or not place:
            msg = f"{endpoint!r} must begin with tcp:, unix: or systemd:"
            raise OptionError(option, msg)
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
    """As `endpoints`, with one endpoint at least."""
    found = endpoints(option, value)
    if not found:
        raise OptionError(option, "must have at least one endpoint")
    return found


def count(option: str, value: Any) -> int:
    """Positive integer. A string of digits is accepted, as the environment has it."""
    is_text = isinstance(value, str) and value.isdecimal()
    return positive_integer(option, int(value) if is_text else value)


def scalar(option: str, value: Any) -> str | int:
    """String or integer. The error leaves the value out, because the value may be a
    secret."""
    if type(value) not in (str, int):
        raise OptionError(option, "must be a string or an integer")
    return value  # type: ignore[no-any-return]


def _strings(option: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise OptionError(option, "must be a list of strings")
    return tuple(value)

"""Who sends a request, where there are reverse proxies in between."""

import re
import secrets
from collections.abc import Iterable, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address

from twisted.internet.interfaces import IAddress

from .checks import Network

_SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
#: What stands in the place of an address where a unix socket has none.
UNIX = "unix"

_Address = IPv4Address | IPv6Address


def is_trusted(peer: IAddress, trusted: Iterable[Network]) -> bool:
    """Whether the headers that tell of a request's origin are believed.

    Args:
        peer: the other end of the connection. Only proxies connect to a unix socket.
        trusted: the proxies.
    """
    host = getattr(peer, "host", None)
    return host is None or _is_in(_parse(host), trusted)


def client_address(
    peer: IAddress, forwarded: Sequence[bytes], trusted: Iterable[Network]
) -> str:
    """The address of a request's client: the last one that isn't a trusted proxy's.

    Args:
        forwarded: the values of X-Forwarded-For, of any bytes. Each proxy adds the
            address of its peer at the end, so what comes before a stranger's is the
            stranger's claim.
    """
    found = str(getattr(peer, "host", UNIX)).partition("%")[0]
    if not is_trusted(peer, trusted):
        return found
    for text in reversed(b",".join(forwarded).decode("latin-1").split(",")):
        try:
            address = _parse(text.strip())
        except ValueError:
            break
        found = str(address)
        if not _is_in(address, trusted):
            break
    return found


def choose_request_id(sent: bytes | None) -> str:
    """The id that a proxy has given to a request, or a new one if it is none.

    Args:
        sent: the X-Request-ID of a trusted proxy, of any bytes.
    """
    if sent is not None and _SANE_ID.fullmatch(sent):
        return sent.decode("ascii")
    return secrets.token_hex(8)


def _parse(text: str) -> _Address:
    """Parse an address. The zone of a link-local one ("fe80::1%eth0") is left out: it
    names an interface of one machine, and may be any text.

    Raises:
        ValueError: the text isn't an address.
    """
    return _parse_without_zone(text.partition("%")[0])


@lru_cache(maxsize=1024)
def _parse_without_zone(text: str) -> _Address:
    """Parse an address; the cache spares 2 microseconds for each of a request's."""
    return ip_address(text)


def _is_in(address: _Address, trusted: Iterable[Network]) -> bool:
    """Whether one of the networks has an address; a socket that takes IPv6 as well
    tells those of IPv4 as a part of IPv6's."""
    address = getattr(address, "ipv4_mapped", None) or address
    return any(address in network for network in trusted)

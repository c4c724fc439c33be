"""The parts of a client's request that the homeserver needs to identify the user."""

import hashlib
import re
from collections.abc import Mapping
from functools import lru_cache
from ipaddress import ip_address

import attrs
from twisted.web.http import Request
from twisted.web.http_headers import Headers

from .errors import TokenError

#: Query parameters by which an application service masquerades as a user.
MASKS = ("user_id", "device_id")
#: Limit of ``User-Agent`` in bytes. A browser sends about 150 bytes.
MAX_USER_AGENT_BYTES = 500

#: Visible ASCII, a superset of RFC 6750: a token is sent on in a header.
_TOKEN = re.compile("[!-~]+")
_BEARER = re.compile("Bearer +([!-~]+)", re.IGNORECASE)
_CONTROLS = bytes([*range(32), 127])


@attrs.frozen
class Claim:
    """The parts of a client's request that are sent to the homeserver.

    Attributes:
        token: access token of the client.
        masks: values of the query parameters in `MASKS`.
        client_host: IP address of the client, or None if unknown.
        user_agent: value of the client's ``User-Agent``, or None.
    """

    token: str
    masks: Mapping[str, str]
    client_host: str | None
    user_agent: bytes | None

    def key(self) -> bytes:
        """Hash by which the answer is remembered. The hash includes the address,
        because the homeserver must see each address from which a token is used."""
        parts = (self.token, sorted(self.masks.items()), self.client_host)
        return hashlib.sha256(repr(parts).encode()).digest()

    def headers(self) -> Headers:
        """Headers of the request to the homeserver."""
        headers = Headers({"Authorization": [f"Bearer {self.token}"]})
        if self.client_host is not None:
            headers.addRawHeader("X-Forwarded-For", self.client_host)
            # Without this header Synapse logs a warning for each request.
            headers.addRawHeader("X-Forwarded-Proto", "https")
        if self.user_agent is not None:
            headers.addRawHeader(b"User-Agent", self.user_agent)
        return headers


def claim_of(request: Request) -> Claim:
    """Read the claim of a client's request.

    Raises:
        TokenError: the request has no access token, or two.
    """
    token = _access_token(request)
    values = {name: _parameters(request, name) for name in MASKS}
    masks = {name: found[0] for name, found in values.items() if found}
    return Claim(token, masks, _client_host(request), _user_agent(request))


def _access_token(request: Request) -> str:
    """Read the access token of the ``Authorization`` header or of the query.

    A request with two tokens is refused, as in Synapse: a proxy may have checked the
    other token.

    Raises:
        TokenError: the request has no token, or two.
    """
    headers = request.requestHeaders.getRawHeaders(b"Authorization") or []
    parameters = _parameters(request, "access_token")
    if len(headers) > 1:
        raise _missing_token("Too many Authorization headers")
    if headers and parameters:
        raise _missing_token("Both an Authorization header and access_token")
    if len(parameters) > 1:
        raise _missing_token("Too many access_token parameters")
    if headers:
        bearer = _BEARER.fullmatch(headers[0].decode("latin-1"))
        if bearer is None:
            raise _missing_token("Invalid Authorization header")
        return bearer[1]
    if not parameters or not _TOKEN.fullmatch(parameters[0]):
        raise _missing_token("Missing access token")
    return parameters[0]


def _missing_token(msg: str) -> TokenError:
    return TokenError(401, "M_MISSING_TOKEN", msg)


def _parameters(request: Request, name: str) -> list[str]:
    """All values of a query parameter."""
    values = (request.args or {}).get(name.encode(), [])
    return [value.decode("utf-8", "replace") for value in values]


def _client_host(request: Request) -> str | None:
    """The client's IP address. A mapped address (``::ffff:192.0.2.1``) is returned as
    IPv4."""
    host = getattr(request.getClientAddress(), "host", None)
    # The zone of a link-local address is a name on this machine.
    return None if host is None else _plain_address(host.partition("%")[0])


@lru_cache(maxsize=1024)
def _plain_address(host: str) -> str:
    """Return an IP address in its canonical form, and a mapped address as IPv4."""
    address = ip_address(host)
    return str(getattr(address, "ipv4_mapped", None) or address)


def _user_agent(request: Request) -> bytes | None:
    """The client's last ``User-Agent``, as in Synapse, without control characters and
    cut at `MAX_USER_AGENT_BYTES`."""
    values = request.requestHeaders.getRawHeaders(b"User-Agent") or [b""]
    return values[-1].translate(None, _CONTROLS)[:MAX_USER_AGENT_BYTES] or None

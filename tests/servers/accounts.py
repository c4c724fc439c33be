"""Requests that create, log in and deactivate accounts on a running Synapse."""

import hashlib
import hmac
import json
import secrets
import urllib.parse
from typing import Any

import attrs

from .. import blocking_http

_CLIENT = "/_matrix/client/v3"
_ADMIN = "/_synapse/admin/v1"


@attrs.frozen
class User:
    """A user or a guest with the access token of one device."""

    user_id: str
    access_token: str
    device_id: str
    password: str


def fetch(
    url: str, *, method: str = "GET", token: str | None = None, body: object = None
) -> bytes:
    """Send one request and return the body of the answer.

    Args:
        method: the HTTP method.
        token: the access token, or None for a request without an Authorization header.
        body: a value to send as JSON, or None for an empty body.

    Raises:
        RuntimeError: the status is no success (2xx); the text holds status and body.
    """
    headers = {"Content-Type": "application/json"}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    data = None if body is None else json.dumps(body).encode()
    answer = blocking_http.send(method, url, headers, data)
    if not 200 <= answer.status < 300:
        text = answer.body.decode(errors="replace")
        raise RuntimeError(f"{method} {url}: {answer.status} {text}")
    return answer.body


def _post(url: str, body: object, token: str | None = None) -> dict[str, Any]:
    """Send a JSON object by POST and return the JSON object of the answer."""
    answer: dict[str, Any] = json.loads(
        fetch(url, method="POST", token=token, body=body)
    )
    return answer


def _user(answer: dict[str, Any], password: str) -> User:
    """Build a user from the answer of a registration or a login."""
    return User(
        answer["user_id"], answer["access_token"], answer["device_id"], password
    )


def register(url: str, shared_secret: str, name: str, *, admin: bool = False) -> User:
    """Register a user through the admin API, with Synapse's registration shared
    secret."""
    password = secrets.token_hex(8)
    nonce = json.loads(fetch(f"{url}{_ADMIN}/register"))["nonce"]
    role = "admin" if admin else "notadmin"
    claim = "\0".join([nonce, name, password, role]).encode()
    body = {
        "nonce": nonce,
        "username": name,
        "password": password,
        "admin": admin,
        "mac": hmac.new(shared_secret.encode(), claim, hashlib.sha1).hexdigest(),
    }
    return _user(_post(f"{url}{_ADMIN}/register", body), password)


def register_guest(url: str) -> User:
    """Register a guest, an account without a password."""
    return _user(_post(f"{url}{_CLIENT}/register?kind=guest", {}), "")


def login(url: str, user: User, *, refreshable: bool) -> User:
    """Log a user in on another device.

    Args:
        url: the base URL of the homeserver.
        user: the user.
        refreshable: whether to ask for an access token that expires and can be
            refreshed.

    Returns:
        The same user with the token and the id of the new device.
    """
    body = {
        "type": "m.login.password",
        "identifier": {"type": "m.id.user", "user": user.user_id},
        "password": user.password,
        "refresh_token": refreshable,
    }
    return _user(_post(f"{url}{_CLIENT}/login", body), user.password)


def logout(url: str, user: User) -> None:
    """Log a device out, which invalidates the device's access token."""
    _post(f"{url}{_CLIENT}/logout", {}, user.access_token)


def deactivate(url: str, admin: User, user_id: str) -> None:
    """Deactivate an account for good.

    Args:
        admin: a server administrator, whose token authorises the request.
        user_id: the account to deactivate.
    """
    target = urllib.parse.quote(user_id, safe="")
    _post(f"{url}{_ADMIN}/deactivate/{target}", {}, admin.access_token)

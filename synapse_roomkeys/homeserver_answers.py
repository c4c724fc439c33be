"""Answers of the homeserver: the user of an access token, a refusal, or neither."""

from typing import Annotated, Literal
from urllib.parse import quote

import attrs
import msgspec

from .errors import RoomKeysError, TokenError
from .homeserver import CLIENT_API, HomeserverOptions, Response
from .request_queue import UnusableResponseError
from .types import Requester

WHOAMI = "/v3/account/whoami"
#: Path of an endpoint of Synapse's admin API ("Query User Account"), which answers only
#: administrators. Unlike "Get whether a user is a server administrator or not", Synapse
#: has the endpoint also in workers, and with the Matrix Authentication Service.
ACCOUNT = "/_synapse/admin/v2/users/{user_id}"
#: Statuses of a refusal. Its body is a Matrix error.
_REFUSALS = (400, 401, 403, 404)
#: Errcodes that make a client turn its backup off, whatever the status.
_FATAL_ERRCODES = ("M_NOT_FOUND", "M_WRONG_ROOM_KEYS_VERSION")


class _WhoamiBody(msgspec.Struct):
    """Body of a 200. ``is_guest`` is new in version 1.2 of the specification: servers
    may omit the member, or send null or a number."""

    user_id: Annotated[str, msgspec.Meta(pattern="^@.*:.", max_length=255)]
    device_id: str | None = None
    is_guest: bool | Literal[0, 1] | None = None


class _ErrorBody(msgspec.Struct):
    errcode: Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9_.]{1,100}$")]
    soft_logout: bool | None = None


class _AccountBody(msgspec.Struct):
    """Body of a 200 to `ACCOUNT`. Its member ``admin`` isn't read: with the Matrix
    Authentication Service, the token tells whether its user is an administrator."""

    name: str


_decode_account = msgspec.json.Decoder(_AccountBody).decode
_decode_whoami = msgspec.json.Decoder(_WhoamiBody).decode
_decode_error = msgspec.json.Decoder(_ErrorBody).decode


@attrs.frozen
class Refusal:
    """Arguments of a `TokenError`. A remembered exception would keep requests alive by
    its traceback."""

    code: int
    errcode: str
    msg: str
    soft_logout: bool | None = None

    def error(self) -> RoomKeysError:
        """A new error."""
        return TokenError(self.code, self.errcode, self.msg, self.soft_logout)


def read_answer(response: Response, options: HomeserverOptions) -> Requester | Refusal:
    """Read the user of the token, or the refusal, from a response to whoami.

    Raises:
        UnusableResponseError: the response has neither.
    """
    try:
        if response.code == 200:
            return _read_user(_decode_whoami(response.body), options)
        if response.code in _REFUSALS:
            error = _decode_error(response.body)
            if response.code != 404 or error.errcode == "M_NOT_FOUND":
                return _read_refusal(response.code, error)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        pass
    raise UnusableResponseError(describe_response(response, CLIENT_API + WHOAMI))


def read_admin(response: Response, user_id: str) -> bool | Refusal:
    """Read whether a user is an administrator, or the refusal of the user's token, from
    a response to `ACCOUNT`.

    Raises:
        UnusableResponseError: the response has neither.
    """
    try:
        if response.code == 200 and _decode_account(response.body).name == user_id:
            return True
        if response.code in (401, 403):
            error = _decode_error(response.body)
            is_refused = response.code == 401
            return _read_refusal(response.code, error) if is_refused else False
    except (msgspec.MsgspecError, UnicodeDecodeError):
        pass
    path = ACCOUNT.format(user_id=quote(user_id, safe=""))
    raise UnusableResponseError(describe_response(response, path))


def _read_user(user: _WhoamiBody, options: HomeserverOptions) -> Requester | Refusal:
    if user.is_guest and options.has_guests:
        return Refusal(403, "M_GUEST_ACCESS_FORBIDDEN", "Guests have no backup")
    return Requester(user.user_id, user.device_id)


def _read_refusal(code: int, error: _ErrorBody) -> Refusal:
    """Pass a refusal on. Replace an errcode that makes a client turn its backup off."""
    msg = "The homeserver refuses the access token"
    if error.errcode in _FATAL_ERRCODES:
        msg = "The homeserver knows no such user or device"
        return Refusal(403, "M_FORBIDDEN", msg)
    return Refusal(code, error.errcode, msg, error.soft_logout)


def describe_response(response: Response, path: str) -> str:
    """Describe an unusable response in one line. If the address of the homeserver looks
    wrong, name the option to change.

    Args:
        path: path of the request below the homeserver's address.
    """
    code = response.code
    kind = response.header("Content-Type").partition(";")[0] or "no Content-Type"
    target = response.header("Location").partition("?")[0]
    if 300 <= code < 400 and target:
        return (
            f"status {code}, a redirect to {target[:200]}, which isn't followed: set"
            f" homeserver.url to {_base_of(target[:200], path)}"
        )
    try:
        kind = _decode_error(response.body).errcode
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return f"status {code} ({kind}), no answer of a Matrix homeserver"
    if code == 404:
        is_client = path.startswith(CLIENT_API)
        api = "client-server API" if is_client else "admin API of a Synapse"
        return f"status 404 ({kind}): homeserver.url has no {api}"
    return f"status {code} ({kind})"


def _base_of(target: str, path: str) -> str:
    """The value of ``homeserver.url`` for the target of a redirect."""
    return target.removesuffix("/").removesuffix(path)

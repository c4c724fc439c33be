"""The parameters and bodies of requests of the HTTP interface for operators."""

from collections.abc import Callable
from typing import Annotated, Literal, TypeVar

import msgspec
from twisted.web.http import Request

from ..admin.handler import UsersPage
from ..errors import BadJsonError, InvalidParamError, NotJsonError, TooLargeError
from .resource import find_parameter, read_body

T = TypeVar("T")

#: Maximum bytes of a body. A real body has some hundred bytes.
_MAX_BODY_BYTES = 1 << 16
#: Maximum number of items of a page, and the default, as in Synapse's admin API.
_MAX_LIMIT = 1000
_LIMIT = 100
#: Maximum ``from`` of a page of users in an order that needs a sort in memory.
_MAX_SORTED = 10_000
#: The largest integer that JavaScript holds exactly.
_MAX_INTEGER = 2**53 - 1
#: Maximum characters of a decoder's message in an error. A message may quote a value of
#: the body; without a quote it has about 70 characters.
_MAX_MESSAGE = 200
#: The values of ``order_by``.
_ORDERS = ("name", "keys", "bytes", "last_upload")

_Time = Annotated[int, msgspec.Meta(ge=0, le=_MAX_INTEGER)]


class EraseBody(msgspec.Struct):
    """Body of a request that erases a user.

    Attributes:
        even_if_active: Whether to erase a user although the account is active, or its
            state is unknown.
    """

    even_if_active: bool = False


class RestoreBody(msgspec.Struct):
    """Body of a request to give back a deleted version or replaced keys.

    Attributes:
        before_ms: Unix time in milliseconds: keys replaced at this time or later are
            given back. None to give the deleted version back.
        room_id: only keys of this room; None for all.
        session_id: only the key of this session; None for all.
        force: Whether a worse key replaces a better one.
    """

    version: str
    before_ms: _Time | None = None
    room_id: str | None = None
    session_id: str | None = None
    force: bool = False


class PurgeBody(msgspec.Struct):
    """Body of a request to purge unused versions, keys or changes.

    Attributes:
        what: a constant of `admin.runner`, such as `admin.runner.SUPERSEDED`.
        before_ms: Unix time in milliseconds, for superseded versions and the record.
    """

    what: Literal["superseded", "orphaned", "deleted", "record"]
    before_ms: _Time | None = None


class StatisticsBody(msgspec.Struct):
    """Body of a request to sum up all users.

    Attributes:
        top: number of the largest users in the result.
    """

    top: Annotated[int, msgspec.Meta(ge=0, le=_MAX_LIMIT)] = 10


decode_erase = msgspec.json.Decoder(EraseBody).decode
decode_restore = msgspec.json.Decoder(RestoreBody).decode
decode_purge = msgspec.json.Decoder(PurgeBody).decode
decode_statistics = msgspec.json.Decoder(StatisticsBody).decode


def parse_body(request: Request, decode: Callable[[bytes], T]) -> T:
    """Return the body of a request. An empty body is an empty object.

    Args:
        decode: one of the decoders above.

    Raises:
        NotJsonError: the body isn't JSON.
        BadJsonError: a member is missing or has a wrong value.
        TooLargeError: the body has more than 64 KiB.
    """
    body = read_body(request) or b"{}"
    if len(body) > _MAX_BODY_BYTES:
        raise TooLargeError(f"The body is over {_MAX_BODY_BYTES} bytes")
    try:
        return decode(body)
    except (msgspec.ValidationError, RecursionError) as error:
        raise BadJsonError(f"The body can't be used: {_message(error)}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise NotJsonError(f"The body is not JSON: {_message(error)}") from None


def _message(error: Exception) -> str:
    """Return a decoder's message as a line of ASCII, cut at `_MAX_MESSAGE`."""
    return ascii(str(error))[1:-1][:_MAX_MESSAGE]


def parse_page(request: Request) -> tuple[int, int]:
    """Return a request's ``from``, the number of items before the page, and ``limit``,
    the maximum number of items of the page.

    Raises:
        InvalidParamError: ``from`` or ``limit`` is no number, or out of range.
    """
    skipped = parse_number(request, "from", 0, range(_MAX_INTEGER + 1))
    return skipped, parse_number(request, "limit", _LIMIT, range(1, _MAX_LIMIT + 1))


def parse_users_page(request: Request) -> UsersPage:
    """Return the requested page of users.

    Raises:
        InvalidParamError: a parameter has a wrong value, or ``from`` is over 10,000 in
            an order that needs a sort in memory.
    """
    order = parse_choice(request, "order_by", _ORDERS, "name").replace("_", "-")
    is_forward = parse_choice(request, "dir", ("f", "b"), "f") == "f"
    skipped, most = parse_page(request)
    is_read_in_order = order == "name" and is_forward
    if skipped > _MAX_SORTED and not is_read_in_order:
        raise InvalidParamError(
            f"from must be at most {_MAX_SORTED}, or order_by must be name and dir f"
        )
    return UsersPage(order, "f" if is_forward else "b", skipped, most)


def parse_time(request: Request, name: str) -> int:
    """Return a Unix time in milliseconds from the query, 0 by default.

    Raises:
        InvalidParamError: the parameter is no number.
    """
    return parse_number(request, name, 0, range(_MAX_INTEGER + 1))


def parse_number(request: Request, name: str, default: int, allowed: range) -> int:
    """Return a number from the query.

    Raises:
        InvalidParamError: the parameter is no number, or out of range.
    """
    text = find_parameter(request, name)
    if text is None:
        return default
    # Python refuses to convert a text of over 4,300 digits.
    is_number = text.isascii() and text.isdecimal() and len(text) < 20
    if not is_number or int(text) not in allowed:
        least, most = allowed[0], allowed[-1]
        raise InvalidParamError(f"{name} must be a number from {least} to {most}")
    return int(text)


def parse_choice(
    request: Request, name: str, choices: tuple[str, ...], default: str = ""
) -> str:
    """Return one of some values from the query.

    Raises:
        InvalidParamError: the parameter has another value.
    """
    text = find_parameter(request, name)
    if text is None:
        return default
    if text not in choices:
        raise InvalidParamError(f"{name} must be one of {', '.join(choices)}")
    return text

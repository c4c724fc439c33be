"""The parameters and bodies of requests of the HTTP interface for operators."""

from collections.abc import Callable
from typing import Annotated, Literal, TypeVar

import msgspec
from twisted.web.http import Request

from ..errors import BadJsonError, InvalidParamError, NotJsonError, TooLargeError
from .resource import find_parameter, read_body

T = TypeVar("T")

#: Maximum bytes of a body. A real one has some hundred bytes.
_MAX_BODY_BYTES = 1 << 16
#: Largest number of items of a list's page, and its default, which is Synapse's.
_MAX_LIMIT = 1000
_LIMIT = 100
#: Largest number of items before a list's page. The list's beginning is sorted in
#: memory.
_MAX_FROM = 10_000
#: Milliseconds since 1970; the largest integer that JavaScript holds exactly.
_MAX_TIME = 2**53 - 1

_Time = Annotated[int, msgspec.Meta(ge=0, le=_MAX_TIME)]


class EraseBody(msgspec.Struct):
    """Body of a request that erases a user.

    Attributes:
        even_if_active: Whether to erase a user whose account is active, or of whom that
            isn't known.
    """

    even_if_active: bool = False


class RestoreBody(msgspec.Struct):
    """Body of a request that gives back a deleted version or replaced keys.

    Attributes:
        before_ms: Unix time in milliseconds: keys that were replaced then or later are
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
    """Body of a request that deletes what nobody uses.

    Attributes:
        what: a constant of `admin.runner`, such as `admin.runner.SUPERSEDED`.
        before_ms: Unix time in milliseconds, for superseded versions and the record.
    """

    what: Literal["superseded", "orphaned", "deleted", "record"]
    before_ms: _Time | None = None


class StatisticsBody(msgspec.Struct):
    """Body of a request that sums up all users.

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
        raise BadJsonError(f"The body can't be used: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise NotJsonError(f"The body is not JSON: {error}") from None


def parse_page(request: Request) -> tuple[int, int]:
    """Return the number of items before the page that a request asks for, and the
    page's maximum number of items.

    Raises:
        InvalidParamError: ``from`` or ``limit`` is no number, or is too large.
    """
    skipped = parse_number(request, "from", 0, _MAX_FROM)
    return skipped, parse_number(request, "limit", _LIMIT, _MAX_LIMIT)


def parse_time(request: Request, name: str) -> int:
    """Return a Unix time in milliseconds from the query, 0 by default.

    Raises:
        InvalidParamError: the parameter is no number.
    """
    return parse_number(request, name, 0, _MAX_TIME)


def parse_number(request: Request, name: str, default: int, most: int) -> int:
    """Return a number from 0 on from the query.

    Raises:
        InvalidParamError: the parameter is no number, or is over `most`.
    """
    text = find_parameter(request, name)
    if text is None:
        return default
    is_number = text.isascii() and text.isdecimal() and len(text) <= len(str(most))
    if not is_number or int(text) > most:
        raise InvalidParamError(f"{name} must be a number from 0 to {most}")
    return int(text)


def parse_choice(request: Request, name: str, choices: tuple[str, ...]) -> str:
    """Return one of some values from the query, the first by default.

    Raises:
        InvalidParamError: the parameter has another value.
    """
    text = find_parameter(request, name)
    if text is None:
        return choices[0]
    if text not in choices:
        raise InvalidParamError(f"{name} must be one of {', '.join(choices)}")
    return text

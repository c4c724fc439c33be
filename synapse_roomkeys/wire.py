"""JSON of requests: parsing of bodies into values.

``session_data`` and ``auth_data`` are opaque: their text is checked to be JSON, and
passed on without a change.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, TypeVar

import attrs
import msgspec

from .errors import BadJsonError, NotJsonError, TooLargeError
from .identifiers import check_id
from .json_text import check_syntax
from .refusals import MAX_INTEGER, explain_refusal, load_refused, name_field
from .throttling import has_too_many_objects
from .types import KeyMetadata, Limits, RoomKey

#: Maximum bytes of a body that creates or updates a version. A real body has some KiB.
_MAX_VERSION_BODY_BYTES = 1 << 16
#: An integer of 309 digits or more exceeds the range of a double.
_LONG_INTEGER = re.compile(b"[0-9]{309}")

_Integer = Annotated[int, msgspec.Meta(ge=0, le=MAX_INTEGER)]


# gc=False: the garbage collector skips the values, which never form a cycle.
class _KeyBody(msgspec.Struct, gc=False):
    first_message_index: _Integer
    forwarded_count: _Integer
    is_verified: bool
    session_data: msgspec.Raw


class _RoomBody(msgspec.Struct, gc=False):
    sessions: dict[str, _KeyBody]


class _BackupBody(msgspec.Struct):
    rooms: dict[str, _RoomBody]


class _NewVersionBody(msgspec.Struct):
    algorithm: str
    auth_data: msgspec.Raw


class _VersionBody(_NewVersionBody):
    version: str | msgspec.UnsetType = msgspec.UNSET


_AnyVersionBody = TypeVar("_AnyVersionBody", bound=_NewVersionBody)


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError("a number is out of range")
    return number


_decode_anything = msgspec.json.Decoder(float_hook=_finite).decode
_decode_strings = msgspec.json.Decoder(dict[str, str] | str).decode
_decode_key = msgspec.json.Decoder(_KeyBody).decode
_decode_room = msgspec.json.Decoder(_RoomBody).decode
_decode_backup = msgspec.json.Decoder(_BackupBody).decode
_decode_new_version = msgspec.json.Decoder(_NewVersionBody).decode
_decode_version = msgspec.json.Decoder(_VersionBody).decode


@attrs.frozen
class VersionInfo:
    """Body of a request that creates or updates a version.

    Attributes:
        auth_data: JSON text.
        version: the version number in the body; None without one.
    """

    algorithm: str
    auth_data: str
    version: str | None


def parse_upload(
    body: bytes, room_id: str | None, session_id: str | None, limits: Limits
) -> Iterator[RoomKey]:
    """Yield the keys of an upload, each session once.

    A large upload takes long: the caller may yield to the reactor between two keys.
    Unknown members are checked to be JSON and skipped.

    Args:
        body: a whole backup; the sessions of one room if the path names a room; one
            key if the path names a session too.

    Raises:
        NotJsonError: the body isn't JSON, or isn't UTF-8.
        BadJsonError: a field is missing, of the wrong type or out of range. The
            message names room, session and field, unless the body has more than
            `throttling.MAX_EXPLAINED_VALUES` values.
        InvalidParamError: an id is empty or over 255 bytes.
        TooLargeError: the body or a ``session_data`` is over its limit, or the body
            has more objects than a real upload of the same length.
    """
    _check_text(body, limits.max_body_bytes)
    try:
        if has_too_many_objects(body):
            check_syntax(body)
            raise TooLargeError("The body holds too many objects")
        rooms = _decode_upload(body, room_id, session_id)
    except (msgspec.MsgspecError, RecursionError) as error:
        explain_refusal(body, room_id, session_id, error)
    for room, sessions in rooms.items():
        check_id("Room", room)
        for session, key in sessions.items():
            yield _room_key(room, session, key, limits)


def parse_new_version(body: bytes, limits: Limits) -> VersionInfo:
    """Parse the body of a request that creates a version.

    A member ``version`` of any value is ignored: the server chooses the number.

    Raises:
        NotJsonError: the body isn't JSON, or isn't UTF-8.
        BadJsonError: ``algorithm`` or ``auth_data`` is missing or of the wrong type.
        TooLargeError: the body is over its limit.
    """
    info = _decode_version_body(body, limits, _decode_new_version)
    return VersionInfo(info.algorithm, bytes(info.auth_data).decode(), None)


def parse_version_info(body: bytes, limits: Limits) -> VersionInfo:
    """Parse the body of a request that updates a version.

    Raises:
        NotJsonError: the body isn't JSON, or isn't UTF-8.
        BadJsonError: ``algorithm`` or ``auth_data`` is missing, or one of them or
            ``version`` is of the wrong type.
        TooLargeError: the body is over its limit.
    """
    info = _decode_version_body(body, limits, _decode_version)
    version = None if info.version is msgspec.UNSET else info.version
    return VersionInfo(info.algorithm, bytes(info.auth_data).decode(), version)


def _decode_version_body(
    body: bytes, limits: Limits, decode: Callable[[bytes], _AnyVersionBody]
) -> _AnyVersionBody:
    _check_text(body, min(limits.max_body_bytes, _MAX_VERSION_BODY_BYTES))
    try:
        info = decode(body)
        auth_data = bytes(info.auth_data)
        _check_opaque(auth_data)
    except (ValueError, msgspec.MsgspecError, RecursionError) as error:
        if not isinstance(load_refused(body, error), dict):
            raise BadJsonError("The body must be an object") from None
        raise BadJsonError(f"The body can't be used: {error}") from None
    if "\0" in info.algorithm:
        raise BadJsonError("algorithm holds a NUL")
    if auth_data == b"null":
        raise BadJsonError("auth_data must not be null")
    return info


def _check_text(body: bytes, limit: int) -> None:
    if len(body) > limit:
        raise TooLargeError(f"The body is over {limit} bytes")
    if body.isascii():
        return
    try:
        body.decode()
    except UnicodeDecodeError:
        raise NotJsonError("The body is not UTF-8") from None


def _decode_upload(
    body: bytes, room_id: str | None, session_id: str | None
) -> Mapping[str, Mapping[str, _KeyBody]]:
    if room_id is None:
        rooms = _decode_backup(body).rooms
        return {room: value.sessions for room, value in rooms.items()}
    if session_id is None:
        return {room_id: _decode_room(body).sessions}
    return {room_id: {session_id: _decode_key(body)}}


def _room_key(room_id: str, session_id: str, body: _KeyBody, limits: Limits) -> RoomKey:
    check_id("Session", session_id)
    session_data = bytes(body.session_data)
    if len(session_data) > limits.max_session_data_bytes:
        where = name_field("session_data", room_id, session_id)
        raise TooLargeError(f"{where} is over {limits.max_session_data_bytes} bytes")
    if session_data == b"null":
        where = name_field("session_data", room_id, session_id)
        raise BadJsonError(f"{where} must not be null")
    try:
        _check_opaque(session_data)
    except (ValueError, msgspec.MsgspecError, RecursionError) as error:
        where = name_field("session_data", room_id, session_id)
        raise BadJsonError(f"{where} can't be used: {error}") from None
    metadata = KeyMetadata(
        body.first_message_index, body.forwarded_count, body.is_verified
    )
    return RoomKey(room_id, session_id, metadata, session_data.decode())


def _check_opaque(text: bytes) -> None:
    """Check that opaque JSON can be read by other decoders.

    Raises:
        ValueError: a number exceeds the range of a double.
        msgspec.MsgspecError: the same, or the text isn't JSON.
        RecursionError: the text is nested too deeply.
    """
    try:
        # Clients send an object of strings; old clients sent a string. Neither holds a
        # number.
        _decode_strings(text)
    except msgspec.MsgspecError:
        _decode_anything(text)
        # The decoder accepts integers of any length.
        if _LONG_INTEGER.search(text):
            json.loads(text, parse_int=_finite)

"""JSON of requests and answers: parsing into values, and encoding of values.

``session_data`` and ``auth_data`` are opaque: their text is checked to be JSON, and
passed on without a change.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Annotated, Any, NoReturn, TypeVar

import attrs
import msgspec

from .errors import (
    BadJsonError,
    InvalidParamError,
    NotJsonError,
    TooLargeError,
    unknown_version,
)
from .types import BackupInfo, KeyMetadata, KeyPage, Limits, RoomKey

#: Largest value of PostgreSQL's ``integer``, the type of the homeserver's columns.
MAX_INTEGER = 2**31 - 1
#: The specification's limit for ids, in bytes of UTF-8.
MAX_ID_BYTES = 255
#: Maximum characters of an id in a message or log line. A real id fits, and two ids
#: fit into a log line of 2 KB.
_MAX_SHOWN = 600
#: A version number: a positive ``bigint``, as in the homeserver's tables.
_VERSION = re.compile("[1-9][0-9]{0,18}")
_MAX_VERSION = 2**63 - 1
#: Maximum bytes of a body that creates or updates a version. A real body has some KiB.
_MAX_VERSION_BODY_BYTES = 1 << 16
#: Maximum JSON objects of an upload: `_OBJECTS`, and one more for each
#: `_BYTES_PER_OBJECT` bytes. A real key has two objects in 900 bytes. The limit keeps
#: the decoding of 10 MiB, which doesn't yield to the reactor, below 35 ms.
_OBJECTS = 10_000
_BYTES_PER_OBJECT = 256
#: Approximate maximum of values in a refused body that is decoded a second time for a
#: message that names room, session and field. An upload of 200 keys has 2,000 values.
_MAX_EXPLAINED = 10_000
#: An integer of 309 digits or more exceeds the range of a double.
_LONG_INTEGER = re.compile(b"[0-9]{309}")

_Integer = Annotated[int, msgspec.Meta(ge=0, le=MAX_INTEGER)]


# gc=False: these values are never part of a cycle, so the garbage collector skips them.
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
#: Checks that a text is JSON, without creating values.
_skip = msgspec.json.Decoder(msgspec.Raw).decode
_encode_string = msgspec.json.Encoder().encode
_json_decoder = json.JSONDecoder()


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


def check_id(kind: str, value: str) -> None:
    """Refuse a room or session id that is invalid or can't be stored.

    Args:
        kind: "Room" or "Session", for the message.

    Raises:
        BadJsonError: the id holds a NUL or a lone surrogate.
        InvalidParamError: the id is empty or over 255 bytes.
    """
    if "\0" in value or not _is_utf8(value):
        raise BadJsonError(f"{kind} id {shown(value)} holds a character it can't have")
    if not 0 < len(value.encode()) <= MAX_ID_BYTES:
        raise InvalidParamError(
            f"{kind} id {shown(value)} must have 1 to {MAX_ID_BYTES} bytes"
        )


def shown(value: str | None) -> str:
    """Quote an id for a message or a log line, in ASCII, cut at `_MAX_SHOWN`."""
    text = json.dumps(value[:MAX_ID_BYTES] if value else value)
    # An escape has six characters, so 255 characters may become 1,530.
    return text if len(text) <= _MAX_SHOWN else f'{text[:_MAX_SHOWN]}..."'


def parse_version(version: str) -> int:
    """Parse the version number of a request.

    Raises:
        NotFoundError: this server can't have issued such a number.
    """
    if not _VERSION.fullmatch(version) or int(version) > _MAX_VERSION:
        raise unknown_version()
    return int(version)


def is_json(text: str) -> bool:
    """Return whether a text is one JSON value.

    Values that an upload may not hold are JSON too: a lone surrogate, and a number
    beyond the range of a double. A text nested deeper than some 1,000 levels, the limit
    of Python's decoder, counts as JSON.
    """
    try:
        # The fast decoder refuses some valid JSON, such as deep nesting.
        with suppress(msgspec.MsgspecError, UnicodeEncodeError, RecursionError):
            _skip(text)
            return True
        json.loads(text, parse_int=_clipped, parse_constant=_no_constant)
    except RecursionError:
        return True
    except ValueError:
        return False
    return True


def are_json(texts: Iterable[str]) -> bool:
    """Return whether the fast decoder accepts all texts as JSON.

    After False, decide for each text by `is_json`: the fast decoder refuses some valid
    JSON. A text of 900 characters takes 0.4 to 0.9 microseconds.
    """
    try:
        for text in texts:
            _skip(text)
    except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError):
        return False
    return True


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
            `_MAX_EXPLAINED` values.
        InvalidParamError: an id is empty or over 255 bytes.
        TooLargeError: the body or a ``session_data`` is over its limit, or the body
            has more objects than a real upload of the same length.
    """
    _check_text(body, limits.max_body_bytes)
    try:
        if body.count(b"{") > _OBJECTS + len(body) // _BYTES_PER_OBJECT:
            _skip(body)
            raise TooLargeError("The body holds too many objects")
        rooms = _decode_upload(body, room_id, session_id)
    except (msgspec.MsgspecError, RecursionError) as error:
        _refuse_upload(body, room_id, session_id, error)
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
        if not isinstance(_load(body, error), dict):
            raise BadJsonError("The body must be an object") from None
        raise BadJsonError(f"The body can't be used: {error}") from None
    if "\0" in info.algorithm:
        raise BadJsonError("algorithm holds a NUL")
    if auth_data == b"null":
        raise BadJsonError("auth_data must not be null")
    return info


def encode_key(key: RoomKey) -> bytes:
    """Encode a key as the specification's ``KeyBackupData``. NULL becomes 0 or false.

    ``session_data`` isn't decoded: an old row may hold JSON that the strict decoder
    refuses.
    """
    return (
        b'{"first_message_index":%d,"forwarded_count":%d,"is_verified":%b,'
        b'"session_data":%b}'
    ) % (
        key.metadata.first_message_index or 0,
        key.metadata.forwarded_count or 0,
        b"true" if key.metadata.is_verified else b"false",
        key.session_data.encode(),
    )


def encode_backup_info(info: BackupInfo) -> bytes:
    """Encode a version of a backup, with ``etag`` and ``version`` as strings.

    ``info.auth_data`` must be JSON.
    """
    return b'{"algorithm":%b,"auth_data":%b,"count":%d,"etag":"%d","version":"%d"}' % (
        _encode_string(info.algorithm),
        info.auth_data.encode(),
        info.count,
        info.etag,
        info.version,
    )


def session_id_of(member: str) -> str:
    """Return the session id of a key in the form of a JSON object's member."""
    session_id: str
    session_id, _ = _json_decoder.raw_decode(member)
    return session_id


class BackupEncoder:
    """Encoder of a download: keys, ordered by room, become one JSON object.

    The object is the concatenation of the chunks of `encode` and of `finish`.
    """

    def __init__(self, with_rooms: bool) -> None:
        """
        Args:
            with_rooms: True for a whole backup, an object with ``rooms``; False for
                a room, an object with ``sessions``.
        """
        self._with_rooms = with_rooms
        self._room_id: str | None = None
        self._opened = False

    def encode(self, page: KeyPage) -> bytes:
        """Encode keys as the next chunk. The first chunk is never empty."""
        texts: list[str] = []
        if not self._opened:
            self._opened = True
            texts.append('{"rooms":{' if self._with_rooms else '{"sessions":{')
        for room_id, head, data in page.rows:
            start = "," if room_id == self._room_id else self._open(room_id)
            texts += (start, head, data, "}")
        # One character outside ASCII makes the joined text up to four times as large,
        # so callers pass a few keys at a time. Encoding each key by itself takes three
        # times as long.
        return "".join(texts).encode()

    def _open(self, room_id: str) -> str:
        """Return the text between the last key and the first key of a room."""
        first = self._room_id is None
        self._room_id = room_id
        if not self._with_rooms:
            return ""
        end = "" if first else "}},"
        return f'{end}{json.dumps(room_id)}:{{"sessions":{{'

    def finish(self) -> bytes:
        """Return the last chunk."""
        if self._with_rooms and self._room_id is not None:
            return b"}}}}"
        return b"}}"


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
        where = _where("session_data", room_id, session_id)
        raise TooLargeError(f"{where} is over {limits.max_session_data_bytes} bytes")
    if session_data == b"null":
        where = _where("session_data", room_id, session_id)
        raise BadJsonError(f"{where} must not be null")
    try:
        _check_opaque(session_data)
    except (ValueError, msgspec.MsgspecError, RecursionError) as error:
        where = _where("session_data", room_id, session_id)
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
        # What clients send is an object of strings, or a string, as old ones did:
        # nothing in it can be out of range.
        _decode_strings(text)
    except msgspec.MsgspecError:
        _decode_anything(text)
        # The decoder makes any integer one of Python's.
        if _LONG_INTEGER.search(text):
            json.loads(text, parse_int=_finite)


def _refuse_upload(
    body: bytes, room_id: str | None, session_id: str | None, error: Exception
) -> NoReturn:
    """Raise the error that names the fault of a refused upload."""
    value = _load(body, error)
    if session_id is not None:
        value = {"sessions": {session_id: value}}
    if room_id is not None:
        value = {"rooms": {room_id: value}}
    rooms = _member(value, "rooms", "The body")
    for room, room_value in rooms.items():
        check_id("Room", room)
        sessions = _member(room_value, "sessions", f"Room {shown(room)}")
        for session, key in sessions.items():
            check_id("Session", session)
            _refuse_key(room, session, key)
    raise BadJsonError(f"The body can't be used: {error}")


def _load(body: bytes, error: Exception) -> Any:
    """Decode a refused body by a decoder that accepts more than the strict decoder.

    Args:
        error: the strict decoder's error.

    Raises:
        NotJsonError: the body isn't JSON.
        BadJsonError: the body is nested too deeply, or has more than `_MAX_EXPLAINED`
            values; then the message is the strict decoder's.
    """
    try:
        if sum(map(body.count, (b"{", b"[", b","))) > _MAX_EXPLAINED:
            _skip(body)
            raise BadJsonError(f"The body can't be used: {error}")
        return json.loads(
            body.decode(), parse_int=_clipped, parse_constant=_no_constant
        )
    except RecursionError:
        raise BadJsonError("The body is nested too deeply") from None
    except (ValueError, msgspec.MsgspecError) as reason:
        raise NotJsonError(f"The body is not JSON: {reason}") from None


def _clipped(digits: str) -> int:
    """Parse an integer, cut at 20 digits: far out of range, and quick to parse."""
    return int(digits[:20])


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _member(value: Any, name: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadJsonError(f"{where} must be an object")
    if name not in value:
        raise BadJsonError(f"{where} has no {name}")
    if not isinstance(value[name], dict):
        raise BadJsonError(
            f"{name} of {where[:1].lower()}{where[1:]} must be an object"
        )
    member: dict[str, Any] = value[name]
    return member


def _refuse_key(room_id: str, session_id: str, key: Any) -> None:
    if not isinstance(key, dict):
        raise BadJsonError(
            f"{_where('the key', room_id, session_id)} must be an object"
        )
    for field in ("first_message_index", "forwarded_count"):
        value = key.get(field)
        if type(value) is not int or not 0 <= value <= MAX_INTEGER:
            raise BadJsonError(
                f"{_where(field, room_id, session_id)} must be an integer"
                f" from 0 to {MAX_INTEGER}"
            )
    if type(key.get("is_verified")) is not bool:
        raise BadJsonError(
            f"{_where('is_verified', room_id, session_id)} must be a boolean"
        )
    where = _where("session_data", room_id, session_id)
    if key.get("session_data") is None:
        raise BadJsonError(f"{where} must be there and not null")
    if not _is_utf8(json.dumps(key["session_data"], ensure_ascii=False)):
        raise BadJsonError(f"{where} holds a lone surrogate")


def _where(field: str, room_id: str, session_id: str) -> str:
    return f"{field} of session {shown(session_id)} in room {shown(room_id)}"


def _is_utf8(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True

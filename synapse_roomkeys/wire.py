"""JSON in and out: the bytes of requests to values, and values to the bytes of answers.

``session_data`` and ``auth_data`` are opaque. They are checked to be JSON and go
through as the text they came as.
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

#: The columns of the homeserver's tables are PostgreSQL's ``integer``.
MAX_INTEGER = 2**31 - 1
#: The specification's limit for ids, in bytes of UTF-8.
MAX_ID_BYTES = 255
#: Characters of an id that are shown: all of a real one's. Two make no line of 2 KB.
_MAX_SHOWN = 600
#: A version is a ``bigint`` in the homeserver's tables.
_VERSION = re.compile("[1-9][0-9]{0,18}")
_MAX_VERSION = 2**63 - 1
#: A real body that speaks of a version has some KiB.
_MAX_VERSION_BODY_BYTES = 1 << 16
#: How many objects an upload may hold, and for how many of its bytes one more. A real
#: key has two in 900 bytes. So a body of 10 MiB keeps the reactor for 35 ms at one go.
_OBJECTS = 10_000
_BYTES_PER_OBJECT = 256
#: How many values a body may hold, about, to be read again only to say what is wrong
#: with it: 200 keys have 2,000.
_MAX_EXPLAINED = 10_000
#: How many digits an integer has at least that no double holds.
_LONG_INTEGER = re.compile(b"[0-9]{309}")

_Integer = Annotated[int, msgspec.Meta(ge=0, le=MAX_INTEGER)]


# None of these can be part of a cycle: the garbage collector needn't look at them.
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
#: Sees that a body is JSON, without any value made of it.
_skip = msgspec.json.Decoder(msgspec.Raw).decode
_encode_string = msgspec.json.Encoder().encode
_json_decoder = json.JSONDecoder()


@attrs.frozen
class VersionInfo:
    """What a client says of a version of its backup.

    Attributes:
        auth_data: JSON text.
        version: the number it says it speaks of, where it says one.
    """

    algorithm: str
    auth_data: str
    version: str | None


def check_id(kind: str, value: str) -> None:
    """Refuse an id that can't be stored or that no room or session has.

    Args:
        kind: what the id is of, for the message.

    Raises:
        BadJsonError: it holds a NUL or a lone surrogate.
        InvalidParamError: it is empty or over 255 bytes.
    """
    if "\0" in value or not _is_utf8(value):
        raise BadJsonError(f"{kind} id {shown(value)} holds a character it can't have")
    if not 0 < len(value.encode()) <= MAX_ID_BYTES:
        raise InvalidParamError(
            f"{kind} id {shown(value)} must have 1 to {MAX_ID_BYTES} bytes"
        )


def shown(value: str | None) -> str:
    """An id as a message or a log line may hold it: short, quoted, in ASCII."""
    text = json.dumps(value[:MAX_ID_BYTES] if value else value)
    # An escape has six characters: a cut id may have many times its bytes.
    return text if len(text) <= _MAX_SHOWN else f'{text[:_MAX_SHOWN]}..."'


def parse_version(version: str) -> int:
    """The number of a version that a client names.

    Raises:
        NotFoundError: it is no number that this server can have issued.
    """
    if not _VERSION.fullmatch(version) or int(version) > _MAX_VERSION:
        raise unknown_version()
    return int(version)


def is_json(text: str) -> bool:
    """Whether a text is one JSON value, be it one that an upload may not hold: a lone
    surrogate, or a number that no double holds. A text that is nested too deeply for
    Python's decoder, by some 1,000 levels, counts as JSON."""
    try:
        # The fast decoder refuses some JSON that Python's reads, such as deep nesting.
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
    """Whether all of some texts are JSON for certain. If not, `is_json` knows of each.

    A text of 900 characters takes 0.9 microseconds.
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
    """The keys of an upload, each session once.

    A large one takes a while: the caller may do something else between two keys. What
    the server has no use for is skipped, and only seen to be JSON.

    Args:
        body: a whole backup, or what the path leaves open of it: one room's
            sessions when it names a room, one key when it names a session too.

    Raises:
        NotJsonError: the body isn't JSON, or isn't UTF-8.
        BadJsonError: something is missing, of the wrong type or out of range; the
            message names room, session and field, unless the body holds a great many.
        InvalidParamError: an id is empty or over 255 bytes.
        TooLargeError: the body or a ``session_data`` is over its limit, or the body
            holds more objects than any real one of its length.
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
    """Parse the body of a request that makes a version.

    A ``version`` in it is ignored, whatever it holds: the server chooses the number.

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
    """A key, as the specification's ``KeyBackupData``. A NULL reads as 0 or false.

    Its data isn't decoded: an old row may hold what the strict decoder refuses.
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
    """One version of a backup, with ``etag`` and ``version`` as strings.

    Its ``auth_data`` must be JSON.
    """
    return b'{"algorithm":%b,"auth_data":%b,"count":%d,"etag":"%d","version":"%d"}' % (
        _encode_string(info.algorithm),
        info.auth_data.encode(),
        info.count,
        info.etag,
        info.version,
    )


def session_id_of(member: str) -> str:
    """Session id of a key that is written as a member of a JSON object."""
    session_id: str
    session_id, _ = _json_decoder.raw_decode(member)
    return session_id


class BackupEncoder:
    """Keys in, in the order of their rooms, and the bytes of a download out.

    The chunks that `encode` gives, and at the end `finish`, make one JSON object.
    """

    def __init__(self, with_rooms: bool) -> None:
        """
        Args:
            with_rooms: whether the object has ``rooms``, as the one of a whole
                backup, or ``sessions`` alone, as the one of a room.
        """
        self._with_rooms = with_rooms
        self._room_id: str | None = None
        self._opened = False

    def encode(self, page: KeyPage) -> bytes:
        """The next chunk. It is never empty at the first call."""
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
        """What stands between the key before and the first one of a room."""
        first = self._room_id is None
        self._room_id = room_id
        if not self._with_rooms:
            return ""
        end = "" if first else "}},"
        return f'{end}{json.dumps(room_id)}:{{"sessions":{{'

    def finish(self) -> bytes:
        """The last chunk."""
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
    """Read what is opaque, only to see that others can read it.

    Raises:
        ValueError: a number is out of a double's range.
        msgspec.MsgspecError: the same, or it isn't JSON.
        RecursionError: it is nested too deeply.
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
    """Say what is wrong with an upload that the strict decoder refused."""
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
    """A body that was refused, read by a decoder that takes more than the strict one.

    Args:
        error: why it was refused.

    Raises:
        NotJsonError: it isn't JSON.
        BadJsonError: it is nested too deeply; or nothing more is to be said of it, as
            it holds too much to be read at one go.
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
    """Any integer far out of range stands for another: none is read at length."""
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

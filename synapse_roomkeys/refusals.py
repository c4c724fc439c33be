"""Messages that name the fault of a refused body.

The strict decoder of `wire` refuses a body with a message that names no room and no
session. `explain_refusal` decodes the body a second time, with Python's decoder, and
checks field by field, so that the message names room, session and field. A body with
too many values (`throttling.is_explainable`) keeps the strict decoder's message,
because a second decoding would block the reactor.
"""

import json
from typing import Any, NoReturn

import msgspec

from .errors import BadJsonError, NotJsonError
from .identifiers import check_id, is_utf8, quote_for_log
from .json_text import check_syntax, load_json
from .throttling import is_explainable

#: Largest value of PostgreSQL's ``integer``, the type of the homeserver's columns.
MAX_INTEGER = 2**31 - 1


def explain_refusal(
    body: bytes, room_id: str | None, session_id: str | None, error: Exception
) -> NoReturn:
    """Raise the error that names the fault of a refused upload."""
    value = load_refused(body, error)
    if session_id is not None:
        value = {"sessions": {session_id: value}}
    if room_id is not None:
        value = {"rooms": {room_id: value}}
    rooms = _member(value, "rooms", "The body")
    for room, room_value in rooms.items():
        check_id("Room", room)
        sessions = _member(room_value, "sessions", f"Room {quote_for_log(room)}")
        for session, key in sessions.items():
            check_id("Session", session)
            _refuse_key(room, session, key)
    raise BadJsonError(f"The body can't be used: {error}")


def load_refused(body: bytes, error: Exception) -> Any:
    """Decode a refused body by a decoder that accepts more than the strict decoder.

    Args:
        error: the strict decoder's error.

    Raises:
        NotJsonError: the body isn't JSON.
        BadJsonError: the body is nested too deeply, or has more than
            `throttling.MAX_EXPLAINED_VALUES` values; then the message is the strict
            decoder's.
    """
    try:
        if not is_explainable(body):
            check_syntax(body)
            raise BadJsonError(f"The body can't be used: {error}")
        return load_json(body.decode())
    except RecursionError:
        raise BadJsonError("The body is nested too deeply") from None
    except (ValueError, msgspec.MsgspecError) as reason:
        raise NotJsonError(f"The body is not JSON: {reason}") from None


def name_field(field: str, room_id: str, session_id: str) -> str:
    """Return the name of a key's field for a message, with session id and room id."""
    session, room = quote_for_log(session_id), quote_for_log(room_id)
    return f"{field} of session {session} in room {room}"


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
            f"{name_field('the key', room_id, session_id)} must be an object"
        )
    for field in ("first_message_index", "forwarded_count"):
        value = key.get(field)
        if type(value) is not int or not 0 <= value <= MAX_INTEGER:
            raise BadJsonError(
                f"{name_field(field, room_id, session_id)} must be an integer"
                f" from 0 to {MAX_INTEGER}"
            )
    if type(key.get("is_verified")) is not bool:
        raise BadJsonError(
            f"{name_field('is_verified', room_id, session_id)} must be a boolean"
        )
    where = name_field("session_data", room_id, session_id)
    if key.get("session_data") is None:
        raise BadJsonError(f"{where} must be there and not null")
    if not is_utf8(json.dumps(key["session_data"], ensure_ascii=False)):
        raise BadJsonError(f"{where} holds a lone surrogate")

"""What the contract says of a body, by another reader than the one under test."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from synapse_roomkeys.errors import RoomKeysError
from synapse_roomkeys.service.logs import MAX_LINE
from synapse_roomkeys.types import RoomKey

from ..contract.base import same
from .inputs import FIELDS


def read(body: bytes) -> Any:
    """A body as the strictest of readers reads it, but for numbers that no double
    holds: they may stand where nothing is kept of them."""

    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is no JSON")

    value = json.loads(body.decode("utf-8"), parse_constant=refuse, parse_int=integer)
    json.dumps(value, ensure_ascii=False).encode()
    return value


def integer(digits: str) -> int | float:
    """A number of any length."""
    return int(digits) if len(digits) < 400 else float(digits)


def kept(text: str) -> Any:
    """What is stored, as any client can read it."""
    return json.loads(text, parse_float=finite, parse_int=finite_integer)


def finite(digits: str) -> float:
    """A number that fits in a double."""
    value = float(digits)
    assert math.isfinite(value), digits
    return value


def finite_integer(digits: str) -> int:
    """An integer that fits in a double, if not exactly."""
    finite(digits)
    return int(digits)


def keys_of(body: bytes, room_id: str | None, session_id: str | None) -> Any:
    """The keys of an upload by room and session id, by the contract alone."""
    value = read(body)
    if session_id is not None:
        return {room_id: {session_id: value}}
    if room_id is not None:
        return {room_id: value["sessions"]}
    return {room: inner["sessions"] for room, inner in value["rooms"].items()}


def is_integer(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def check_accepted(
    keys: Iterable[RoomKey], body: bytes, room_id: str | None, session_id: str | None
) -> None:
    """What was taken is what was sent, and what the contract has taken."""
    got: dict[str, dict[str, Any]] = {}
    for key in keys:
        for id_ in (key.room_id, key.session_id):
            assert 0 < len(id_.encode()) <= 255 and "\0" not in id_
        metadata = key.metadata
        got.setdefault(key.room_id, {})[key.session_id] = {
            "first_message_index": metadata.first_message_index,
            "forwarded_count": metadata.forwarded_count,
            "is_verified": metadata.is_verified,
            "session_data": kept(key.session_data),
        }
    for sessions in keys_of(body, room_id, session_id).values():
        for sent in sessions.values():
            assert is_integer(sent["first_message_index"])
            assert is_integer(sent["forwarded_count"])
            assert type(sent["is_verified"]) is bool
            assert sent["session_data"] is not None
    same(got, fields_of(keys_of(body, room_id, session_id)))


def fields_of(rooms: Any) -> dict[str, dict[str, Any]]:
    """Keys without the members that no server keeps, and without empty rooms."""
    return {
        room: {
            session: {field: key[field] for field in FIELDS}
            for session, key in sessions.items()
        }
        for room, sessions in rooms.items()
        if sessions
    }


def check_refusal(error: RoomKeysError) -> None:
    """A refusal has a status and an errcode of its own, and isn't long."""
    assert error.code in (400, 404, 413), error
    assert error.errcode.startswith("M_") and error.msg
    assert len(error.msg.encode()) < MAX_LINE, error.msg

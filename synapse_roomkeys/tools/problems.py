"""Faults of stored values, in plain words: functions on values, without any IO.

The texts never quote ``session_data`` or ``auth_data``.
"""

import base64
import math
from collections.abc import Iterator
from enum import Enum
from typing import Any

import attrs

from ..identifiers import MAX_ID_BYTES
from ..json_text import is_valid_json, load_json
from ..storage import Blob, StoredRow, StoredVersion
from ..storage.inspection import Value

#: The algorithm whose ``auth_data`` has a Curve25519 key.
_MEGOLM = "m.megolm_backup.v1.curve25519-aes-sha2"
#: Bytes of a Curve25519 key, and characters of its unpadded base64.
_KEY_BYTES, _KEY_CHARACTERS = 32, 43
#: The largest values of PostgreSQL's types, by the column's type.
_MAX_INTEGER = 2**31 - 1
_MAX_BIGINT = 2**63 - 1
#: The largest integer of JSON that all decoders read alike. The server reads larger
#: integers as 0.
_MAX_SAFE = 2**53 - 1
#: Total bytes of user, room and session id that always fit into an index entry of
#: PostgreSQL: 2,704 bytes without the version and headers. PostgreSQL compresses long
#: ids, so longer ids may fit.
_MAX_INDEXED = 2660
#: The effects of text that isn't UTF-8, and of a BLOB: in a version, and in a key.
_UNSENT = "so the server can't send the backup"
_LEFT_OUT = "so the server leaves the key out of downloads"


class Port(Enum):
    """The outcome of ``synapse_port_db``, which copies an SQLite file of a Synapse to
    PostgreSQL; the texts are for the operator."""

    COPIES = ""
    CHANGES = "synapse_port_db changes the value"
    DROPS = "synapse_port_db leaves the row out"
    STOPS = "synapse_port_db stops at the row"


@attrs.frozen
class Problem:
    """A fault of a row.

    Attributes:
        kind: name for programs and for the sums.
        text: the fault for people.
        is_usable: Whether clients can use the key, or the version, all the same.
        port: the outcome of a copy to PostgreSQL.
    """

    kind: str
    text: str
    is_usable: bool = True
    port: Port = Port.COPIES


def find_key_problems(key: StoredRow) -> Iterator[Problem]:
    """Yield the faults of a key's columns, without the user id and the version."""
    ids = {"room id": key.room_id, "session id": key.session_id}
    for name, value in ids.items():
        yield from _find_text_problems(name, value, _LEFT_OUT)
        yield from _find_length_problems(name, value)
    if sum(map(len, (key.user_id, key.room_id, key.session_id))) > _MAX_INDEXED:
        text = "the ids may be too long for PostgreSQL's index"
        yield Problem("long_ids", text, port=Port.STOPS)
    for name in ("first_message_index", "forwarded_count"):
        yield from _find_field_problems(name, getattr(key, name))
    if key.is_verified is None:
        yield Problem(
            "null", "is_verified is NULL, which reads as false and is harmless"
        )
    elif not _is_boolean(key.is_verified):
        text = f"is_verified is {_describe(key.is_verified)}, not a boolean"
        # The server reads text as false, synapse_port_db as true.
        is_text = isinstance(key.is_verified, bytes)
        port = Port.CHANGES if is_text else Port.COPIES
        yield Problem("wrong_type", text, port=port)
    yield from _find_data_problems(key.session_data)


def find_user_problems(user_id: Value) -> Iterator[Problem]:
    """Yield the faults of a user id."""
    yield from _find_text_problems("user id", user_id, _UNSENT)


def find_version_problems(version: StoredVersion) -> Iterator[Problem]:
    """Yield the faults of a version's columns, without the user id. A deleted version
    has no ``auth_data`` to check."""
    yield from find_number_problems("version", version.version)
    yield from find_number_problems("deleted", version.deleted)
    if version.etag is None:
        yield Problem("null", "etag is NULL, which reads as 0 and is harmless")
    elif isinstance(version.etag, int) and version.etag < 0:
        text = f"etag is {version.etag}, so the server may refuse uploads"
        yield Problem("negative_etag", text)
    else:
        yield from find_number_problems("etag", version.etag)
    yield from _find_text_problems("algorithm", version.algorithm, _UNSENT)
    auth_data = list(_find_text_problems("auth_data", version.auth_data, _UNSENT))
    yield from auth_data
    if version.deleted == 0 and all(found.is_usable for found in auth_data):
        yield from _find_auth_problems(version)


def find_number_problems(name: str, value: Value) -> Iterator[Problem]:
    """Yield the faults of a number that identifies or describes a version."""
    if isinstance(value, int) and abs(value) <= _MAX_BIGINT:
        return
    port = _port_number(value, _MAX_BIGINT)
    yield Problem("wrong_type", f"{name} is {_describe(value)}", False, port)


def _find_field_problems(name: str, value: Value) -> Iterator[Problem]:
    """Yield the faults of a key's number. The server reads an integer from 0 to
    2^53 - 1 unchanged, and other values as 0."""
    if value is None:
        yield Problem("null", f"{name} is NULL, which reads as 0 and is harmless")
    elif not isinstance(value, int):
        text = f"{name} is {_describe(value)}, which reads as 0"
        port = _port_number(value, _MAX_INTEGER)
        yield Problem("wrong_type", text, port=port)
    elif not 0 <= value <= _MAX_INTEGER:
        text = f"{name} is {value}"
        if value < 0:
            text += ", which reads as 0"
        elif value > _MAX_SAFE:
            text += ", above 2^53 - 1, which reads as 0"
        else:
            text += ", above 2^31 - 1"
        yield Problem("out_of_range", text, port=_port_number(value, _MAX_INTEGER))


def _port_number(value: Value, maximum: int) -> Port:
    """Return the outcome of a copy into an integer of PostgreSQL, which rounds."""
    is_number = isinstance(value, int | float) and math.isfinite(value)
    if not is_number or not -maximum - 1 <= round(value) <= maximum:
        return Port.STOPS
    return Port.COPIES if isinstance(value, int) else Port.CHANGES


def _is_boolean(value: Value) -> bool:
    """Return whether a value is a boolean: True, False, or SQLite's 0 and 1."""
    return isinstance(value, int) and value in (0, 1)


def _describe(value: Value) -> str:
    """Describe a number, or name the type of another value, without the value."""
    if isinstance(value, Blob):
        return "a BLOB"
    return "text" if isinstance(value, bytes) else str(value)


def _find_text_problems(name: str, value: bytes, effect: str) -> Iterator[Problem]:
    """Yield the faults of a text's type, encoding and characters.

    Args:
        effect: words about text that isn't UTF-8, and about a BLOB.
    """
    if isinstance(value, Blob):
        # The server reads a BLOB of session_data as text. PostgreSQL writes a BLOB as
        # hexadecimal text.
        is_usable = name == "session_data"
        text = f"{name} is a BLOB" + ("" if is_usable else f", {effect}")
        yield Problem("wrong_type", text, is_usable, Port.CHANGES)
    elif not is_utf8(value):
        text = f"{name} isn't UTF-8, {effect}"
        yield Problem("not_utf8", text, False, Port.STOPS)
    elif b"\0" in value:
        yield Problem("nul", f"{name} holds a NUL", port=Port.DROPS)


def _find_length_problems(name: str, value: bytes) -> Iterator[Problem]:
    """Yield the faults of an id's length. Downloads contain the key; requests for the
    single key are refused."""
    if not value:
        yield Problem("bad_length", f"{name} is empty")
    elif len(value) > MAX_ID_BYTES:
        text = f"{name} has {len(value):,} bytes, more than {MAX_ID_BYTES}"
        yield Problem("bad_length", text)


def _find_data_problems(data: bytes) -> Iterator[Problem]:
    """Yield the faults of a key's data."""
    yield from _find_text_problems("session_data", data, _LEFT_OUT)
    if not is_utf8(data):
        return
    text = data.decode()
    if text.strip() == "null":
        yield Problem("json_null", "session_data is JSON null", False)
    elif not is_valid_json(text):
        yield Problem("not_json", "session_data isn't JSON", False)


def _find_auth_problems(version: StoredVersion) -> Iterator[Problem]:
    """Yield the faults of a live version's ``auth_data``."""
    auth_data = _load_object(version.auth_data)
    if auth_data is None:
        yield Problem("auth_data", "auth_data isn't a JSON object", False)
    elif bytes(version.algorithm) == _MEGOLM.encode():
        public_key = auth_data.get("public_key")
        if not isinstance(public_key, str):
            yield Problem("public_key", "auth_data has no public_key", False)
        elif len(public_key) != _KEY_CHARACTERS or not _has_key_bytes(public_key):
            text = f"public_key isn't unpadded base64 of {_KEY_BYTES} bytes"
            yield Problem("public_key", text, _has_key_bytes(public_key))


def _load_object(text: bytes) -> dict[str, Any] | None:
    """Return the object of a JSON text; None for any other text."""
    try:
        value = load_json(text.decode())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _has_key_bytes(public_key: str) -> bool:
    """Return whether base64, padded or not, decodes to `_KEY_BYTES` bytes."""
    try:
        padded = public_key.rstrip("=") + "=" * (-len(public_key.rstrip("=")) % 4)
        return len(base64.b64decode(padded, validate=True)) == _KEY_BYTES
    except ValueError:
        return False


def is_utf8(value: bytes) -> bool:
    """Return whether bytes are UTF-8."""
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True

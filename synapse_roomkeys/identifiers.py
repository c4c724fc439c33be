"""Ids of rooms and sessions, and numbers of versions: checks, and quotes for a log."""

import json
import re

from .errors import BadJsonError, InvalidParamError, unknown_version

#: The specification's limit for ids, in bytes of UTF-8.
MAX_ID_BYTES = 255
#: Maximum characters of an id in a message or log line. A real id fits, and two ids
#: fit into a log line of 2 KB.
_MAX_QUOTED = 600
#: A version number: a positive ``bigint``, as in the homeserver's tables.
_VERSION = re.compile("[1-9][0-9]{0,18}")
_MAX_VERSION = 2**63 - 1


def check_id(kind: str, value: str) -> None:
    """Refuse an id that is invalid or can't be stored.

    Args:
        kind: the beginning of the message, such as "Room" or "Session".

    Raises:
        BadJsonError: the id holds a NUL or a lone surrogate.
        InvalidParamError: the id is empty or over 255 bytes.
    """
    if "\0" in value or not is_utf8(value):
        raise BadJsonError(
            f"{kind} id {quote_for_log(value)} holds a character it can't have"
        )
    if not 0 < len(value.encode()) <= MAX_ID_BYTES:
        raise InvalidParamError(
            f"{kind} id {quote_for_log(value)} must have 1 to {MAX_ID_BYTES} bytes"
        )


def quote_for_log(value: str | None) -> str:
    """Quote an id for a message or a log line, in ASCII, cut at `_MAX_QUOTED`."""
    text = json.dumps(value[:MAX_ID_BYTES] if value else value)
    # An escape has six characters, so 255 characters may become 1,530.
    return text if len(text) <= _MAX_QUOTED else f'{text[:_MAX_QUOTED]}..."'


def parse_version(version: str) -> int:
    """Parse the version number of a request.

    Raises:
        NotFoundError: this server can't have issued such a number.
    """
    if not _VERSION.fullmatch(version) or int(version) > _MAX_VERSION:
        raise unknown_version()
    return int(version)


def is_utf8(value: str) -> bool:
    """Return whether a text can be encoded as UTF-8: it has no lone surrogate."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True

"""Log lines about keys that were replaced by better keys."""

from collections.abc import Iterable, Iterator

from .identifiers import quote_for_log
from .types import KeyMetadata, Replacement

#: Log message with two texts: the backup, and its replaced keys.
MESSAGE = "Replaced keys (first_message_index/forwarded_count/is_verified): %s%s"
#: Maximum length of a log line about several replaced keys, in ASCII characters,
#: including the backslashes that JSON adds. The service cuts longer lines.
_MAX_SIZE = 1792


def describe(backup: str, replaced: Iterable[Replacement]) -> Iterator[str]:
    """Yield texts for `MESSAGE` that describe the replaced keys of an upload.

    Each text holds as many keys as possible, because a log line costs the host as
    much time as several keys do. Only a line with a single key may exceed the maximum
    length. The room id is written before the room's first key, and again at the start
    of each text.

    Args:
        backup: the other text in `MESSAGE`.
    """
    max_size = _MAX_SIZE - len(MESSAGE) - _size(ascii(backup))
    text = room = ""
    size = 0
    last_room: str | None = None
    for key in replaced:
        session = f" session={quote_for_log(key.session_id)}"
        session += f" old={_rank_fields(key.old)} new={_rank_fields(key.new)}"
        if key.room_id == last_room:
            added = session
        else:
            last_room, room = key.room_id, f" room={quote_for_log(key.room_id)}"
            added = room + session
        size += _size(added)
        if text and size > max_size:
            yield text
            text = room + session
            size = _size(text)
        else:
            text += added
    if text:
        yield text


def _rank_fields(key: KeyMetadata) -> str:
    """The three fields that rank a key, separated by slashes, for a log line."""
    return f"{key.first_message_index}/{key.forwarded_count}/{key.is_verified}"


def _size(text: str) -> int:
    """Length of an ASCII text in a JSON string, where a backslash precedes each quote
    and each backslash."""
    return len(text) + text.count('"') + text.count("\\")

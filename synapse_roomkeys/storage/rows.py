"""Rows of the database as values."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import attrs

from ..types import KeyMetadata, KeyPage, Position, RoomKey, StoredKey
from . import sql

#: How many keys a page of a download holds: about 0.4 MB of real ones.
PAGE_KEYS = 400
#: How many characters of keys and their ids a statement writes at least, where more
#: follow: what makes a statement of them holds Python's interpreter meanwhile. Ordinary
#: uploads have less.
CHUNK_SIZE = 1 << 19
#: What a row counts for besides.
_ROW_SIZE = 100
#: The largest integer that all readers of JSON agree on.
_MAX_SAFE = 2**53 - 1


_decoder = json.JSONDecoder()


@attrs.frozen
class Found:
    """What a look at a version found.

    Attributes:
        current: the number of the user's current version.
        count: of its keys, where it is cached.
        stored: the sessions that were looked for, by their places among those.
    """

    etag: int
    current: int
    count: int | None
    stored: dict[int, StoredKey]


def found_of(rows: list[tuple[Any, ...]]) -> Found:
    """What the rows of ``find_sessions`` say; there is at least one."""
    etag, current, count = rows[0][:3]
    stored = {
        place: StoredKey(metadata(fields), bool(has_session_data), size)
        for _, _, _, place, *fields, has_session_data, size in rows
        if place is not None
    }
    return Found(etag, current, count, stored)


def page_statement(
    dialect: sql.Dialect,
    backup: tuple[str, int],
    room_id: str | None,
    after: Position,
    by_cursor: bool,
) -> tuple[str, tuple[str | int, ...]]:
    """The statement that gets a page, and its parameters.

    Args:
        backup: a user and a version.
        by_cursor: whether the transaction has a cursor that goes on after the page
            before it.
    """
    if by_cursor and dialect.next_page is not None:
        return dialect.next_page, (PAGE_KEYS,)
    pages = dialect.pages
    common = (*backup, *backup)
    numbers = (PAGE_KEYS * dialect.pages_at_once, PAGE_KEYS)
    if room_id is None:
        if after is None:
            return pages.first, (*common, *numbers)
        return pages.following, (*common, *after, *numbers)
    if after is None:
        return pages.first_of_room, (*common, room_id, *numbers)
    return pages.following_of_room, (*common, room_id, after[1], *numbers)


def key_page(rows: list[tuple[Any, ...]]) -> KeyPage:
    """A page of the rows of a download. Whoever takes it has the work of putting them
    together: the database can go on with the next one meanwhile."""
    if not rows or rows[0][0] is None:
        return KeyPage((), None)
    if len(rows) < PAGE_KEYS:
        return KeyPage(rows, None)
    room_id, member = rows[-1]
    session_id, _ = _decoder.raw_decode(member)
    return KeyPage(rows, (room_id, session_id))


def ids_of(key: RoomKey) -> tuple[str, str]:
    """A key's room and session id."""
    return key.room_id, key.session_id


def chunks(keys: Iterable[RoomKey]) -> Iterator[list[tuple[Any, ...]]]:
    """Keys as rows to write, as many as one statement takes at a time."""
    rows: list[tuple[Any, ...]] = []
    size = 0
    for key in keys:
        given = key.metadata
        rows.append(
            (
                key.room_id,
                key.session_id,
                given.first_message_index,
                given.forwarded_count,
                given.is_verified,
                key.session_data,
            )
        )
        size += len(key.session_data) + len(key.room_id) + len(key.session_id)
        size += _ROW_SIZE
        if size > CHUNK_SIZE:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def metadata(row: Sequence[Any]) -> KeyMetadata:
    """The three fields of a row, as far as they are what a key can have."""
    index, forwarded, verified = row
    is_verified = None if verified is None else bool(verified)
    return KeyMetadata(natural(index), natural(forwarded), is_verified)


def natural(value: Any) -> int | None:
    return value if isinstance(value, int) and 0 <= value <= _MAX_SAFE else None

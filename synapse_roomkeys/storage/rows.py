"""Rows of the database as values."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import attrs

from ..types import KeyMetadata, KeyPage, Position, RoomKey, StoredKey
from ..wire import is_json, session_id_of
from . import sql

#: How many keys are read at once for a download: about 0.4 MB of real ones.
PAGE_KEYS = 400
#: How many at first, before it is known how large they are.
FIRST_KEYS = 100
#: How many bytes of memory a page of them takes at most, if it is of more than one key.
#: Keys may be of 64 KiB each, and four times as much where one character isn't ASCII.
PAGE_SIZE = 1 << 20
#: How many characters of keys and their ids a statement writes at least, where more
#: follow: what makes a statement of them holds Python's interpreter meanwhile. Ordinary
#: uploads have less.
CHUNK_SIZE = 1 << 19
#: What a row counts for besides.
_ROW_SIZE = 100
#: The largest integer that all readers of JSON agree on.
_MAX_SAFE = 2**53 - 1


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


def found_of(rows: list[tuple[Any, ...]], with_data: bool) -> Found:
    """The rows of ``find_sessions``, at least one, as a value.

    Args:
        with_data: the rows are those of ``find_sessions_with_data``.
    """
    etag, current, count = rows[0][:3]
    stored = {
        place: StoredKey(metadata(fields), _is_whole(data) if with_data else data, size)
        for _, _, _, place, *fields, data, size in rows
        if place is not None
    }
    return Found(etag, current, count, stored)


def _is_whole(session_data: str) -> bool:
    """Whether the data of a stored key can be given to clients."""
    return session_data != "null" and is_json(session_data)


def page_statement(
    dialect: sql.Dialect,
    backup: tuple[str, int],
    room_id: str | None,
    after: Position | None,
    by_cursor: bool,
) -> tuple[str, tuple[str | int, ...]]:
    """The statement that reads keys of a download, and its parameters.

    Args:
        backup: a user and a version.
        by_cursor: whether the transaction has a cursor that goes on after the keys
            before them.
    """
    asked = keys_after(after)
    if by_cursor and dialect.next_page is not None:
        return dialect.next_page, (asked,)
    pages = dialect.pages
    common = (*backup, *backup)
    numbers = (PAGE_KEYS * dialect.pages_at_once, asked)
    if room_id is None:
        if after is None:
            return pages.first, (*common, *numbers)
        return pages.following, (*common, after.room_id, after.session_id, *numbers)
    if after is None:
        return pages.first_of_room, (*common, room_id, *numbers)
    return pages.following_of_room, (*common, room_id, after.session_id, *numbers)


def keys_after(after: Position | None) -> int:
    """How many keys are read at once from there on."""
    return min(FIRST_KEYS, PAGE_KEYS) if after is None else after.keys


def key_pages(rows: list[tuple[Any, ...]], asked: int) -> Iterator[KeyPage]:
    """The rows of a download, as one page if they aren't large. Whoever takes it has
    the work of putting them together: the database can go on meanwhile.

    Args:
        asked: of how many rows at most; more may follow if there are as many.
    """
    if not rows or rows[0][0] is None:
        yield KeyPage((), (), None)
        return
    # At most: `sys.getsizeof` would be exact, and takes four times as long.
    sizes = [
        (len(head) + len(data) + 1) * (1 if head.isascii() and data.isascii() else 4)
        for _, head, data in rows
    ]
    fitting = PAGE_SIZE * len(rows) // sum(sizes)
    first = 0
    for end in _page_ends(sizes):
        last = None
        if end < len(rows) or end >= asked:
            room_id, head, _ = rows[end - 1]
            keys = min(max(fitting, 1), PAGE_KEYS)
            last = Position(room_id, session_id_of(head), keys)
        yield KeyPage(rows[first:end], sizes[first:end], last)
        first = end


def _page_ends(sizes: list[int]) -> Iterator[int]:
    """How many rows there are up to the end of each page, by the sizes of all."""
    if sum(sizes) > PAGE_SIZE:
        page = 0
        for end, size in enumerate(sizes):
            page += size
            if end and page > PAGE_SIZE:
                yield end
                page = size
    yield len(sizes)


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

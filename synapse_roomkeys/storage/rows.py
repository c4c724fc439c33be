"""Rows of the database as values, and keys in pages and batches."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..encoding import session_id_of
from ..json_text import is_valid_json
from ..types import KeyMetadata, KeyPage, Position, RoomKey, StoredKey
from .values import Snapshot

#: Maximum number of keys in one page of a download: about 0.4 MB of real keys.
PAGE_KEYS = 400
#: Number of keys in the first page, which is read before their size is known.
FIRST_KEYS = 50
#: Maximum memory of a page in bytes, if the page has more than one key. A key may have
#: 64 KiB, and four times as much in memory if one character isn't ASCII.
PAGE_SIZE = 1 << 20
#: A batch ends with the key that takes it over this number of characters of keys and
#: ids. Packing a batch for its statement holds Python's interpreter lock, and so does
#: the driver. Ordinary uploads are smaller than one batch.
CHUNK_SIZE = 1 << 19
#: Characters that a row counts for in addition to its key and ids.
_ROW_SIZE = 100
#: The largest integer that all readers of JSON agree on.
_MAX_SAFE = 2**53 - 1


def read_snapshot(rows: list[tuple[Any, ...]], with_data: bool) -> Snapshot:
    """Return the rows of `Engine.find_sessions`, at least one, as a value.

    Args:
        with_data: the rows hold the ``session_data`` of the sessions.
    """
    etag, current, count = rows[0][:3]
    stored = {
        place: StoredKey(metadata(fields), _is_whole(data) if with_data else data, size)
        for _, _, _, place, *fields, data, size in rows
        if place is not None
    }
    return Snapshot(etag, current, count, stored)


def _is_whole(session_data: str) -> bool:
    """Return whether the session_data of a stored key can be sent to clients."""
    return session_data != "null" and is_valid_json(session_data)


def keys_after(after: Position | None) -> int:
    """Return how many keys the query after a position reads."""
    return min(FIRST_KEYS, PAGE_KEYS) if after is None else after.keys


def key_pages(rows: list[tuple[Any, ...]], asked: int) -> Iterator[KeyPage]:
    """Split the rows of a download into pages of `PAGE_SIZE` bytes at most.

    The rows stay as they are: the reactor's thread joins them while the database's
    thread reads the next page.

    Args:
        asked: the LIMIT of the query. If it returned as many rows, more may follow.
    """
    if not rows or rows[0][0] is None:
        yield KeyPage((), (), None)
        return
    # An upper bound: `sys.getsizeof` would be exact, and takes four times as long.
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
    """Yield the index after the last row of each page, given the sizes of all rows."""
    if sum(sizes) > PAGE_SIZE:
        page = 0
        for end, size in enumerate(sizes):
            page += size
            if end and page > PAGE_SIZE:
                yield end
                page = size
    yield len(sizes)


def batches(keys: Iterable[RoomKey]) -> Iterator[list[RoomKey]]:
    """Split keys into lists, each for one statement: at least `CHUNK_SIZE` characters
    each, except the last one."""
    batch: list[RoomKey] = []
    size = 0
    for key in keys:
        batch.append(key)
        size += len(key.session_data) + len(key.room_id) + len(key.session_id)
        size += _ROW_SIZE
        if size > CHUNK_SIZE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def metadata(row: Sequence[Any]) -> KeyMetadata:
    """Return the three fields of a row, with None for a value that no key can have."""
    index, forwarded, verified = row
    is_verified = None if verified is None else bool(verified)
    return KeyMetadata(natural(index), natural(forwarded), is_verified)


def natural(value: Any) -> int | None:
    """Return an integer from 0 to 2^53 - 1 unchanged, and None for any other value."""
    return value if isinstance(value, int) and 0 <= value <= _MAX_SAFE else None

"""Comparison of two keys, and the merge of an upload into a backup."""

from collections.abc import Iterable, Mapping

import attrs

from .types import KeyMetadata, Replacement, RoomKey, StoredKey


def rank(key: KeyMetadata) -> tuple[bool, int, int]:
    """Sort key for keys in the order of the specification; the best key sorts lowest.

    Section "Server-side key backups", "Recovering keys / storing keys": verified before
    unverified, then the lower ``first_message_index``, then the lower
    ``forwarded_count``. NULL counts as 0 or false.
    """
    return (
        not key.is_verified,
        key.first_message_index or 0,
        key.forwarded_count or 0,
    )


def is_complete(stored: StoredKey) -> bool:
    """Whether a stored key has all fields. Any uploaded key is better than an
    incomplete stored key."""
    return (
        stored.has_session_data
        and stored.metadata.first_message_index is not None
        and stored.metadata.forwarded_count is not None
        and stored.metadata.is_verified is not None
    )


def is_better(uploaded: KeyMetadata, stored: StoredKey) -> bool:
    """Whether an uploaded key replaces a stored key. If both rank equal, the stored key
    stays."""
    return not is_complete(stored) or rank(uploaded) < rank(stored.metadata)


@attrs.frozen
class MergePlan:
    """The changes that an upload makes to a backup.

    Attributes:
        writes: the keys to write: new keys and better keys.
        new: the new keys among `writes`.
        replaced: the stored keys that the better keys replace.
        unchanged: number of uploaded keys that are not better than the stored keys.
        added_bytes: growth of the backup's ``session_data`` in bytes; may be negative.
    """

    writes: tuple[RoomKey, ...]
    new: tuple[RoomKey, ...]
    replaced: tuple[Replacement, ...]
    unchanged: int
    added_bytes: int


def merge(stored: Mapping[int, StoredKey], uploaded: Iterable[RoomKey]) -> MergePlan:
    """Decide for each uploaded key whether to write the key.

    Args:
        stored: the stored keys of the uploaded sessions, by the session's index in
            `uploaded`.
        uploaded: the uploaded keys, at most one key per session.
    """
    writes: list[RoomKey] = []
    new: list[RoomKey] = []
    replaced: list[Replacement] = []
    unchanged = added_bytes = 0
    for place, key in enumerate(uploaded):
        old: StoredKey | None = stored.get(place)
        if old is None:
            writes.append(key)
            new.append(key)
            added_bytes += size(key.session_data)
        elif is_better(key.metadata, old):
            writes.append(key)
            added_bytes += size(key.session_data) - old.size
            replaced.append(
                Replacement(key.room_id, key.session_id, old.metadata, key.metadata)
            )
        else:
            unchanged += 1
    return MergePlan(tuple(writes), tuple(new), tuple(replaced), unchanged, added_bytes)


def size(text: str) -> int:
    """Length of a text in UTF-8, in bytes. Most texts are ASCII; Python stores that
    fact with the text, which makes the check cheap."""
    return len(text) if text.isascii() else len(text.encode())

"""Which of two keys is the better one, and what an upload changes."""

from collections.abc import Iterable, Mapping

import attrs

from .types import KeyMetadata, Replacement, RoomKey, StoredKey


def rank(key: KeyMetadata) -> tuple[bool, int, int]:
    """The place of a key in the order of the specification, the best one lowest.

    "Server-side key backups", "Recovering keys / storing keys": verified before
    unverified, then the lower ``first_message_index``, then the lower
    ``forwarded_count``. A NULL reads as 0 or false.
    """
    return (
        not key.is_verified,
        key.first_message_index or 0,
        key.forwarded_count or 0,
    )


def is_sound(stored: StoredKey) -> bool:
    """Whether a stored key is whole; any uploaded key is better than one that isn't."""
    return (
        stored.has_session_data
        and stored.metadata.first_message_index is not None
        and stored.metadata.forwarded_count is not None
        and stored.metadata.is_verified is not None
    )


def is_better(uploaded: KeyMetadata, stored: StoredKey) -> bool:
    """Whether an uploaded key takes the place of a stored one; equals keep the old."""
    return not is_sound(stored) or rank(uploaded) < rank(stored.metadata)


@attrs.frozen
class MergePlan:
    """What an upload changes.

    Attributes:
        writes: the keys to write, new ones and better ones.
        stored: how many of them are new.
        replaced: the keys that the others take the place of.
        kept: how many uploaded keys lose against the stored ones.
        added_bytes: how much longer all the ``session_data`` gets.
    """

    writes: tuple[RoomKey, ...]
    stored: int
    replaced: tuple[Replacement, ...]
    kept: int
    added_bytes: int


def merge(stored: Mapping[int, StoredKey], uploaded: Iterable[RoomKey]) -> MergePlan:
    """Decide, key by key, what an upload changes.

    Args:
        stored: by their places in the upload, what the backup holds of its sessions.
        uploaded: the keys, each session once.
    """
    writes: list[RoomKey] = []
    replaced: list[Replacement] = []
    kept = added_bytes = 0
    for place, key in enumerate(uploaded):
        old: StoredKey | None = stored.get(place)
        if old is None:
            writes.append(key)
            added_bytes += size(key.session_data)
        elif is_better(key.metadata, old):
            writes.append(key)
            added_bytes += size(key.session_data) - old.size
            replaced.append(
                Replacement(key.room_id, key.session_id, old.metadata, key.metadata)
            )
        else:
            kept += 1
    stored_keys = len(writes) - len(replaced)
    return MergePlan(tuple(writes), stored_keys, tuple(replaced), kept, added_bytes)


def size(text: str) -> int:
    """The bytes that a text has in UTF-8. Most are ASCII, which Python remembers."""
    return len(text) if text.isascii() else len(text.encode())

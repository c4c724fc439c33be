"""What the contract says of backups, in plain Python: no SQL, nothing of the plugin."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeAlias

import attrs

Ids: TypeAlias = tuple[str, str]
"""The room and session id of a key."""

#: A count is exact but for what went past the plugin in the last hour, in seconds.
COUNT_LIFETIME = 3600


@attrs.frozen
class Key:
    """A key; the fields of old rows may be None, or their data null or no JSON.

    Attributes:
        data: JSON text, the ``session_data``.
    """

    verified: bool | None
    index: int | None
    forwarded: int | None
    data: str

    def is_bad(self) -> bool:
        """Whether it is an old row that any good key beats."""
        numbers = (self.index, self.forwarded)
        return (
            self.verified is None
            or any(number is None or number < 0 for number in numbers)
            or not self.is_shown()
        )

    def is_shown(self) -> bool:
        """Whether clients are given it: its data are JSON and not null."""
        try:
            return json.loads(self.data) is not None
        except ValueError:
            return False

    def beats(self, old: Key) -> bool:
        """Whether this one, a good one, takes the old one's place."""
        mine = (not self.verified, self.index, self.forwarded)
        return old.is_bad() or mine < (not old.verified, old.index, old.forwarded)

    def json(self) -> dict[str, Any]:
        """The key as clients are given it."""
        return {
            "first_message_index": max(self.index or 0, 0),
            "forwarded_count": max(self.forwarded or 0, 0),
            "is_verified": bool(self.verified),
            "session_data": json.loads(self.data),
        }


Keys: TypeAlias = Mapping[Ids, Key]


def in_scope(ids: Ids, room_id: str | None, session_id: str | None) -> bool:
    """Whether a key is among those that a path names; None leaves it open."""
    return room_id in (None, ids[0]) and session_id in (None, ids[1])


@attrs.frozen(eq=False)
class Backup:
    """The keys of a version and their etag. What changes nothing gives the same object.

    Attributes:
        keys: never changed in place.
    """

    etag: int = 0
    keys: Keys = attrs.field(factory=dict)

    def uploaded(self, keys: Keys) -> Backup:
        """The backup after an upload."""
        better = {
            ids: key
            for ids, key in keys.items()
            if ids not in self.keys or key.beats(self.keys[ids])
        }
        return Backup(self.etag + 1, {**self.keys, **better}) if better else self

    def without(self, room_id: str | None, session_id: str | None) -> Backup:
        """The backup after a deletion of all, of a room or of a session."""
        gone = self.selected(room_id, session_id)
        kept = {ids: key for ids, key in self.keys.items() if ids not in gone}
        return Backup(self.etag + 1, kept) if gone else self

    def selected(self, room_id: str | None, session_id: str | None) -> Keys:
        """All keys, a room's, or one."""
        return {
            ids: key
            for ids, key in self.keys.items()
            if in_scope(ids, room_id, session_id)
        }


@attrs.define
class Version:
    """A version of a user's backup.

    Attributes:
        purged: when keys went past the plugin, in Unix seconds, and how many.
    """

    algorithm: str
    auth_data: str
    backup: Backup = attrs.field(factory=Backup)
    purged: list[tuple[int, int]] = attrs.field(factory=list)

    def counts(self, now: float) -> set[int]:
        """What a count may be: some of what went past the plugin in the last hour, from
        a moment on, may not show yet."""
        counts = [len(self.backup.keys)]
        for when, keys in reversed(self.purged):
            if int(now) - when <= COUNT_LIFETIME:
                counts.append(counts[-1] + keys)
        return set(counts)


@attrs.define
class User:
    """A user's versions by their numbers; the deleted ones are None.

    Attributes:
        issued: all numbers ever, also those from before a deactivation.
    """

    versions: dict[int, Version | None] = attrs.field(factory=dict)
    issued: set[int] = attrs.field(factory=set)

    @property
    def current(self) -> int | None:
        """The newest version that is left."""
        left = [number for number, version in self.versions.items() if version]
        return max(left, default=None)

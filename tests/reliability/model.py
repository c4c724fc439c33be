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
        return self.is_incomplete() or not self.is_shown()

    def is_incomplete(self) -> bool:
        """Whether a field has no valid value, or the data is JSON null."""
        numbers = (self.index, self.forwarded)
        return (
            self.verified is None
            or any(number is None or number < 0 for number in numbers)
            or self.data == "null"
        )

    def is_shown(self) -> bool:
        """Whether clients are given it: its data are JSON and not null."""
        try:
            return json.loads(self.data) is not None
        except ValueError:
            return False

    def beats(self, old: Key) -> bool:
        """Whether this key, a good one, replaces the old key."""
        return old.is_bad() or self.rank() < old.rank()

    def comes_back_over(self, stored: Key) -> bool:
        """Whether a restore without force replaces the stored key by this one.

        A restore reads no data, so data that isn't JSON counts as good.
        """
        return not self.is_incomplete() and (
            stored.is_incomplete() or self.rank() < stored.rank()
        )

    def rank(self) -> tuple[bool, int, int]:
        """Sort key of the specification for complete keys; the best sorts lowest."""
        return (not self.verified, self.index or 0, self.forwarded or 0)

    def reads_less_than(self, old: Key) -> bool:
        """Whether this key decrypts fewer messages than the old key."""
        return max(self.index or 0, 0) > max(old.index or 0, 0)

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


@attrs.frozen
class Change:
    """A row of the record.

    Attributes:
        sessions: triples of ``stored`` or ``replaced``, room and session id.
    """

    user_id: str
    version: int
    etag: int
    changed_ms: int
    act: str
    device_id: str | None = None
    operator: str | None = None
    stored: int = 0
    replaced: int = 0
    unchanged: int = 0
    deleted: int | None = 0
    sessions: frozenset[tuple[str, str, str]] = frozenset()


#: The acts that move the etag.
MOVING = ("upload", "delete_keys", "restore_version", "restore_keys")


@attrs.frozen
class Replaced:
    """A replaced key that is kept.

    Attributes:
        etag: the etag of the change that replaced the key.
    """

    ids: Ids
    replaced_ms: int
    etag: int
    key: Key


@attrs.define
class Deletion:
    """A deleted version whose keys wait for the sweeper, or are deleted.

    Attributes:
        deleted_ms: the time of the deletion, Unix milliseconds.
        is_queued: Whether the sweeper has yet to delete the last key.
        is_started: Whether keys are deleted already, so that nothing can be given back.
    """

    deleted_ms: int
    is_queued: bool = True
    is_started: bool = False


@attrs.define
class Version:
    """A version of a user's backup.

    Attributes:
        purged: when keys went past the plugin, in Unix seconds, and how many.
        changes: the record.
        unrecorded: the last etag whose change isn't in the record; 0 if all are.
        replaced: the replaced keys that are kept.
        deletion: None unless the version is deleted.
    """

    algorithm: str
    auth_data: str
    backup: Backup = attrs.field(factory=Backup)
    purged: list[tuple[int, int]] = attrs.field(factory=list)
    changes: list[Change] = attrs.field(factory=list)
    unrecorded: int = 0
    replaced: list[Replaced] = attrs.field(factory=list)
    deletion: Deletion | None = None

    def counts(self, now: float, lifetime: float = COUNT_LIFETIME) -> set[int]:
        """Return the possible values of a cached count: some of the keys that went past
        the plugin in the last hour, from a moment on, may not show yet.

        Args:
            lifetime: seconds for which a cached count is used.
        """
        counts = [len(self.backup.keys)]
        for when, keys in reversed(self.purged):
            if int(now) - when <= lifetime:
                counts.append(counts[-1] + keys)
        return set(counts)

    def can_come_back(self) -> bool:
        """Whether the version is deleted and none of its keys is."""
        deletion = self.deletion
        return bool(deletion and deletion.is_queued and not deletion.is_started)

    def restorable(
        self, scope: tuple[str | None, str | None], since_ms: int, is_forced: bool
    ) -> Keys:
        """Return the keys that a restore gives back: of each session the key that was
        replaced first since the time, unless the stored key is the same or, without
        force, as good."""
        first: dict[Ids, Key] = {}
        for row in sorted(self.replaced, key=lambda row: (row.replaced_ms, row.etag)):
            if row.replaced_ms >= since_ms and in_scope(row.ids, *scope):
                first.setdefault(row.ids, row.key)
        return {
            ids: key
            for ids, key in first.items()
            if self._comes_back(ids, key, is_forced)
        }

    def _comes_back(self, ids: Ids, key: Key, is_forced: bool) -> bool:
        stored = self.backup.keys.get(ids)
        if stored is None:
            return True
        has_null = None in (key.verified, key.index, key.forwarded)
        if key == stored and not has_null:
            return False
        return is_forced or key.comes_back_over(stored)


@attrs.define
class User:
    """A user's versions by their numbers, deleted ones included.

    Attributes:
        issued: all numbers ever, also those from before a deactivation.
    """

    versions: dict[int, Version] = attrs.field(factory=dict)
    issued: set[int] = attrs.field(factory=set)

    @property
    def current(self) -> int | None:
        """The newest version that isn't deleted."""
        left = [n for n, version in self.versions.items() if not version.deletion]
        return max(left, default=None)

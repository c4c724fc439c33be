"""The record: a row for each change of a backup, in the change's transaction. Undo: the
choice of replaced keys that are kept."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, groupby
from operator import attrgetter
from typing import Any, Protocol

import attrs

from ..errors import unknown_version
from ..types import (
    Actor,
    BackupId,
    RecordedChange,
    Replacement,
    Retention,
    VersionRecord,
)
from . import statements
from .transactions import Transaction
from .values import names

#: The acts in the record.
UPLOAD = "upload"
DELETE_KEYS = "delete_keys"
CREATE_VERSION = "create_version"
UPDATE_VERSION = "update_version"
DELETE_VERSION = "delete_version"
RESTORE_VERSION = "restore_version"
RESTORE_KEYS = "restore_keys"
#: An operator has read the keys: nothing has changed.
EXPORT = "export"


#: Maximum number of sessions in the changes of a page, unless the page has a single
#: change. A page of 100 uploads by real clients, of 100 sessions each, is whole. An
#: upload of 10 MiB, the default limit of a body, may name 30,000 sessions with ids of
#: 255 bytes: 100 such changes would take 0.8 GB of memory.
PAGE_SESSIONS = 10_000


@attrs.frozen
class Change:
    """A change of a version.

    Attributes:
        act: one of the constants above.
        stored: number of new keys.
        replaced: number of replaced keys.
        unchanged: number of uploaded keys that weren't better than the stored ones.
        deleted: number of deleted keys; None if it isn't known.
        sessions: JSON text that names the stored and replaced sessions.
    """

    act: str
    actor: Actor
    stored: int = 0
    replaced: int = 0
    unchanged: int = 0
    deleted: int | None = 0
    sessions: str | None = None


class Ids(Protocol):
    """A key, with the ids of its session."""

    @property
    def room_id(self) -> str:
        """The session's room."""

    @property
    def session_id(self) -> str:
        """The session."""


#: The acts that move the etag of a version, by one.
_MOVING = (UPLOAD, DELETE_KEYS, RESTORE_VERSION, RESTORE_KEYS)


def read_user(
    txn: Transaction, user_id: str, since_ms: int
) -> tuple[RecordedChange, ...]:
    """Return the recorded changes of a user's backups since a Unix time in
    milliseconds, in their order."""
    parameters = {"user_id": user_id, "since_ms": since_ms}
    txn.execute(statements.CHANGES_OF_USER, parameters)
    return tuple(RecordedChange(*row) for row in txn.fetchall())


def read_newest(
    txn: Transaction, user_id: str, since_ms: int, skipped: int, most: int
) -> tuple[list[RecordedChange], int]:
    """Return a page of the recorded changes of a user's backups since a Unix time in
    milliseconds, the newest first, and the number of all of them.

    The changes of a page together name `PAGE_SESSIONS` sessions at most, or the page
    has a single change.

    Args:
        skipped: number of changes before the page.
        most: maximum number of changes of the page.
    """
    parameters = {"user_id": user_id, "since_ms": since_ms}
    txn.execute(statements.COUNT_CHANGES_OF_USER, parameters)
    ((total,),) = txn.fetchall()
    page = {**parameters, "skipped": skipped, "most": most}
    txn.execute(statements.SIZES_OF_NEWEST_CHANGES, page)
    ends = accumulate(int(size) for (size,) in txn.fetchall())
    page["most"] = max(sum(end <= PAGE_SESSIONS for end in ends), 1)
    txn.execute(statements.NEWEST_CHANGES_OF_USER, page)
    return [RecordedChange(*row) for row in txn.fetchall()], int(total)


def read_version(txn: Transaction, backup: BackupId) -> VersionRecord:
    """Return the record of a version.

    Raises:
        NotFoundError: there never was such a version.
    """
    txn.execute(statements.ETAG, names(backup))
    row = txn.fetchone()
    if row is None:
        raise unknown_version()
    txn.execute(statements.CHANGES_OF_VERSION, names(backup))
    changes = tuple(RecordedChange(*row) for row in txn.fetchall())
    return VersionRecord(changes, _whole_from(changes, row[0]))


def _whole_from(changes: Iterable[RecordedChange], etag: int) -> int:
    """Return the etag since which the record is whole: each later etag was made by one
    recorded change. Two changes of the same etag are a change by a program that takes
    no lock, and another one.

    Args:
        etag: the version's present etag.
    """
    made = Counter(change.etag for change in changes if change.act in _MOVING)
    while etag > 0 and made[etag] == 1:
        etag -= 1
    return etag


def name_sessions(stored: Iterable[Ids], replaced: Iterable[Ids]) -> str:
    """Return the sessions of a change as JSON text: an object of rooms, each with the
    session ids of its new keys (``stored``) and of its replaced ones (``replaced``)."""
    rooms: dict[str, dict[str, list[str]]] = {}
    for kind, keys in ("stored", stored), ("replaced", replaced):
        for room_id, same_room in groupby(keys, attrgetter("room_id")):
            sessions = rooms.setdefault(room_id, {}).setdefault(kind, [])
            sessions.extend([key.session_id for key in same_room])
    return json.dumps(rooms, ensure_ascii=False)


def is_lossy(key: Replacement) -> bool:
    """Whether the new key decrypts fewer messages than the replaced one: a verified key
    with a higher ``first_message_index``."""
    new, old = key.new.first_message_index, key.old.first_message_index
    return (new or 0) > (old or 0)


class Record:
    """What the operator wants to have recorded and kept."""

    def __init__(self, now: Callable[[], float], retention: Retention) -> None:
        """
        Args:
            now: returns the Unix time in seconds.
        """
        self._now = now
        self._is_on = retention.record_days > 0
        self._keeps = "off"
        if retention.replaced_keys_days > 0:
            self._keeps = retention.keep_replaced

    def now_ms(self) -> int:
        """The Unix time in milliseconds."""
        return int(1000 * self._now())

    def choose_kept(self, replaced: Sequence[Replacement]) -> Sequence[Replacement]:
        """Return those of an upload's replaced keys that are kept: see `Retention`."""
        if self._keeps == "all":
            return replaced
        if self._keeps == "off":
            return ()
        return [key for key in replaced if is_lossy(key)]

    def parameters(self, change: Change) -> dict[str, Any] | None:
        """Return a change as parameters of the record's row; None for no row."""
        if not self._is_on:
            return None
        return {
            "changed_ms": self.now_ms(),
            "act": change.act,
            "device_id": change.actor.device_id,
            "operator": change.actor.operator,
            "stored": change.stored,
            "replaced": change.replaced,
            "unchanged": change.unchanged,
            "deleted": change.deleted,
            "sessions": change.sessions,
        }

    def note(self, txn: Transaction, backup: BackupId, change: Change) -> None:
        """Record a change, after the transaction has made it and moved the etag."""
        parameters = self.parameters(change)
        if parameters is not None:
            txn.execute(statements.NOTE_CHANGE, {**names(backup), **parameters})

"""The record: a row for each change of a backup, in the change's transaction."""

import json
from collections.abc import Callable, Iterable
from typing import Protocol

import attrs

from ..types import Actor, BackupId, Retention
from . import statements
from .engine import names
from .transactions import Transaction

#: The acts in the record.
UPLOAD = "upload"
DELETE_KEYS = "delete_keys"
CREATE_VERSION = "create_version"
UPDATE_VERSION = "update_version"
DELETE_VERSION = "delete_version"
RESTORE_VERSION = "restore_version"
RESTORE_KEYS = "restore_keys"


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


def name_sessions(stored: Iterable[Ids], replaced: Iterable[Ids]) -> str:
    """Return the sessions of a change as JSON text: an object of rooms, each with the
    session ids of its new keys (``stored``) and of its replaced ones (``replaced``)."""
    rooms: dict[str, dict[str, list[str]]] = {}
    for kind, keys in ("stored", stored), ("replaced", replaced):
        for key in keys:
            sessions = rooms.setdefault(key.room_id, {}).setdefault(kind, [])
            sessions.append(key.session_id)
    return json.dumps(rooms, ensure_ascii=False)


class Record:
    """The record of changes, unless the operator turned it off."""

    def __init__(self, now: Callable[[], float], retention: Retention) -> None:
        """
        Args:
            now: returns the Unix time in seconds.
        """
        self._now = now
        self._is_on = retention.record_days > 0

    def now_ms(self) -> int:
        """The Unix time in milliseconds."""
        return int(1000 * self._now())

    def note(self, txn: Transaction, backup: BackupId, change: Change) -> None:
        """Record a change, after the transaction has made it and moved the etag."""
        if not self._is_on:
            return
        values = {
            **names(backup),
            **attrs.asdict(change.actor),
            **attrs.asdict(change, recurse=False),
            "changed_ms": self.now_ms(),
        }
        del values["actor"]
        txn.execute(statements.NOTE_CHANGE, values)

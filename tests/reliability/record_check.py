"""A comparison of a version's record with the history of its operations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import attrs

from synapse_roomkeys.types import RecordedChange

from .linearizability import Event, NotLinearizable, Upload, linearize
from .model import Backup


class RecordError(AssertionError):
    """The record of a version isn't the history of the version."""


#: A change as the record and the model know it: etag, act, the numbers of stored,
#: replaced, unchanged and deleted keys, and the sessions.
Row: TypeAlias = tuple[int, str, int, int, int, int | None, list[tuple[str, str, str]]]


@attrs.frozen
class RecordedRows:
    """The recorded changes of a version's keys by their etags."""

    rows: Mapping[int, Row]

    @property
    def last_etag(self) -> int:
        """As `Record.last_etag`."""
        return max(self.rows, default=0)

    def has(self, event: Event, before: Backup, after: Backup) -> bool:
        """As `Record.has`."""
        return self.rows.get(after.etag) == row_of(event, before, after)


def check_record(events: Sequence[Event], changes: Sequence[RecordedChange]) -> None:
    """Check that the record holds each change of a history exactly once, and no other.

    Args:
        events: a linearizable history, from the version's creation on.
        changes: the record of the version.

    Raises:
        RecordError: an etag is recorded twice, or no order of the operations explains
            both the answers and the record.
    """
    creation, *rest = sorted(changes, key=lambda change: change.etag)
    if (creation.etag, creation.act) != (0, "create_version"):
        raise RecordError(f"record: {creation}, not the creation of the version")
    rows = {change.etag: recorded_row(change) for change in rest}
    if len(rows) < len(rest):
        raise RecordError(f"record: {len(rest)} changes have {len(rows)} etags")
    try:
        linearize(events, record=RecordedRows(rows))
    except NotLinearizable as error:
        raise RecordError(f"record: {error}") from None


def recorded_row(change: RecordedChange) -> Row:
    """Return a recorded change as a row to compare."""
    return (
        change.etag,
        change.act,
        change.stored,
        change.replaced,
        change.unchanged,
        change.deleted,
        read_sessions(change.sessions),
    )


def row_of(event: Event, before: Backup, after: Backup) -> Row:
    """Return the row that an operation's change must have in the record."""
    if not isinstance(event.operation, Upload):
        deleted = len(before.keys) - len(after.keys)
        return after.etag, "delete_keys", 0, 0, 0, deleted, []
    keys = event.operation.keys
    stored = [("stored", *ids) for ids in keys if ids not in before.keys]
    replaced = [
        ("replaced", *ids)
        for ids in keys
        if ids in before.keys and after.keys[ids] is not before.keys[ids]
    ]
    unchanged = len(keys) - len(stored) - len(replaced)
    return (
        after.etag,
        "upload",
        len(stored),
        len(replaced),
        unchanged,
        0,
        sorted(stored + replaced),
    )


def read_sessions(text: str | None) -> list[tuple[str, str, str]]:
    """Return the sessions of a recorded change, sorted: ``stored`` or ``replaced``,
    room id and session id."""
    return sorted(
        (kind, room_id, session_id)
        for room_id, kinds in json.loads(text or "{}").items()
        for kind, session_ids in kinds.items()
        for session_id in session_ids
    )

"""A linearizability checker for the recorded operations of a backup.

A history is linearizable if some order of the operations gives each operation the
answer received by the client, and if the order puts an operation after all operations
that ended before the start of this operation. The checker searches for such an order by
depth-first search with backtracking. Two facts keep the search short:

- An operation without a change is appended as soon as the answer fits, because no later
  operation depends on the position.
- Each change increments the etag. The etag in an answer therefore fixes the position of
  a change, except among changes with equal answers. A branch is a dead end once the
  etag is higher than in an answer without a position.

An operation whose answer was lost has no end time. The server may have run the
operation at any time after the start, even after all others, or never. If the server
may have run an operation twice, as in a transaction that was retried, the history has
two operations, and the first operation's answer is lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import attrs

from .model import Backup, Ids, Key, Keys

Tally: TypeAlias = tuple[int, int]
"""An etag and a count of keys."""


class NotLinearizable(AssertionError):
    """No order of the operations explains the answers."""


@attrs.frozen
class Upload:
    """``PUT /keys``; the answer is the tally."""

    keys: Keys

    def apply(self, backup: Backup) -> tuple[Backup, Tally]:
        """Return the backup after the operation, and the answer."""
        after = backup.uploaded(self.keys)
        return after, tally(after)


@attrs.frozen
class Delete:
    """``DELETE /keys`` for all keys, a room's or a session's; the answer is the
    tally."""

    room_id: str | None = None
    session_id: str | None = None

    def apply(self, backup: Backup) -> tuple[Backup, Tally]:
        """As `Upload.apply`."""
        after = backup.without(self.room_id, self.session_id)
        return after, tally(after)


@attrs.frozen
class GetInfo:
    """``GET /version/{version}``; the answer is the tally."""

    def apply(self, backup: Backup) -> tuple[Backup, Tally]:
        """As `Upload.apply`."""
        return backup, tally(backup)


@attrs.frozen
class Download:
    """``GET /keys`` for all keys, a room's or a session's; the answer is the keys.

    The download must fit in one page, because a longer download isn't a snapshot.
    """

    room_id: str | None = None
    session_id: str | None = None

    def apply(self, backup: Backup) -> tuple[Backup, dict[Ids, Key]]:
        """As `Upload.apply`."""
        return backup, dict(backup.selected(self.room_id, self.session_id))


Operation: TypeAlias = Upload | Delete | GetInfo | Download


def tally(backup: Backup) -> Tally:
    """Return the etag and count reported by the server for a backup."""
    return backup.etag, len(backup.keys)


@attrs.frozen(eq=False)
class Event:
    """An operation as recorded by a client.

    Attributes:
        start: when the request was sent, in seconds of a clock shared by all clients.
        end: when the answer arrived; infinite if the answer was lost.
        answer: as returned by `Upload.apply`; None if the answer was lost.
    """

    operation: Operation
    start: float
    end: float = math.inf
    answer: Any = None

    @property
    def is_lost(self) -> bool:
        """Whether no answer arrived; the operation may have happened or not."""
        return self.end == math.inf


@attrs.frozen
class _Prefix:
    """The beginning of a possible order, as a linked list.

    Attributes:
        backup: the backup after the operations of the prefix.
        remaining: events after the prefix.
        event: last event of the prefix; None in the empty prefix.
        before: the prefix without the last event; None for the empty prefix.
    """

    backup: Backup
    remaining: frozenset[Event]
    event: Event | None
    before: _Prefix | None

    def then(self, event: Event, backup: Backup) -> _Prefix:
        """Return the prefix extended by an event that leaves this backup."""
        return _Prefix(backup, self.remaining - {event}, event, self)

    def order(self) -> list[Event]:
        """Return all events of the prefix, in order."""
        order: list[Event] = []
        prefix: _Prefix | None = self
        while prefix is not None and prefix.event is not None:
            order.append(prefix.event)
            prefix = prefix.before
        return order[::-1]

    def candidates(self) -> list[Event]:
        """Return the events that may come next: no other event ended before their
        start."""
        end = min((event.end for event in self.remaining), default=math.inf)
        return [event for event in self.remaining if event.start <= end]


class Record(Protocol):
    """The recorded changes of a backup."""

    @property
    def last_etag(self) -> int:
        """The etag of the last recorded change."""

    def has(self, event: Event, before: Backup, after: Backup) -> bool:
        """Whether this change of the backup is recorded."""


def linearize(
    events: Sequence[Event],
    backup: Backup | None = None,
    record: Record | None = None,
) -> list[Event]:
    """Find an order of the events that explains all answers.

    Args:
        backup: the backup at the beginning; empty by default.
        record: if given, the order has all recorded changes and no other changes.

    Returns:
        The order, without lost events that neither an answer nor the record needs.

    Raises:
        NotLinearizable: no such order exists.
    """
    prefixes = [_Prefix(backup or Backup(), frozenset(events), None, None)]
    seen = set()
    longest = prefixes[0]
    while prefixes:
        prefix = _with_reads(prefixes.pop())
        is_recorded = record is None or prefix.backup.etag == record.last_etag
        if is_recorded and all(event.is_lost for event in prefix.remaining):
            return prefix.order()
        state = (
            prefix.remaining,
            prefix.backup.etag,
            frozenset(prefix.backup.keys.items()),
        )
        if state in seen or _is_dead_end(prefix):
            continue
        seen.add(state)
        longest = min(
            longest, prefix, key=lambda p: sum(not e.is_lost for e in p.remaining)
        )
        prefixes += _changes(prefix, record)
    raise NotLinearizable(_explain(longest))


def _with_reads(prefix: _Prefix) -> _Prefix:
    """Append all events that fit and leave the backup unchanged, until no more fit."""
    while True:
        for event in prefix.candidates():
            after, answer = event.operation.apply(prefix.backup)
            if after is prefix.backup and answer == event.answer:
                prefix = prefix.then(event, after)
                break
        else:
            return prefix


def _changes(prefix: _Prefix, record: Record | None) -> Iterator[_Prefix]:
    """Yield the prefix extended by each possible change.

    Changes with a lost answer come first. The caller's stack takes the last prefix
    first, so changes with an answer are tried before.
    """
    for event in sorted(prefix.candidates(), key=lambda event: not event.is_lost):
        after, answer = event.operation.apply(prefix.backup)
        if after is prefix.backup or not (event.is_lost or answer == event.answer):
            continue
        if record is None or record.has(event, prefix.backup, after):
            yield prefix.then(event, after)


def _is_dead_end(prefix: _Prefix) -> bool:
    """Whether a remaining answer has an etag lower than the backup's."""
    return any(
        event.answer[0] < prefix.backup.etag
        for event in prefix.remaining
        if not event.is_lost and not isinstance(event.operation, Download)
    )


def _explain(prefix: _Prefix) -> str:
    """Return a message with the longest prefix and the answers that don't fit
    afterwards."""
    lines = [f"no operation fits after {len(prefix.order())} operations:"]
    for event in sorted(prefix.candidates(), key=lambda event: event.start):
        if not event.is_lost:
            expected = event.operation.apply(prefix.backup)[1]
            lines.append(f"{event.operation} answered {event.answer}, not {expected}")
    return "\n".join(lines)

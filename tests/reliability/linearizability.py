"""What clients saw of one backup, and whether a server without faults can explain it.

The checker looks for an order of the operations in which each gives the answer that
was seen, and in which whatever had ended before another began comes first. It tries
the operations that may be next, one after the other, and goes back when none fits. Two
facts keep that short:

- What changes nothing is taken as soon as it fits: nothing else depends on it.
- Each change moves the etag by one. So an answer tells, but for its twins, the prefix of
  its operation, and an order is given up when the etag has passed an answer that has no
  prefix yet.

An operation whose answer was lost has no end. It may have happened at any time since
it began, also after all the others, or never. What a server may have done twice, as
when it tried a transaction again, is two operations, and the first one's answer is
lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import attrs

from .model import Backup, Ids, Key, Keys

Tally: TypeAlias = tuple[int, int]
"""An etag and a count."""


class NotLinearizable(AssertionError):
    """No order of the operations explains the answers."""


@attrs.frozen
class Upload:
    """``PUT /keys``; it answers the tally."""

    keys: Keys

    def apply(self, backup: Backup) -> tuple[Backup, Tally]:
        """The backup afterwards, and the answer."""
        after = backup.uploaded(self.keys)
        return after, tally(after)


@attrs.frozen
class Delete:
    """``DELETE /keys``, all, a room's or one; it answers the tally."""

    room_id: str | None = None
    session_id: str | None = None

    def apply(self, backup: Backup) -> tuple[Backup, Tally]:
        """As `Upload.apply`."""
        after = backup.without(self.room_id, self.session_id)
        return after, tally(after)


@attrs.frozen
class GetInfo:
    """``GET /version/{version}``; it answers the tally."""

    def apply(self, backup: Backup) -> tuple[Backup, Tally]:
        """As `Upload.apply`."""
        return backup, tally(backup)


@attrs.frozen
class Download:
    """``GET /keys``, all, a room's or one, in one page; it answers the keys."""

    room_id: str | None = None
    session_id: str | None = None

    def apply(self, backup: Backup) -> tuple[Backup, dict[Ids, Key]]:
        """As `Upload.apply`."""
        return backup, dict(backup.selected(self.room_id, self.session_id))


Operation: TypeAlias = Upload | Delete | GetInfo | Download


def tally(backup: Backup) -> Tally:
    """What a backup is told to be like."""
    return backup.etag, len(backup.keys)


@attrs.frozen(eq=False)
class Event:
    """An operation as a client saw it.

    Attributes:
        start: when it was sent, in seconds of a clock that all clients have.
        end: when its answer was there.
        answer: as `Upload.apply`; None when it was lost.
    """

    operation: Operation
    start: float
    end: float = math.inf
    answer: Any = None

    @property
    def is_lost(self) -> bool:
        """Whether nobody knows if it has happened."""
        return self.end == math.inf


@attrs.frozen
class _Prefix:
    """A prefix in an order, and all before it.

    Attributes:
        backup: what it has come to.
        remaining: the events that have no prefix yet.
        event: the last one, None at the beginning.
    """

    backup: Backup
    remaining: frozenset[Event]
    event: Event | None
    before: _Prefix | None

    def then(self, event: Event, backup: Backup) -> _Prefix:
        """The prefix after it, of an event that leaves the backup so."""
        return _Prefix(backup, self.remaining - {event}, event, self)

    def order(self) -> list[Event]:
        """All events up to here."""
        order: list[Event] = []
        prefix: _Prefix | None = self
        while prefix is not None and prefix.event is not None:
            order.append(prefix.event)
            prefix = prefix.before
        return order[::-1]

    def candidates(self) -> list[Event]:
        """Those that may be next: nothing has ended before they began."""
        end = min((event.end for event in self.remaining), default=math.inf)
        return [event for event in self.remaining if event.start <= end]


def linearize(events: Sequence[Event], backup: Backup | None = None) -> list[Event]:
    """An order that explains the answers, without the lost events that it can do
    without.

    Args:
        backup: what there was at the beginning, nothing by default.

    Raises:
        NotLinearizable: there is none.
    """
    prefixes = [_Prefix(backup or Backup(), frozenset(events), None, None)]
    seen = set()
    longest = prefixes[0]
    while prefixes:
        prefix = _with_reads(prefixes.pop())
        if all(event.is_lost for event in prefix.remaining):
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
        prefixes += _changes(prefix)
    raise NotLinearizable(_explain(longest))


def _with_reads(prefix: _Prefix) -> _Prefix:
    """The prefix after all that fits and leaves the backup as it is."""
    while True:
        for event in prefix.candidates():
            after, answer = event.operation.apply(prefix.backup)
            if after is prefix.backup and answer == event.answer:
                prefix = prefix.then(event, after)
                break
        else:
            return prefix


def _changes(prefix: _Prefix) -> Iterator[_Prefix]:
    """The prefixes after each change that may be next, the lost ones first: the last is
    tried first."""
    for event in sorted(prefix.candidates(), key=lambda event: not event.is_lost):
        after, answer = event.operation.apply(prefix.backup)
        if after is not prefix.backup and (event.is_lost or answer == event.answer):
            yield prefix.then(event, after)


def _is_dead_end(prefix: _Prefix) -> bool:
    """Whether an answer that has no prefix yet tells an earlier etag."""
    return any(
        event.answer[0] < prefix.backup.etag
        for event in prefix.remaining
        if not event.is_lost and not isinstance(event.operation, Download)
    )


def _explain(prefix: _Prefix) -> str:
    """What doesn't fit after the longest order that was found."""
    lines = [f"nothing fits after {len(prefix.order())} operations:"]
    for event in sorted(prefix.candidates(), key=lambda event: event.start):
        if not event.is_lost:
            expected = event.operation.apply(prefix.backup)[1]
            lines.append(f"{event.operation} answered {event.answer}, not {expected}")
    return "\n".join(lines)

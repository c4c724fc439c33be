"""What clients saw of one backup, and whether a server without faults can explain it.

The checker looks for an order of the operations in which each gives the answer that
was seen, and in which whatever had ended before another began comes first. It tries
the operations that may be next, one after the other, and goes back when none fits. Two
facts keep that short:

- What changes nothing is taken as soon as it fits: nothing else depends on it.
- Each change moves the etag by one. So an answer tells, but for its twins, the place of
  its operation, and an order is given up when the etag has passed an answer that has no
  place yet.

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


class NoOrder(AssertionError):
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
class Look:
    """``GET /version/{version}``; it answers the tally."""

    def apply(self, backup: Backup) -> tuple[Backup, Tally]:
        """As `Upload.apply`."""
        return backup, tally(backup)


@attrs.frozen
class Read:
    """``GET /keys``, all, a room's or one, in one page; it answers the keys."""

    room_id: str | None = None
    session_id: str | None = None

    def apply(self, backup: Backup) -> tuple[Backup, dict[Ids, Key]]:
        """As `Upload.apply`."""
        return backup, dict(backup.selected(self.room_id, self.session_id))


Operation: TypeAlias = Upload | Delete | Look | Read


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
class _Place:
    """A place in an order, and all before it.

    Attributes:
        backup: what it has come to.
        left: the events that have no place yet.
        event: the last one, None at the beginning.
    """

    backup: Backup
    left: frozenset[Event]
    event: Event | None
    before: _Place | None

    def then(self, event: Event, backup: Backup) -> _Place:
        """The place after it, of an event that leaves the backup so."""
        return _Place(backup, self.left - {event}, event, self)

    def order(self) -> list[Event]:
        """All events up to here."""
        order: list[Event] = []
        place: _Place | None = self
        while place is not None and place.event is not None:
            order.append(place.event)
            place = place.before
        return order[::-1]

    def next_ones(self) -> list[Event]:
        """Those that may be next: nothing has ended before they began."""
        end = min((event.end for event in self.left), default=math.inf)
        return [event for event in self.left if event.start <= end]


def find_order(events: Sequence[Event], backup: Backup | None = None) -> list[Event]:
    """An order that explains the answers, without the lost events that it can do
    without.

    Args:
        backup: what there was at the beginning, nothing by default.

    Raises:
        NoOrder: there is none.
    """
    places = [_Place(backup or Backup(), frozenset(events), None, None)]
    seen = set()
    furthest = places[0]
    while places:
        place = _with_what_changes_nothing(places.pop())
        if all(event.is_lost for event in place.left):
            return place.order()
        state = (place.left, place.backup.etag, frozenset(place.backup.keys.items()))
        if state in seen or _has_missed_one(place):
            continue
        seen.add(state)
        furthest = min(
            furthest, place, key=lambda p: sum(not e.is_lost for e in p.left)
        )
        places += _changes(place)
    raise NoOrder(_complaint(furthest))


def _with_what_changes_nothing(place: _Place) -> _Place:
    """The place after all that fits and leaves the backup as it is."""
    while True:
        for event in place.next_ones():
            after, answer = event.operation.apply(place.backup)
            if after is place.backup and answer == event.answer:
                place = place.then(event, after)
                break
        else:
            return place


def _changes(place: _Place) -> Iterator[_Place]:
    """The places after each change that may be next, the lost ones first: the last is
    tried first."""
    for event in sorted(place.next_ones(), key=lambda event: not event.is_lost):
        after, answer = event.operation.apply(place.backup)
        if after is not place.backup and (event.is_lost or answer == event.answer):
            yield place.then(event, after)


def _has_missed_one(place: _Place) -> bool:
    """Whether an answer that has no place yet tells an earlier etag."""
    return any(
        event.answer[0] < place.backup.etag
        for event in place.left
        if not event.is_lost and not isinstance(event.operation, Read)
    )


def _complaint(place: _Place) -> str:
    """What doesn't fit after the longest order that was found."""
    lines = [f"nothing fits after {len(place.order())} operations:"]
    for event in sorted(place.next_ones(), key=lambda event: event.start):
        if not event.is_lost:
            would_be = event.operation.apply(place.backup)[1]
            lines.append(f"{event.operation} answered {event.answer}, not {would_be}")
    return "\n".join(lines)

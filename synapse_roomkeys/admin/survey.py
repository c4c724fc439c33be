"""Sums over all users, and the largest users, in bounded memory."""

import heapq
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import attrs
from twisted.internet.defer import inlineCallbacks

from ..inline import Inline
from ..storage import Activity, Overview, Owner
from .facts import describe_owner

_DAY_MS = 24 * 60 * 60 * 1000
#: Upper bounds of the classes of users by their number of keys.
_CLASSES = (0, 9, 99, 999, 9_999, 99_999, 999_999)
#: Days of the sums of the record.
GROWTH_DAYS = (1, 7, 28)

#: By the name of an order, the value that sorts a user.
ORDERS: dict[str, Callable[[Owner], int]] = {
    "keys": lambda owner: owner.keys,
    "bytes": lambda owner: owner.size,
    "last-upload": lambda owner: owner.uploaded_ms or 0,
}


class Largest:
    """The largest users by an order."""

    def __init__(self, order: str, limit: int) -> None:
        """
        Args:
            order: a name of `ORDERS`.
            limit: maximum number of users to keep.
        """
        self._value = ORDERS[order]
        self._limit = limit
        self._heap: list[tuple[int, str, Owner]] = []

    def add(self, owner: Owner) -> None:
        """Take a user into account."""
        entry = (self._value(owner), owner.user_id, owner)
        if len(self._heap) < self._limit:
            heapq.heappush(self._heap, entry)
        elif self._heap:
            heapq.heappushpop(self._heap, entry)

    def sorted(self) -> list[Owner]:
        """Return the largest users, the largest first."""
        return [owner for _, _, owner in sorted(self._heap, reverse=True)]


@attrs.define
class Totals:
    """Sums over users.

    Attributes:
        versions: number of versions by state.
        keys: number of keys by the state of their version.
        size: length of the keys' ``session_data`` in bytes.
        classes: number of users by the upper bound of their class; -1 for the last.
        ages: number of users by the age of their last recorded upload.
        growth: by a number of days, the sums of the record of these last days.
    """

    users: int = 0
    versions: Counter[str] = attrs.field(factory=Counter)
    keys: Counter[str] = attrs.field(factory=Counter)
    size: int = 0
    classes: Counter[int] = attrs.field(factory=Counter)
    ages: Counter[str] = attrs.field(factory=Counter)
    growth: dict[int, Activity] = attrs.field(
        factory=lambda: dict.fromkeys(GROWTH_DAYS, Activity())
    )


class Survey:
    """A walk over all users that sums them up.

    Attributes:
        totals: the sums so far.
        largest: the users with the most keys so far.
    """

    def __init__(self, overview: Overview, top: int, now_ms: int) -> None:
        """
        Args:
            top: number of the largest users.
            now_ms: Unix time in milliseconds.
        """
        self.totals = Totals()
        self.largest = Largest("keys", top)
        self._overview = overview
        self._now_ms = now_ms

    @inlineCallbacks
    def take(self, page: list[Owner]) -> Inline[None]:
        """Add a page of users, in their order."""
        for owner in page:
            self._add(owner)
            self.largest.add(owner)
        first, last = page[0].user_id, page[-1].user_id
        for days in GROWTH_DAYS:
            since_ms = self._now_ms - days * _DAY_MS
            found = yield self._overview.sum_changes(first, last, since_ms)
            self.totals.growth[days] += found

    def _add(self, owner: Owner) -> None:
        totals = self.totals
        totals.users += 1
        totals.size += owner.size
        for version in owner.versions:
            totals.versions[version.state] += 1
            totals.keys[version.state] += version.keys
        totals.classes[next((c for c in _CLASSES if owner.keys <= c), -1)] += 1
        totals.ages[_age(owner.uploaded_ms, self._now_ms)] += 1

    def describe(self, tables: dict[str, int]) -> dict[str, Any]:
        """Return the sums as a JSON object.

        Args:
            tables: sizes of the tables in bytes.
        """
        totals = self.totals
        classes = sorted(totals.classes.items())
        return {
            "users": totals.users,
            "versions": dict(totals.versions),
            "keys": dict(totals.keys),
            "bytes": totals.size,
            "users_by_keys": {class_text(c): number for c, number in classes},
            "users_by_last_upload": dict(totals.ages),
            "growth": {
                f"{days}d": attrs.asdict(a) for days, a in totals.growth.items()
            },
            "tables": tables,
            "largest": [describe_owner(owner) for owner in self.largest.sorted()],
        }


def _age(uploaded_ms: int | None, now_ms: int) -> str:
    """Return the class of a last upload's age."""
    if uploaded_ms is None:
        return "unknown"
    days = (now_ms - uploaded_ms) // _DAY_MS
    for most in GROWTH_DAYS:
        if days < most:
            return f"under {most} day" if most == 1 else f"under {most} days"
    return "older"


def class_text(upper: int) -> str:
    """Describe a class of users by its upper bound, -1 for the last class."""
    if upper == 0:
        return "0"
    lower = {c: f"{b + 1}" for b, c in pairwise(_CLASSES)}
    return f"{lower[upper]} to {upper}" if upper > 0 else f"over {_CLASSES[-1]}"

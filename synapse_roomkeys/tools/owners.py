"""The commands ``stats``, ``users`` and ``show``: backups in figures."""

import heapq
import json
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import attrs
from twisted.internet.defer import Deferred, inlineCallbacks

from ..inline import Inline
from ..storage import Activity, Owner, VersionFacts
from .output import Output, plural, progress, size_text, time_text
from .session import DONE, Session, ToolError

_DAY_MS = 24 * 60 * 60 * 1000
#: Upper bounds of the classes of users by their number of keys.
_CLASSES = (0, 9, 99, 999, 9_999, 99_999, 999_999)
#: Days of the sums of the record.
_GROWTH_DAYS = (1, 7, 28)

#: Header of the lines of `_owner_text`.
_HEADER = f"{'keys':>10} {'size':>9} {'versions':>8} {'last upload':>19}  user"

#: By the name of an order, the value that sorts a user. `name` is the order of pages.
ORDERS: dict[str, Callable[[Owner], int]] = {
    "keys": lambda owner: owner.keys,
    "bytes": lambda owner: owner.size,
    "last-upload": lambda owner: owner.uploaded_ms or 0,
}


@inlineCallbacks
def each_page(
    session: Session, after: str, take: "Callable[[list[Owner]], Deferred[Any] | bool]"
) -> Inline[None]:
    """Read all users, a page at a time, with progress.

    Args:
        after: the user after whom the first page begins; "" for the first user.
        take: is called with each page, and returns whether to go on, or a Deferred that
            fires with whether to go on.
    """
    with progress("users") as bar:
        while page := (yield session.overview.list_owners(after)):
            wanted = take(page)
            if isinstance(wanted, Deferred):
                wanted = yield wanted
            if not wanted:
                return
            bar.update(len(page))
            after = page[-1].user_id


class _Largest:
    """The largest users by an order, in bounded memory."""

    def __init__(self, order: str, limit: int) -> None:
        self._value = ORDERS[order]
        self._limit = limit
        self._heap: list[tuple[int, str, Owner]] = []

    def add(self, owner: Owner) -> None:
        entry = (self._value(owner), owner.user_id, owner)
        if len(self._heap) < self._limit:
            heapq.heappush(self._heap, entry)
        elif self._heap:
            heapq.heappushpop(self._heap, entry)

    def sorted(self) -> list[Owner]:
        return [owner for _, _, owner in sorted(self._heap, reverse=True)]


@attrs.define
class _Totals:
    """Sums over all users."""

    users: int = 0
    versions: Counter[str] = attrs.field(factory=Counter)
    keys: Counter[str] = attrs.field(factory=Counter)
    size: int = 0
    classes: Counter[int] = attrs.field(factory=Counter)
    ages: Counter[str] = attrs.field(factory=Counter)

    def add(self, owner: Owner, now_ms: int) -> None:
        self.users += 1
        self.size += owner.size
        for version in owner.versions:
            self.versions[version.state] += 1
            self.keys[version.state] += version.keys
        self.classes[next((c for c in _CLASSES if owner.keys <= c), -1)] += 1
        self.ages[_age(owner.uploaded_ms, now_ms)] += 1


def _age(uploaded_ms: int | None, now_ms: int) -> str:
    """Return the class of a last upload's age."""
    if uploaded_ms is None:
        return "unknown"
    days = (now_ms - uploaded_ms) // _DAY_MS
    return next((f"under {most} days" for most in _GROWTH_DAYS if days < most), "older")


@inlineCallbacks
def stats(session: Session, output: Output, top: int) -> Inline[int]:
    """Print sums over all users, and the largest backups.

    Args:
        top: number of the largest users to print.
    """
    totals, largest = _Totals(), _Largest("keys", top)
    now_ms = int(1000 * time.time())
    growth = dict.fromkeys(_GROWTH_DAYS, Activity())

    @inlineCallbacks
    def take(page: list[Owner]) -> Inline[bool]:
        for owner in page:
            totals.add(owner, now_ms)
            largest.add(owner)
        first, last = page[0].user_id, page[-1].user_id
        for days in _GROWTH_DAYS:
            since_ms = now_ms - days * _DAY_MS
            found = yield session.overview.sum_changes(first, last, since_ms)
            growth[days] += found
        return True

    yield each_page(session, "", take)
    tables: dict[str, int] = yield session.overview.measure_tables()
    values = {
        "users": totals.users,
        "versions": dict(totals.versions),
        "keys": dict(totals.keys),
        "bytes": totals.size,
        "users_by_keys": {_class_text(c): n for c, n in sorted(totals.classes.items())},
        "users_by_last_upload": dict(totals.ages),
        "growth": {f"{days}d": attrs.asdict(growth[days]) for days in growth},
        "tables": tables,
        "largest": [_owner_values(owner) for owner in largest.sorted()],
    }
    output.write(values, "\n".join(_stats_lines(totals, growth, tables)))
    for owner in largest.sorted():
        output.say(_owner_text(owner))
    return DONE


def _class_text(upper: int) -> str:
    """Describe a class of users by its upper bound, -1 for the last class."""
    if upper == 0:
        return "0"
    lower = {c: f"{b + 1}" for b, c in pairwise(_CLASSES)}
    return f"{lower[upper]} to {upper}" if upper > 0 else f"over {_CLASSES[-1]}"


def _stats_lines(
    totals: _Totals, growth: dict[int, Activity], tables: dict[str, int]
) -> list[str]:
    """Describe the sums for people."""
    lines = [
        f"Users with a backup: {totals.users:,}",
        f"Stored keys: {sum(totals.keys.values()):,}, {size_text(totals.size)}",
        *(
            f"  {plural(totals.versions[state], f'{state} version')},"
            f" {plural(totals.keys[state], 'key')}"
            for state in sorted(totals.versions)
        ),
        "Users by number of keys:",
        *(f"  {_class_text(c):>18}: {n:,}" for c, n in sorted(totals.classes.items())),
        "Users by their last recorded upload:",
        *(f"  {age:>18}: {n:,}" for age, n in sorted(totals.ages.items())),
        "Recorded changes:",
    ]
    for days, sums in growth.items():
        lines.append(
            f"  last {plural(days, 'day')}: {sums.changes:,} changes, {sums.stored:,}"
            f" keys stored, {sums.replaced:,} replaced, {sums.deleted:,} deleted"
        )
    lines.append("Size on disk, with indexes:")
    lines += [f"  {name:>24}: {size_text(size)}" for name, size in tables.items()]
    lines += ["Largest backups:", _HEADER]
    return lines


@attrs.frozen
class UserFilter:
    """The users to print.

    Attributes:
        order: a name of `ORDERS`, or ``name``.
        min_keys: users with fewer keys are left out.
        is_superseded: Whether only users with a superseded version are printed.
        limit: maximum number of users; None for all, in the order of names.
        after: only users after this one.
    """

    order: str
    min_keys: int
    is_superseded: bool
    limit: int | None
    after: str

    def matches(self, owner: Owner) -> bool:
        """Whether to print a user."""
        if self.is_superseded and all(v.state != "superseded" for v in owner.versions):
            return False
        return owner.keys >= self.min_keys


#: Number of users in an order other than that of names, unless the operator asks for
#: more: their lines are kept in memory until all users are read.
_ORDERED = 100


@inlineCallbacks
def users(session: Session, output: Output, wanted: UserFilter) -> Inline[int]:
    """Print a line for each user."""
    output.say(_HEADER)
    printed = 0

    def print_page(page: list[Owner]) -> bool:
        nonlocal printed
        for owner in filter(wanted.matches, page):
            if printed == wanted.limit:
                return False
            output.write(_owner_values(owner), _owner_text(owner))
            printed += 1
        return True

    if wanted.order == "name":
        yield each_page(session, wanted.after, print_page)
        return DONE
    limit = _ORDERED if wanted.limit is None else wanted.limit
    largest = _Largest(wanted.order, limit)

    def keep_page(page: list[Owner]) -> bool:
        for owner in filter(wanted.matches, page):
            largest.add(owner)
        return True

    yield each_page(session, wanted.after, keep_page)
    for owner in largest.sorted():
        output.write(_owner_values(owner), _owner_text(owner))
    return DONE


def _owner_values(owner: Owner) -> dict[str, Any]:
    """Describe a user for programs."""
    return {
        "user": owner.user_id,
        "keys": owner.keys,
        "bytes": owner.size,
        "versions": len(owner.versions),
        "last_upload_ms": owner.uploaded_ms,
    }


def _owner_text(owner: Owner) -> str:
    """Describe a user for people."""
    return (
        f"{owner.keys:>10,} {size_text(owner.size):>9} {len(owner.versions):>8}"
        f" {time_text(owner.uploaded_ms):>19}  {owner.user_id}"
    )


@inlineCallbacks
def find_owner(session: Session, user_id: str) -> Inline[Owner]:
    """Fire with a user who has a version or a key.

    Raises:
        ToolError: the user has none.
    """
    owner: Owner = yield session.overview.find_owner(user_id)
    if not owner.versions:
        raise no_backup(user_id)
    return owner


def no_backup(user_id: str) -> ToolError:
    """Return the error for a user without a version or a key."""
    return ToolError(
        f"{user_id} has no backup here. A user is written as in Matrix, such as"
        " @alice:example.org; the command users lists all"
    )


@inlineCallbacks
def show(
    session: Session, output: Output, user_id: str, has_rooms: bool
) -> Inline[int]:
    """Print each version of a user's backup.

    Args:
        has_rooms: Whether to print the number of keys in each room.
    """
    owner: Owner = yield find_owner(session, user_id)
    for version in owner.versions:
        values = _version_values(version)
        lines = _version_lines(version, values)
        if has_rooms:
            rooms = yield session.overview.count_rooms(user_id, version.version)
            values["rooms"] = rooms
            lines += [f"  {number:>10,}  {room}" for room, number in rooms.items()]
        output.write(values, "\n".join(lines))
    return DONE


def _version_values(version: VersionFacts) -> dict[str, Any]:
    """Describe a version for programs: the public parts of ``auth_data`` only."""
    auth_data = _parse_object(version.auth_data)
    signatures = auth_data.get("signatures")
    own = signatures.get(version.user_id) if isinstance(signatures, dict) else None
    return {
        "user": version.user_id,
        "version": str(version.version),
        "state": version.state,
        "algorithm": version.algorithm,
        "public_key": auth_data.get("public_key"),
        "signed_by": sorted(own) if isinstance(own, dict) else [],
        "keys": version.keys,
        "bytes": version.size,
        "etag": str(version.etag),
        "created_ms": version.created_ms,
        "last_upload_ms": version.uploaded_ms,
        "last_upload_device": version.device_id,
        "deleted_ms": version.deleted_ms,
    }


def _parse_object(text: str | None) -> dict[str, Any]:
    """Return the object of a JSON text; an empty one for any other text."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _version_lines(version: VersionFacts, values: dict[str, Any]) -> list[str]:
    """Describe a version for people."""
    state = version.state
    if version.deleted_ms is not None:
        state += f" at {time_text(version.deleted_ms)}, its keys wait for the sweeper"
    device = version.device_id or "unknown device"
    uploaded = "no upload is recorded"
    if version.uploaded_ms is not None:
        uploaded = f"{time_text(version.uploaded_ms)} by {device}"
    return [
        f"Version {version.version}: {state}",
        f"  algorithm    {version.algorithm or '-'}",
        f"  public key   {values['public_key'] or '-'}",
        f"  signed by    {', '.join(values['signed_by']) or '-'}",
        f"  keys         {version.keys:,}, {size_text(version.size)}",
        f"  etag         {version.etag}",
        f"  created      {time_text(version.created_ms)}",
        f"  last upload  {uploaded}",
    ]

"""The commands ``stats``, ``users`` and ``show``: backups in figures."""

import time
from collections.abc import Callable
from typing import Any

import attrs
from twisted.internet.defer import Deferred, inlineCallbacks

from ..admin.facts import describe_owner, describe_version
from ..admin.survey import Largest, Survey, Totals, class_text
from ..inline import Inline
from ..storage import Owner, VersionFacts
from .output import Output, plural, progress, size_text, time_text
from .session import DONE, Session, ToolError

#: Header of the lines of `_owner_text`.
_HEADER = f"{'keys':>10} {'size':>9} {'versions':>8} {'last upload':>19}  user"


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


@inlineCallbacks
def stats(session: Session, output: Output, top: int) -> Inline[int]:
    """Print sums over all users, and the largest backups.

    Args:
        top: number of the largest users to print.
    """
    survey = Survey(session.overview, top, int(1000 * time.time()))

    @inlineCallbacks
    def take(page: list[Owner]) -> Inline[bool]:
        yield survey.take(page)
        return True

    yield each_page(session, "", take)
    tables: dict[str, int] = yield session.overview.measure_tables()
    text = "\n".join(_stats_lines(survey.totals, tables))
    output.write(survey.describe(tables), text)
    for owner in survey.largest.sorted():
        output.say(_owner_text(owner))
    return DONE


def _stats_lines(totals: Totals, tables: dict[str, int]) -> list[str]:
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
        *(f"  {class_text(c):>18}: {n:,}" for c, n in sorted(totals.classes.items())),
        "Users by their last recorded upload:",
        *(f"  {age:>18}: {n:,}" for age, n in sorted(totals.ages.items())),
        "Recorded changes:",
    ]
    for days, sums in totals.growth.items():
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
            output.write(describe_owner(owner), _owner_text(owner))
            printed += 1
        return True

    if wanted.order == "name":
        yield each_page(session, wanted.after, print_page)
        return DONE
    limit = _ORDERED if wanted.limit is None else wanted.limit
    largest = Largest(wanted.order, limit)

    def keep_page(page: list[Owner]) -> bool:
        for owner in filter(wanted.matches, page):
            largest.add(owner)
        return True

    yield each_page(session, wanted.after, keep_page)
    for owner in largest.sorted():
        output.write(describe_owner(owner), _owner_text(owner))
    return DONE


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
        values = describe_version(version)
        lines = _version_lines(version, values)
        if has_rooms:
            rooms = yield session.overview.count_rooms(user_id, version.version)
            values["rooms"] = rooms
            lines += [f"  {number:>10,}  {room}" for room, number in rooms.items()]
        output.write(values, "\n".join(lines))
    return DONE


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

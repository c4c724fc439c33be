"""The commands ``purge``, ``erase`` and ``sweep``: deletions, in small transactions."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
from twisted.internet.defer import Deferred, inlineCallbacks, succeed

from ..admin.removal import AfterBatch, Choice
from ..inline import Inline
from ..storage import Owner, VersionFacts
from ..types import Actor
from .output import Output, plural, progress, require_yes, time_text
from .owners import each_page, no_backup
from .session import DONE, USAGE, Session, ToolError

#: Fires with the users without an active account at the homeserver, among some users.
FindGone = Callable[[Sequence[str]], "Deferred[frozenset[str]]"]


@attrs.frozen
class Manner:
    """How a command deletes.

    Attributes:
        operator: the name for the record.
        is_dry_run: Whether the deletion is only described.
        has_yes: Whether the operator has agreed to the deletion.
        rate: maximum number of keys that are deleted in a second; None for no limit.
    """

    operator: str
    is_dry_run: bool
    has_yes: bool
    rate: int | None


@contextmanager
def paced(session: Session, keys: int, rate: int | None) -> Iterator[AfterBatch]:
    """Show the progress of a deletion, and pause after each batch.

    Args:
        keys: number of keys that will be deleted.
        rate: maximum number of keys that are deleted in a second; None for no limit.
    """
    with progress("keys", keys) as bar:

        def after_batch(deleted: int) -> "Deferred[None]":
            bar.update(deleted)
            if rate is None:
                return succeed(None)
            return session.clock.sleep(deleted / rate)

        yield after_batch


@inlineCallbacks
def purge_versions(
    session: Session,
    output: Output,
    wanted: Choice,
    manner: Manner,
) -> Inline[int]:
    """Delete versions of all users, with their keys.

    Args:
        wanted: chooses a user's versions.
    """
    if not manner.is_dry_run:
        require_yes(manner.has_yes, "the deleted keys can't be given back")
    versions = keys = 0

    @inlineCallbacks
    def delete(version: VersionFacts) -> Inline[bool]:
        actor = Actor(None, manner.operator)
        with paced(session, version.keys, manner.rate) as after_batch:
            is_deleted: bool = yield session.removal.delete_version(
                version, wanted, actor, after_batch, manner.rate
            )
        return is_deleted

    @inlineCallbacks
    def purge_page(page: list[Owner]) -> Inline[bool]:
        nonlocal versions, keys
        for owner in page:
            for version in wanted(owner):
                if manner.is_dry_run or (yield delete(version)):
                    versions += 1
                    keys += version.keys
                    output.write(_purged_values(version), _purged_text(version))
        return True

    yield each_page(session, "", purge_page)
    verb = "would be deleted" if manner.is_dry_run else "deleted"
    output.say(f"{plural(versions, 'version')}, {plural(keys, 'key')} {verb}")
    return DONE


def _purged_values(version: VersionFacts) -> dict[str, Any]:
    """Describe a version for programs."""
    return {
        "user": version.user_id,
        "version": str(version.version),
        "state": version.state,
        "keys": version.keys,
    }


def _purged_text(version: VersionFacts) -> str:
    """Describe a version for people."""
    return (
        f"{version.user_id}  version {version.version} ({version.state}),"
        f" {plural(version.keys, 'key')}"
    )


@inlineCallbacks
def purge_record(
    session: Session, output: Output, days: int, manner: Manner
) -> Inline[int]:
    """Delete the recorded changes that are older than some days."""
    since_ms = int(1000 * (time.time() - 86400 * days))
    if not manner.is_dry_run:
        require_yes(manner.has_yes, "the record of these changes will be lost")
    found = 0
    after = ""
    with progress("users") as bar:
        while page := (yield session.overview.list_users(after)):
            changes = yield session.overview.sum_changes(page[0], page[-1], 0)
            newer = yield session.overview.sum_changes(page[0], page[-1], since_ms)
            found += changes.changes - newer.changes
            for user_id in page if not manner.is_dry_run else ():
                yield session.erasure.delete_changes(user_id, since_ms)
            bar.update(len(page))
            after = page[-1]
    verb = "would be deleted" if manner.is_dry_run else "deleted"
    output.write(
        {"changes": found, "before_ms": since_ms},
        f"{plural(found, 'recorded change')} before {time_text(since_ms)} {verb}",
    )
    return DONE


@inlineCallbacks
def erase(
    session: Session, output: Output, user_id: str, is_forced: bool, manner: Manner
) -> Inline[int]:
    """Delete a user's rows in all tables, except the last version number, and print a
    receipt.

    Args:
        is_forced: Whether to erase a user whose account is active, or whose homeserver
            isn't known.

    Raises:
        ToolError: the account is active, or no table has a row of the user.
    """
    if not (yield _has_rows(session, user_id)):
        raise no_backup(user_id)
    if not is_forced:
        yield _refuse_active(session, user_id)
    if not manner.is_dry_run:
        require_yes(manner.has_yes, f"all keys of {user_id} will be lost")
    yield _erase(session, output, user_id, manner)
    return DONE


@inlineCallbacks
def _refuse_active(session: Session, user_id: str) -> Inline[None]:
    """Raise a ToolError unless the homeserver has deactivated the account."""
    advice = "deactivate the account first, or add --even-if-active"
    if not session.is_synapse:
        raise ToolError(
            f"the service's database doesn't tell whether {user_id} is active:"
            f" {advice}",
            USAGE,
        )
    gone = yield session.overview.find_gone([user_id])
    if user_id not in gone:
        raise ToolError(f"{user_id} is an active account: {advice}", USAGE)


@inlineCallbacks
def _erase(
    session: Session, output: Output, user_id: str, manner: Manner
) -> Inline[None]:
    """Delete a user's rows, or count the rows in a dry run, and print the receipt."""
    owner: Owner
    rows: dict[str, int]
    if manner.is_dry_run:
        owner = yield session.overview.find_owner(user_id)
        rows = {"e2e_room_keys": owner.keys}
        rows |= yield session.overview.count_rows(user_id)
        verb = "would be deleted"
    else:
        owner = yield session.removal.begin_erasure(user_id)
        with paced(session, owner.keys, manner.rate) as after_batch:
            rows = yield session.removal.erase(owner, after_batch, manner.rate)
        verb = "deleted"
    numbers = ", ".join(f"{table} {rows[table]:,}" for table in sorted(rows))
    values = {"user": user_id, "rows": rows, "is_dry_run": manner.is_dry_run}
    values["erased_ms"] = int(1000 * time.time())
    output.write(values, f"{user_id}: rows {verb}: {numbers}")


@inlineCallbacks
def sweep_named(
    session: Session, output: Output, user_ids: Iterable[str], manner: Manner
) -> Inline[int]:
    """Erase the users of a list."""
    _require_yes(manner)
    erased = 0
    for user_id in user_ids:
        if (yield _has_rows(session, user_id)):
            yield _erase(session, output, user_id, manner)
            erased += 1
    _say_erased(output, erased, manner)
    return DONE


@inlineCallbacks
def sweep_deactivated(
    session: Session, output: Output, find_gone: FindGone, manner: Manner
) -> Inline[int]:
    """Erase the users without an active account at the homeserver.

    Args:
        find_gone: asks the homeserver, or a Synapse's database. After a failure, no
            user of the page is erased.
    """
    _require_yes(manner)
    erased = 0
    after = ""
    with progress("users") as bar:
        while page := (yield session.overview.list_users(after)):
            gone = yield find_gone(page)
            for user_id in sorted(gone):
                yield _erase(session, output, user_id, manner)
            erased += len(gone)
            bar.update(len(page))
            after = page[-1]
    _say_erased(output, erased, manner)
    return DONE


def _require_yes(manner: Manner) -> None:
    """
    Raises:
        ToolError: ``--yes`` is missing.
    """
    if not manner.is_dry_run:
        require_yes(manner.has_yes, "all keys of the deactivated users will be lost")


def _say_erased(output: Output, erased: int, manner: Manner) -> None:
    verb = "would be erased" if manner.is_dry_run else "erased"
    output.say(f"{plural(erased, 'user')} {verb}")


@inlineCallbacks
def _has_rows(session: Session, user_id: str) -> Inline[bool]:
    """Fire with whether a table has a row of a user, apart from the last version
    number."""
    rows = yield session.overview.count_rows(user_id)
    if any(rows.values()):
        return True
    owner: Owner = yield session.overview.find_owner(user_id)
    return bool(owner.versions)

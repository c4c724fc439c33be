"""The commands ``purge``, ``erase`` and ``sweep``: deletions, in small transactions."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import attrs
from twisted.internet.defer import inlineCallbacks

from ..inline import Inline
from ..storage import Owner, Place, VersionFacts
from ..storage.overview import DELETED, ORPHANED, SUPERSEDED
from ..types import Actor, BackupId, Retention
from .output import Output, plural, progress, require_yes, time_text
from .owners import each_page, find_owner
from .session import DONE, USAGE, Session, ToolError

#: Function that returns a user's versions to delete.
Choice = Callable[[Owner], Iterable[VersionFacts]]

#: Days after which replaced keys expire: longer than any key has been stored.
_FOREVER = 100_000


@attrs.frozen
class Manner:
    """How a command deletes.

    Attributes:
        operator: the name for the record.
        is_dry_run: Whether nothing is deleted.
        has_yes: Whether the operator has agreed to the deletion.
        rate: maximum number of keys that are deleted in a second; None for no limit.
    """

    operator: str
    is_dry_run: bool
    has_yes: bool
    rate: int | None


@inlineCallbacks
def delete_keys(
    session: Session, backup: BackupId, keys: int, rate: int | None
) -> Inline[int]:
    """Delete the keys of a version that is deleted or has no row; fire with the number
    of deleted keys.

    Args:
        keys: number of keys, for the progress.
        rate: maximum number of keys that are deleted in a second; None for no limit.
    """
    place: Place | None = Place()
    deleted = 0
    with progress("keys", keys) as bar:
        while place is not None:
            batch = yield session.erasure.delete_batch(backup, place, rate)
            place = batch.next
            deleted += batch.deleted
            bar.update(batch.deleted)
            if rate is not None and place is not None:
                yield session.clock.sleep(batch.deleted / rate)
    return deleted


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
    def purge_page(page: list[Owner]) -> Inline[bool]:
        nonlocal versions, keys
        for owner in page:
            for version in wanted(owner):
                versions += 1
                keys += version.keys
                output.write(_purged_values(version), _purged_text(version))
                if not manner.is_dry_run:
                    yield _purge(session, version, manner)
        return True

    yield each_page(session, "", purge_page)
    verb = "would be deleted" if manner.is_dry_run else "deleted"
    output.say(f"{plural(versions, 'version')}, {plural(keys, 'key')} {verb}")
    return DONE


@inlineCallbacks
def _purge(session: Session, version: VersionFacts, manner: Manner) -> Inline[None]:
    """Delete a version with its keys."""
    backup = BackupId(version.user_id, version.version)
    if version.state == ORPHANED:
        yield delete_keys(session, backup, version.keys, manner.rate)
        return
    # Deleting a deleted version again puts it into the sweeper's queue, if it isn't
    # there. Once the sweep has begun, nobody can give the version back.
    actor = Actor(None, manner.operator)
    yield session.store.delete_version(backup.user_id, backup.version, actor)
    sweeps = session.sweeps(Retention(deleted_versions_days=0))
    pause = session.swept_at_once / manner.rate if manner.rate else 0
    place: Place | None = Place()
    with progress("keys", version.keys) as bar:
        while place is not None:
            place = yield sweeps.delete_batch(backup, place)
            bar.update(session.swept_at_once)
            yield session.clock.sleep(pause if place is not None else 0)


def find_orphans(owner: Owner) -> Iterable[VersionFacts]:
    """Return the versions with keys and without a row."""
    return [version for version in owner.versions if version.state == ORPHANED]


def find_deleted(owner: Owner) -> Iterable[VersionFacts]:
    """Return the deleted versions that still have keys, or can be given back."""
    return [
        version
        for version in owner.versions
        if version.state == DELETED and (version.keys or version.deleted_ms is not None)
    ]


def superseded_before(due_ms: int) -> Choice:
    """Return a function that returns a user's superseded versions without a change
    since a time.

    A version changes until the next one is created. The time of a version is unknown if
    Synapse's own endpoints made all of the user's versions; such a version is never
    returned.

    Args:
        due_ms: a Unix time in milliseconds.
    """

    def find(owner: Owner) -> Iterable[VersionFacts]:
        for version in owner.versions:
            later = [v for v in owner.versions if v.version > version.version]
            times = [version.uploaded_ms, *(v.created_ms for v in later[:1])]
            known = [ms for ms in times if ms is not None]
            if version.state == SUPERSEDED and known and max(known) < due_ms:
                yield version

    return find


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
    sweeps = session.sweeps(Retention(record_days=days, replaced_keys_days=_FOREVER))
    found = 0
    after = ""
    with progress("users") as bar:
        while page := (yield sweeps.list_users(after)):
            changes = yield session.overview.sum_changes(page[0], page[-1], 0)
            newer = yield session.overview.sum_changes(page[0], page[-1], since_ms)
            found += changes.changes - newer.changes
            for user_id in page if not manner.is_dry_run else ():
                yield sweeps.expire(user_id, Place())
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
    rows = yield session.overview.count_rows(user_id)
    if not any(rows.values()):
        # Keys without any other row, or no row at all.
        yield find_owner(session, user_id)
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
    """Delete a user's rows, or count them in a dry run, and print the receipt."""
    owner: Owner = yield session.overview.find_owner(user_id)
    rows: dict[str, int] = {"e2e_room_keys": owner.keys}
    if manner.is_dry_run:
        rows |= yield session.overview.count_rows(user_id)
    else:
        yield session.erasure.mark_deleted(user_id)
        # Read again: an upload may have stored keys before the mark.
        owner = yield session.overview.find_owner(user_id)
        rows["e2e_room_keys"] = 0
        for version in owner.versions:
            backup = BackupId(user_id, version.version)
            deleted = yield delete_keys(session, backup, version.keys, manner.rate)
            rows["e2e_room_keys"] += deleted
        rows |= yield session.erasure.delete_rows(user_id)
    verb = "would be deleted" if manner.is_dry_run else "deleted"
    numbers = ", ".join(f"{table} {rows[table]:,}" for table in sorted(rows))
    values = {"user": user_id, "rows": rows, "is_dry_run": manner.is_dry_run}
    values["erased_ms"] = int(1000 * time.time())
    output.write(values, f"{user_id}: rows {verb}: {numbers}")


@inlineCallbacks
def sweep_deactivated(
    session: Session, output: Output, gone: frozenset[str] | None, manner: Manner
) -> Inline[int]:
    """Erase the users that the homeserver no longer has.

    Args:
        gone: these users; None to ask a Synapse's database.
    """
    if not manner.is_dry_run:
        require_yes(manner.has_yes, "all keys of the deactivated users will be lost")
    erased = 0

    @inlineCallbacks
    def erase_page(page: list[Owner]) -> Inline[bool]:
        nonlocal erased
        ids = [owner.user_id for owner in page]
        found = (yield session.overview.find_gone(ids)) if gone is None else gone
        for user_id in ids:
            if user_id in found:
                erased += 1
                yield _erase(session, output, user_id, manner)
        return True

    yield each_page(session, "", erase_page)
    verb = "would be erased" if manner.is_dry_run else "erased"
    output.say(f"{plural(erased, 'user')} {verb}")
    return DONE

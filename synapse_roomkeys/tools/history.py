"""The commands ``audit`` and ``restore``: the record in words, and undo."""

from typing import Any

import attrs
from twisted.internet.defer import inlineCallbacks

from ..admin.facts import Sessions, describe_change, sessions_of
from ..inline import Inline
from ..storage import Owner, VersionFacts
from ..types import Actor, RecordedChange, Restore, RoomKey
from .output import Output, plural, time_text
from .owners import find_owner
from .session import DONE, FINDINGS, Session, ToolError

_ACTS = {
    "create_version": "created the version",
    "update_version": "changed auth_data",
    "delete_version": "deleted the version",
    "restore_version": "gave the deleted version back",
    "export": "exported the version",
}
#: Acts without the ids of sessions: any key of the version may be concerned.
_NAMELESS = ("delete_keys", "delete_version", "restore_version", "export")


@attrs.frozen
class AuditFilter:
    """The changes to print.

    Attributes:
        since_ms: Unix time in milliseconds of the first change.
        room_id: only changes of this room's keys; None for all.
        session_id: only changes of this session's key; None for all.
    """

    since_ms: int
    room_id: str | None
    session_id: str | None

    def matches(self, sessions: Sessions, change: RecordedChange) -> bool:
        """Whether a change concerns the room and the session, or may concern both."""
        if self.room_id is None and self.session_id is None:
            return True
        if change.act in _NAMELESS:
            return True
        return any(
            self.session_id is None or self.session_id in ids
            for room_id, kinds in sessions.items()
            if self.room_id in (None, room_id)
            for ids in kinds.values()
        )


@inlineCallbacks
def audit(
    session: Session, output: Output, user_id: str, wanted: AuditFilter
) -> Inline[int]:
    """Print the recorded changes of a user's backups. With a session, print the stored
    key's first readable message as well."""
    owner: Owner = yield session.overview.find_owner(user_id)
    changes = yield session.store.get_user_record(user_id, wanted.since_ms)
    if not owner.versions and not changes:
        raise ToolError(f"{user_id} has no backup and no record here")
    printed = replaced = 0
    for change in changes:
        sessions = sessions_of(change)
        if wanted.matches(sessions, change):
            output.write(describe_change(change), change_text(change))
            printed += 1
            replaced += any("replaced" in kinds for kinds in sessions.values())
    if not printed:
        output.say("No change is recorded in this time")
    if wanted.room_id is not None and wanted.session_id is not None:
        output.say(f"Uploads that replaced a key: {replaced}")
        yield _print_keys(session, output, owner, wanted)
    return DONE


def change_text(change: RecordedChange) -> str:
    """Describe a recorded change for people."""
    who = f"device {change.device_id}" if change.device_id else "an unknown device"
    if change.operator is not None:
        who = f"operator {change.operator}"
    act = _ACTS.get(change.act) or _key_act(change)
    return (
        f"{time_text(change.changed_ms)}  version {change.version}, etag {change.etag}:"
        f" {who} {act}"
    )


def _key_act(change: RecordedChange) -> str:
    """Describe a change of keys, after the name of the device or operator."""
    if change.act == "delete_keys":
        number = "keys" if change.deleted is None else plural(change.deleted, "key")
        return f"deleted {number}"
    verb = "gave back" if change.act == "restore_keys" else "stored"
    parts = []
    if change.stored:
        parts.append(f"{verb} {plural(change.stored, 'key')}")
    if change.replaced:
        parts.append(f"replaced {plural(change.replaced, 'key')}")
    if change.unchanged:
        parts.append(f"left {change.unchanged:,} better or equal keys unchanged")
    return ", ".join(parts)


@inlineCallbacks
def _print_keys(
    session: Session, output: Output, owner: Owner, wanted: AuditFilter
) -> Inline[None]:
    """Print the index of the first message that the stored key of a session decrypts,
    for each version with access for clients."""
    for version in owner.versions:
        if not _is_live(version):
            continue
        key: RoomKey | None = yield session.store.get_key(
            owner.user_id, version.version, str(wanted.room_id), str(wanted.session_id)
        )
        values: dict[str, Any] = {"version": str(version.version), "key": None}
        text = f"Version {version.version} has no key of this session"
        if key is not None:
            index = key.metadata.first_message_index or 0
            verified = "verified" if key.metadata.is_verified else "not verified"
            text = (
                f"Version {version.version} has a key, {verified}, that decrypts the"
                f" session's messages from index {index} on"
            )
            values["key"] = {
                "first_message_index": index,
                "forwarded_count": key.metadata.forwarded_count or 0,
                "is_verified": bool(key.metadata.is_verified),
            }
        output.write(values, text)


@attrs.frozen
class Undo:
    """A request to give a version or keys back.

    Attributes:
        operator: the name for the record.
        restore: keys to give back; None to give a deleted version back.
        is_dry_run: Whether the change is only described.
    """

    user_id: str
    version: int
    operator: str
    restore: Restore | None
    is_dry_run: bool


@inlineCallbacks
def restore(session: Session, output: Output, undo: Undo) -> Inline[int]:
    """Give a deleted version back, or keys as they were before a time."""
    owner: Owner = yield find_owner(session, undo.user_id)
    store = session.dry_store if undo.is_dry_run else session.store
    actor = Actor(None, undo.operator)
    ids = (undo.user_id, undo.version)
    values: dict[str, Any] = {"user": ids[0], "version": str(ids[1])}
    would = "would be " if undo.is_dry_run else ""
    if undo.restore is not None:
        restored: int = yield store.restore_keys(*ids, undo.restore, actor)
        values["restored_keys"] = restored
        text = f"{plural(restored, 'key')} of version {undo.version} {would}given back"
        output.write(values, text)
        return DONE if restored else FINDINGS
    yield store.restore_version(*ids, actor)
    newer = [v for v in owner.versions if v.version > undo.version and _is_live(v)]
    keys = sum(v.keys for v in owner.versions if v.version == undo.version)
    values |= {"restored_keys": keys, "is_current": not newer}
    state = "readable" if newer else "the current one"
    output.write(
        values,
        f"Version {undo.version} {would or 'is '}{state} again, with"
        f" {plural(keys, 'key')}",
    )
    return DONE


def _is_live(version: VersionFacts) -> bool:
    """Whether clients can read a version."""
    return version.state in ("current", "superseded")

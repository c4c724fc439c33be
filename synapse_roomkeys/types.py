"""Immutable values passed between the layers.

An upload has thousands of keys. The classes for keys are therefore msgspec structs with
``gc=False``, which the garbage collector skips. Skipping is safe because instances of
these classes can't be part of a reference cycle.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import attrs
import msgspec

#: Type of an option that counts bytes, seconds, keys or the like.
PositiveInt = Annotated[int, msgspec.Meta(ge=1, description="a positive integer")]
#: Type of an option that turns something on or off.
Boolean = Annotated[bool, msgspec.Meta(description="true or false")]
#: Type of an option that counts days, of which 0 turns something off. The limit
#: keeps times in the range of 64 bits.
Days = Annotated[
    int, msgspec.Meta(ge=0, le=100_000, description="an integer from 0 to 100,000")
]


@attrs.frozen
class Requester:
    """Sender of a request, as determined by the host's authentication.

    Attributes:
        user_id: the full Matrix id of the user.
        device_id: the device of the access token, or None if the token has no device.
    """

    user_id: str
    device_id: str | None


class KeyMetadata(msgspec.Struct, frozen=True, gc=False):
    """The unencrypted fields of a key: the three fields that rank keys.

    Synapse's own endpoints stored some rows with a NULL or with a number outside the
    valid range (on SQLite, with any value). In these cases the field is None.
    """

    first_message_index: int | None
    forwarded_count: int | None
    is_verified: bool | None


class RoomKey(msgspec.Struct, frozen=True, gc=False):
    """A session's key (``KeyBackupData`` in the specification) with its room and
    session.

    Attributes:
        metadata: the fields that rank the key.
        session_data: the encrypted key as JSON text, never decoded.
    """

    room_id: str
    session_id: str
    metadata: KeyMetadata
    session_data: str


class StoredKey(msgspec.Struct, frozen=True, gc=False):
    """A key in the database, reduced to the fields that a merge needs.

    Attributes:
        metadata: the fields that rank the key.
        has_session_data: False for an old row whose ``session_data`` is JSON null.
        size: length of the key's ``session_data``, in bytes.
    """

    metadata: KeyMetadata
    has_session_data: bool
    size: int


@attrs.frozen
class Position:
    """Point at which a download continues: after the given key.

    Attributes:
        room_id: room of the last key that was read.
        session_id: session of the last key that was read.
        keys: number of keys to read in the next batch, derived from the size of the
            keys read before.
    """

    room_id: str
    session_id: str
    keys: int


@attrs.frozen
class KeyPage:
    """Batch of keys of a download, ordered by room id and session id.

    Attributes:
        rows: for each key the room id, the head, and the data. The head is the key's
            text as a member of a JSON object (``"session_id":{...,"session_data":``) up
            to the data. The data may be invalid JSON. The final ``}`` is missing.
        sizes: for each row, in the order of `rows`, an upper bound of the key's memory
            in bytes. The key's UTF-8 text is not longer than the bound.
        last: position of the last key, or None if no more keys follow.
    """

    rows: Sequence[tuple[str, str, str]]
    sizes: Sequence[int]
    last: Position | None


@attrs.frozen
class BackupId:
    """Identifier of a version of a user's backup.

    Attributes:
        version: number of the version.
    """

    user_id: str
    version: int


@attrs.frozen
class BackupInfo:
    """Description of a version of a user's backup.

    Attributes:
        version: number of the version.
        auth_data: JSON text, never decoded.
        etag: a number that changes whenever the keys change.
        count: number of keys in the version.
    """

    version: int
    algorithm: str
    auth_data: str
    etag: int
    count: int


@attrs.frozen
class BackupState:
    """The etag and the number of keys of a backup after a write.

    Attributes:
        etag: as in `BackupInfo`.
        count: as in `BackupInfo`.
    """

    etag: int
    count: int


class Replacement(msgspec.Struct, frozen=True, gc=False):
    """A stored key (`old`) that was replaced by a better uploaded key (`new`)."""

    room_id: str
    session_id: str
    old: KeyMetadata
    new: KeyMetadata


@attrs.frozen
class UploadResult:
    """Result of an upload.

    Attributes:
        state: etag and number of keys after the upload.
        stored: number of new keys.
        replaced: the stored keys that were replaced by better keys.
        unchanged: number of uploaded keys that were not better than the stored keys.
    """

    state: BackupState
    stored: int
    replaced: tuple[Replacement, ...]
    unchanged: int


@attrs.frozen
class Limits:
    """Limits above which a request is refused. No honest client reaches the defaults.

    Attributes:
        max_body_bytes: length of a request's body.
        max_session_data_bytes: length of a ``session_data``. In real keys the length
            is about 1 KiB.
        max_waiting_requests: number of a user's requests that wait in a process. A
            further request is answered with 429.
        max_user_keys: number of keys in all of a user's backups together, or None for
            no limit.
        max_user_bytes: length of ``session_data`` and ``auth_data`` in all of a user's
            backups together, or None for no limit.
        max_user_versions: number of a user's versions that aren't deleted. Clients
            delete the old version when they create a new version: few users ever have
            two. 100 leaves room for clients that forget to delete.
    """

    max_body_bytes: PositiveInt = 10 * 1024 * 1024
    max_session_data_bytes: PositiveInt = 64 * 1024
    max_waiting_requests: PositiveInt = 5000
    max_user_keys: PositiveInt | None = None
    max_user_bytes: PositiveInt | None = None
    max_user_versions: PositiveInt = 100


@attrs.frozen
class Retention:
    """What is kept of changed and deleted backups, and for how many days.

    Attributes:
        record_days: days for which the record of changes is kept; 0 for no record.
        keep_replaced: the replaced keys that are kept: ``lossy`` for those whose
            replacement has a higher ``first_message_index``, and so decrypts fewer
            messages; ``all``; or ``off``.
        replaced_keys_days: days for which replaced keys are kept.
        deleted_versions_days: days for which a deleted version can be given back; 0 to
            delete the keys immediately, in the background.
    """

    record_days: Days = 28
    keep_replaced: Literal["lossy", "all", "off"] = "lossy"
    replaced_keys_days: Days = 14
    deleted_versions_days: Days = 0


@attrs.frozen
class Actor:
    """Who changes a backup: a user's device, or an operator.

    Attributes:
        device_id: the device of the access token; None for an operator, or for a token
            without a device.
        operator: the name under which an operator's act is recorded; None for a client.
    """

    device_id: str | None
    operator: str | None = None


@attrs.frozen
class Restore:
    """Keys that an operator gives back as they were before a time.

    Attributes:
        room_id: only the keys of this room; None for all rooms.
        session_id: only the key of this session; None for all sessions.
        since_ms: Unix time in milliseconds. Keys that were replaced then or later are
            given back.
        is_forced: Whether a worse key replaces a better one, against the rule for
            uploads.
    """

    room_id: str | None
    session_id: str | None
    since_ms: int
    is_forced: bool


@attrs.frozen
class RecordedChange:
    """A row of the record: a change of a version.

    Attributes:
        version: number of the version.
        etag: the version's etag after the change.
        changed_ms: Unix time in milliseconds.
        act: the kind of the change: one of the constants of `storage.record`.
        device_id: the device of the change; None for an operator's act.
        operator: the operator of the change; None for a client's.
        stored: number of new keys.
        replaced: number of replaced keys.
        unchanged: number of uploaded keys that weren't better than the stored ones.
        deleted: number of deleted keys; None if it isn't known.
        sessions: JSON text that names the stored and replaced sessions.
    """

    version: int
    etag: int
    changed_ms: int
    act: str
    device_id: str | None
    operator: str | None
    stored: int
    replaced: int
    unchanged: int
    deleted: int | None
    sessions: str | None


@attrs.frozen
class VersionRecord:
    """The record of a version.

    Attributes:
        changes: the recorded changes, in the order of etags.
        whole_from: the etag since which each change of the keys is recorded; the
            version's etag, if the last change isn't. Changes are missing before the
            record was turned on, after its days are over, and where a program without
            the plugin wrote.
    """

    changes: tuple[RecordedChange, ...]
    whole_from: int

"""The values that cross the layers.

Those that an upload has thousands of are msgspec's: the garbage collector needn't look
at them. None can be part of a cycle.
"""

from collections.abc import Sequence

import attrs
import msgspec


@attrs.frozen
class Requester:
    """Who sends a request, as the host's authentication found.

    Attributes:
        user_id: the full Matrix id of the user.
        device_id: the device whose access token was used, where there is one.
    """

    user_id: str
    device_id: str | None


class KeyMetadata(msgspec.Struct, frozen=True, gc=False):
    """What the server may know of a key: the three fields that rank it.

    A field is None in rows that Synapse's own endpoints let in with a NULL, or with a
    number that no key can have (on SQLite, with any value).
    """

    first_message_index: int | None
    forwarded_count: int | None
    is_verified: bool | None


class RoomKey(msgspec.Struct, frozen=True, gc=False):
    """One session's key, the specification's ``KeyBackupData``, and where it belongs.

    Attributes:
        metadata: the fields that rank it.
        session_data: the encrypted key as JSON text, never decoded.
    """

    room_id: str
    session_id: str
    metadata: KeyMetadata
    session_data: str


class StoredKey(msgspec.Struct, frozen=True, gc=False):
    """A key of the database, as far as a merge needs it.

    Attributes:
        has_session_data: False for an old row whose ``session_data`` is JSON null.
        size: of its ``session_data``, in bytes.
    """

    metadata: KeyMetadata
    has_session_data: bool
    size: int


@attrs.frozen
class Position:
    """Where a download goes on: after a key.

    Attributes:
        keys: how many to read at once from there, by how large those before it are.
    """

    room_id: str
    session_id: str
    keys: int


@attrs.frozen
class KeyPage:
    """Some keys of a download, in the order of their ids.

    Attributes:
        rows: of each key its room's id, its text as a member of a JSON object
            (``"session_id":{...,"session_data":``) up to the data, and the data, which
            may not be JSON. A ``}`` is missing at the end.
        sizes: upper bound of the memory that each row's key takes, in bytes, in the
            order of `rows`. Its UTF-8 text is no longer than that.
        last: where the last key is, when more may follow.
    """

    rows: Sequence[tuple[str, str, str]]
    sizes: Sequence[int]
    last: Position | None


@attrs.frozen
class BackupId:
    """One version of one user's backup.

    Attributes:
        version: its number.
    """

    user_id: str
    version: int


@attrs.frozen
class BackupInfo:
    """One version of a user's backup.

    Attributes:
        version: its number.
        auth_data: JSON text, never decoded.
        etag: a number that moves whenever the keys change.
        count: how many keys it holds.
    """

    version: int
    algorithm: str
    auth_data: str
    etag: int
    count: int


@attrs.frozen
class BackupState:
    """What the keys of a backup are like after a write.

    Attributes:
        etag: as in `BackupInfo`.
        count: as in `BackupInfo`.
    """

    etag: int
    count: int


class Replacement(msgspec.Struct, frozen=True, gc=False):
    """A stored key that a better one took the place of."""

    room_id: str
    session_id: str
    old: KeyMetadata
    new: KeyMetadata


@attrs.frozen
class UploadResult:
    """What an upload did.

    Attributes:
        state: the backup afterwards.
        stored: how many keys were new.
        replaced: the keys that gave way to better ones.
        kept: how many uploaded keys were not better than the stored ones.
    """

    state: BackupState
    stored: int
    replaced: tuple[Replacement, ...]
    kept: int


@attrs.frozen
class Limits:
    """What is refused for its size. No honest client meets the defaults.

    Attributes:
        max_body_bytes: of a request's body.
        max_session_data_bytes: of one ``session_data``; a real one has about 1 KiB.
        max_waiting_requests: of one user in one process, before the next is
            answered 429.
        max_user_keys: in all of a user's backups together; None for any number.
        max_user_bytes: of ``session_data`` and ``auth_data`` in all of a user's backups
            together; None for any number.
        max_user_versions: of a user's that aren't deleted. A client deletes the old
            version when it makes another one, so few users ever have two; 100 leaves
            room for clients that forget to.
    """

    max_body_bytes: int = 10 * 1024 * 1024
    max_session_data_bytes: int = 64 * 1024
    max_waiting_requests: int = 5000
    max_user_keys: int | None = None
    max_user_bytes: int | None = None
    max_user_versions: int = 100

"""What the two sides of a migration have in common, whichever engine each is of.

Their connections are their own, and block.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import attrs

from ...storage import sql

#: How many versions are looked at together.
PAGE_VERSIONS = 1000

#: A key: room id, session id, first_message_index, forwarded_count, is_verified,
#: session_data; whatever it was that a side held, where it comes from there.
Row = tuple[Any, ...]

KEY_COLUMNS = """room_id, session_id,
    first_message_index, forwarded_count, is_verified, session_data"""
KEYS = f"SELECT {KEY_COLUMNS} FROM e2e_room_keys WHERE user_id = ? AND version = ?"
VERSION_COLUMNS = "user_id, version, algorithm, auth_data, deleted, etag"
_INFO = """
    SELECT v.user_id, v.version, v.algorithm, v.auth_data, v.deleted, v.etag,
        (SELECT COUNT(*) FROM e2e_room_keys AS k
        WHERE k.user_id = v.user_id AND k.version = v.version)"""
VERSIONS = f"{_INFO} FROM e2e_room_keys_versions AS v"
#: What the version was like when it was copied comes last.
HELD = f"""{_INFO}, (SELECT m.copied FROM roomkeys_migrated AS m
        WHERE m.user_id = v.user_id AND m.version = v.version)
    FROM e2e_room_keys_versions AS v"""
HELD_ONE = f"{HELD} WHERE v.user_id = ? AND v.version = ?"

#: The digest of each version that was copied, as it was then: whoever finds another
#: one knows that the target's service has changed the version since.
MAKE_MIGRATED = """
    CREATE TABLE IF NOT EXISTS roomkeys_migrated (
        user_id TEXT NOT NULL, version BIGINT NOT NULL, copied TEXT NOT NULL,
        PRIMARY KEY (user_id, version))"""
_SAVE_MIGRATED = """
    INSERT INTO roomkeys_migrated (user_id, version, copied) VALUES (?, ?, ?)
    ON CONFLICT (user_id, version) DO UPDATE SET copied = excluded.copied"""
_ADD_VERSION = """
    INSERT INTO e2e_room_keys_versions
        (algorithm, auth_data, deleted, etag, user_id, version)
    VALUES (?, ?, ?, ?, ?, ?)"""
_SET_VERSION = """
    UPDATE e2e_room_keys_versions
    SET algorithm = ?, auth_data = ?, deleted = ?, etag = ?
    WHERE user_id = ? AND version = ?"""


@attrs.frozen
class Version:
    """One version of a user's backup.

    Attributes:
        etag: 0 for NULL.
        count: how many keys it holds.
    """

    user_id: str
    version: int
    algorithm: str
    auth_data: str
    deleted: bool
    etag: int
    count: int

    @property
    def ids(self) -> tuple[str, int]:
        """Which one it is."""
        return self.user_id, self.version

    @property
    def digest(self) -> str:
        """It, but for its count, in a few letters."""
        text = f"{self.etag} {self.deleted:d} {self.algorithm}\n{self.auth_data}"
        return hashlib.sha256(text.encode()).hexdigest()


@attrs.frozen
class Held:
    """A version at the target.

    Attributes:
        copied: its digest when it was copied there, or None if it wasn't.
    """

    version: Version
    copied: str | None


class Side(Protocol):
    """A database that is the source of a migration, or its target."""

    def close(self) -> None:
        """Disconnect; what isn't committed is undone."""

    def count_versions(self) -> int:
        """How many versions there are."""

    def versions(self) -> Iterator[list[Row]]:
        """The versions, a page of them at a time: the fields of a `Version`."""

    def keys(self, version: Version, count: int, ordered: bool) -> Iterator[Row]:
        """The keys of a version; at the target, as they were before the transaction.

        Args:
            count: how many there are, about.
            ordered: they come in the order of their ids, as Python has it.
        """

    def prepare(self) -> None:
        """Make the tables.

        Raises:
            SchemaError: they are newer than this version of the plugin.
        """

    def holds(self, *texts: Any) -> bool:
        """Whether these are texts that it can hold."""

    def fit(self, row: Row) -> Row:
        """A key with numbers that it can hold: NULL, which reads as 0, for others."""

    def find(self, versions: Sequence[Version]) -> list[Held]:
        """Those of some versions that are there."""

    def lock(self, version: Version) -> Held | None:
        """A version, if it is there, which nobody else changes until the commit."""

    def write(self, version: Version, rows: Sequence[Row]) -> int:
        """Add keys; how many of them the database can't hold, and goes without."""

    def delete(self, version: Version, ids: Sequence[tuple[str, str]]) -> None:
        """Delete keys by their room and session ids."""

    def clear(self, version: Version) -> None:
        """Delete all keys of a version."""

    def save(self, version: Version, new: bool) -> None:
        """Write a version's row, note that it is a copy, forget its cached count."""

    def commit(self) -> None:
        """Have what was written stay."""


def is_text(value: Any) -> bool:
    """Whether a value is text that can be encoded; SQLite lets in what is not."""
    try:
        return isinstance(value, str) and (value.isascii() or bool(value.encode()))
    except UnicodeEncodeError:
        return False


def parse_version(row: Row) -> Version:
    """A version of a row whose ids and texts are sound."""
    user_id, version, algorithm, auth_data, deleted, etag, count = row[:7]
    number = etag if type(etag) is int else 0
    return Version(
        *(user_id, version, algorithm, auth_data, bool(deleted), number, count)
    )


def parse_held(row: Row) -> Held:
    """A row of the target's, which is sound."""
    return Held(parse_version(row), row[7])


def saving(version: Version, new: bool) -> list[tuple[str, tuple[Any, ...]]]:
    """The statements that `Side.save` is made of."""
    values = (version.algorithm, version.auth_data, int(version.deleted), version.etag)
    return [
        (_ADD_VERSION if new else _SET_VERSION, (*values, *version.ids)),
        (_SAVE_MIGRATED, (*version.ids, version.digest)),
        (sql.FORGET_COUNT, version.ids),
    ]

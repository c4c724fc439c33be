"""The two sides of a migration, of either engine.

Each side has a blocking connection of its own.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol, TypeVar

import attrs

from ...describe import error_line
from .layouts import KEY_COLUMNS, Layout
from .values import Held, KeysDigest, Row, SourceVersion, Version

#: Versions that are compared together: few enough for the progress to move, many
#: enough to make the round trips negligible.
PAGE_VERSIONS = 100
#: Timeout of a statement that waits for another program's lock, in seconds.
LOCK_SECONDS = 60

#: A user and the number of a version.
Ids = tuple[str, int]

KEYS = f"SELECT {KEY_COLUMNS} FROM e2e_room_keys WHERE user_id = ? AND version = ?"
#: The table of the migration, and the service's table of cached counts.
MIGRATED = "roomkeys_migrated"
COUNTS = "roomkeys_counts"

#: The digest of each version at the time of its copy. A row outlives the version:
#: a later run doesn't bring an erased version back.
MAKE_MIGRATED = f"""
    CREATE TABLE IF NOT EXISTS {MIGRATED} (
        user_id TEXT NOT NULL, version BIGINT NOT NULL, copied TEXT NOT NULL,
        PRIMARY KEY (user_id, version))"""
_SAVE_MIGRATED = f"""
    INSERT INTO {MIGRATED} (user_id, version, copied) VALUES (?, ?, ?)
    ON CONFLICT (user_id, version) DO UPDATE SET copied = excluded.copied"""
_ADD_VERSION = """
    INSERT INTO e2e_room_keys_versions
        (algorithm, auth_data, deleted, etag, user_id, version)
    VALUES (?, ?, ?, ?, ?, ?)"""
_SET_VERSION = """
    UPDATE e2e_room_keys_versions
    SET algorithm = ?, auth_data = ?, deleted = ?, etag = ?
    WHERE user_id = ? AND version = ?"""
_FORGET_COUNT = f"DELETE FROM {COUNTS} WHERE user_id = ? AND version = ?"
#: Deletes all keys of a version.
DELETE_KEYS = "DELETE FROM e2e_room_keys WHERE user_id = ? AND version = ?"

T = TypeVar("T")


class MigrateError(Exception):
    """The migration cannot go on; the message is for the operator.

    Attributes:
        exit_code: the exit code of the command.
    """

    exit_code = 1


class RefusedError(MigrateError):
    """The migration does not begin: the operator named the wrong databases."""

    exit_code = 2


class UnreachableError(MigrateError):
    """A database is away, locked or full; the same command goes on later."""

    exit_code = 3


def failure(place: str, error: Exception, is_passing: bool) -> MigrateError:
    """Return the error for an exception of a driver.

    Args:
        place: the side and its address.
        is_passing: the same may succeed later.
    """
    line = error_line(error)
    if not is_passing:
        return MigrateError(f"{place}: {type(error).__name__}: {line}")
    return UnreachableError(
        f"{place}: {line}. See that the database runs, accepts these settings and has"
        " room, then run the same command again: committed backups stay"
    )


class Keys(Protocol):
    """The part that sources and targets share."""

    #: The side and its address, never with a password: "source, SQLite file /a.db".
    place: str

    def close(self) -> None:
        """Disconnect; what isn't committed is undone."""

    def identity(self) -> Hashable | None:
        """Identify the table of keys, independent of the server's name or the file's
        path in the configuration; None without such a table."""

    def keys(self, ids: Ids, count: int, ordered: bool) -> Iterator[Row]:
        """Yield the keys of a version; at the target, without the changes made since
        the iteration began.

        Args:
            count: how many there are, about.
            ordered: order them by room and session id, by code points.
        """


class Target(Keys, Protocol):
    """The database to write to, in transactions that `commit` ends.

    A dry run calls no method that writes, locks or prepares.
    """

    def claim(self) -> None:
        """Keep other migrations from this target until `close`.

        Raises:
            MigrateError: another one is running.
        """

    def prepare(self, make_tables: bool) -> None:
        """Make the missing tables.

        Args:
            make_tables: make those of the service; else only the migration's own, in
                the database of a Synapse, which has made the others.

        Raises:
            SchemaError: the tables are newer than this version of the plugin.
            MigrateError: the homeserver's tables are missing.
        """

    def holds(self, *texts: Any) -> bool:
        """Whether the database can hold all of the texts."""

    def fit(self, row: Row) -> Row | None:
        """Adapt a key to the database: replace a number out of range by NULL, which
        reads as 0. Return None for a key with an impossible text."""

    def find(self, ids: Sequence[Ids]) -> dict[Ids, Held]:
        """Read the state of some versions; leave out versions without a trace."""

    def lock(self, ids: Ids) -> Held | None:
        """Lock a version against other writers until the commit; read the state."""

    def write(self, ids: Ids, rows: Sequence[Row]) -> list[Row]:
        """Add keys; return the keys that the database refuses for size or text."""

    def delete(self, ids: Ids, rows: Sequence[Row]) -> None:
        """Delete keys."""

    def clear(self, ids: Ids) -> None:
        """Delete all keys of a version."""

    def save(self, version: Version, copied: str, is_new: bool) -> None:
        """Write a version's row, record the digest for later runs, and delete the
        cached count."""

    def commit(self) -> None:
        """Commit the transaction."""


@attrs.frozen
class KeyCount:
    """The number of keys at the source, of all users or of the named users.

    Attributes:
        read: the keys of the versions.
        left: other keys: Dendrite keeps the keys of deleted versions.
    """

    read: int
    left: int = 0


@attrs.frozen
class Page:
    """Some versions of the source.

    Attributes:
        lost: versions on the same page that the target cannot hold.
    """

    versions: Sequence[SourceVersion]
    lost: int


class Source(Keys, Protocol):
    """The database to read, in one snapshot, of all users or of the named users."""

    def take_snapshot(self) -> None:
        """Fix the state that the other methods read; may take minutes on SQLite."""

    def count_keys(self) -> KeyCount:
        """Count the keys."""

    def versions(self, target: Target) -> Iterator[Page]:
        """Yield the versions, with the digests of the keys that the target can hold."""


def pages_of(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the rows in lists of a size."""
    iterator = iter(rows)
    while page := list(islice(iterator, size)):
        yield page


def has_sound_version(row: Row, target: Target) -> bool:
    """Whether the target can hold a row of versions, which begins with
    `VERSION_COLUMNS`."""
    return type(row[1]) is int and target.holds(row[0], row[2], row[3])


def parse_version(row: Row, keys: KeysDigest) -> Version:
    """Return the version of a sound row. The row begins with `VERSION_COLUMNS`."""
    user_id, version, algorithm, auth_data, deleted, etag = row[:6]
    number = _parse_etag(etag)
    return Version(user_id, version, algorithm, auth_data, bool(deleted), number, keys)


def _parse_etag(etag: Any) -> int:
    """Return an etag as a number: 0 for NULL, for other text than digits, and for more
    than the 18 digits that any BIGINT can hold. Dendrite's etags are text."""
    if isinstance(etag, str) and etag.isascii() and etag.isdigit() and len(etag) <= 18:
        return int(etag)
    return etag if type(etag) is int else 0


def parse_held(row: Row, copied: str | None, keys: KeysDigest) -> Held | None:
    """Return the state of a version at the target, None if nothing is left of it.

    Args:
        row: begins with `VERSION_COLUMNS`; the algorithm is NULL if there is no such
            version.
    """
    if row[2] is not None:
        return Held(parse_version(row, keys), copied, keys.count)
    return Held(None, copied, keys.count) if copied or keys.count else None


def saving(
    version: Version, copied: str, is_new: bool, has_counts: bool
) -> list[tuple[str, tuple[Any, ...]]]:
    """Return the statements of `Target.save`, and their parameters.

    Args:
        has_counts: the plugin's table of counts exists.
    """
    values = (version.algorithm, version.auth_data, int(version.deleted), version.etag)
    statements: list[tuple[str, tuple[Any, ...]]] = [
        (_ADD_VERSION if is_new else _SET_VERSION, (*values, *version.ids)),
        (_SAVE_MIGRATED, (*version.ids, copied)),
    ]
    return statements + [(_FORGET_COUNT, version.ids)] * has_counts


def check_tables(place: str, layout: Layout, tables: Iterable[str]) -> None:
    """Check that a database has the homeserver's tables.

    Args:
        place: the side and its address.
        layout: the tables to find.
        tables: the names of the database's tables.

    Raises:
        RefusedError: one of the tables is missing.
    """
    missing = [table for table in layout.tables if table not in tables]
    if missing:
        raise RefusedError(
            f"{place}: there is no table {' or '.join(missing)}. Is it the database"
            " with a homeserver's key backups?"
        )

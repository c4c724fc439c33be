"""An SQLite file as a side of a migration."""

import fcntl
import json
import os
import sqlite3
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...storage import PAGE_KEYS, SQLITE, upgrade_tables
from .layouts import KEY_COLUMNS, SYNAPSE, VERSION_COLUMNS, Layout
from .side import (
    COUNTS,
    DELETE_KEYS,
    KEYS,
    LOCK_SECONDS,
    MAKE_MIGRATED,
    MIGRATED,
    PAGE_VERSIONS,
    Ids,
    KeyCount,
    MigrateError,
    Page,
    Target,
    UnreachableError,
    check_tables,
    failure,
    has_sound_version,
    pages_of,
    parse_held,
    parse_version,
    saving,
)
from .values import Held, Row, SourceVersion, Version, digest_keys, is_text

_VERSIONS = f"SELECT {VERSION_COLUMNS} FROM e2e_room_keys_versions"
_COPIED = f"SELECT copied FROM {MIGRATED} WHERE user_id = ? AND version = ?"
_ORDER = " ORDER BY room_id, session_id"
#: The texts of the position are bytes: broken UTF-8 stays unchanged.
_AFTER = """
    AND (room_id, session_id) > (CAST(? AS TEXT), CAST(? AS TEXT))"""
_FIND_TABLES = "SELECT name FROM sqlite_master WHERE type = 'table'"
_FIND_SOURCES_TABLES = "SELECT name FROM source.sqlite_master WHERE type = 'table'"
#: The columns of the tables in a snapshot.
_SNAPSHOT = {
    "e2e_room_keys": f"user_id, version, {KEY_COLUMNS}",
    "e2e_room_keys_versions": VERSION_COLUMNS,
    MIGRATED: "user_id, version, copied",
}
#: Deletes one key.
_DELETE_KEY = f"{DELETE_KEYS} AND room_id = ? AND session_id = ?"
#: The parameter is a JSON array of user ids.
_OF_USERS = " WHERE user_id IN (SELECT value FROM json_each(?))"
_INDEXES = {
    "e2e_room_keys": """
        CREATE INDEX keys_by_ids
        ON e2e_room_keys (user_id, version, room_id, session_id)""",
    MIGRATED: f"CREATE INDEX migrated_by_ids ON {MIGRATED} (user_id, version)",
}
#: Steps of SQLite's virtual machine between two chances for Ctrl-C: some milliseconds.
_STEPS = 100_000


class _SqliteSide:
    """A connection to a database in a file.

    Attributes:
        place: as `Keys.place`.
    """

    def __init__(self, role: str, args: Mapping[str, Any]) -> None:
        """
        Args:
            role: "source" or "target".
            args: ``database``, the path of the file.
        """
        self._path = Path(args["database"]).absolute()
        self.place = f"{role}, SQLite file {self._path}"

    def close(self) -> None:
        """As `Keys.close`."""
        self._connection.close()

    def identity(self) -> Hashable | None:
        """As `Keys.identity`."""
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def _connect(self, database: str) -> None:
        self._connection = sqlite3.connect(
            database, timeout=LOCK_SECONDS, isolation_level=None, uri=True
        )
        self._connection.text_factory = lambda text: text.decode(
            "utf-8", "surrogateescape"
        )
        # Python handles Ctrl-C only between two Python instructions: run an empty
        # function at intervals.
        self._connection.set_progress_handler(lambda: 0, _STEPS)

    def _find_tables(self) -> None:
        """Note which tables there are."""
        self._tables = {name for (name,) in self._execute(_FIND_TABLES)}

    def _find_copied(self, ids: Ids) -> str | None:
        rows = self._execute(_COPIED, ids) if MIGRATED in self._tables else ()
        return next((copied for (copied,) in rows), None)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn the driver's exceptions into those of the migration."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if str(error) == "interrupted":
                raise KeyboardInterrupt from error
            raise failure(self.place, error, True) from error
        except sqlite3.Error as error:
            raise failure(self.place, error, False) from error

    def _execute(self, statement: str, parameters: Sequence[Any] = ()) -> list[Row]:
        with self._errors():
            return self._connection.execute(statement, parameters).fetchall()


class SqliteSource(_SqliteSide):
    """A `Source` in an SQLite file.

    The snapshot is a copy of the tables in a temporary database, so that other programs
    don't wait for the migration.
    """

    def __init__(
        self, args: Mapping[str, Any], layout: Layout, users: Sequence[str]
    ) -> None:
        """
        Args:
            args: ``database``, the path of the file.
            layout: the homeserver's tables.
            users: the only ones to read, or none for all.
        """
        super().__init__("source", args)
        self._layout = layout
        self._of_users = _OF_USERS if users else ""
        self._users = (json.dumps(users),) if users else ()
        self._connect("")
        try:
            self._execute("ATTACH ? AS source", (f"{self._path.as_uri()}?mode=ro",))
            rows = self._execute(_FIND_SOURCES_TABLES)
            self._tables = {name for (name,) in rows}
            check_tables(self.place, layout, self._tables)
            # The snapshot has Synapse's tables, also of a source with other tables.
            self._tables.update(SYNAPSE.tables)
        except MigrateError:
            self.close()
            raise

    def take_snapshot(self) -> None:
        """As `Source.take_snapshot`."""
        self._execute("BEGIN")
        for table, columns in _SNAPSHOT.items():
            if table in self._tables:
                # The snapshot's database is empty: the table to read is the source's.
                query = f"SELECT {columns} FROM {table}{self._of_users}"
                self._execute(
                    f"CREATE TABLE main.{table} AS {self._layout.with_clause}{query}",
                    self._users,
                )
        ((self._present,),) = self._execute(
            f"SELECT COUNT(*) FROM source.{self._layout.keys}{self._of_users}",
            self._users,
        )
        self._execute("COMMIT")
        self._execute("DETACH source")
        for table, statement in _INDEXES.items():
            if table in self._tables:
                self._execute(statement)

    def keys(self, ids: Ids, count: int, ordered: bool) -> Iterator[Row]:
        """As `Keys.keys`."""
        with self._errors():
            # Not "yield from", which would close the cursor after the connection.
            rows = self._connection.execute(KEYS + _ORDER if ordered else KEYS, ids)
            for row in rows:  # noqa: UP028
                yield row

    def count_keys(self) -> KeyCount:
        """As `Source.count_keys`."""
        ((read,),) = self._execute("SELECT COUNT(*) FROM e2e_room_keys")
        return KeyCount(read, self._present - read)

    def versions(self, target: Target) -> Iterator[Page]:
        """As `Source.versions`."""
        for page in pages_of(self._execute(_VERSIONS), PAGE_VERSIONS):
            sound = [row for row in page if has_sound_version(row, target)]
            versions = [self._version(row, target) for row in sound]
            yield Page(versions, len(page) - len(sound))

    def _version(self, row: Row, target: Target) -> SourceVersion:
        ids = row[0], row[1]
        lost = 0

        def fitted() -> Iterator[Row]:
            nonlocal lost
            for key in self.keys(ids, 0, False):
                fit = target.fit(key)
                if fit is None:
                    lost += 1
                else:
                    yield fit

        digest = digest_keys(fitted())
        return SourceVersion(parse_version(row, digest), self._find_copied(ids), lost)


class SqliteTarget(_SqliteSide):
    """A `Target` in an SQLite file."""

    def __init__(self, args: Mapping[str, Any], dry_run: bool) -> None:
        """
        Args:
            args: ``database``, the path of the file.
            dry_run: the file is only read, and not made.
        """
        super().__init__("target", args)
        self._file: int | None = None
        if not dry_run:
            self._file = self._open_file()
            self._connect(str(self._path))
        else:
            exists = self._path.exists()
            self._connect(f"{self._path.as_uri()}?mode=ro" if exists else ":memory:")
        self._find_tables()

    def close(self) -> None:
        """As `Keys.close`."""
        super().close()
        # Last: closing a file drops all of the process' locks on it, SQLite's too.
        if self._file is not None:
            os.close(self._file)

    def claim(self) -> None:
        """As `Target.claim`."""
        assert self._file is not None, "opened for a dry run"
        try:
            # SQLite's own locks are of another kind, and don't meet this one.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MigrateError(
                f"{self.place}: another migration writes to it. Wait for its end, then"
                " run this command again"
            ) from None

    def prepare(self, make_tables: bool) -> None:
        """As `Target.prepare`."""
        if not make_tables:
            check_tables(self.place, SYNAPSE, self._tables)
        else:
            # The service reads while the migration writes.
            self._execute("PRAGMA journal_mode = WAL")
            with self._errors():
                upgrade_tables(self._connection.cursor(), SQLITE, True)
        self._execute(MAKE_MIGRATED)
        self.commit()
        self._find_tables()

    def keys(self, ids: Ids, count: int, ordered: bool) -> Iterator[Row]:
        """As `Keys.keys`; page by page, each read before the keys in it change."""
        statement = KEYS + _ORDER + f" LIMIT {PAGE_KEYS}"
        parameters: tuple[Any, ...] = ids
        while rows := self._execute(statement, parameters):
            yield from rows
            statement = KEYS + _AFTER + _ORDER + f" LIMIT {PAGE_KEYS}"
            last = (text.encode("utf-8", "surrogateescape") for text in rows[-1][:2])
            parameters = (*ids, *last)

    def holds(self, *texts: Any) -> bool:
        """As `Target.holds`."""
        return all(map(is_text, texts))

    def fit(self, row: Row) -> Row | None:
        """As `Target.fit`."""
        return row if self.holds(row[0], row[1], row[5]) else None

    def find(self, ids: Sequence[Ids]) -> dict[Ids, Held]:
        """As `Target.find`."""
        if not set(SYNAPSE.tables) <= self._tables:
            return {}
        states = {one: self._find_one(one) for one in ids}
        return {one: held for one, held in states.items() if held is not None}

    def lock(self, ids: Ids) -> Held | None:
        """As `Target.lock`."""
        if not self._connection.in_transaction:
            self._execute("BEGIN IMMEDIATE")
        return self._find_one(ids)

    def write(self, ids: Ids, rows: Sequence[Row]) -> list[Row]:
        """As `Target.write`."""
        statement = f"""
            INSERT INTO e2e_room_keys (user_id, version, {KEY_COLUMNS})
            VALUES (?, ?, ?, ?, ?, ?, ?, ?)"""
        with self._errors():
            self._connection.executemany(statement, [(*ids, *row) for row in rows])
        return []

    def delete(self, ids: Ids, rows: Sequence[Row]) -> None:
        """As `Target.delete`."""
        parameters = [(*ids, *row[:2]) for row in rows]
        with self._errors():
            self._connection.executemany(_DELETE_KEY, parameters)

    def clear(self, ids: Ids) -> None:
        """As `Target.clear`."""
        self._execute(DELETE_KEYS, ids)

    def save(self, version: Version, copied: str, is_new: bool) -> None:
        """As `Target.save`."""
        has_counts = COUNTS in self._tables
        for statement, parameters in saving(version, copied, is_new, has_counts):
            self._execute(statement, parameters)

    def commit(self) -> None:
        """As `Target.commit`."""
        with self._errors():
            self._connection.commit()

    def _find_one(self, ids: Ids) -> Held | None:
        """Read the state of a version; None without a trace of it."""
        where = " WHERE user_id = ? AND version = ?"
        rows = self._execute(_VERSIONS + where, ids) or [(*ids, None)]
        with self._errors():
            digest = digest_keys(self._connection.execute(KEYS, ids))
        return parse_held(rows[0], self._find_copied(ids), digest)

    def _open_file(self) -> int:
        try:
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UnreachableError(
                f"{self.place}: {error.strerror}. Check the path and its permissions"
            ) from None

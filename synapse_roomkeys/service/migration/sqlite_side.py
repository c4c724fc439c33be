"""An SQLite file as a side of a migration."""

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...storage import SQLITE, sql, upgrade_tables
from .side import (
    HELD_ONE,
    KEY_COLUMNS,
    KEYS,
    MAKE_MIGRATED,
    PAGE_VERSIONS,
    VERSION_COLUMNS,
    VERSIONS,
    Held,
    Row,
    Version,
    is_text,
    parse_held,
    saving,
)

#: Seconds to wait for somebody else's transaction.
_TIMEOUT = 60.0


class SqliteSide:
    """A database in an SQLite file."""

    def __init__(self, args: Mapping[str, Any], source: bool) -> None:
        """
        Args:
            args: ``database``, the path of the file.
            source: the file is only read, in one go: its two tables are put into a
                temporary file, where SQLite has those, so that nobody waits long.
        """
        path = Path(args["database"])
        if source:
            self._connection = self._reader = _snapshot(path)
        else:
            self._connection = _connect(str(path))
            self._reader = _connect(str(path))
            # So that the reader reads while the other one writes.
            self._connection.execute("PRAGMA journal_mode = WAL").fetchall()

    def close(self) -> None:
        """As `Side.close`."""
        self._connection.close()
        self._reader.close()

    def count_versions(self) -> int:
        """As `Side.count_versions`."""
        count = "SELECT COUNT(*) FROM e2e_room_keys_versions"
        ((number,),) = self._connection.execute(count)
        found: int = number
        return found

    def versions(self) -> Iterator[list[Row]]:
        """As `Side.versions`."""
        cursor = self._reader.execute(VERSIONS)
        while page := cursor.fetchmany(PAGE_VERSIONS):
            yield page

    def keys(self, version: Version, count: int, ordered: bool) -> Iterator[Row]:
        """As `Side.keys`."""
        order = " ORDER BY room_id, session_id" if ordered else ""
        return self._reader.execute(KEYS + order, version.ids)

    def prepare(self) -> None:
        """As `Side.prepare`."""
        upgrade_tables(self._connection.cursor(), SQLITE, True)
        self._connection.execute(MAKE_MIGRATED)
        self.commit()

    def holds(self, *texts: Any) -> bool:
        """As `Side.holds`."""
        return all(map(is_text, texts))

    def fit(self, row: Row) -> Row:
        """As `Side.fit`."""
        return row

    def find(self, versions: Sequence[Version]) -> list[Held]:
        """As `Side.find`."""
        found = (self._find_one(version) for version in versions)
        return [held for held in found if held is not None]

    def lock(self, version: Version) -> Held | None:
        """As `Side.lock`."""
        if not self._connection.in_transaction:
            self._connection.execute("BEGIN IMMEDIATE")
        return self._find_one(version)

    def write(self, version: Version, rows: Sequence[Row]) -> int:
        """As `Side.write`."""
        statement = f"""
            INSERT INTO e2e_room_keys (user_id, version, {KEY_COLUMNS})
            VALUES (?, ?, ?, ?, ?, ?, ?, ?)"""
        self._connection.executemany(statement, [(*version.ids, *row) for row in rows])
        return 0

    def delete(self, version: Version, ids: Sequence[tuple[str, str]]) -> None:
        """As `Side.delete`."""
        parameters = [(*version.ids, *pair) for pair in ids]
        self._connection.executemany(sql.DELETE_ROOM_KEY, parameters)

    def clear(self, version: Version) -> None:
        """As `Side.clear`."""
        self._connection.execute(sql.DELETE_KEYS, version.ids)

    def save(self, version: Version, new: bool) -> None:
        """As `Side.save`."""
        for statement, parameters in saving(version, new):
            self._connection.execute(statement, parameters)

    def commit(self) -> None:
        """As `Side.commit`."""
        self._connection.commit()

    def _find_one(self, version: Version) -> Held | None:
        row = self._connection.execute(HELD_ONE, version.ids).fetchone()
        return None if row is None else parse_held(row)


def _connect(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_TIMEOUT, isolation_level=None, uri=True)
    connection.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
    return connection


def _snapshot(path: Path) -> sqlite3.Connection:
    """A temporary database with the two tables of a file."""
    connection = _connect("")
    connection.execute("ATTACH ? AS source", (f"{path.absolute().as_uri()}?mode=ro",))
    connection.execute("BEGIN")
    for table, columns in (
        ("e2e_room_keys", f"user_id, version, {KEY_COLUMNS}"),
        ("e2e_room_keys_versions", VERSION_COLUMNS),
    ):
        connection.execute(
            f"CREATE TABLE main.{table} AS SELECT {columns} FROM source.{table}"
        )
    connection.execute("COMMIT")
    connection.execute("DETACH source")
    connection.execute(
        "CREATE INDEX by_ids ON e2e_room_keys (user_id, version, room_id, session_id)"
    )
    return connection

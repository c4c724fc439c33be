"""The servers' databases, filled and looked into past the servers."""

import io
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import psycopg2

from .keys import Key, backup_lines, session_lines

ALGORITHM = "m.megolm_backup.v1.curve25519-aes-sha2"
AUTH_DATA = (
    '{"public_key":"hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo",'
    '"signatures":{"@user:test.example":{"ed25519:ABCDEFGHIJ":"'
    + "N" * 86
    + '","ed25519:KLMNOPQRST":"'
    + "M" * 86
    + '"}}}'
)
_TABLES = ("e2e_room_keys", "e2e_room_keys_versions")
_TIMEOUT = 120.0
_COPY_LINES = 5_000

_BACKGROUND_WORK = "SELECT count(*) FROM background_updates"
_ADD_VERSION = """
INSERT INTO e2e_room_keys_versions
    (user_id, version, algorithm, auth_data, deleted, etag)
VALUES ({0}, {0}, {0}, {0}, 0, 1)
"""
_COLUMNS = """
    room_id, session_id, first_message_index, forwarded_count, is_verified,
    session_data
"""
_FILL = f"""
INSERT INTO e2e_room_keys (user_id, version, {_COLUMNS})
SELECT {{0}}, {{0}}, room_id, {{0}} || substr(session_id, {{0}}),
    first_message_index, forwarded_count, is_verified, session_data
FROM {{1}} WHERE position < {{0}} ORDER BY position
"""
_CROWD_VERSIONS = """
INSERT INTO e2e_room_keys_versions
    (user_id, version, algorithm, auth_data, deleted, etag)
SELECT '@crowd' || number || ':test.example', 1, %s, %s, 0, 1
FROM generate_series(1, %s) AS number
"""
_CROWD_KEYS = f"""
INSERT INTO e2e_room_keys (user_id, version, {_COLUMNS})
SELECT '@crowd' || number || ':test.example', 1, {_COLUMNS}
FROM generate_series(1, %s) AS number, benchmark.keys WHERE position < %s
"""
_AUTOVACUUM = """
SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'autovacuum worker'
"""
_COUNT = "SELECT count(*) FROM e2e_room_keys WHERE user_id = {0} AND version = {0}"
_MASTER = """
CREATE TABLE {0} (
    position integer PRIMARY KEY, room_id text, session_id text,
    first_message_index integer, forwarded_count integer, is_verified boolean,
    session_data text
)
"""
_BARE_TABLES = """
CREATE TABLE e2e_room_keys (
    user_id text NOT NULL,
    room_id text NOT NULL,
    session_id text NOT NULL,
    version bigint NOT NULL,
    first_message_index integer,
    forwarded_count integer,
    is_verified boolean,
    session_data text NOT NULL
);
CREATE UNIQUE INDEX ON e2e_room_keys (user_id, version, room_id, session_id);
CREATE INDEX ON e2e_room_keys (room_id);
CREATE TABLE e2e_room_keys_versions (
    user_id text NOT NULL,
    version bigint NOT NULL,
    algorithm text NOT NULL,
    auth_data text NOT NULL,
    deleted smallint NOT NULL DEFAULT 0,
    etag bigint
);
CREATE UNIQUE INDEX ON e2e_room_keys_versions (user_id, version);
"""


class Database(Protocol):
    """What is done to a server's database behind its back."""

    def load(self, keys: Sequence[Key]) -> None:
        """Store the keys that backups are filled from."""

    def fill(self, user_id: str, version: int, count: int, copies: int = 1) -> None:
        """Make a backup of the first keys, or of several variants of each."""

    def count(self, user_id: str, version: int) -> int:
        """Count the keys of a backup."""

    def analyze(self) -> None:
        """Let the planner know the tables, and leave them as writes left them."""

    def settle(self) -> None:
        """Have all maintenance done that would be due."""

    def wait_for_background_work(self) -> None:
        """Wait until the homeserver has built its indexes."""

    def close(self) -> None:
        """Disconnect."""


def _wait(ready: Callable[[], bool]) -> None:
    """Wait for something that a homeserver or PostgreSQL does by itself."""
    deadline = time.monotonic() + _TIMEOUT
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError("the background work doesn't end")
        time.sleep(0.05)


def _prefix(copy: int) -> str:
    """Tell the variants of a session's id apart."""
    return f"-{copy}" if copy else ""


class PostgresDatabase:
    """One database of a PostgreSQL server."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        """Connect."""
        self.arguments = dict(arguments)
        self._connection = psycopg2.connect(**arguments)
        self._connection.autocommit = True
        self._cursor = self._connection.cursor()

    def query(self, sql: str, parameters: Sequence[object] = ()) -> list[Any]:
        """Run a query and return its rows."""
        self.execute(sql, parameters)
        return list(self._cursor.fetchall())

    def execute(self, sql: str, parameters: Sequence[object] = ()) -> None:
        """Run a statement."""
        self._cursor.execute(sql, parameters or None)

    def load(self, keys: Sequence[Key]) -> None:
        """Store the keys that backups are filled from."""
        self.execute("CREATE SCHEMA benchmark")
        self.execute(_MASTER.format("benchmark.keys"))
        lines = [
            f"{position}\t{key.room_id}\t{key.session_id}\t{key.first_message_index}"
            f"\t{key.forwarded_count}\t{key.is_verified}\t{key.session_data}"
            for position, key in enumerate(keys)
        ]
        self._copy("benchmark.keys", lines)

    def load_answers(self, keys: Sequence[Key], room: Sequence[Key]) -> None:
        """Store downloads in pieces that only need to be read out."""
        self.execute("CREATE TABLE benchmark.backup (piece text)")
        self._copy("benchmark.backup", list(backup_lines(keys)))
        self.execute("CREATE TABLE benchmark.room (piece text)")
        lines = ['{"sessions":{', *session_lines(room), "}}"]
        self._copy("benchmark.room", lines)
        self.settle()

    def create_bare_tables(self) -> None:
        """Create the tables that a homeserver would have made."""
        self.execute(_BARE_TABLES)

    def fill(self, user_id: str, version: int, count: int, copies: int = 1) -> None:
        """Make a backup of the first keys, or of several variants of each."""
        values = (user_id, version, ALGORITHM, AUTH_DATA)
        self.execute(_ADD_VERSION.format("%s"), values)
        if not count:
            return
        sql = _FILL.format("%s", "benchmark.keys")
        for copy in range(copies):
            prefix = _prefix(copy)
            self.execute(sql, (user_id, version, prefix, len(prefix) + 1, count))

    def crowd(self, users: int, keys: int) -> None:
        """Make so many users more, each with a backup of so many keys."""
        self.execute(_CROWD_VERSIONS, (ALGORITHM, AUTH_DATA, users))
        self.execute(_CROWD_KEYS, (users, keys))
        self.settle()

    def count(self, user_id: str, version: int) -> int:
        """Count the keys of a backup."""
        ((count,),) = self.query(_COUNT.format("%s"), (user_id, version))
        return int(count)

    def analyze(self) -> None:
        """Analyze the tables of keys, and keep them from being vacuumed."""
        for table in _TABLES:
            self.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = off)")
            self.execute(f"ANALYZE {table}")
        self.execute("CHECKPOINT")

    def settle(self) -> None:
        """Vacuum and analyze the tables of keys; leave nothing to be done beside."""
        for table in _TABLES:
            self.execute(f"ALTER TABLE {table} RESET (autovacuum_enabled)")
            self.execute(f"VACUUM ANALYZE {table}")
        _wait(lambda: self.query(_AUTOVACUUM) == [(0,)])
        self.execute("CHECKPOINT")

    def wait_for_background_work(self) -> None:
        """Wait until the homeserver has built its indexes."""
        _wait(lambda: self.query(_BACKGROUND_WORK) == [(0,)])

    def close(self) -> None:
        """Disconnect."""
        self._connection.close()

    def _copy(self, table: str, lines: Sequence[str]) -> None:
        """Load lines in the format of COPY, none of which needs escaping."""
        for start in range(0, len(lines), _COPY_LINES):
            text = "\n".join(lines[start : start + _COPY_LINES])
            self._cursor.copy_expert(f"COPY {table} FROM STDIN", io.StringIO(text))
        self.execute(f"ANALYZE {table}")


class SqliteDatabase:
    """The file that a homeserver has its tables in."""

    def __init__(self, file: Path) -> None:
        """Open the file, and another one beside it for the keys to fill it from."""
        self._connection = sqlite3.connect(
            file, timeout=_TIMEOUT, isolation_level=None, check_same_thread=False
        )
        master = str(file.with_name("master.db"))
        self._connection.execute("ATTACH DATABASE ? AS master", (master,))

    def load(self, keys: Sequence[Key]) -> None:
        """Store the keys that backups are filled from."""
        self._connection.execute(_MASTER.format("master.keys"))
        rows = (
            (
                position,
                key.room_id,
                key.session_id,
                key.first_message_index,
                key.forwarded_count,
                key.is_verified,
                key.session_data,
            )
            for position, key in enumerate(keys)
        )
        self._connection.execute("BEGIN")
        insert = "INSERT INTO master.keys VALUES (?, ?, ?, ?, ?, ?, ?)"
        self._connection.executemany(insert, rows)
        self._connection.execute("COMMIT")

    def fill(self, user_id: str, version: int, count: int, copies: int = 1) -> None:
        """Make a backup of the first keys, or of several variants of each."""
        self._connection.execute("BEGIN IMMEDIATE")
        values = (user_id, version, ALGORITHM, AUTH_DATA)
        self._connection.execute(_ADD_VERSION.format("?"), values)
        sql = _FILL.format("?", "master.keys")
        for copy in range(copies):
            prefix = _prefix(copy)
            parameters = (user_id, version, prefix, len(prefix) + 1, count)
            self._connection.execute(sql, parameters)
        self._connection.execute("COMMIT")

    def count(self, user_id: str, version: int) -> int:
        """Count the keys of a backup."""
        cursor = self._connection.execute(_COUNT.format("?"), (user_id, version))
        return int(cursor.fetchone()[0])

    def analyze(self) -> None:
        """Analyze the tables, all that there is to be done on SQLite."""
        self.settle()

    def settle(self) -> None:
        """Analyze the tables and empty the write-ahead log."""
        self._connection.execute("ANALYZE main")
        self._connection.execute("PRAGMA main.wal_checkpoint(TRUNCATE)").fetchall()

    def wait_for_background_work(self) -> None:
        """Wait until the homeserver has built its indexes."""
        execute = self._connection.execute
        _wait(lambda: bool(execute(_BACKGROUND_WORK).fetchone() == (0,)))

    def close(self) -> None:
        """Disconnect."""
        self._connection.close()

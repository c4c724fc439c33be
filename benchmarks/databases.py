"""Direct access to the servers' databases: filling, counting, maintenance."""

import io
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import psycopg2

from .keys import Key, backup_json_pieces, session_json_pieces

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
_TIMEOUT_SECONDS = 120.0
_LINES_PER_COPY = 5_000

_COUNT_BACKGROUND_UPDATES = "SELECT count(*) FROM background_updates"
_ADD_VERSION = """
INSERT INTO e2e_room_keys_versions
    (user_id, version, algorithm, auth_data, deleted, etag)
VALUES ({0}, {0}, {0}, {0}, 0, 1)
"""
_COLUMNS = """
    room_id, session_id, first_message_index, forwarded_count, is_verified,
    session_data
"""
_COPY_TEMPLATE_KEYS = f"""
INSERT INTO e2e_room_keys (user_id, version, {_COLUMNS})
SELECT {{0}}, {{0}}, room_id, {{0}} || substr(session_id, {{0}}),
    first_message_index, forwarded_count, is_verified, session_data
FROM {{1}} WHERE position < {{0}} ORDER BY position
"""
_ADD_USERS_VERSIONS = """
INSERT INTO e2e_room_keys_versions
    (user_id, version, algorithm, auth_data, deleted, etag)
SELECT '@crowd' || number || ':test.example', 1, %s, %s, 0, 1
FROM generate_series(1, %s) AS number
"""
_ADD_USERS_KEYS = f"""
INSERT INTO e2e_room_keys (user_id, version, {_COLUMNS})
SELECT '@crowd' || number || ':test.example', 1, {_COLUMNS}
FROM generate_series(1, %s) AS number, benchmark.keys WHERE position < %s
"""
_COUNT_AUTOVACUUM_WORKERS = """
SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'autovacuum worker'
"""
_COUNT_KEYS = "SELECT count(*) FROM e2e_room_keys WHERE user_id = {0} AND version = {0}"
_CREATE_TEMPLATE_KEYS = """
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
    """The operations on a server's database that bypass the server."""

    def load_template_keys(self, keys: Sequence[Key]) -> None:
        """Store the template keys, which backups are copied from."""

    def insert_backup(
        self, user_id: str, version: int, count: int, copies: int = 1
    ) -> None:
        """Insert a backup with the first template keys.

        With several copies, each template key is stored that many times under
        different session ids.
        """

    def count_keys(self, user_id: str, version: int) -> int:
        """Return the number of keys in a backup."""

    def analyze_only(self) -> None:
        """Update the planner's statistics without a vacuum."""

    def run_maintenance(self) -> None:
        """Run all maintenance that would be due, and wait for its end."""

    def wait_for_background_updates(self) -> None:
        """Wait until the homeserver's background updates have built its indexes."""

    def close(self) -> None:
        """Disconnect."""


def _wait_until(is_done: Callable[[], bool]) -> None:
    """Poll a condition; raise TimeoutError if it stays false."""
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while not is_done():
        if time.monotonic() > deadline:
            raise TimeoutError("background work of Synapse or PostgreSQL didn't end")
        time.sleep(0.05)


def _copy_prefix(copy: int) -> str:
    """Return the session-id prefix of a copy of the template keys."""
    return f"-{copy}" if copy else ""


class PostgresDatabase:
    """One database of a PostgreSQL server, over one autocommit connection."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        """Connect with psycopg2's connection arguments."""
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

    def load_template_keys(self, keys: Sequence[Key]) -> None:
        """Store the template keys in ``benchmark.keys``."""
        self.execute("CREATE SCHEMA benchmark")
        self.execute(_CREATE_TEMPLATE_KEYS.format("benchmark.keys"))
        lines = [
            f"{position}\t{key.room_id}\t{key.session_id}\t{key.first_message_index}"
            f"\t{key.forwarded_count}\t{key.is_verified}\t{key.session_data}"
            for position, key in enumerate(keys)
        ]
        self._copy("benchmark.keys", lines)

    def load_responses(self, keys: Sequence[Key], room: Sequence[Key]) -> None:
        """Store two finished downloads, which the limit copies from a table.

        Each table has one piece of the JSON text in a row: ``benchmark.backup`` for the
        whole backup, ``benchmark.room`` for one room.
        """
        self.execute("CREATE TABLE benchmark.backup (piece text)")
        self._copy("benchmark.backup", list(backup_json_pieces(keys)))
        self.execute("CREATE TABLE benchmark.room (piece text)")
        lines = ['{"sessions":{', *session_json_pieces(room), "}}"]
        self._copy("benchmark.room", lines)
        self.run_maintenance()

    def create_bare_tables(self) -> None:
        """Create the key tables, as a homeserver would have done."""
        self.execute(_BARE_TABLES)

    def insert_backup(
        self, user_id: str, version: int, count: int, copies: int = 1
    ) -> None:
        """Insert a backup with the first template keys, or several copies of each."""
        values = (user_id, version, ALGORITHM, AUTH_DATA)
        self.execute(_ADD_VERSION.format("%s"), values)
        if not count:
            return
        sql = _COPY_TEMPLATE_KEYS.format("%s", "benchmark.keys")
        for copy in range(copies):
            prefix = _copy_prefix(copy)
            self.execute(sql, (user_id, version, prefix, len(prefix) + 1, count))

    def add_users(self, users: int, keys: int) -> None:
        """Add users, each with a backup of so many keys, and run maintenance."""
        self.execute(_ADD_USERS_VERSIONS, (ALGORITHM, AUTH_DATA, users))
        self.execute(_ADD_USERS_KEYS, (users, keys))
        self.run_maintenance()

    def count_keys(self, user_id: str, version: int) -> int:
        """Return the number of keys in a backup."""
        ((count,),) = self.query(_COUNT_KEYS.format("%s"), (user_id, version))
        return int(count)

    def analyze_only(self) -> None:
        """Analyze the key tables, and disable autovacuum on them."""
        for table in _TABLES:
            self.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = off)")
            self.execute(f"ANALYZE {table}")
        self.execute("CHECKPOINT")

    def run_maintenance(self) -> None:
        """Vacuum, analyze and checkpoint, and wait for running autovacuum workers."""
        for table in _TABLES:
            self.execute(f"ALTER TABLE {table} RESET (autovacuum_enabled)")
            self.execute(f"VACUUM ANALYZE {table}")
        _wait_until(lambda: self.query(_COUNT_AUTOVACUUM_WORKERS) == [(0,)])
        self.execute("CHECKPOINT")

    def wait_for_background_updates(self) -> None:
        """Wait until the homeserver's background updates have built its indexes."""
        _wait_until(lambda: self.query(_COUNT_BACKGROUND_UPDATES) == [(0,)])

    def close(self) -> None:
        """Disconnect."""
        self._connection.close()

    def _copy(self, table: str, lines: Sequence[str]) -> None:
        """Load lines in COPY's text format; none of them may need escaping."""
        for start in range(0, len(lines), _LINES_PER_COPY):
            text = "\n".join(lines[start : start + _LINES_PER_COPY])
            self._cursor.copy_expert(f"COPY {table} FROM STDIN", io.StringIO(text))
        self.execute(f"ANALYZE {table}")


class SqliteDatabase:
    """A homeserver's SQLite file."""

    def __init__(self, file: Path) -> None:
        """Open the file, and attach a second file for the template keys."""
        self._connection = sqlite3.connect(
            file,
            timeout=_TIMEOUT_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        templates = str(file.with_name("template_keys.db"))
        self._connection.execute("ATTACH DATABASE ? AS templates", (templates,))

    def load_template_keys(self, keys: Sequence[Key]) -> None:
        """Store the template keys in the attached file."""
        self._connection.execute(_CREATE_TEMPLATE_KEYS.format("templates.keys"))
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
        insert = "INSERT INTO templates.keys VALUES (?, ?, ?, ?, ?, ?, ?)"
        self._connection.executemany(insert, rows)
        self._connection.execute("COMMIT")

    def insert_backup(
        self, user_id: str, version: int, count: int, copies: int = 1
    ) -> None:
        """Insert a backup with the first template keys, or several copies of each."""
        self._connection.execute("BEGIN IMMEDIATE")
        values = (user_id, version, ALGORITHM, AUTH_DATA)
        self._connection.execute(_ADD_VERSION.format("?"), values)
        sql = _COPY_TEMPLATE_KEYS.format("?", "templates.keys")
        for copy in range(copies):
            prefix = _copy_prefix(copy)
            parameters = (user_id, version, prefix, len(prefix) + 1, count)
            self._connection.execute(sql, parameters)
        self._connection.execute("COMMIT")

    def count_keys(self, user_id: str, version: int) -> int:
        """Return the number of keys in a backup."""
        cursor = self._connection.execute(_COUNT_KEYS.format("?"), (user_id, version))
        return int(cursor.fetchone()[0])

    def analyze_only(self) -> None:
        """Run the full maintenance, which has no vacuum on SQLite."""
        self.run_maintenance()

    def run_maintenance(self) -> None:
        """Analyze the tables and truncate the write-ahead log."""
        self._connection.execute("ANALYZE main")
        self._connection.execute("PRAGMA main.wal_checkpoint(TRUNCATE)").fetchall()

    def wait_for_background_updates(self) -> None:
        """Wait until the homeserver's background updates have built its indexes."""
        execute = self._connection.execute
        _wait_until(lambda: bool(execute(_COUNT_BACKGROUND_UPDATES).fetchone() == (0,)))

    def close(self) -> None:
        """Disconnect."""
        self._connection.close()

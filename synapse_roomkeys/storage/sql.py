"""Every statement that the plugin sends.

They are written with ``?`` for parameters, which stands for nothing else, and hold
no ``%``; what runs them translates where the driver wants another mark. Each names
one user in every query, join and conflict target, so the tables can be partitioned
or distributed by ``user_id``, and each statement goes to one shard.

A version's row is locked before its keys are written, so that the writes of one
backup happen in some order, whichever process they come from.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import attrs

#: The columns of the homeserver's tables that the statements below use.
TABLES = {
    "e2e_room_keys": (
        "user_id",
        "version",
        "room_id",
        "session_id",
        "first_message_index",
        "forwarded_count",
        "is_verified",
        "session_data",
    ),
    "e2e_room_keys_versions": (
        "user_id",
        "version",
        "algorithm",
        "auth_data",
        "deleted",
        "etag",
    ),
}

#: The columns of a table, without reading a row of it.
COLUMNS = "SELECT * FROM {table} LIMIT 0"
#: Fails unless the unique indexes that a conflict target needs are there.
PROBES = (
    "EXPLAIN INSERT INTO e2e_room_keys (user_id, version, room_id, session_id,"
    " session_data) VALUES ('', 0, '', '', '')"
    " ON CONFLICT (user_id, version, room_id, session_id) DO NOTHING",
    "EXPLAIN INSERT INTO e2e_room_keys_versions (user_id, version, algorithm,"
    " auth_data) VALUES ('', 0, '', '') ON CONFLICT (user_id, version) DO NOTHING",
)

#: A cached count is one of these seconds at most.
COUNT_LIFETIME = 3600
#: Parameters: user, version, etag, the oldest and the newest time it may be of.
_CACHED_COUNT = """
    SELECT key_count FROM roomkeys_counts WHERE user_id = ? AND version = {version}
    AND etag = {etag} AND counted_ts BETWEEN ? AND ?"""

LAST_VERSION = "SELECT MAX(version) FROM e2e_room_keys_versions WHERE user_id = ?"
CURRENT_VERSION = f"{LAST_VERSION} AND deleted = 0"

_INFO = f"""
    SELECT v.version, v.algorithm, v.auth_data, COALESCE(v.etag, 0),
        ({_CACHED_COUNT.format(version="v.version", etag="COALESCE(v.etag, 0)")})
    FROM e2e_room_keys_versions AS v WHERE v.user_id = ? AND v.deleted = 0"""
#: Parameters: user, oldest and newest time of a count, user.
CURRENT_INFO = f"{_INFO} ORDER BY v.version DESC LIMIT 1"
#: Parameters: the same, and the version.
VERSION_INFO = f"{_INFO} AND v.version = ?"

#: Parameters: user, version, user, version.
COUNT_KEYS = """
    SELECT COALESCE(etag, 0),
        (SELECT COUNT(*) FROM e2e_room_keys WHERE user_id = ? AND version = ?)
    FROM e2e_room_keys_versions WHERE user_id = ? AND version = ? AND deleted = 0"""
#: Parameters: user, version, etag, count, time in Unix seconds.
SAVE_COUNT = """
    INSERT INTO roomkeys_counts (user_id, version, etag, key_count, counted_ts)
    VALUES (?, ?, ?, ?, ?) ON CONFLICT (user_id, version) DO UPDATE SET
    etag = excluded.etag, key_count = excluded.key_count,
    counted_ts = excluded.counted_ts"""
#: Parameters: etag, count, user, version.
MOVE_COUNT = """
    UPDATE roomkeys_counts SET etag = ?, key_count = ?
    WHERE user_id = ? AND version = ?"""
FORGET_COUNT = "DELETE FROM roomkeys_counts WHERE user_id = ? AND version = ?"
FORGET_USER = "DELETE FROM roomkeys_counts WHERE user_id = ?"

INSERT_VERSION = """
    INSERT INTO e2e_room_keys_versions
        (user_id, version, algorithm, auth_data, deleted, etag)
    VALUES (?, ?, ?, ?, 0, 0) ON CONFLICT (user_id, version) DO NOTHING"""
SET_AUTH_DATA = """
    UPDATE e2e_room_keys_versions SET auth_data = ?
    WHERE user_id = ? AND version = ?"""
SET_ETAG = """
    UPDATE e2e_room_keys_versions SET etag = ? WHERE user_id = ? AND version = ?"""
MARK_DELETED = """
    UPDATE e2e_room_keys_versions SET deleted = 1 WHERE user_id = ? AND version = ?"""

DELETE_KEYS = "DELETE FROM e2e_room_keys WHERE user_id = ? AND version = ?"
DELETE_ROOM_KEYS = f"{DELETE_KEYS} AND room_id = ?"
DELETE_ROOM_KEY = f"{DELETE_ROOM_KEYS} AND session_id = ?"


def _page(condition: str) -> str:
    """A page of keys: no row when there is no such version, one of NULLs when it
    holds no key. Parameters: user, version, user, version, those of the condition,
    how many keys at most."""
    return f"""
    SELECT k.room_id, k.session_id, k.first_message_index, k.forwarded_count,
        k.is_verified, k.session_data
    FROM (SELECT 1 FROM e2e_room_keys_versions
        WHERE user_id = ? AND version = ? AND deleted = 0) AS v
    LEFT JOIN (
        SELECT room_id, session_id, first_message_index, forwarded_count,
            is_verified, session_data
        FROM e2e_room_keys
        WHERE user_id = ? AND version = ? AND session_data <> 'null'{condition}
        ORDER BY room_id, session_id LIMIT ?
    ) AS k ON TRUE ORDER BY k.room_id, k.session_id"""


FIRST_PAGE = _page("")
NEXT_PAGE = _page(" AND (room_id, session_id) > (?, ?)")
FIRST_ROOM_PAGE = _page(" AND room_id = ?")
NEXT_ROOM_PAGE = _page(" AND room_id = ? AND session_id > ?")
ONE_KEY = _page(" AND room_id = ? AND session_id = ?")

_LOCK_VERSION = """
    SELECT algorithm, COALESCE(etag, 0), deleted FROM e2e_room_keys_versions
    WHERE user_id = ? AND version = ?"""

#: The LIMIT keeps PostgreSQL from joining in any other way than by looking each
#: session up in the unique index, whatever it believes of the size of the backup.
_FIND_SESSIONS = f"""
    SELECT b.current_version, b.key_count, k.*
    FROM (SELECT ({CURRENT_VERSION}) AS current_version,
        ({_CACHED_COUNT.format(version="?", etag="?")}) AS key_count) AS b
    LEFT JOIN ({{lookup}}) AS k ON TRUE"""

_FOUND = """k.room_id, k.session_id, k.first_message_index, k.forwarded_count,
        k.is_verified, k.session_data <> 'null'"""

_WRITE_KEYS = """
    INSERT INTO e2e_room_keys (user_id, version, room_id, session_id,
        first_message_index, forwarded_count, is_verified, session_data)
    SELECT ?, ?, {values}
    ON CONFLICT (user_id, version, room_id, session_id) DO UPDATE SET
    first_message_index = excluded.first_message_index,
    forwarded_count = excluded.forwarded_count,
    is_verified = excluded.is_verified, session_data = excluded.session_data"""


def pack_columns(rows: Sequence[tuple[Any, ...]], width: int) -> list[Any]:
    """Rows as PostgreSQL takes them: an array for each of the columns."""
    return [[row[column] for row in rows] for column in range(width)]


def pack_json(rows: Sequence[tuple[Any, ...]], width: int) -> list[Any]:
    """Rows as SQLite takes them: one JSON array of arrays."""
    return [json.dumps(rows)]


@attrs.frozen
class Dialect:
    """What SQLite and PostgreSQL are told in different words.

    Attributes:
        begin_write: begins a transaction that locks, reads and writes. Each of its
            statements sees what others committed before it, and its commit is on
            disk when it returns.
        lock_schema: keeps other processes from making tables until the commit.
        lock_version: a version's row, locked until the commit. Parameters: user,
            version.
        find_sessions: what a backup holds of some sessions, in rows that begin with
            the current version and the cached count. Parameters: user; user,
            version, etag, oldest and newest time of a count; the packed room and
            session ids; user, version.
        write_keys: write keys, over those that are there. Parameters: user,
            version, the packed keys.
        pack: rows, and how many values each has, as parameters of a statement.
    """

    begin_write: str
    lock_schema: str
    lock_version: str
    find_sessions: str
    write_keys: str
    pack: Callable[[Sequence[tuple[Any, ...]], int], list[Any]]


SQLITE = Dialect(
    begin_write="BEGIN IMMEDIATE",
    lock_schema="BEGIN IMMEDIATE",
    lock_version=_LOCK_VERSION,
    find_sessions=_FIND_SESSIONS.format(
        lookup=f"""
        SELECT {_FOUND} FROM json_each(?) AS u CROSS JOIN e2e_room_keys AS k
        ON k.user_id = ? AND k.version = ?
        AND k.room_id = json_extract(u.value, '$[0]')
        AND k.session_id = json_extract(u.value, '$[1]')"""
    ),
    write_keys=_WRITE_KEYS.format(
        values=", ".join(f"json_extract(value, '$[{i}]')" for i in range(6))
        + " FROM json_each(?) WHERE TRUE",
    ),
    pack=pack_json,
)

POSTGRES = Dialect(
    begin_write=(
        "SET TRANSACTION ISOLATION LEVEL READ COMMITTED;"
        " SET LOCAL synchronous_commit TO ON"
    ),
    lock_schema="SELECT pg_advisory_xact_lock(hashtext('roomkeys schema'))",
    lock_version=f"{_LOCK_VERSION} FOR UPDATE",
    find_sessions=_FIND_SESSIONS.format(
        lookup=f"""
        SELECT {_FOUND} FROM unnest(?::text[], ?::text[]) AS u (room_id, session_id)
        CROSS JOIN LATERAL (
            SELECT * FROM e2e_room_keys AS k
            WHERE k.user_id = ? AND k.version = ?
            AND k.room_id = u.room_id AND k.session_id = u.session_id LIMIT 1
        ) AS k"""
    ),
    write_keys=_WRITE_KEYS.format(
        values="u.* FROM unnest(?::text[], ?::text[], ?::int[], ?::int[],"
        " ?::boolean[], ?::text[]) AS u",
    ),
    pack=pack_columns,
)

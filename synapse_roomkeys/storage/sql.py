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

#: The plugin's own tables.
OWN_TABLES = ("roomkeys_counts", "roomkeys_numbers", "roomkeys_schema")
#: The homeserver's tables and the plugin's own.
ALL_TABLES = (*TABLES, *OWN_TABLES)

#: The columns of a table, without reading a row of it.
COLUMNS = "SELECT * FROM {table} LIMIT 0"
#: They fail unless the unique index is there that a conflict target needs.
PROBES = {
    "e2e_room_keys": (
        "EXPLAIN INSERT INTO e2e_room_keys (user_id, version, room_id, session_id,"
        " session_data) VALUES ('', 0, '', '', '')"
        " ON CONFLICT (user_id, version, room_id, session_id) DO NOTHING"
    ),
    "e2e_room_keys_versions": (
        "EXPLAIN INSERT INTO e2e_room_keys_versions (user_id, version, algorithm,"
        " auth_data) VALUES ('', 0, '', '') ON CONFLICT (user_id, version) DO NOTHING"
    ),
}

#: A cached count is one of these seconds at most.
COUNT_LIFETIME = 3600
#: The count that is cached of a version v. Parameters: user, the oldest and the newest
#: time it may be of.
_COUNT_OF_V = """
    SELECT key_count FROM roomkeys_counts WHERE user_id = ? AND version = v.version
    AND etag = COALESCE(v.etag, 0) AND counted_ts BETWEEN ? AND ?"""

#: A key's fields, NULLs when it isn't there, and no row when there is no such version.
#: Parameters: user, version, room, session, user, version.
GET_KEY = """
    SELECT k.first_message_index, k.forwarded_count, k.is_verified,
        CAST(k.session_data AS TEXT)
    FROM e2e_room_keys_versions AS v LEFT JOIN e2e_room_keys AS k
        ON k.user_id = ? AND k.version = ? AND k.room_id = ? AND k.session_id = ?
        AND k.session_data <> 'null'
    WHERE v.user_id = ? AND v.version = ? AND v.deleted = 0"""

#: The last number that a user was given, as far as it is written down, the highest
#: number among the user's versions, how many versions there are, and how many of them
#: are deleted. Parameters: user, user.
VERSION_NUMBERS = """
    SELECT (SELECT last_version FROM roomkeys_numbers WHERE user_id = ?),
        MAX(version), COUNT(*), COALESCE(SUM(deleted), 0)
    FROM e2e_room_keys_versions WHERE user_id = ?"""
_SAVE_NUMBER = """
    INSERT INTO roomkeys_numbers (user_id, last_version)
    {number} ON CONFLICT (user_id) DO UPDATE SET last_version =
    CASE WHEN excluded.last_version > roomkeys_numbers.last_version
    THEN excluded.last_version ELSE roomkeys_numbers.last_version END"""
#: Writes down that a user was given a number. Parameters: user, number.
SAVE_NUMBER = _SAVE_NUMBER.format(number="VALUES (?, ?)")
#: Writes down the highest number among a user's versions and cached counts. The
#: homeserver may have deleted the versions already. Parameters: user, user.
SAVE_LAST_NUMBER = _SAVE_NUMBER.format(
    number="""
    SELECT user_id, MAX(version) FROM (
        SELECT user_id, version FROM e2e_room_keys_versions WHERE user_id = ?
        UNION ALL SELECT user_id, version FROM roomkeys_counts WHERE user_id = ?
    ) AS v GROUP BY user_id"""
)
#: A user's current version, if there is one.
_CURRENT = """
    SELECT {columns} FROM e2e_room_keys_versions WHERE user_id = ? AND deleted = 0
    ORDER BY version DESC LIMIT 1"""
CURRENT_VERSION = _CURRENT.format(columns="version")

_INFO = f"""
    SELECT v.version, v.algorithm, v.auth_data, COALESCE(v.etag, 0), ({_COUNT_OF_V})
    FROM e2e_room_keys_versions AS v WHERE v.user_id = ? AND v.deleted = 0"""
#: Parameters: user, oldest and newest time of a count, user.
CURRENT_INFO = f"{_INFO} ORDER BY v.version DESC LIMIT 1"
#: Parameters: the same, and the version.
VERSION_INFO = f"{_INFO} AND v.version = ?"

_CACHE_COUNT = """
    INSERT INTO roomkeys_counts
        (user_id, version, etag, key_count, key_bytes, counted_ts)
    {counted} ON CONFLICT (user_id, version) DO UPDATE SET
    etag = excluded.etag, key_count = excluded.key_count,
    key_bytes = excluded.key_bytes, counted_ts = excluded.counted_ts"""
#: Parameters: user, version, etag, count, bytes or NULL, time in Unix seconds.
SAVE_COUNT = _CACHE_COUNT.format(counted="VALUES (?, ?, ?, ?, ?, ?)")
_COUNT_KEYS = f"""{_CACHE_COUNT} RETURNING etag, key_count, key_bytes""".format(
    counted="""
    SELECT v.user_id, v.version, COALESCE(v.etag, 0), k.*, ?
    FROM e2e_room_keys_versions AS v, (SELECT COUNT(*), {size} FROM e2e_room_keys
        WHERE user_id = ? AND version = ?) AS k
    WHERE v.user_id = ? AND v.version = ? AND v.deleted = 0"""
)
#: Counts the keys of a version and caches that; its etag, its count, and NULL.
#: Parameters: the time in Unix seconds, user, version, user, version.
COUNT_KEYS = _COUNT_KEYS.format(size="CAST(NULL AS BIGINT)")
#: Etag of a version and number of its keys, without a lock or a write. Parameters:
#: user, version, user, version.
FIND_COUNT = """
    SELECT COALESCE(etag, 0),
        (SELECT COUNT(*) FROM e2e_room_keys WHERE user_id = ? AND version = ?)
    FROM e2e_room_keys_versions WHERE user_id = ? AND version = ? AND deleted = 0"""
#: Caches a count that `FIND_COUNT` found, if the version still has that etag.
#: Parameters: count, time in Unix seconds, user, version, etag.
KEEP_COUNT = _CACHE_COUNT.format(
    counted="""
    SELECT user_id, version, COALESCE(etag, 0), ?, CAST(NULL AS BIGINT), ?
    FROM e2e_room_keys_versions
    WHERE user_id = ? AND version = ? AND deleted = 0 AND COALESCE(etag, 0) = ?"""
)
#: Moves a cached count with its version's etag, where it is of that etag. Parameters:
#: the new etag, how many keys and bytes more, or NULL, user, version, the old etag.
MOVE_COUNT = """
    UPDATE roomkeys_counts SET etag = ?, key_count = key_count + ?,
        key_bytes = key_bytes + ?
    WHERE user_id = ? AND version = ? AND etag = ?"""
_USER_SIZES = """
    SELECT v.version, {size}, c.key_count, c.key_bytes
    FROM e2e_room_keys_versions AS v
    LEFT JOIN roomkeys_counts AS c ON c.user_id = ? AND c.version = v.version
        AND c.etag = COALESCE(v.etag, 0) AND c.counted_ts BETWEEN ? AND ?
    WHERE v.user_id = ? AND v.deleted = 0"""
FORGET_COUNT = "DELETE FROM roomkeys_counts WHERE user_id = ? AND version = ?"
FORGET_USER = "DELETE FROM roomkeys_counts WHERE user_id = ?"

_INSERT_VERSION = """
    INSERT INTO e2e_room_keys_versions
        (user_id, version, algorithm, auth_data, deleted, etag)
    VALUES (?, ?, ?, ?, 0, 0) ON CONFLICT (user_id, version) DO NOTHING"""
AUTH_DATA = """
    SELECT auth_data FROM e2e_room_keys_versions WHERE user_id = ? AND version = ?"""
SET_AUTH_DATA = """
    UPDATE e2e_room_keys_versions SET auth_data = ?
    WHERE user_id = ? AND version = ?"""
#: Moves the etag, and with it locks the version until the commit, unless the etag is
#: another by now. Parameters: the new etag, user, version, the etag that was seen.
CLAIM = """
    UPDATE e2e_room_keys_versions SET etag = ?
    WHERE user_id = ? AND version = ? AND deleted = 0 AND COALESCE(etag, 0) = ?"""
#: The same, unless there is a newer version. Two more parameters: user, version.
_CLAIM_CURRENT = f"""{CLAIM} AND NOT EXISTS (
        SELECT 1 FROM e2e_room_keys_versions
        WHERE user_id = ? AND version > ? AND deleted = 0)"""
#: Nothing shows the auth_data of a deleted version; the column can't be NULL, and an
#: empty object is JSON that Synapse's own endpoints can read.
MARK_DELETED = """
    UPDATE e2e_room_keys_versions SET deleted = 1, auth_data = '{}'
    WHERE user_id = ? AND version = ?"""
#: Drops a user's deleted versions but the newest ones. A version whose keys are not all
#: deleted yet stays. Parameters: user, user, how many stay, user.
DROP_DELETED_VERSIONS = """
    DELETE FROM e2e_room_keys_versions WHERE user_id = ? AND deleted = 1
    AND version <= (
        SELECT version FROM e2e_room_keys_versions WHERE user_id = ? AND deleted = 1
        ORDER BY version DESC LIMIT 1 OFFSET ?)
    AND NOT EXISTS (SELECT 1 FROM e2e_room_keys AS k WHERE k.user_id = ?
        AND k.version = e2e_room_keys_versions.version)"""

DELETE_KEYS = "DELETE FROM e2e_room_keys WHERE user_id = ? AND version = ?"
DELETE_ROOM_KEYS = f"{DELETE_KEYS} AND room_id = ?"
DELETE_ROOM_KEY = f"{DELETE_ROOM_KEYS} AND session_id = ?"
#: How many keys one transaction deletes on SQLite, which lets nobody else write
#: meanwhile: 2,000 keys of 900 bytes took 0.15 s in a backup of 1,000,000 keys; all of
#: them took 56 s.
DELETED_AT_ONCE = 2000
#: The plus sign keeps SQLite from walking through all of the user's keys by an index.
_DELETE_SOME_KEYS = f"""
    DELETE FROM e2e_room_keys WHERE +user_id = ? AND rowid IN (
        SELECT rowid FROM e2e_room_keys WHERE user_id = ? AND version = ?{{room}}
        LIMIT {DELETED_AT_ONCE})"""


_LOCK_VERSION = """
    SELECT algorithm, deleted FROM e2e_room_keys_versions
    WHERE user_id = ? AND version = ?"""

_FIND_SESSIONS = f"""
    WITH b AS MATERIALIZED (
        SELECT COALESCE(v.etag, 0), ({CURRENT_VERSION}), ({_COUNT_OF_V})
        FROM e2e_room_keys_versions AS v
        WHERE v.user_id = ? AND v.version = ? AND v.deleted = 0)
    SELECT b.*, k.* FROM b LEFT JOIN ({{lookup}}) AS k ON TRUE"""

_FOUND = """k.first_message_index, k.forwarded_count, k.is_verified,
        {{found}}, {size}"""
#: The data of a key, or an error if they aren't JSON. `Dialect.is_not_json` knows it.
_SQLITE_JSON = """CASE WHEN json_valid(k.session_data) THEN k.session_data
        ELSE json(k.session_data) END"""
_POSTGRES_JSON = """CASE WHEN k.session_data::json IS NOT NULL
        THEN k.session_data END"""
#: How many bytes a text has.
_SQLITE_SIZE = "LENGTH(CAST({0} AS BLOB))"
_POSTGRES_SIZE = "OCTET_LENGTH({0})"

_INSERT_KEYS = """
    INSERT INTO e2e_room_keys (user_id, version, room_id, session_id,
        first_message_index, forwarded_count, is_verified, session_data)
    SELECT ?, ?, {values}"""
_REPLACE_KEYS = f"""{_INSERT_KEYS}
    ON CONFLICT (user_id, version, room_id, session_id) DO UPDATE SET
    first_message_index = excluded.first_message_index,
    forwarded_count = excluded.forwarded_count,
    is_verified = excluded.is_verified, session_data = excluded.session_data"""

#: What stands between texts of JSON in a parameter. In none of them it can stand as it
#: is: they are of those that the strict decoder has read.
_BETWEEN = "\x1f"


@attrs.frozen
class Write:
    """What a statement that writes keys has for parameters.

    Attributes:
        backup: the user and the version.
        seen: the etag it had.
        moved: the etag it has from now on.
        added: how many keys more it holds then, and how many bytes.
        keys: the packed keys.
    """

    backup: tuple[str, int]
    seen: tuple[int]
    moved: tuple[int]
    added: tuple[int, int]
    keys: list[str]


@attrs.frozen
class Step:
    """A statement that writes keys, or a part of what that takes.

    Attributes:
        takes: which of the attributes of a `Write` are its parameters, in order.
    """

    statement: str
    takes: tuple[str, ...]

    def parameters(self, write: Write) -> list[str | int]:
        """Those of the statement."""
        return [value for name in self.takes for value in getattr(write, name)]


_CLAIM_TAKES = ("moved", "backup", "seen", "backup")
_MOVE_COUNT_TAKES = ("moved", "added", "backup", "seen")


def pack_arrays(rows: Sequence[tuple[Any, ...]]) -> list[str]:
    """Rows as PostgreSQL takes them: an array for each of the columns, as a literal.

    psycopg2 would write arrays of their own out as expressions, which take PostgreSQL
    twice as long to read.
    """
    # Of no rows, which only ids may be, the columns can't be told from them.
    return [_array(column) for column in zip(*rows, strict=True)] or ["{}", "{}"]


def _pack_columns(rows: Sequence[tuple[Any, ...]]) -> list[str]:
    """The same for keys, but the last column, their data, as one text: nothing in it
    has to be escaped, here or when PostgreSQL reads it."""
    *ids_and_metadata, data = zip(*rows, strict=True)
    return [*map(_array, ids_and_metadata), _BETWEEN.join(data)]


def _array(values: Sequence[Any]) -> str:
    if not values or not isinstance(values[0], str):
        return "{" + ",".join(map(str, values)) + "}"
    escaped = (v.replace("\\", "\\\\").replace('"', '\\"') for v in values)
    return '{"' + '","'.join(escaped) + '"}'


def _pack_json(rows: Sequence[tuple[Any, ...]]) -> list[str]:
    """Rows as SQLite takes them: one JSON array of arrays."""
    return [json.dumps(rows)]


@attrs.frozen
class Pages:
    """The statements of downloads: keys of one version, in the order of their ids.

    A row has a key's room id and the key as a member of a JSON object. There is no row
    when there is no such version, and one of NULLs when it holds no keys. Parameters:
    user, version, user, version, those that each attribute says, how many keys at most,
    and how many of these at once.

    Attributes:
        first: the first ones of a backup.
        following: those after one. Parameters: its room and session.
        first_of_room: the first ones of a room. Parameter: the room.
        following_of_room: those after one of a room. Parameters: room and session.
    """

    first: str
    following: str
    first_of_room: str
    following_of_room: str


def _pages(string: str, integer: str, limit: str, paged: str = "{}") -> Pages:
    """The downloads, in the words of an engine.

    The text of a key up to its data is put together by the database, which leaves
    Python's interpreter to others meanwhile. The data is a column of its own: it isn't
    copied for a longer text, and Python checks that it is JSON.

    Args:
        string: makes a JSON string of a text.
        integer: makes an integer that JSON can hold of a column.
        limit: takes the numbers of keys.
        paged: makes a page of what a query finds.
    """

    keys = f"""
    SELECT k.room_id, {string.format("k.session_id")}
        || ':{{"first_message_index":' || {integer.format("k.first_message_index")}
        || ',"forwarded_count":' || {integer.format("k.forwarded_count")}
        || ',"is_verified":' || CASE WHEN k.is_verified THEN 'true' ELSE 'false' END
        || ',"session_data":', CAST(k.session_data AS TEXT)
    FROM (SELECT 1 FROM e2e_room_keys_versions
        WHERE user_id = ? AND version = ? AND deleted = 0) AS v"""

    def page(condition: str) -> str:
        return paged.format(f"""{keys} LEFT JOIN (
        SELECT room_id, session_id, first_message_index, forwarded_count,
            is_verified, session_data
        FROM e2e_room_keys
        WHERE user_id = ? AND version = ? AND session_data <> 'null'{condition}
        ORDER BY room_id, session_id LIMIT {limit}
    ) AS k ON TRUE""")

    return Pages(
        first=page(""),
        following=page(" AND (room_id, session_id) > (?, ?)"),
        first_of_room=page(" AND room_id = ?"),
        following_of_room=page(" AND room_id = ? AND session_id > ?"),
    )


@attrs.frozen
class Dialect:
    """What SQLite and PostgreSQL are told in different words.

    Attributes:
        limits: settings of a transaction, sent in one message with its first statement:
            how long it waits for a lock, and how long the server waits for its next
            statement before it ends the session. Empty where an engine has none.
        find_read_only: 1 if the session can't write, else 0.
        find_encoding: the name of the database's encoding.
        begin_write: begins a transaction that reads and then writes, where the engine
            has to be told. Each of the statements of any transaction sees what others
            committed before it.
        find_tables: the names of those of `ALL_TABLES` that there are. The
            transaction's next statement sees tables that others commit.
        touch_schema: writes a row without a change, to test that the database takes
            writes. If another process has the row locked, it writes nothing and doesn't
            wait.
        estimate_keys: approximate number of keys in all backups, without counting them:
            the sum of the cached counts (SQLite), which lacks backups that were never
            counted, or the server's statistics (PostgreSQL), kept by its autovacuum.
        lock_schema: keeps other processes from making tables until the commit, which
            is on disk when it returns.
        lock_version: a version's row, locked until the commit, which is on disk when
            it returns. Parameters: user, version.
        insert_version: makes a version, unless there is one of its number. The commit
            is on disk when it returns. Parameters: user, version, algorithm, auth_data.
        is_not_json: whether an error says that the data of a key aren't JSON.
        find_sessions: what a version holds of some sessions, in rows that begin with
            its etag, the current version and the cached count, and go on with the place
            of a session among those; no row when there is no such version. Parameters:
            user; user, oldest and newest time of a count; user, version; the packed
            room and session ids; user, version. It fails if the data of a session
            aren't JSON.
        find_sessions_with_data: the same with the data of a session in the place of
            whether there are any, whatever they are.
        measure_keys: as `COUNT_KEYS`, but with the version's bytes.
        user_sizes: each of a user's versions that isn't deleted, with the bytes of its
            ``auth_data``, and the count and the bytes of its keys that are cached.
            Parameters: user, the oldest and the newest time they may be of, user.
        add_keys: locks a version until the commit, which is on disk when it returns,
            and adds keys to it. The one row has the etag and the count afterwards, NULL
            for one that is too old; there is none, and nothing is added, unless all
            keys are new, the version is the current one and a count of its etag is
            cached, however old. It fails if somebody who takes no lock adds one of the
            keys meanwhile. Empty where an engine has no such thing. Parameters: user,
            version; how many keys and bytes more, user, version, user, the packed ids,
            user, version; user, version; user, version, the packed keys; the oldest and
            the newest time of a count.
        write_keys: locks a version until the commit, which is on disk when it returns,
            and moves its etag and count and writes keys, over those that are there. The
            first step writes nothing where the etag is no longer what it was, or there
            is a newer version; then the others aren't to be taken.
        write_more_keys: the same in a transaction that has the lock.
        deleted_at_once: how many keys a transaction may delete, or None for any number.
        delete_keys: deletes keys of a version, as many as a transaction may.
            Parameters: user, version; before them the user once more where
            `deleted_at_once` is a number.
        delete_room_keys: the same for a room. One more parameter: the room.
        pages: the downloads. They fail if the data of a key aren't JSON.
        next_page: gets what follows a page, in the same transaction, or None where
            the statements of `pages` have to. Parameter: how many keys.
        pages_at_once: for how many pages a download keeps its connection while it is
            read as fast as they come.
        pack_ids: room and session ids as parameters of a statement.
        pack_keys: keys as parameters of a statement: room and session id, the three
            fields that rank them, and their data.
    """

    limits: str
    find_read_only: str
    find_encoding: str
    begin_write: str | None
    find_tables: str
    touch_schema: str
    estimate_keys: str
    lock_schema: str
    lock_version: str
    insert_version: str
    is_not_json: Callable[[Exception], bool]
    find_sessions: str
    find_sessions_with_data: str
    measure_keys: str
    user_sizes: str
    add_keys: str
    write_keys: tuple[Step, ...]
    write_more_keys: tuple[Step, ...]
    deleted_at_once: int | None
    delete_keys: str
    delete_room_keys: str
    pages: Pages
    next_page: str | None
    pages_at_once: int
    pack_ids: Callable[[Sequence[tuple[Any, ...]]], list[str]]
    pack_keys: Callable[[Sequence[tuple[Any, ...]]], list[str]]


_WRITE_ON_SQLITE = (
    Step(_CLAIM_CURRENT, _CLAIM_TAKES),
    Step(
        _REPLACE_KEYS.format(
            values=", ".join(f"json_extract(value, '$[{i}]')" for i in range(6))
            # Without WHERE, what follows would be taken for a part of a join.
            + " FROM json_each(?) WHERE TRUE",
        ),
        ("backup", "keys"),
    ),
    Step(MOVE_COUNT, _MOVE_COUNT_TAKES),
)

_FIND_ON_SQLITE = _FIND_SESSIONS.format(
    lookup=f"""
        SELECT u.key, {_FOUND.format(size=_SQLITE_SIZE.format("session_data"))}
        FROM json_each(?) AS u CROSS JOIN e2e_room_keys AS k
        ON k.user_id = ? AND k.version = ?
        AND k.room_id = json_extract(u.value, '$[0]')
        AND k.session_id = json_extract(u.value, '$[1]')"""
)


#: A process has one connection to an SQLite file, for all its users: three pages take
#: some 5 ms.
SQLITE = Dialect(
    limits="",
    find_read_only="SELECT 0",
    # The driver encodes and decodes whatever encoding the file has.
    find_encoding="SELECT 'UTF8'",
    begin_write="BEGIN IMMEDIATE",
    find_tables=f"SELECT name FROM sqlite_master WHERE name IN {ALL_TABLES}",
    touch_schema="UPDATE roomkeys_schema SET number = number",
    estimate_keys="SELECT COALESCE(SUM(key_count), 0) FROM roomkeys_counts",
    lock_schema="BEGIN IMMEDIATE",
    lock_version=_LOCK_VERSION,
    insert_version=_INSERT_VERSION,
    is_not_json=lambda error: str(error) == "malformed JSON",
    find_sessions=_FIND_ON_SQLITE.format(found=f"{_SQLITE_JSON} <> 'null'"),
    find_sessions_with_data=_FIND_ON_SQLITE.format(found="k.session_data"),
    measure_keys=_COUNT_KEYS.format(
        size=f"COALESCE(SUM({_SQLITE_SIZE.format('session_data')}), 0)"
    ),
    user_sizes=_USER_SIZES.format(size=_SQLITE_SIZE.format("v.auth_data")),
    add_keys="",
    write_keys=_WRITE_ON_SQLITE,
    write_more_keys=_WRITE_ON_SQLITE,
    deleted_at_once=DELETED_AT_ONCE,
    delete_keys=_DELETE_SOME_KEYS.format(room=""),
    delete_room_keys=_DELETE_SOME_KEYS.format(room=" AND room_id = ?"),
    pages=_pages(
        string="json_quote({0})",
        integer="CASE WHEN typeof({0}) = 'integer' AND {0} BETWEEN 0 AND"
        " 9007199254740991 THEN {0} ELSE 0 END",
        limit="MIN(?, ?)",
    ),
    next_page=None,
    pages_at_once=3,
    pack_ids=_pack_json,
    pack_keys=_pack_json,
)

#: Longest wait for a lock, in seconds. An upload holds its lock for milliseconds, and
#: each wait keeps a connection from others. Tries go on for some seconds.
LOCK_SECONDS = 1
#: Longest pause between two statements of a transaction, in seconds. Then the server
#: ends the session and frees its locks, as the process was stopped or its machine is
#: gone: the work between two statements takes milliseconds.
IDLE_SECONDS = 10

_ON_DISK = "SET LOCAL synchronous_commit TO ON"
_LOCK_ON_POSTGRES = f"{_ON_DISK}; {_LOCK_VERSION} FOR UPDATE"
_LOOKUP_ON_POSTGRES = """CROSS JOIN LATERAL (
            SELECT * FROM e2e_room_keys AS k
            WHERE k.user_id = ? AND k.version = ?
            AND k.room_id = u.room_id AND k.session_id = u.session_id LIMIT 1
        ) AS k"""
_PACKED_IDS = """unnest(?::text[], ?::text[]) WITH ORDINALITY
        AS u (room_id, session_id, position)"""
_PACKED_KEYS = f"""unnest(?::text[], ?::text[], ?::int[], ?::int[], ?::boolean[],
        string_to_array(?, chr({ord(_BETWEEN)}))) AS u"""

_FIND_ON_POSTGRES = _FIND_SESSIONS.format(
    lookup=f"""
        SELECT u.position - 1,
            {_FOUND.format(size=_POSTGRES_SIZE.format("session_data"))}
        FROM {_PACKED_IDS} {_LOOKUP_ON_POSTGRES}"""
)
#: invalid_text_representation, and statement_too_complex for what is nested too deeply.
_NOT_JSON_ON_POSTGRES = ("22P02", "54001")


_WRITE_ON_POSTGRES = Step(
    f"WITH claimed AS ({_CLAIM_CURRENT} RETURNING 1),"
    f" counted AS ({MOVE_COUNT} AND EXISTS (SELECT 1 FROM claimed))"
    + _REPLACE_KEYS.format(values=f"u.* FROM claimed CROSS JOIN {_PACKED_KEYS}"),
    (*_CLAIM_TAKES, *_MOVE_COUNT_TAKES, "backup", "keys"),
)

#: What looks names up, such as to_regclass, may not see a table that others made while
#: the transaction waited for an advisory lock; a query of the catalogue does.
#: An ALTER TABLE that waits for a long reader, such as pg_dump, would hold up everybody
#: who comes after it: the timeout has the start of a process fail instead. The LIMIT
#: keeps PostgreSQL from joining in any other way than by looking each session up in the
#: unique index, whatever it believes of the size of the backup. Keys are written in one
#: message with the lock, but by a statement of their own: it sees what was committed
#: while the lock was waited for. Without the settings of
#: a download all that may follow was read and sorted for each page; without its LIMIT a
#: large backup would be worth compiling the query for. A download keeps one of several
#: connections for some 50 ms.
POSTGRES = Dialect(
    limits=(
        f"SET LOCAL lock_timeout TO {1000 * LOCK_SECONDS};"
        f" SET LOCAL idle_in_transaction_session_timeout TO {1000 * IDLE_SECONDS}; "
    ),
    find_read_only="SELECT current_setting('transaction_read_only')::bool::int",
    find_encoding="SELECT current_setting('server_encoding')",
    begin_write=None,
    find_tables=(
        "SET TRANSACTION ISOLATION LEVEL READ COMMITTED;"
        " SELECT DISTINCT tablename FROM pg_tables"
        f" WHERE tablename IN {ALL_TABLES} AND schemaname = ANY(current_schemas(FALSE))"
    ),
    touch_schema=(
        "UPDATE roomkeys_schema SET number = number"
        " WHERE number IN (SELECT number FROM roomkeys_schema FOR UPDATE SKIP LOCKED)"
    ),
    estimate_keys="""
    SELECT COALESCE(SUM(reltuples) FILTER (WHERE reltuples > 0), 0)::bigint
    FROM pg_class, (SELECT to_regclass('e2e_room_keys') AS root) AS keys
    WHERE relkind = 'r'
    AND (oid = root OR oid IN (SELECT relid FROM pg_partition_tree(root)))""",
    lock_schema=(
        "SET LOCAL lock_timeout TO '10s';"
        f" SET LOCAL idle_in_transaction_session_timeout TO {1000 * IDLE_SECONDS};"
        " SET LOCAL synchronous_commit TO ON;"
        " SELECT pg_advisory_xact_lock(hashtext('roomkeys schema'))"
    ),
    lock_version=_LOCK_ON_POSTGRES,
    insert_version=f"{_ON_DISK}; {_INSERT_VERSION}",
    is_not_json=lambda error: getattr(error, "pgcode", None) in _NOT_JSON_ON_POSTGRES,
    find_sessions=_FIND_ON_POSTGRES.format(found=f"{_POSTGRES_JSON} <> 'null'"),
    find_sessions_with_data=_FIND_ON_POSTGRES.format(found="k.session_data"),
    measure_keys=_COUNT_KEYS.format(
        size=f"COALESCE(SUM({_POSTGRES_SIZE.format('session_data')}), 0)::bigint"
    ),
    user_sizes=_USER_SIZES.format(size=_POSTGRES_SIZE.format("v.auth_data")),
    add_keys=f"""{_LOCK_ON_POSTGRES};
    WITH counted AS (
        UPDATE roomkeys_counts SET etag = etag + 1, key_count = key_count + ?,
            key_bytes = key_bytes + ?
        WHERE user_id = ? AND version = ?
        AND (version, etag) = ({_CURRENT.format(columns="version, COALESCE(etag, 0)")})
        AND NOT EXISTS (SELECT 1 FROM {_PACKED_IDS} {_LOOKUP_ON_POSTGRES})
        RETURNING etag, key_count, counted_ts),
    claimed AS (
        UPDATE e2e_room_keys_versions AS v SET etag = counted.etag FROM counted
        WHERE v.user_id = ? AND v.version = ?),
    added AS (
        {_INSERT_KEYS.format(values=f"u.* FROM counted CROSS JOIN {_PACKED_KEYS}")})
    SELECT etag, CASE WHEN counted_ts BETWEEN ? AND ? THEN key_count END
    FROM counted""",
    write_keys=(
        Step(
            f"{_LOCK_ON_POSTGRES}; {_WRITE_ON_POSTGRES.statement}",
            ("backup", *_WRITE_ON_POSTGRES.takes),
        ),
    ),
    write_more_keys=(_WRITE_ON_POSTGRES,),
    deleted_at_once=None,
    delete_keys=DELETE_KEYS,
    delete_room_keys=DELETE_ROOM_KEYS,
    pages=_pages(
        string="to_json({0})::text",
        integer="GREATEST(COALESCE({0}, 0), 0)",
        limit="?",
        paged="SET LOCAL enable_sort = off; SET LOCAL enable_incremental_sort = off;"
        " DECLARE download NO SCROLL CURSOR FOR {}; FETCH ? FROM download",
    ),
    next_page="FETCH ? FROM download",
    pages_at_once=25,
    pack_ids=pack_arrays,
    pack_keys=_pack_columns,
)

"""The statements of SQLite alone, each as sent, with parameters as in `statements`."""

from .statements import ALL_TABLES
from .values import DownloadStatements, TableStatements

#: How many keys one transaction deletes at most. SQLite lets nobody else write
#: meanwhile: 2,000 keys of 900 bytes took 0.15 s in a backup of 1,000,000 keys; all of
#: them took 56 s.
DELETED_AT_ONCE = 2000
#: Takes SQLite's one write lock. Without it, a transaction that first reads could not
#: write any more if another one had written in between.
BEGIN_WRITE = "BEGIN IMMEDIATE"

#: Returns the algorithm of a version, and whether it is deleted. The transaction holds
#: the write lock already.
LOCK_VERSION = """
    SELECT algorithm, deleted FROM e2e_room_keys_versions
    WHERE user_id = :user_id AND version = :version"""

#: Inserts a version, unless its number is taken.
INSERT_VERSION = """
    INSERT INTO e2e_room_keys_versions
        (user_id, version, algorithm, auth_data, deleted, etag)
    VALUES (:user_id, :version, :algorithm, :auth_data, 0, 0)
    ON CONFLICT (user_id, version) DO NOTHING"""


#: Returns a version and some sessions. The parameter ``ids`` is a JSON array of pairs
#: of room and session id. A row has the etag, the current version, the cached count,
#: the position of a session among the ids, its three fields, and its session_data as a
#: BLOB, because the text may not be UTF-8. There is one row of NULLs after the count if
#: no session is stored, and no row if there is no such version.
FIND_SESSIONS = """
    WITH b AS MATERIALIZED (
        SELECT COALESCE(v.etag, 0), (
            SELECT version FROM e2e_room_keys_versions
            WHERE user_id = :user_id AND deleted = 0
            ORDER BY version DESC LIMIT 1
        ), (
            SELECT key_count FROM roomkeys_counts
            WHERE user_id = :user_id AND version = v.version
            AND etag = COALESCE(v.etag, 0) AND counted_ts BETWEEN :oldest AND :newest)
        FROM e2e_room_keys_versions AS v
        WHERE v.user_id = :user_id AND v.version = :version AND v.deleted = 0)
    SELECT b.*, k.* FROM b LEFT JOIN (
        SELECT u.key, k.first_message_index, k.forwarded_count, k.is_verified,
            CAST(k.session_data AS BLOB)
        FROM json_each(:ids) AS u CROSS JOIN e2e_room_keys AS k
        ON k.user_id = :user_id AND k.version = :version
        AND k.room_id = json_extract(u.value, '$[0]')
        AND k.session_id = json_extract(u.value, '$[1]')
    ) AS k ON TRUE"""

#: Moves the etag to the new one, a compare-and-set: it writes no row unless the version
#: has the expected etag and is the current one.
SET_ETAG_OF_CURRENT = """
    UPDATE e2e_room_keys_versions SET etag = :new_etag
    WHERE user_id = :user_id AND version = :version AND deleted = 0
    AND COALESCE(etag, 0) = :expected_etag AND NOT EXISTS (
        SELECT 1 FROM e2e_room_keys_versions
        WHERE user_id = :user_id AND version > :version AND deleted = 0)"""
#: Writes keys over those of the same ids. The parameter ``keys`` is a JSON array of
#: arrays of six columns. Without WHERE, SQLite would parse ON CONFLICT as the
#: condition of a join.
WRITE_KEYS = """
    INSERT INTO e2e_room_keys (user_id, version, room_id, session_id,
        first_message_index, forwarded_count, is_verified, session_data)
    SELECT :user_id, :version, json_extract(value, '$[0]'),
        json_extract(value, '$[1]'), json_extract(value, '$[2]'),
        json_extract(value, '$[3]'), json_extract(value, '$[4]'),
        json_extract(value, '$[5]') FROM json_each(:keys) WHERE TRUE
    ON CONFLICT (user_id, version, room_id, session_id) DO UPDATE SET
    first_message_index = excluded.first_message_index,
    forwarded_count = excluded.forwarded_count,
    is_verified = excluded.is_verified, session_data = excluded.session_data"""

#: Keeps the stored keys of some sessions in roomkeys_replaced, before others replace
#: them. The parameter ``ids`` is a JSON array of pairs of room and session id, and
#: ``etag`` the etag of the version after the write.
KEEP_KEYS = """
    INSERT INTO roomkeys_replaced (user_id, version, room_id, session_id, replaced_ms,
        etag, first_message_index, forwarded_count, is_verified, session_data)
    SELECT k.user_id, k.version, k.room_id, k.session_id, :replaced_ms, :etag,
        k.first_message_index, k.forwarded_count, k.is_verified, k.session_data
    FROM json_each(:ids) AS u CROSS JOIN e2e_room_keys AS k
    ON k.user_id = :user_id AND k.version = :version
    AND k.room_id = json_extract(u.value, '$[0]')
    AND k.session_id = json_extract(u.value, '$[1]')"""
#: Writes replaced keys over the stored keys of their sessions. The parameter ``rows``
#: is a JSON array of arrays: room id, session id, time and etag of the replacement.
RESTORE_KEYS = """
    INSERT INTO e2e_room_keys (user_id, version, room_id, session_id,
        first_message_index, forwarded_count, is_verified, session_data)
    SELECT r.user_id, r.version, r.room_id, r.session_id,
        r.first_message_index, r.forwarded_count, r.is_verified, r.session_data
    FROM json_each(:rows) AS u CROSS JOIN roomkeys_replaced AS r
    ON r.user_id = :user_id AND r.version = :version
    AND r.room_id = json_extract(u.value, '$[0]')
    AND r.session_id = json_extract(u.value, '$[1]')
    AND r.replaced_ms = json_extract(u.value, '$[2]')
    AND r.etag = json_extract(u.value, '$[3]')
    WHERE TRUE
    ON CONFLICT (user_id, version, room_id, session_id) DO UPDATE SET
    first_message_index = excluded.first_message_index,
    forwarded_count = excluded.forwarded_count,
    is_verified = excluded.is_verified, session_data = excluded.session_data"""

#: Deletes keys of a version, `DELETED_AT_ONCE` at most. The plus sign keeps SQLite from
#: walking through all of the user's keys by an index.
DELETE_SOME_KEYS = f"""
    DELETE FROM e2e_room_keys WHERE +user_id = :user_id AND rowid IN (
        SELECT rowid FROM e2e_room_keys
        WHERE user_id = :user_id AND version = :version
        LIMIT {DELETED_AT_ONCE})"""
#: Deletes keys of a room in the same way.
DELETE_SOME_ROOM_KEYS = f"""
    DELETE FROM e2e_room_keys WHERE +user_id = :user_id AND rowid IN (
        SELECT rowid FROM e2e_room_keys
        WHERE user_id = :user_id AND version = :version AND room_id = :room_id
        LIMIT {DELETED_AT_ONCE})"""

#: Returns the ids of keys and the bytes of their session_data: see `Engine.key_sizes`.
KEY_SIZES = """
    SELECT room_id, session_id, LENGTH(CAST(session_data AS BLOB)) FROM e2e_room_keys
    WHERE user_id = :user_id AND version = :version
    AND (room_id, session_id) >= (:room_id, :session_id)
    ORDER BY room_id, session_id LIMIT :limit"""
#: Returns the sizes of a user's backups: see `Engine.user_sizes`.
USER_SIZES = """
    SELECT v.version, LENGTH(CAST(v.auth_data AS BLOB)), c.key_count, c.key_bytes
    FROM e2e_room_keys_versions AS v
    LEFT JOIN roomkeys_counts AS c ON c.user_id = :user_id AND c.version = v.version
        AND c.etag = COALESCE(v.etag, 0) AND c.counted_ts BETWEEN :oldest AND :newest
    WHERE v.user_id = :user_id AND v.deleted = 0"""

_INTEGER = """CASE WHEN typeof({0}) = 'integer' AND {0} BETWEEN 0 AND
        9007199254740991 THEN {0} ELSE 0 END"""


#: The text of a key up to the data, as a member of a JSON object.
_HEAD = f"""json_quote(k.session_id)
        || ':{{"first_message_index":' || {_INTEGER.format("k.first_message_index")}
        || ',"forwarded_count":' || {_INTEGER.format("k.forwarded_count")}
        || ',"is_verified":' || CASE WHEN k.is_verified THEN 'true' ELSE 'false' END
        || ',"session_data":'"""
_COLUMNS = f"k.room_id, {_HEAD}, CAST(k.session_data AS TEXT)"
_BLOBS = f"""CAST(k.room_id AS BLOB), CAST({_HEAD} AS BLOB),
        CAST(k.session_data AS BLOB)"""


def _download(columns: str, condition: str) -> str:
    """Return the query of a page of a download: see `DownloadStatements`.

    SQLite builds the text of a key up to the data, which leaves Python's interpreter to
    other threads meanwhile. The data are a column of their own: they aren't copied into
    a longer text, and Python checks whether they are JSON. A stored value that isn't an
    integer from 0 to 2^53 - 1 reads as 0: readers of JSON disagree on larger numbers.
    """
    return f"""
    SELECT {columns}
    FROM (SELECT 1 FROM e2e_room_keys_versions
        WHERE user_id = :user_id AND version = :version AND deleted = 0) AS v
    LEFT JOIN (
        SELECT room_id, session_id, first_message_index, forwarded_count,
            is_verified, session_data
        FROM e2e_room_keys
        WHERE user_id = :user_id AND version = :version AND session_data <> 'null'
        {condition}
        ORDER BY room_id, session_id LIMIT MIN(:limit, :count)
    ) AS k ON TRUE"""


def _downloads(columns: str, room: str, session: str, also: str) -> DownloadStatements:
    """Return the queries of downloads.

    Args:
        columns: the columns of a key.
        room: expression of the parameter ``room_id``.
        session: expression of the parameter ``session_id``.
        also: another condition of all queries.
    """
    after = f"AND (room_id, session_id) > ({room}, {session})"
    in_room = f"AND room_id = {room}"
    return DownloadStatements(
        backup=_download(columns, also),
        backup_after=_download(columns, f"{after} {also}"),
        room=_download(columns, f"{in_room} {also}"),
        room_after=_download(columns, f"{in_room} AND session_id > {session} {also}"),
    )


#: Downloads of session_data, JSON or not. They fail if a text isn't UTF-8, or if a
#: session id is a BLOB. A room id that is a BLOB sorts after all others.
DOWNLOADS = _downloads(_COLUMNS, ":room_id", ":session_id", "")
#: Downloads of a page with such a row: the columns and the parameters with ids are
#: BLOBs of the text's bytes, and the keys whose room or session id is a BLOB are left
#: out.
DAMAGED_DOWNLOADS = _downloads(
    _BLOBS,
    "CAST(:room_id AS TEXT)",
    "CAST(:session_id AS TEXT)",
    "AND typeof(room_id) = 'text' AND typeof(session_id) = 'text'",
)

TABLE_STATEMENTS = TableStatements(
    find_read_only="SELECT 0",
    # The driver encodes and decodes whatever encoding the file has.
    find_encoding="SELECT 'UTF8'",
    find_tables=f"SELECT name FROM sqlite_master WHERE name IN {ALL_TABLES}",
    lock="BEGIN IMMEDIATE",
    touch="UPDATE roomkeys_schema SET number = number",
    estimate_keys="SELECT COALESCE(SUM(key_count), 0) FROM roomkeys_counts",
    measure_keys="""
    SELECT user_id, version, COUNT(*),
        COALESCE(SUM(LENGTH(CAST(session_data AS BLOB))), 0)
    FROM e2e_room_keys WHERE user_id BETWEEN :first AND :last
    GROUP BY user_id, version""",
    measure_tables="""
    SELECT 'all tables of the file', page_count * page_size
    FROM pragma_page_count, pragma_page_size""",
)

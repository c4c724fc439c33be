"""The statements of PostgreSQL alone, each as sent.

Parameters are named as in `statements`. `PostgresTransaction` translates the names.
"""

from collections.abc import Callable

import attrs

from .postgres_settings import IDLE_SECONDS
from .statements import ALL_TABLES
from .values import DownloadStatements, TableStatements

#: Locks a version's row until the commit. Returns the version's algorithm, and 1 for a
#: deleted version. With synchronous_commit on, the commit returns once it is on disk,
#: also if the operator's default is off.
LOCK_VERSION = """SET LOCAL synchronous_commit TO ON;
    SELECT algorithm, deleted FROM e2e_room_keys_versions
    WHERE user_id = :user_id AND version = :version FOR UPDATE"""

#: Inserts a version, unless its number is taken. The commit returns once it is on disk.
INSERT_VERSION = """SET LOCAL synchronous_commit TO ON;
    INSERT INTO e2e_room_keys_versions
        (user_id, version, algorithm, auth_data, deleted, etag)
    VALUES (:user_id, :version, :algorithm, :auth_data, 0, 0)
    ON CONFLICT (user_id, version) DO NOTHING"""


def _find_sessions(found: str) -> str:
    """Return the query of a version and of some sessions.

    The parameters ``room_ids`` and ``session_ids`` are arrays. A row has the etag, the
    current version, the cached count, the position of a session in the arrays, its
    three fields, a column of the caller's, and the bytes of its session_data. There is
    one row of NULLs after the count if no session is stored, and no row if there is no
    such version.

    The LIMIT leaves PostgreSQL one join only: an index lookup for each session,
    whatever it believes of the size of the backup.

    Args:
        found: the column that stands for the session_data.
    """
    return f"""
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
        SELECT u.position - 1, k.first_message_index, k.forwarded_count,
            k.is_verified, {found}, OCTET_LENGTH(session_data)
        FROM unnest(:room_ids::text[], :session_ids::text[]) WITH ORDINALITY
            AS u (room_id, session_id, position)
        CROSS JOIN LATERAL (
            SELECT * FROM e2e_room_keys AS k
            WHERE k.user_id = :user_id AND k.version = :version
            AND k.room_id = u.room_id AND k.session_id = u.session_id LIMIT 1
        ) AS k
    ) AS k ON TRUE"""


#: Returns whether the session_data of a session is other than JSON null. The cast to
#: JSON fails if it isn't JSON.
FIND_SESSIONS = _find_sessions(
    """CASE WHEN k.session_data::json IS NOT NULL
        THEN k.session_data END <> 'null'"""
)
#: Returns the session_data of a session, JSON or not.
FIND_SESSIONS_WITH_DATA = _find_sessions("k.session_data")

#: Separator (U+001F) between session_data texts in one parameter. The strict decoder
#: has read each of them, and JSON cannot contain a raw control character, so nothing
#: has to be escaped, here or when PostgreSQL reads the text.
SEPARATOR = "\x1f"
#: The keys of an upload as rows of an array a column, with session_data in one text.
_KEYS = f"""unnest(:room_ids::text[]), unnest(:session_ids::text[]),
        unnest(:first_message_indexes::int[]), unnest(:forwarded_counts::int[]),
        unnest(:are_verified::boolean[]),
        unnest(string_to_array(:session_data, chr({ord(SEPARATOR)})))"""

# An upload sends one message of several statements: lock, claim, keep, write, note and
# settle.
#
# 1. The claim moves the version's etag and the cached count, if its conditions hold. In
#    one of the two rows it leaves the new etag negative: the mark.
# 2. The statements that keep replaced keys, write keys, and note the change in the
#    record write rows only if they find the mark.
# 3. The last statement makes the etag positive again, only if it is negative.
#
# No committed etag is negative, and the transaction holds the locks of both rows. After
# a claim that failed, there is no mark, and no row is written. The claim alone has
# conditions on other rows: a process that takes no lock can't make the statements
# decide differently. The claim is a separate statement after the lock, in the same
# message, and therefore sees all commits before the lock was granted.
#
# The INSERT is no part of the claim because of Citus. Citus sends a statement unchanged
# to a shard only if no INSERT stands beside a WITH, and an INSERT ... SELECT only if
# the user_id comes from a distributed table.

#: Claims a version for the insertion of keys. The claim fails unless all keys are new,
#: the version is the current one, and a count of its etag is cached. The cached count
#: has the mark. OFFSET leaves PostgreSQL one plan only: an index lookup for each key.
CLAIM_INSERT = """
    WITH counted AS (
        UPDATE roomkeys_counts SET etag = -1 - etag,
            key_count = key_count + :added_keys, key_bytes = key_bytes + :added_bytes
        WHERE user_id = :user_id AND version = :version
        AND (version, etag) = (
            SELECT version, COALESCE(etag, 0) FROM e2e_room_keys_versions
            WHERE user_id = :user_id AND deleted = 0
            ORDER BY version DESC LIMIT 1)
        AND NOT EXISTS (
            SELECT FROM unnest(:room_ids::text[], :session_ids::text[])
                AS u (room_id, session_id)
            WHERE EXISTS (
                SELECT FROM e2e_room_keys AS k
                WHERE k.user_id = :user_id AND k.version = :version
                AND k.room_id = u.room_id AND k.session_id = u.session_id OFFSET 0))
        RETURNING etag)
    UPDATE e2e_room_keys_versions SET etag = -counted.etag FROM counted
    WHERE user_id = :user_id AND version = :version"""
#: Inserts keys after `CLAIM_INSERT`. It has no ON CONFLICT: a process that takes no
#: lock, such as Synapse's own endpoints, may insert one of the keys meanwhile, and then
#: the statement fails (23505) and the upload merges instead.
INSERT_KEYS = f"""
    INSERT INTO e2e_room_keys (user_id, version, room_id, session_id,
        first_message_index, forwarded_count, is_verified, session_data)
    SELECT user_id, version, {_KEYS}
    FROM roomkeys_counts
    WHERE user_id = :user_id AND version = :version AND etag < 0"""
#: Records the insertion.
NOTE_INSERT = """
    INSERT INTO roomkeys_changes (user_id, version, etag, changed_ms, act, device_id,
        operator, stored, replaced, unchanged, deleted, sessions)
    SELECT user_id, version, -etag, :changed_ms, :act, :device_id,
        :operator, :stored, :replaced, :unchanged, :deleted, :sessions
    FROM roomkeys_counts
    WHERE user_id = :user_id AND version = :version AND etag < 0"""
#: Settles `CLAIM_INSERT`. Returns the new etag, and the new count or NULL if the cached
#: one isn't of the window; no row if the claim failed.
SETTLE_INSERT = """
    UPDATE roomkeys_counts SET etag = -etag
    WHERE user_id = :user_id AND version = :version AND etag < 0
    RETURNING etag, CASE WHEN counted_ts BETWEEN :oldest AND :newest
        THEN key_count END"""

#: Claims a version for a write: a compare-and-set of the etag. The claim fails unless
#: the version has the expected etag and is the current one. A version may have no
#: cached count, so the version has the mark.
CLAIM_WRITE = """
    WITH claimed AS (
        UPDATE e2e_room_keys_versions SET etag = -:new_etag
        WHERE user_id = :user_id AND version = :version AND deleted = 0
        AND COALESCE(etag, 0) = :expected_etag AND NOT EXISTS (
            SELECT 1 FROM e2e_room_keys_versions
            WHERE user_id = :user_id AND version > :version AND deleted = 0)
        RETURNING 1)
    UPDATE roomkeys_counts SET etag = :new_etag,
        key_count = key_count + :added_keys, key_bytes = key_bytes + :added_bytes
    WHERE user_id = :user_id AND version = :version AND etag = :expected_etag
    AND EXISTS (SELECT 1 FROM claimed)"""
#: Keeps those stored keys that the write replaces and that ``kept_room_ids`` and
#: ``kept_session_ids``, two arrays, name.
KEEP_REPLACED = """
    INSERT INTO roomkeys_replaced (user_id, version, room_id, session_id, replaced_ms,
        etag, first_message_index, forwarded_count, is_verified, session_data)
    SELECT k.user_id, k.version, k.room_id, k.session_id, :replaced_ms, -v.etag,
        k.first_message_index, k.forwarded_count, k.is_verified, k.session_data
    FROM e2e_room_keys_versions AS v
    CROSS JOIN unnest(:kept_room_ids::text[], :kept_session_ids::text[])
        AS u (room_id, session_id)
    CROSS JOIN LATERAL (
        SELECT * FROM e2e_room_keys AS k
        WHERE k.user_id = :user_id AND k.version = :version
        AND k.room_id = u.room_id AND k.session_id = u.session_id OFFSET 0) AS k
    WHERE v.user_id = :user_id AND v.version = :version AND v.etag < 0"""
#: Writes keys over those of the same ids after `CLAIM_WRITE`.
WRITE_KEYS = f"""
    INSERT INTO e2e_room_keys (user_id, version, room_id, session_id,
        first_message_index, forwarded_count, is_verified, session_data)
    SELECT user_id, version, {_KEYS}
    FROM e2e_room_keys_versions
    WHERE user_id = :user_id AND version = :version AND etag < 0
    ON CONFLICT (user_id, version, room_id, session_id) DO UPDATE SET
    first_message_index = excluded.first_message_index,
    forwarded_count = excluded.forwarded_count,
    is_verified = excluded.is_verified, session_data = excluded.session_data"""
#: Records the write.
NOTE_WRITE = """
    INSERT INTO roomkeys_changes (user_id, version, etag, changed_ms, act, device_id,
        operator, stored, replaced, unchanged, deleted, sessions)
    SELECT user_id, version, -etag, :changed_ms, :act, :device_id,
        :operator, :stored, :replaced, :unchanged, :deleted, :sessions
    FROM e2e_room_keys_versions
    WHERE user_id = :user_id AND version = :version AND etag < 0"""
#: Settles `CLAIM_WRITE`. Writes no row if the claim failed.
SETTLE_WRITE = """
    UPDATE e2e_room_keys_versions SET etag = -etag
    WHERE user_id = :user_id AND version = :version AND etag < 0"""

#: Keeps the stored keys of some sessions in roomkeys_replaced, before a restore
#: replaces them. The parameters ``room_ids`` and ``session_ids`` are arrays, and
#: ``etag`` is the etag of the version after the restore.
KEEP_KEYS = """
    INSERT INTO roomkeys_replaced (user_id, version, room_id, session_id, replaced_ms,
        etag, first_message_index, forwarded_count, is_verified, session_data)
    SELECT k.user_id, k.version, k.room_id, k.session_id, :replaced_ms, :etag,
        k.first_message_index, k.forwarded_count, k.is_verified, k.session_data
    FROM unnest(:room_ids::text[], :session_ids::text[]) AS u (room_id, session_id)
    CROSS JOIN LATERAL (
        SELECT * FROM e2e_room_keys AS k
        WHERE k.user_id = :user_id AND k.version = :version
        AND k.room_id = u.room_id AND k.session_id = u.session_id OFFSET 0) AS k"""
#: Writes replaced keys over the stored keys of their sessions. The parameters
#: ``room_ids``, ``session_ids``, ``times`` and ``etags`` are arrays, which identify the
#: replaced keys.
RESTORE_KEYS = """
    INSERT INTO e2e_room_keys (user_id, version, room_id, session_id,
        first_message_index, forwarded_count, is_verified, session_data)
    SELECT r.user_id, r.version, r.room_id, r.session_id,
        r.first_message_index, r.forwarded_count, r.is_verified, r.session_data
    FROM unnest(:room_ids::text[], :session_ids::text[], :times::bigint[],
        :etags::bigint[]) AS u (room_id, session_id, replaced_ms, etag)
    CROSS JOIN LATERAL (
        SELECT * FROM roomkeys_replaced AS r
        WHERE r.user_id = :user_id AND r.version = :version
        AND r.room_id = u.room_id AND r.session_id = u.session_id
        AND r.replaced_ms = u.replaced_ms AND r.etag = u.etag LIMIT 1) AS r
    ON CONFLICT (user_id, version, room_id, session_id) DO UPDATE SET
    first_message_index = excluded.first_message_index,
    forwarded_count = excluded.forwarded_count,
    is_verified = excluded.is_verified, session_data = excluded.session_data"""

#: Deletes all keys of a version.
DELETE_KEYS = """
    DELETE FROM e2e_room_keys WHERE user_id = :user_id AND version = :version"""
#: Deletes all keys of a room.
DELETE_ROOM_KEYS = """
    DELETE FROM e2e_room_keys WHERE user_id = :user_id AND version = :version
    AND room_id = :room_id"""

#: Counts the keys of a version and their bytes, and caches both. Returns the etag, the
#: count and the bytes; no row if there is no such version.
COUNT_KEYS_AND_BYTES = """
    INSERT INTO roomkeys_counts
        (user_id, version, etag, key_count, key_bytes, counted_ts)
    SELECT v.user_id, v.version, COALESCE(v.etag, 0), k.*, :now
    FROM e2e_room_keys_versions AS v, (
        SELECT COUNT(*), COALESCE(SUM(OCTET_LENGTH(session_data)), 0)::bigint
        FROM e2e_room_keys WHERE user_id = :user_id AND version = :version) AS k
    WHERE v.user_id = :user_id AND v.version = :version AND v.deleted = 0
    ON CONFLICT (user_id, version) DO UPDATE SET
    etag = excluded.etag, key_count = excluded.key_count,
    key_bytes = excluded.key_bytes, counted_ts = excluded.counted_ts
    RETURNING etag, key_count, key_bytes"""
#: Returns the sizes of a user's backups: see `Engine.user_sizes`.
USER_SIZES = """
    SELECT v.version, OCTET_LENGTH(v.auth_data), c.key_count, c.key_bytes
    FROM e2e_room_keys_versions AS v
    LEFT JOIN roomkeys_counts AS c ON c.user_id = :user_id AND c.version = v.version
        AND c.etag = COALESCE(v.etag, 0) AND c.counted_ts BETWEEN :oldest AND :newest
    WHERE v.user_id = :user_id AND v.deleted = 0"""


def _page(condition: str, limit: str) -> str:
    """Return the query of a download's keys: see `DownloadStatements`.

    PostgreSQL builds the text of a key up to the data, which leaves Python's
    interpreter to other threads meanwhile. The data are a column of their own: they
    aren't copied into a longer text, and Python checks whether they are JSON.
    """
    return f"""
    SELECT k.room_id, to_json(k.session_id)::text
        || ':{{"first_message_index":'
        || GREATEST(COALESCE(k.first_message_index, 0), 0)
        || ',"forwarded_count":' || GREATEST(COALESCE(k.forwarded_count, 0), 0)
        || ',"is_verified":' || CASE WHEN k.is_verified THEN 'true' ELSE 'false' END
        || ',"session_data":', CAST(k.session_data AS TEXT)
    FROM (SELECT 1 FROM e2e_room_keys_versions
        WHERE user_id = :user_id AND version = :version AND deleted = 0) AS v
    LEFT JOIN (
        SELECT room_id, session_id, first_message_index, forwarded_count,
            is_verified, session_data
        FROM e2e_room_keys
        WHERE user_id = :user_id AND version = :version AND session_data <> 'null'
        {condition}
        ORDER BY room_id, session_id LIMIT {limit}
    ) AS k ON TRUE"""


def _with_cursor(condition: str) -> str:
    """Return the statements that open a download's cursor and fetch its first page.

    With sorting off, the rows come in the order of the index; else PostgreSQL reads and
    sorts all keys that may follow, for each page. Without the LIMIT, PostgreSQL would
    compile the query (JIT) for a large backup.
    """
    return f"""SET LOCAL enable_sort = off; SET LOCAL enable_incremental_sort = off;
    DECLARE download NO SCROLL CURSOR FOR {_page(condition, ":limit")};
    FETCH :count FROM download"""


def _without_cursor(condition: str) -> str:
    """Return the query of one page."""
    return _page(condition, ":count")


def _downloads(select: Callable[[str], str]) -> DownloadStatements:
    """Return the downloads of session_data, JSON or not.

    Args:
        select: returns the statement for a condition on the keys.
    """
    return DownloadStatements(
        backup=select(""),
        backup_after=select("AND (room_id, session_id) > (:room_id, :session_id)"),
        room=select("AND room_id = :room_id"),
        room_after=select("AND room_id = :room_id AND session_id > :session_id"),
    )


#: Downloads by a cursor.
DOWNLOADS = _downloads(_with_cursor)
#: Downloads from distributed tables, with a query for each page. Settings of the
#: transaction don't reach the nodes, on which docs/scaling.rst turns sorting off.
DISTRIBUTED_DOWNLOADS = _downloads(_without_cursor)
#: Returns the next rows of the transaction's download.
FETCH_PAGE = "FETCH :count FROM download"

TABLE_STATEMENTS = TableStatements(
    find_read_only="SELECT current_setting('transaction_read_only')::bool::int",
    find_encoding="SELECT current_setting('server_encoding')",
    # READ COMMITTED: the next statement, after the lock, sees tables that were created
    # meanwhile. A name lookup, such as to_regclass, may not see a table that others
    # created while the transaction waited for an advisory lock; a query of the
    # catalogue does.
    find_tables=(
        "SET TRANSACTION ISOLATION LEVEL READ COMMITTED;"
        " SELECT DISTINCT tablename FROM pg_tables"
        f" WHERE tablename IN {ALL_TABLES} AND schemaname = ANY(current_schemas(FALSE))"
    ),
    # An ALTER TABLE that waits for a long reader, such as pg_dump, would hold up every
    # later query of the table: with the timeout, the start of a process fails instead.
    lock=(
        "SET LOCAL lock_timeout TO '10s';"
        f" SET LOCAL idle_in_transaction_session_timeout TO {1000 * IDLE_SECONDS};"
        " SET LOCAL synchronous_commit TO ON;"
        " SELECT pg_advisory_xact_lock(hashtext('roomkeys schema'))"
    ),
    touch=(
        "UPDATE roomkeys_schema SET number = number"
        " WHERE number IN (SELECT number FROM roomkeys_schema FOR UPDATE SKIP LOCKED)"
    ),
    estimate_keys="""
    SELECT COALESCE(SUM(reltuples) FILTER (WHERE reltuples > 0), 0)::bigint
    FROM pg_class, (SELECT to_regclass('e2e_room_keys') AS root) AS keys
    WHERE relkind = 'r'
    AND (oid = root OR oid IN (SELECT relid FROM pg_partition_tree(root)))""",
    measure_keys="""
    SELECT user_id, version, COUNT(*), COALESCE(SUM(OCTET_LENGTH(session_data)), 0)
    FROM e2e_room_keys WHERE user_id BETWEEN :first AND :last
    GROUP BY user_id, version""",
    # A partitioned table has no rows of its own.
    measure_tables=f"""
    SELECT tablename, GREATEST(pg_total_relation_size(root), (
        SELECT SUM(pg_total_relation_size(relid)) FROM pg_partition_tree(root)))
    FROM (SELECT tablename, to_regclass(tablename) AS root FROM pg_tables
        WHERE tablename IN {ALL_TABLES} AND schemaname = ANY(current_schemas(FALSE))
    ) AS t ORDER BY tablename""",
)
#: Statements about distributed tables. The test of a write is a read, because a write
#: of the schema number would need all nodes. PostgreSQL's statistics of distributed
#: tables are on the nodes, so the number of keys is the sum of the cached counts.
DISTRIBUTED_TABLE_STATEMENTS = attrs.evolve(
    TABLE_STATEMENTS,
    touch="SELECT number FROM roomkeys_schema",
    estimate_keys="SELECT COALESCE(SUM(key_count), 0)::bigint FROM roomkeys_counts",
)

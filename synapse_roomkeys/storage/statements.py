"""The statements that both engines share, each as it is sent.

Parameters are named (``:user_id``), which is SQLite's own style; `PostgresTransaction`
translates them for psycopg2. A statement holds no ``%`` and no ``?``.

Each statement names one user in every query, join and conflict target, so the tables
can be partitioned or distributed by ``user_id``, and each statement goes to one shard.

A version's row is locked before its keys are written. The writes of one backup are
therefore serialized, whichever process they come from.
"""

#: The columns of the homeserver's tables that the statements use.
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

#: The tables of the record, of undo, and of their sweeper.
RECORD_TABLES = (
    "roomkeys_changes",
    "roomkeys_deleted",
    "roomkeys_leases",
    "roomkeys_replaced",
)
#: The plugin's own tables.
OWN_TABLES = (
    "roomkeys_counts",
    "roomkeys_numbers",
    "roomkeys_schema",
    "roomkeys_tasks",
    *RECORD_TABLES,
)
#: The homeserver's tables and the plugin's own.
ALL_TABLES = (*TABLES, *OWN_TABLES)

#: Returns the columns of a table, without reading a row of it, or asking a node of a
#: distributed table.
COLUMNS = "SELECT * FROM {table} WHERE FALSE"
#: By table, a statement that fails unless the unique index exists that the conflict
#: targets below need. EXPLAIN plans the INSERT and writes nothing.
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

#: Returns a key's fields; NULLs if the version holds no such key; no row if there is no
#: such version.
GET_KEY = """
    SELECT k.first_message_index, k.forwarded_count, k.is_verified,
        CAST(k.session_data AS TEXT)
    FROM e2e_room_keys_versions AS v LEFT JOIN e2e_room_keys AS k
        ON k.user_id = :user_id AND k.version = :version
        AND k.room_id = :room_id AND k.session_id = :session_id
        AND k.session_data <> 'null'
    WHERE v.user_id = :user_id AND v.version = :version AND v.deleted = 0"""

#: Returns one row: the last version number that was saved for the user (or NULL), the
#: highest number among the user's versions (or NULL), the number of these versions, and
#: the number of them that are deleted.
VERSION_NUMBERS = """
    SELECT (SELECT last_version FROM roomkeys_numbers WHERE user_id = :user_id),
        MAX(version), COUNT(*), COALESCE(SUM(deleted), 0)
    FROM e2e_room_keys_versions WHERE user_id = :user_id"""
#: Saves a version number as the user's last one, unless a higher one is saved.
SAVE_NUMBER = """
    INSERT INTO roomkeys_numbers (user_id, last_version)
    VALUES (:user_id, :version) ON CONFLICT (user_id) DO UPDATE SET last_version =
    CASE WHEN excluded.last_version > roomkeys_numbers.last_version
    THEN excluded.last_version ELSE roomkeys_numbers.last_version END"""
#: Saves the highest number among a user's versions and cached counts, unless a higher
#: one is saved. The counts are read because the homeserver may have deleted the
#: versions already.
SAVE_LAST_NUMBER = """
    INSERT INTO roomkeys_numbers (user_id, last_version)
    SELECT user_id, MAX(version) FROM (
        SELECT user_id, version FROM e2e_room_keys_versions WHERE user_id = :user_id
        UNION ALL SELECT user_id, version FROM roomkeys_counts WHERE user_id = :user_id
    ) AS v GROUP BY user_id ON CONFLICT (user_id) DO UPDATE SET last_version =
    CASE WHEN excluded.last_version > roomkeys_numbers.last_version
    THEN excluded.last_version ELSE roomkeys_numbers.last_version END"""

#: Returns the number of a user's current version, or no row.
CURRENT_VERSION = """
    SELECT version FROM e2e_room_keys_versions WHERE user_id = :user_id AND deleted = 0
    ORDER BY version DESC LIMIT 1"""
#: Returns the current version: number, algorithm, auth_data, etag, and the cached count
#: of its keys. The count is NULL unless it is of this etag and was counted within the
#: window.
CURRENT_INFO = """
    SELECT v.version, v.algorithm, v.auth_data, COALESCE(v.etag, 0), (
        SELECT key_count FROM roomkeys_counts
        WHERE user_id = :user_id AND version = v.version
        AND etag = COALESCE(v.etag, 0) AND counted_ts BETWEEN :oldest AND :newest)
    FROM e2e_room_keys_versions AS v WHERE v.user_id = :user_id AND v.deleted = 0
    ORDER BY v.version DESC LIMIT 1"""
#: Returns the same for one version.
VERSION_INFO = """
    SELECT v.version, v.algorithm, v.auth_data, COALESCE(v.etag, 0), (
        SELECT key_count FROM roomkeys_counts
        WHERE user_id = :user_id AND version = v.version
        AND etag = COALESCE(v.etag, 0) AND counted_ts BETWEEN :oldest AND :newest)
    FROM e2e_room_keys_versions AS v WHERE v.user_id = :user_id AND v.deleted = 0
    AND v.version = :version"""

#: Caches a count. ``key_bytes`` may be NULL; ``now`` is the Unix time in seconds.
SAVE_COUNT = """
    INSERT INTO roomkeys_counts
        (user_id, version, etag, key_count, key_bytes, counted_ts)
    VALUES (:user_id, :version, :etag, :key_count, :key_bytes, :now)
    ON CONFLICT (user_id, version) DO UPDATE SET
    etag = excluded.etag, key_count = excluded.key_count,
    key_bytes = excluded.key_bytes, counted_ts = excluded.counted_ts"""
#: Counts the keys of a version and caches the count. Returns the etag, the count, and
#: NULL for the bytes, which are not measured; no row if there is no such version.
COUNT_KEYS = """
    INSERT INTO roomkeys_counts
        (user_id, version, etag, key_count, key_bytes, counted_ts)
    SELECT v.user_id, v.version, COALESCE(v.etag, 0), k.*, :now
    FROM e2e_room_keys_versions AS v, (
        SELECT COUNT(*), CAST(NULL AS BIGINT) FROM e2e_room_keys
        WHERE user_id = :user_id AND version = :version) AS k
    WHERE v.user_id = :user_id AND v.version = :version AND v.deleted = 0
    ON CONFLICT (user_id, version) DO UPDATE SET
    etag = excluded.etag, key_count = excluded.key_count,
    key_bytes = excluded.key_bytes, counted_ts = excluded.counted_ts
    RETURNING etag, key_count, key_bytes"""
#: Returns the etag of a version and the number of its keys, without a lock or a write;
#: no row if there is no such version.
FIND_COUNT = """
    SELECT COALESCE(etag, 0), (SELECT COUNT(*) FROM e2e_room_keys
        WHERE user_id = :user_id AND version = :version)
    FROM e2e_room_keys_versions
    WHERE user_id = :user_id AND version = :version AND deleted = 0"""
#: Returns the etag of a version; no row if there is no such version.
FIND_ETAG = """
    SELECT COALESCE(etag, 0) FROM e2e_room_keys_versions
    WHERE user_id = :user_id AND version = :version AND deleted = 0"""
#: Caches a count that was read without a lock, if the version still has that etag.
#: ``key_bytes`` may be NULL.
KEEP_COUNT = """
    INSERT INTO roomkeys_counts
        (user_id, version, etag, key_count, key_bytes, counted_ts)
    SELECT user_id, version, COALESCE(etag, 0), :key_count,
        CAST(:key_bytes AS BIGINT), :now
    FROM e2e_room_keys_versions
    WHERE user_id = :user_id AND version = :version AND deleted = 0
    AND COALESCE(etag, 0) = :etag
    ON CONFLICT (user_id, version) DO UPDATE SET
    etag = excluded.etag, key_count = excluded.key_count,
    key_bytes = excluded.key_bytes, counted_ts = excluded.counted_ts"""
#: Moves a cached count to the version's new etag, if it is of the expected one.
#: ``added_bytes`` may be NULL, which makes the cached bytes NULL.
MOVE_COUNT = """
    UPDATE roomkeys_counts SET etag = :new_etag, key_count = key_count + :added_keys,
        key_bytes = key_bytes + :added_bytes
    WHERE user_id = :user_id AND version = :version AND etag = :expected_etag"""
#: Drops the cached count of a version.
FORGET_COUNT = """
    DELETE FROM roomkeys_counts WHERE user_id = :user_id AND version = :version"""
#: Drops all cached counts of a user.
FORGET_USER = "DELETE FROM roomkeys_counts WHERE user_id = :user_id"
#: Deletes the record of a user.
FORGET_CHANGES = "DELETE FROM roomkeys_changes WHERE user_id = :user_id"
#: Deletes the replaced keys of a user.
FORGET_REPLACED = "DELETE FROM roomkeys_replaced WHERE user_id = :user_id"
#: Removes all deleted versions of a user from the sweeper's queue.
FORGET_DELETED = "DELETE FROM roomkeys_deleted WHERE user_id = :user_id"

#: Returns the auth_data of a version.
AUTH_DATA = """
    SELECT auth_data FROM e2e_room_keys_versions
    WHERE user_id = :user_id AND version = :version"""
#: Returns the etag of a version.
ETAG = """
    SELECT COALESCE(etag, 0) FROM e2e_room_keys_versions
    WHERE user_id = :user_id AND version = :version"""
#: Replaces the auth_data of a version.
SET_AUTH_DATA = """
    UPDATE e2e_room_keys_versions SET auth_data = :auth_data
    WHERE user_id = :user_id AND version = :version"""
#: Moves the etag to the new one, a compare-and-set: it writes no row unless the version
#: exists and has the expected etag. It locks the version until the commit.
SET_ETAG = """
    UPDATE e2e_room_keys_versions SET etag = :new_etag
    WHERE user_id = :user_id AND version = :version AND deleted = 0
    AND COALESCE(etag, 0) = :expected_etag"""
#: Queues a version for the deletion of its keys, unless it is queued already, and keeps
#: its auth_data, so that the version can be given back until then. A version that was
#: deleted before has lost its auth_data, and maybe some keys: the row says that the
#: deletion has started.
QUEUE_DELETION = """
    INSERT INTO roomkeys_deleted
        (user_id, version, deleted_ms, auth_data, key_count, is_started)
    SELECT v.user_id, v.version, :now_ms, v.auth_data, (
        SELECT key_count FROM roomkeys_counts
        WHERE user_id = :user_id AND version = :version
        AND etag = COALESCE(v.etag, 0)), v.deleted
    FROM e2e_room_keys_versions AS v
    WHERE v.user_id = :user_id AND v.version = :version
    ON CONFLICT (user_id, version) DO NOTHING"""
#: Marks a version deleted and blanks its auth_data. No request returns the auth_data of
#: a deleted version. The column can't be NULL, and an empty object is JSON that
#: Synapse's own endpoints can read.
MARK_DELETED = """
    UPDATE e2e_room_keys_versions SET deleted = 1, auth_data = '{}'
    WHERE user_id = :user_id AND version = :version"""
#: Records the deletion of a version that is queued, with its number of keys.
NOTE_DELETION = """
    INSERT INTO roomkeys_changes (user_id, version, etag, changed_ms, act, device_id,
        operator, stored, replaced, unchanged, deleted, sessions)
    SELECT v.user_id, v.version, COALESCE(v.etag, 0), :changed_ms, :act, :device_id,
        :operator, :stored, :replaced, :unchanged, d.key_count, :sessions
    FROM e2e_room_keys_versions AS v JOIN roomkeys_deleted AS d
        ON d.user_id = :user_id AND d.version = v.version
    WHERE v.user_id = :user_id AND v.version = :version"""
#: Makes a deleted version readable again, with its auth_data and a new etag. Writes no
#: row unless the version is queued and none of its keys is deleted yet.
UNMARK_DELETED = """
    UPDATE e2e_room_keys_versions SET deleted = 0, etag = COALESCE(etag, 0) + 1,
        auth_data = (SELECT auth_data FROM roomkeys_deleted
            WHERE user_id = :user_id AND version = :version)
    WHERE user_id = :user_id AND version = :version AND deleted = 1
    AND EXISTS (SELECT 1 FROM roomkeys_deleted
        WHERE user_id = :user_id AND version = :version AND is_started = 0)"""
#: Removes a version from the queue.
LEAVE_QUEUE = """
    DELETE FROM roomkeys_deleted WHERE user_id = :user_id AND version = :version"""
#: Deletes the rows of a user's deleted versions except the newest ``most`` of them. A
#: version that still has keys, or is queued for their deletion, keeps its row.
DROP_DELETED_VERSIONS = """
    DELETE FROM e2e_room_keys_versions WHERE user_id = :user_id AND deleted = 1
    AND version <= (SELECT version FROM e2e_room_keys_versions
        WHERE user_id = :user_id AND deleted = 1
        ORDER BY version DESC LIMIT 1 OFFSET :most)
    AND NOT EXISTS (SELECT 1 FROM e2e_room_keys AS k WHERE k.user_id = :user_id
        AND k.version = e2e_room_keys_versions.version)
    AND NOT EXISTS (SELECT 1 FROM roomkeys_deleted AS d WHERE d.user_id = :user_id
        AND d.version = e2e_room_keys_versions.version)"""

#: Deletes one key.
DELETE_ROOM_KEY = """
    DELETE FROM e2e_room_keys WHERE user_id = :user_id AND version = :version
    AND room_id = :room_id AND session_id = :session_id"""

#: Records a change of a version, with the version's etag after the change.
NOTE_CHANGE = """
    INSERT INTO roomkeys_changes (user_id, version, etag, changed_ms, act, device_id,
        operator, stored, replaced, unchanged, deleted, sessions)
    SELECT v.user_id, v.version, COALESCE(v.etag, 0), :changed_ms, :act, :device_id,
        :operator, :stored, :replaced, :unchanged, :deleted, :sessions
    FROM e2e_room_keys_versions AS v
    WHERE v.user_id = :user_id AND v.version = :version"""

#: Returns the keys of a version, of a room or of a session that were replaced since a
#: time, the earliest first: the ids, the time, the etag of the replacement, and the
#: three fields of the replaced key, and whether it has data; then the three fields of
#: the stored key, whether it has data, and whether both keys are the same. The last
#: five are NULL if the session has no stored key. ``room_id`` and ``session_id`` may be
#: NULL.
FIND_REPLACED = """
    SELECT r.room_id, r.session_id, r.replaced_ms, r.etag,
        r.first_message_index, r.forwarded_count, r.is_verified,
        r.session_data <> 'null',
        k.first_message_index, k.forwarded_count, k.is_verified,
        k.session_data <> 'null',
        k.session_data = r.session_data AND k.is_verified = r.is_verified
            AND k.first_message_index = r.first_message_index
            AND k.forwarded_count = r.forwarded_count
    FROM roomkeys_replaced AS r LEFT JOIN e2e_room_keys AS k
        ON k.user_id = :user_id AND k.version = :version
        AND k.room_id = r.room_id AND k.session_id = r.session_id
    WHERE r.user_id = :user_id AND r.version = :version
    AND r.replaced_ms >= :since_ms
    AND (CAST(:room_id AS TEXT) IS NULL OR r.room_id = :room_id)
    AND (CAST(:session_id AS TEXT) IS NULL OR r.session_id = :session_id)
    ORDER BY r.replaced_ms, r.etag"""

#: Returns a user's rows of the record since a time, in order, with all columns but the
#: user's.
CHANGES_OF_USER = """
    SELECT version, etag, changed_ms, act, device_id, operator, stored, replaced,
        unchanged, deleted, sessions
    FROM roomkeys_changes WHERE user_id = :user_id AND changed_ms >= :since_ms
    ORDER BY changed_ms, version, etag"""
#: Returns the number of sessions in each row of a page of the record, the newest first.
SIZES_OF_NEWEST_CHANGES = """
    SELECT stored + replaced
    FROM roomkeys_changes WHERE user_id = :user_id AND changed_ms >= :since_ms
    ORDER BY changed_ms DESC, version DESC, etag DESC LIMIT :most OFFSET :skipped"""
#: Returns a page of these rows, the newest first.
NEWEST_CHANGES_OF_USER = """
    SELECT version, etag, changed_ms, act, device_id, operator, stored, replaced,
        unchanged, deleted, sessions
    FROM roomkeys_changes WHERE user_id = :user_id AND changed_ms >= :since_ms
    ORDER BY changed_ms DESC, version DESC, etag DESC LIMIT :most OFFSET :skipped"""
#: Returns the number of a user's rows of the record since a time.
COUNT_CHANGES_OF_USER = """
    SELECT COUNT(*) FROM roomkeys_changes
    WHERE user_id = :user_id AND changed_ms >= :since_ms"""
#: Returns a version's rows of the record, in the order of etags, in the same columns.
CHANGES_OF_VERSION = """
    SELECT version, etag, changed_ms, act, device_id, operator, stored, replaced,
        unchanged, deleted, sessions
    FROM roomkeys_changes WHERE user_id = :user_id AND version = :version
    ORDER BY etag, changed_ms"""

-- Deleted versions whose keys wait for the sweeper. deleted_ms is a Unix time in
-- milliseconds. auth_data is the version's own, and key_count its cached number of keys
-- at the deletion, or NULL. is_started is 1 once the first keys are deleted: then the
-- version can't be given back any more.

CREATE TABLE IF NOT EXISTS roomkeys_deleted (
    user_id TEXT NOT NULL,
    version BIGINT NOT NULL,
    deleted_ms BIGINT NOT NULL,
    auth_data TEXT NOT NULL,
    key_count BIGINT,
    is_started SMALLINT NOT NULL,
    PRIMARY KEY (user_id, version)
);

-- The lease of the sweeper: its one row names the process that may sweep until until_ms
-- (Unix time in milliseconds). expired_ms is the time at which a process last deleted
-- what had been kept for long enough.

CREATE TABLE IF NOT EXISTS roomkeys_leases (
    name TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    until_ms BIGINT NOT NULL,
    expired_ms BIGINT NOT NULL
);

-- The record: a row for each change of a backup, without data of keys. etag is the
-- version's etag after the change, changed_ms a Unix time in milliseconds. device_id is
-- NULL for an operator's act, and operator for a client's. sessions names the sessions
-- that an upload stored and replaced, as JSON. The index serves both questions that are
-- asked of the record, what happened to a user lately and what changed in a backup after
-- an etag, and the deletion of old rows: a user has some thousands of rows at most.

CREATE TABLE IF NOT EXISTS roomkeys_changes (
    user_id TEXT NOT NULL,
    version BIGINT NOT NULL,
    etag BIGINT NOT NULL,
    changed_ms BIGINT NOT NULL,
    act TEXT NOT NULL,
    device_id TEXT,
    operator TEXT,
    stored BIGINT NOT NULL,
    replaced BIGINT NOT NULL,
    unchanged BIGINT NOT NULL,
    deleted BIGINT,
    sessions TEXT
);

CREATE INDEX IF NOT EXISTS roomkeys_changes_idx
    ON roomkeys_changes (user_id, changed_ms);

-- Keys that were replaced, to give them back. replaced_ms is a Unix time in
-- milliseconds, etag the etag of the change that replaced the key.

CREATE TABLE IF NOT EXISTS roomkeys_replaced (
    user_id TEXT NOT NULL,
    version BIGINT NOT NULL,
    room_id TEXT NOT NULL,
    session_id TEXT NOT NULL,
    replaced_ms BIGINT NOT NULL,
    etag BIGINT NOT NULL,
    first_message_index INT,
    forwarded_count INT,
    is_verified BOOLEAN,
    session_data TEXT NOT NULL
);

CREATE INDEX IF NOT EXISTS roomkeys_replaced_idx
    ON roomkeys_replaced (user_id, version, room_id, session_id);

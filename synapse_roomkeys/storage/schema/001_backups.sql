-- The homeserver's tables, for where no homeserver has made them: those of Synapse,
-- column by column and index by index, so that either can go on with the other's.

CREATE TABLE IF NOT EXISTS e2e_room_keys (
    user_id TEXT NOT NULL,
    room_id TEXT NOT NULL,
    session_id TEXT NOT NULL,
    version BIGINT NOT NULL,
    first_message_index INT,
    forwarded_count INT,
    is_verified BOOLEAN,
    session_data TEXT NOT NULL
);

CREATE UNIQUE INDEX IF NOT EXISTS e2e_room_keys_with_version_idx
    ON e2e_room_keys (user_id, version, room_id, session_id);

CREATE TABLE IF NOT EXISTS e2e_room_keys_versions (
    user_id TEXT NOT NULL,
    version BIGINT NOT NULL,
    algorithm TEXT NOT NULL,
    auth_data TEXT NOT NULL,
    deleted SMALLINT DEFAULT 0 NOT NULL,
    etag BIGINT
);

CREATE UNIQUE INDEX IF NOT EXISTS e2e_room_keys_versions_idx
    ON e2e_room_keys_versions (user_id, version);

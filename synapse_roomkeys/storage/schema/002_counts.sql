-- How many keys a backup holds: a cache. A row counts while its etag is still that of
-- the backup, and for an hour after counted_ts (Unix seconds). Dropping the table
-- loses nothing.

CREATE TABLE IF NOT EXISTS roomkeys_counts (
    user_id TEXT NOT NULL,
    version BIGINT NOT NULL,
    etag BIGINT NOT NULL,
    key_count BIGINT NOT NULL,
    counted_ts BIGINT NOT NULL,
    PRIMARY KEY (user_id, version)
);

-- The last version number that each user was given. The row stays when the user's
-- versions are erased, because a number that was used once must never come again:
-- clients remember it. It holds nothing else of the person. Versions that are there
-- before this table count from its start.

CREATE TABLE IF NOT EXISTS roomkeys_numbers (
    user_id TEXT PRIMARY KEY,
    last_version BIGINT NOT NULL
);

INSERT INTO roomkeys_numbers (user_id, last_version)
    SELECT user_id, MAX(version) FROM e2e_room_keys_versions GROUP BY user_id
    ON CONFLICT (user_id) DO NOTHING;

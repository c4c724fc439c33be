-- How many bytes the keys of a backup have, session_data alone. NULL is not known: it
-- is found out when the keys are counted the next time.

ALTER TABLE roomkeys_counts ADD COLUMN key_bytes BIGINT;

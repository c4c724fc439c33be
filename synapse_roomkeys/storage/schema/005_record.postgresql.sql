-- Session ids are random: PostgreSQL can't make them shorter. It would try for each
-- upload of more than about 40 sessions, for 0.3 ms.

ALTER TABLE roomkeys_changes ALTER COLUMN sessions SET STORAGE EXTERNAL;

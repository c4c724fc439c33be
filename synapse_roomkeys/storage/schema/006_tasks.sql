-- The tasks of the HTTP interface for operators: long work that goes on after a restart.
-- parameters, progress and result are JSON objects. The times are Unix times in
-- milliseconds. A finished task is kept for four weeks.

CREATE TABLE IF NOT EXISTS roomkeys_tasks (
    task_id TEXT PRIMARY KEY,
    action TEXT NOT NULL,
    operator TEXT NOT NULL,
    parameters TEXT NOT NULL,
    status TEXT NOT NULL,
    created_ms BIGINT NOT NULL,
    changed_ms BIGINT NOT NULL,
    progress TEXT NOT NULL,
    result TEXT,
    error TEXT
);

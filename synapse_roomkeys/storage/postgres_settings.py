"""The settings of PostgreSQL's transactions."""

#: Longest wait for a lock, in seconds. An upload holds its lock for milliseconds, and
#: each wait keeps a connection from others. Transactions are retried for some seconds.
LOCK_SECONDS = 1
#: Longest pause between two statements of a transaction, in seconds. Then the server
#: ends the session and frees its locks, because the process was stopped or its machine
#: is gone: the work between two statements takes milliseconds.
IDLE_SECONDS = 10
#: Settings of each transaction, sent in one message with its first statement.
LIMITS = (
    f"SET LOCAL lock_timeout TO {1000 * LOCK_SECONDS};"
    f" SET LOCAL idle_in_transaction_session_timeout TO {1000 * IDLE_SECONDS}; "
)

#: Longest time of a statement on distributed tables, in seconds. If the node with the
#: user's keys hangs, each waiting statement keeps a connection from users of other
#: nodes, whose requests wait for a connection for 5 seconds at most.
STATEMENT_SECONDS = 2
#: Longest time of a statement that deletes all keys of a backup or of a room, in
#: seconds. For 1,000,000 keys it takes some seconds.
DELETION_SECONDS = 30
#: Longest time of a statement while a node is suspected to hang, in seconds.
SUSPICIOUS_STATEMENT_SECONDS = 1
#: Duration of the suspicion after the last timeout of a statement, in seconds. It is
#: longer than the 10 seconds after which refused clients retry.
SUSPICION_SECONDS = 30
#: Settings of each transaction on distributed tables.
DISTRIBUTED_LIMITS = (
    f"{LIMITS}SET LOCAL statement_timeout TO {1000 * STATEMENT_SECONDS}; "
)
#: Settings of each transaction while a node is suspected to hang.
SUSPICIOUS_LIMITS = (
    f"{LIMITS}SET LOCAL statement_timeout TO {1000 * SUSPICIOUS_STATEMENT_SECONDS}; "
)
#: Setting for the statements of a deletion from distributed tables.
DELETION_LIMIT = f"SET LOCAL statement_timeout TO {1000 * DELETION_SECONDS}"
#: Setting of a transaction that deletes a batch of keys. PostgreSQL has no statistics
#: of the range of a batch. For a user with most of the table's keys, it would read the
#: whole table for each batch: 0.5 s instead of 0.02 s, of 1,000,000 keys.
NO_TABLE_SCAN = "SET LOCAL enable_seqscan TO off"

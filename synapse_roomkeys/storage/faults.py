"""Decide by a driver's error how a failed transaction is answered."""

import sqlite3
from enum import Enum

_POSTGRES_CODE_LENGTH = 5


class Fault(Enum):
    """The kind of a database error; every kind but the first two is answered 503."""

    #: A defect of the plugin, or a row that a client may not write: 500, a traceback.
    DEFECT = "defect"
    #: The row was inserted by another transaction in the meantime.
    CONFLICT = "conflict"
    #: One transaction failed; the same transaction may succeed when it is repeated.
    PASSING = "passing"
    #: Another transaction held a lock for longer than ``lock_timeout``.
    LOCKED = "locked"
    #: The session can't write, but another session might, as after a failover.
    READ_ONLY = "read-only"
    #: Every transaction fails until the server, or its operator, has mended something.
    OUTAGE = "outage"


#: The kind of each SQLSTATE of PostgreSQL ("Appendix A. PostgreSQL Error Codes" of its
#: manual), by the longest prefix that is listed. A code without a prefix here is a
#: DEFECT. Clients turn their backup off at a 404 and loop at other 4xx, and only a 503
#: has a Retry-After, so an operator's mistake that can be mended while the plugin runs
#: is an OUTAGE.
_POSTGRES_FAULTS = {
    # Connection exception. PgBouncer reports its own faults as 08P01.
    "08": Fault.OUTAGE,
    "23505": Fault.CONFLICT,
    "25006": Fault.READ_ONLY,
    # idle_in_transaction_session_timeout and transaction_timeout end a session whose
    # process was stopped or overloaded.
    "25P03": Fault.PASSING,
    "25P04": Fault.PASSING,
    # A password, a role, a database or a schema is being changed or restored.
    "28": Fault.OUTAGE,
    "3D000": Fault.OUTAGE,
    "3F000": Fault.OUTAGE,
    # Deadlock, serialization failure.
    "40": Fault.PASSING,
    # A GRANT, a table, or the unique index of ON CONFLICT is missing, as in a restore.
    "42501": Fault.OUTAGE,
    "42P01": Fault.OUTAGE,
    "42P10": Fault.OUTAGE,
    # Disk full, out of memory, too many connections. A smaller transaction may fit.
    "53": Fault.PASSING,
    # The database accepts no connections (ALLOW_CONNECTIONS), or is being dropped.
    "55000": Fault.OUTAGE,
    "55006": Fault.OUTAGE,
    "55P03": Fault.LOCKED,
    # Operator intervention: shutdown, recovery, database dropped.
    "57": Fault.OUTAGE,
    # A single statement was cancelled, or ran into statement_timeout.
    "57014": Fault.PASSING,
    # Input and output errors of the server's disk.
    "58": Fault.OUTAGE,
    # Snapshot too old.
    "72": Fault.PASSING,
    # A wrong file of configuration.
    "F0": Fault.OUTAGE,
    # XX000 is reported for concurrent DDL and, by Citus, for a shard that is away.
    "XX": Fault.PASSING,
    # Corrupt data or a corrupt index, until it is restored.
    "XX001": Fault.OUTAGE,
    "XX002": Fault.OUTAGE,
}

#: Errors of SQLite that aren't of the passing kind `sqlite3.OperationalError`, by the
#: start of the message. Python 3.10's driver gives no error code.
_CORRUPT = ("database disk image is malformed", "file is not a database")
_LOCKED = ("database is locked", "database table is locked")
_READ_ONLY = "attempt to write a readonly database"
#: Messages of errors in a statement's text, which SQLite reports as operational too.
_STATEMENT_ERRORS = ("near ", "no such column", "no such function", "incomplete input")


def judge_sqlstate(code: str) -> Fault:
    """Return the kind of an error of PostgreSQL by its five-character SQLSTATE."""
    for length in range(_POSTGRES_CODE_LENGTH, 1, -1):
        if code[:length] in _POSTGRES_FAULTS:
            return _POSTGRES_FAULTS[code[:length]]
    return Fault.DEFECT


def judge_sqlite(error: Exception) -> Fault:
    """Return the kind of an error of `sqlite3`, or DEFECT for any other exception.

    Operational errors that aren't listed are PASSING: locked file, full disk, input
    and output error, a file that can't be opened, a schema that has changed, a table
    that is missing.
    """
    message = str(error)
    if isinstance(error, sqlite3.OperationalError):
        if message.startswith(_LOCKED):
            return Fault.LOCKED
        if message.startswith(_READ_ONLY):
            return Fault.READ_ONLY
        if message.startswith(_STATEMENT_ERRORS):
            return Fault.DEFECT
        return Fault.PASSING
    if isinstance(error, sqlite3.DatabaseError) and message.startswith(_CORRUPT):
        return Fault.OUTAGE
    return Fault.DEFECT

"""The answer to each error that a database can give."""

from __future__ import annotations

import sqlite3

import psycopg2
from psycopg2 import errorcodes
from twisted.enterprise import adbapi
from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys.storage import SQLITE, postgres
from synapse_roomkeys.storage.faults import Fault, judge_sqlstate

#: Number of characters of a SQLSTATE; names of whole classes have fewer.
LENGTH = 5
#: Every SQLSTATE that the newest psycopg2 knows and that isn't a defect, by its kind.
EXPECTED = {
    Fault.CONFLICT: {"23505"},
    Fault.READ_ONLY: {"25006"},
    Fault.LOCKED: {"55P03"},
    Fault.PASSING: {
        *("25P03", "25P04"),
        *("40000", "40001", "40002", "40003", "40P01"),
        *("53000", "53100", "53200", "53300", "53400"),
        *("57014", "72000", "XX000"),
    },
    Fault.OUTAGE: {
        *("08000", "08001", "08003", "08004", "08006", "08007", "08P01"),
        *("28000", "28P01", "3D000", "3F000", "42501", "42P01", "42P10"),
        *("55000", "55006"),
        *("57000", "57P01", "57P02", "57P03", "57P04", "57P05"),
        *("58000", "58030", "58P01", "58P02", "58P03", "F0000", "F0001"),
        *("XX001", "XX002"),
    },
}


class PostgresTests(SynchronousTestCase):
    """Errors of psycopg2."""

    def test_every_code(self) -> None:
        """The SQLSTATE alone decides, whatever class psycopg2 gives the error."""
        names = vars(errorcodes)
        codes = {
            code
            for name, code in names.items()
            if name.isupper() and len(code) == LENGTH
        }
        self.assertGreater(len(codes), 200)
        # An older psycopg2 lacks the newest codes.
        codes.update(*EXPECTED.values())
        found = {
            kind: {c for c in codes if judge_sqlstate(c) is kind} for kind in Fault
        }
        defects = found.pop(Fault.DEFECT)
        self.assertEqual(found, EXPECTED)
        self.assertLessEqual({"22P05", "23502", "25P02", "42601", "54000"}, defects)

    def test_errors_without_a_code(self) -> None:
        """A connection that failed is an outage; a wrong call of the driver isn't."""
        judge = postgres().judge
        for error in (
            psycopg2.OperationalError("connection refused"),
            psycopg2.InterfaceError("connection already closed"),
            psycopg2.DatabaseError("server closed the connection unexpectedly"),
            adbapi.ConnectionLost(),
        ):
            self.assertIs(judge(error), Fault.OUTAGE, error)
        for defect in (psycopg2.ProgrammingError("no results"), ValueError("NUL")):
            self.assertIs(judge(defect), Fault.DEFECT, defect)


class SqliteTests(SynchronousTestCase):
    """Errors of sqlite3."""

    def test_messages(self) -> None:
        """Faults of the file pass or are mended; faults of a statement are ours."""
        operational = {
            "database is locked": Fault.LOCKED,
            "database table is locked: e2e_room_keys": Fault.LOCKED,
            "attempt to write a readonly database": Fault.READ_ONLY,
            "disk I/O error": Fault.PASSING,
            "unable to open database file": Fault.PASSING,
            "database or disk is full": Fault.PASSING,
            "database schema has changed": Fault.PASSING,
            "no such table: e2e_room_keys": Fault.PASSING,
            "no such column: etag": Fault.DEFECT,
            'near "SELEC": syntax error': Fault.DEFECT,
        }
        for message, kind in operational.items():
            error = sqlite3.OperationalError(message)
            self.assertIs(SQLITE.judge(error), kind, message)
        for message in ("database disk image is malformed", "file is not a database"):
            corrupt = sqlite3.DatabaseError(message)
            self.assertIs(SQLITE.judge(corrupt), Fault.OUTAGE, message)
        for defect in (sqlite3.IntegrityError("UNIQUE"), sqlite3.ProgrammingError("x")):
            self.assertIs(SQLITE.judge(defect), Fault.DEFECT, defect)

"""What a migration decides, and what an operator is told of it."""

from __future__ import annotations

import io
from typing import Any

import attrs
from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys.config import OptionError
from synapse_roomkeys.service.config import DatabaseConfig
from synapse_roomkeys.service.migration import Progress, Result
from synapse_roomkeys.service.migration.run import (
    Verdict,
    changes,
    judge,
    synapse_database,
)
from synapse_roomkeys.service.migration.side import Held, Version

COPY = Version("@user:test.example", 1, "algorithm", "{}", False, 3, 5)
#: Every way in which a version can be another one, but for its count.
OTHERS = [
    attrs.evolve(COPY, algorithm="other"),
    attrs.evolve(COPY, auth_data="[]"),
    attrs.evolve(COPY, deleted=True),
    attrs.evolve(COPY, etag=2),
    attrs.evolve(COPY, etag=4),
]
PURGED = attrs.evolve(COPY, count=4)


class Terminal(io.StringIO):
    """A terminal, as far as anybody asks."""

    def isatty(self) -> bool:
        return True


class JudgeTests(SynchronousTestCase):
    """`judge`."""

    def check(self, source: Version, held: Held | None, verdict: Verdict) -> None:
        self.assertIs(judge(source, held), verdict, (source, held))

    def test_new(self) -> None:
        """What isn't at the target is copied."""
        self.check(COPY, None, Verdict.COPY)

    def test_nothing_has_changed(self) -> None:
        """What is equal stays, whoever brought it."""
        self.check(COPY, Held(COPY, COPY.digest), Verdict.SAME)
        self.check(COPY, Held(COPY, None), Verdict.SAME)

    def test_the_source_has_changed(self) -> None:
        """A copy gives way to whatever is at the source, with more keys or less."""
        for source in (*OTHERS, PURGED, attrs.evolve(COPY, count=6)):
            self.check(source, Held(COPY, COPY.digest), Verdict.COPY)

    def test_the_target_has_changed(self) -> None:
        """What is no copy any more stays."""
        for there in OTHERS:
            self.check(COPY, Held(there, COPY.digest), Verdict.AHEAD)

    def test_both_have_changed(self) -> None:
        """Even if they look alike, as they do after one upload at each."""
        for source in OTHERS:
            for there in OTHERS:
                self.check(source, Held(there, COPY.digest), Verdict.BOTH)

    def test_what_was_not_copied(self) -> None:
        """It stays, however old it looks."""
        for there in (*OTHERS, PURGED):
            self.check(COPY, Held(there, None), Verdict.FOREIGN)


class ChangesTests(SynchronousTestCase):
    """`changes`."""

    def test_each_set_becomes_each_other(self) -> None:
        """Deleting and adding what it says makes one list of keys the other."""
        ids = [("a", "x"), ("a", "y"), ("b", "x")]
        wholes = [
            [(*both, data) for both, data in zip(ids, digits, strict=True) if data]
            for digits in (
                (i, j, k) for i in range(3) for j in range(3) for k in (0, 2)
            )
        ]
        for new in wholes:
            for old in wholes:
                left: dict[tuple[str, str], Any] = {row[:2]: row for row in old}
                done = list(changes(new, iter(old)))
                for gone, come in done:
                    if gone is not None:
                        del left[gone]
                    if come is not None:
                        self.assertNotIn(come[:2], left)
                        left[come[:2]] = come
                self.assertEqual(sorted(left.values()), new)
                touched = {gone or (come and come[:2]) for gone, come in done}
                differing = {row[:2] for row in set(new) ^ set(old)}
                self.assertEqual(touched, differing)
                self.assertEqual(len(done), len(differing))


class ProgressTests(SynchronousTestCase):
    """`Progress` and `Result`."""

    def test_a_terminal_shows_one_line(self) -> None:
        """It is written over every now and then, and makes room for a warning."""
        times = iter([0.0, 0.1, 0.6, 0.6, 0.7])
        stream = Terminal()
        progress = Progress(stream, times.__next__)
        for text in ("one", "two", "three"):
            progress.step(text)
        progress.warn("careful")
        progress.clear()
        self.assertEqual(
            stream.getvalue(), "\rtwo\x1b[K" + "\r\x1b[K" + "careful\n" + "\r\x1b[K"
        )

    def test_a_file_holds_warnings_alone(self) -> None:
        """Nobody looks at a file while it is written."""
        stream = io.StringIO()
        progress = Progress(stream, iter([0.0, 1e9]).__next__)
        progress.step("one")
        progress.warn("careful")
        progress.clear()
        self.assertEqual(stream.getvalue(), "careful\n")

    def test_equal(self) -> None:
        """What is lost or mended is told, and is no failure; the rest is one."""
        told = Result(lost_keys=1, lost_versions=2, mended=3)
        self.assertTrue(told.is_equal)
        self.assertEqual(
            told.lines(),
            [
                "0 backups copied, 0 unchanged; 0 keys written, 0 deleted",
                "3 keys had numbers that the target can't hold: now NULL",
                "1 keys left out: the target can't hold them",
                "2 backups left out: the target can't hold them",
                "checked etag and count of 0 backups with 0 keys: equal",
            ],
        )
        for result in (Result(kept=1), Result(differing=1)):
            self.assertFalse(result.is_equal)
        self.assertIn("1 backups left as they are", Result(kept=1).lines()[1])
        self.assertTrue(Result(differing=4).lines()[-1].endswith(": 4 differ"))


SQLITE: dict[str, Any] = {
    "name": "sqlite3",
    "args": {"database": "/data/homeserver.db"},
}
POSTGRES: dict[str, Any] = {
    "name": "psycopg2",
    "args": {"dbname": "synapse", "cp_max": 5},
}


class SynapseDatabaseTests(SynchronousTestCase):
    """`synapse_database`."""

    def test_one_database(self) -> None:
        """It is taken as it is written."""
        for database in (SQLITE, {**POSTGRES, "txn_limit": 0}):
            name, args = database["name"], database["args"]
            self.assertEqual(
                synapse_database({"database": database}), DatabaseConfig(name, args)
            )

    def test_several_databases(self) -> None:
        """The one that isn't for the rooms' states alone is taken."""
        state = {**SQLITE, "data_stores": ["state"]}
        for main in (POSTGRES, {**POSTGRES, "data_stores": ["main"]}):
            self.assertEqual(
                synapse_database({"databases": {"a": state, "b": main, "c": state}}),
                DatabaseConfig("psycopg2", POSTGRES["args"]),
            )

    def test_a_wrong_connection_string(self) -> None:
        """It is refused as the service's own is, and no part of it is shown."""
        database = {"name": "psycopg2", "args": {"dsn": "host=h password=my hush pass"}}
        error = self.assertRaises(OptionError, synapse_database, {"database": database})
        self.assertEqual(error.option, "database.args.dsn")
        self.assertNotIn("hush", str(error))

    def test_none(self) -> None:
        """An operator reads what there should be, and no password."""
        contents: list[Any] = [
            *(None, [], {}, {"database": None}, {"database": []}),
            *({"database": {"name": "mysql", "args": {"password": "hush"}}},),
            *({"database": {"name": "sqlite3"}}, {"database": {**SQLITE, "args": {}}}),
            *({"databases": {"s": {**SQLITE, "data_stores": ["state"]}}},),
            *({"databases": {"s": 5}}, {"databases": []}),
        ]
        for content in contents:
            error = self.assertRaises(OptionError, synapse_database, content)
            self.assertNotIn("hush", str(error))
            self.assertEqual(error.option, "database")

"""Tests of the migration's decisions and of its report to the operator."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from itertools import product
from typing import Any, ClassVar
from unittest.mock import patch

import attrs
from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys.config import OptionError
from synapse_roomkeys.service.config import DatabaseConfig
from synapse_roomkeys.service.migration import (
    Keep,
    Progress,
    Result,
    synapse_database,
)
from synapse_roomkeys.service.migration.decisions import (
    Action,
    Change,
    Verdict,
    changes,
    decide,
    joining_changes,
    judge,
    lacks_auth_data,
)
from synapse_roomkeys.service.migration.dendrite_config import dendrite_database
from synapse_roomkeys.service.migration.side import parse_version
from synapse_roomkeys.service.migration.values import (
    Held,
    KeysDigest,
    Row,
    SourceVersion,
    Version,
    digest_keys,
)

KEYS = digest_keys([("!r", "s", 0, 0, True, "{}"), ("!r", "t", 1, 0, False, "{}")])
COPY = Version("@user:test.example", 1, "algorithm", "{}", False, 3, KEYS)
#: Copies of `COPY` that differ in one field each.
OTHERS = [
    attrs.evolve(COPY, algorithm="other"),
    attrs.evolve(COPY, auth_data="[]"),
    attrs.evolve(COPY, deleted=True),
    attrs.evolve(COPY, etag=2),
    attrs.evolve(COPY, etag=4),
    attrs.evolve(COPY, keys=KeysDigest(KEYS.count, KEYS.total + 1)),
    attrs.evolve(COPY, keys=KeysDigest(KEYS.count + 1, KEYS.total)),
]
#: `COPY` after two changes.
LATER = attrs.evolve(COPY, etag=5, auth_data="7")


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def held(version: Version | None, copied: str | None = None) -> Held:
    return Held(version, copied, version.keys.count if version else 0)


class DigestTests(SynchronousTestCase):
    """`digest_keys` and `Version.digest`."""

    ROW = ("!room", "session", 1, 2, True, '"data"')

    def test_any_field_changes_it(self) -> None:
        """Keys that differ in one field, or only in the border between two fields, have
        different digests."""
        rows = [
            self.ROW,
            ("!rooms", "ession", 1, 2, True, '"data"'),
            ("!room", 'session"', 1, 2, True, 'data"'),
            ("!room", "session", 12, None, True, '"data"'),
            ("!room", "session", 1, 2, None, '"data"'),
            ("!room", "session", None, 2, True, '"data"'),
            ("!room", "session", "1", 2, True, '"data"'),
            ("!room", "session", 1, 2, False, '"data"'),
            ("!room", "session", 1, 2, True, '"date"'),
        ]
        self.assertEqual(len({digest_keys([row]) for row in rows}), len(rows))

    def test_the_order_and_the_engine_do_not(self) -> None:
        """Keys in another order, or with SQLite's 1 for true, have the same digest."""
        other = ("!a", "b", None, None, None, "null")
        stored = ("!room", "session", 1, 2, 1, '"data"')
        self.assertEqual(digest_keys([self.ROW, other]), digest_keys([other, stored]))

    def test_sums(self) -> None:
        """Digests of disjoint keys can be added and subtracted."""
        other = ("!a", "b", None, None, None, "null")
        both = digest_keys([self.ROW, other])
        self.assertEqual(both, digest_keys([self.ROW]) + digest_keys([other]))
        self.assertEqual(both - digest_keys([other]), digest_keys([self.ROW]))

    def test_a_version_changes_with_all_of_it(self) -> None:
        """Versions that differ in any field have different digests."""
        digests = {version.digest for version in (COPY, LATER, *OTHERS)}
        self.assertEqual(len(digests), len(OTHERS) + 2)


class JudgeTests(SynchronousTestCase):
    """`judge`."""

    def check(
        self, source: Version, there: Held | None, verdict: Verdict, back: str = ""
    ) -> None:
        found = judge(SourceVersion(source, back or None), there)
        self.assertIs(found, verdict, (source, there))

    def test_new(self) -> None:
        """A version that never was at the target is copied."""
        self.check(COPY, None, Verdict.COPY)
        self.check(COPY, Held(None, None, 3), Verdict.COPY)

    def test_nothing_has_changed(self) -> None:
        """Equal versions need no copy, with or without a record of an earlier copy."""
        self.check(COPY, held(COPY, COPY.digest), Verdict.SAME)
        self.check(COPY, held(COPY), Verdict.SAME)
        self.check(LATER, held(LATER, COPY.digest), Verdict.SAME)

    def test_the_source_has_changed(self) -> None:
        """Any change at the source is copied, even a change without a new etag."""
        for source in OTHERS:
            self.check(source, held(COPY, COPY.digest), Verdict.COPY)

    def test_the_target_has_changed(self) -> None:
        """A version that changed at the target after the copy is not overwritten, even
        if the etag is the same."""
        for there in OTHERS:
            self.check(COPY, held(there, COPY.digest), Verdict.AHEAD)

    def test_both_have_changed(self) -> None:
        """Changes on both sides since the copy need the operator's decision."""
        for source in OTHERS:
            self.check(source, held(LATER, COPY.digest), Verdict.BOTH)

    def test_a_version_that_was_not_copied(self) -> None:
        """A different version of the same number, without a record of a copy, needs the
        operator's decision at any etag."""
        for there in OTHERS:
            self.check(COPY, held(there), Verdict.FOREIGN)

    def test_an_erased_version(self) -> None:
        """A version with a record of a copy, but without a row, was deleted at the
        target."""
        self.check(COPY, held(None, LATER.digest), Verdict.ERASED)

    def test_the_way_back(self) -> None:
        """The source's record, left by an earlier migration in the other direction,
        counts like the target's record."""
        self.check(LATER, held(COPY), Verdict.COPY, back=COPY.digest)
        self.check(COPY, held(LATER), Verdict.AHEAD, back=COPY.digest)
        for there in OTHERS:
            self.check(LATER, held(there), Verdict.BOTH, back=COPY.digest)
        # After migrations in both directions, the record that matches decides.
        held_here = held(COPY, OTHERS[0].digest)
        self.check(LATER, held_here, Verdict.COPY, back=COPY.digest)


class DecideTests(SynchronousTestCase):
    """`decide`."""

    #: States at the target for the verdicts, if the source is `COPY`.
    STATES: ClassVar[dict[Verdict, Held | None]] = {
        Verdict.SAME: held(COPY),
        Verdict.COPY: None,
        Verdict.ERASED: held(None, COPY.digest),
        Verdict.AHEAD: held(OTHERS[3], COPY.digest),
        Verdict.BOTH: held(OTHERS[4], OTHERS[3].digest),
        Verdict.FOREIGN: held(OTHERS[3]),
    }

    def actions(self, keep: Keep | None, is_named: bool = False) -> list[Action]:
        source = SourceVersion(COPY)
        for verdict, state in self.STATES.items():
            self.assertIs(judge(source, state), verdict)
        return [
            decide(source, state, keep, is_named).action
            for state in self.STATES.values()
        ]

    def test_each_choice(self) -> None:
        """Without ``--keep`` a conflict needs the operator's decision; with ``--keep``,
        the option decides."""
        start = [Action.NOTHING, Action.COPY, Action.ERASED]
        for keep, rest in (
            (None, [Action.ASK] * 3),
            (Keep.SOURCE, [Action.COPY] * 3),
            (Keep.TARGET, [Action.KEEP] * 3),
            (Keep.BETTER, [Action.KEEP, Action.JOIN, Action.JOIN]),
        ):
            self.assertEqual(self.actions(keep), start + rest, keep)

    def test_an_erased_version_of_a_named_user(self) -> None:
        """Only ``--keep source`` with ``--user`` copies an erased version again."""
        for keep in (None, *Keep):
            action = Action.COPY if keep is Keep.SOURCE else Action.ERASED
            self.assertIs(self.actions(keep, is_named=True)[2], action)

    def test_versions_that_cannot_be_merged(self) -> None:
        """Versions of different algorithms or auth_data, or of which one is deleted,
        aren't merged; the decision names the reason."""
        for other, why in zip(
            OTHERS, ("algorithms", "auth_data", "deleted"), strict=False
        ):
            found = decide(SourceVersion(COPY), held(other), Keep.BETTER, False)
            self.assertIs(found.action, Action.ASK)
            self.assertIn(why, found.reason)


def lists(*digits: int) -> list[list[Row]]:
    """Return all lists of up to three keys, whose values are the given digits."""
    ids = [("a", "x"), ("a", "y"), ("b", "x")]
    return [
        [(*both, value) for both, value in zip(ids, values, strict=True) if value]
        for values in product((0, *digits), repeat=3)
    ]


class ChangesTests(SynchronousTestCase):
    """`changes` and `joining_changes`."""

    def apply(self, old: Any, done: Sequence[Change]) -> list[Row]:
        left = {row[:2]: row for row in old}
        for gone, come in done:
            if gone is not None:
                self.assertEqual(left.pop(gone[:2]), gone)
            if come is not None:
                self.assertNotIn(come[:2], left)
                left[come[:2]] = come
        return sorted(left.values())

    def test_each_list_becomes_each_other(self) -> None:
        """Applying the changes to the old list gives the new list, with one change for
        each differing key."""
        for new in lists(1, 2):
            for old in lists(1, 2):
                done = list(changes(new, iter(old)))
                self.assertEqual(self.apply(old, done), new)
                differing = {row[:2] for row in set(new) ^ set(old)}
                self.assertEqual(len(done), len(differing))

    def test_merging_takes_the_better_of_each(self) -> None:
        """Merging replaces a key only by a better key, by the rule of uploads; in a tie
        the target's key stays."""
        good = (0, 0, True, '"good"')
        verified, unverified = (5, 0, True, '"v"'), (0, 0, False, '"u"')
        forwarded, broken = (0, 1, True, '"f"'), (0, 0, True, '"broken')
        empty, number = (0, 0, True, "null"), (None, 0, True, '"n"')
        for row, old, better in (
            (good, verified, good),
            (verified, good, good),
            (verified, unverified, verified),
            (forwarded, good, good),
            (good, forwarded, good),
            ((0, 0, True, '"tie"'), good, good),
            *((good, bad, good) for bad in (broken, empty, number)),
            *((bad, unverified, unverified) for bad in (broken, empty, number)),
            *((bad, empty, empty) for bad in (broken, number)),
        ):
            done = list(joining_changes([("r", "s", *row)], iter([("r", "s", *old)])))
            found = self.apply([("r", "s", *old)], done)
            self.assertEqual(found, [("r", "s", *better)], (row, old))

    def test_merging_keeps_the_keys_of_either_side(self) -> None:
        """The merged list has the keys that only one of the sides has."""
        keys = [("r", name, 0, 0, True, "{}") for name in "abc"]
        done = list(joining_changes(keys[:2], iter(keys[1:])))
        self.assertEqual(self.apply(keys[1:], done), keys)


class ProgressTests(SynchronousTestCase):
    """`Progress` and `Result`."""

    def test_a_terminal_shows_one_line(self) -> None:
        """The line shows keys, percent and remaining time, has at most two updates a
        second, and is cleared before a permanent line."""
        times = iter([0.0, 0.0, 0.1, 1.0, 400.0])
        stream = Terminal()
        progress = Progress(stream, times.__next__)
        progress.begin(40_000)
        for keys in (1000, 1000, 18_000):
            progress.advance(keys)
        progress.warn("careful")
        progress.clear()
        self.assertEqual(
            stream.getvalue(),
            "\r2,000 of 40,000 keys (5 %), 19 s left\x1b[K"
            "\r20,000 of 40,000 keys (50 %), 7 min left\x1b[K"
            "\r\x1b[Kcareful\n\r\x1b[K",
        )

    def test_more_keys_than_there_were(self) -> None:
        """Keys uploaded after the count don't raise the progress above 100 %."""
        stream = Terminal()
        progress = Progress(stream, iter([0.0, 0.0, 9000.0]).__next__)
        progress.begin(10)
        progress.advance(20)
        self.assertIn("20 of 20 keys (100 %), 0 s left", stream.getvalue())

    def test_a_long_time(self) -> None:
        """A remaining time above an hour is shown in hours and minutes."""
        stream = Terminal()
        progress = Progress(stream, iter([0.0, 0.0, 7500.0]).__next__)
        progress.begin(20)
        progress.advance(10)
        self.assertIn("2 h 5 min left", stream.getvalue())

    def test_a_file_holds_warnings_alone(self) -> None:
        """A file gets no progress lines, and a bounded number of warnings."""
        stream = io.StringIO()
        progress = Progress(stream, iter([0.0, 0.0, 1e9]).__next__)
        progress.begin(1)
        progress.advance(1)
        for _ in range(10_000):
            progress.warn("careful")
        progress.clear()
        lines = stream.getvalue().splitlines()
        self.assertEqual(lines[:100], ["careful"] * 100)
        self.assertEqual(len(lines), 101)

    def test_done(self) -> None:
        """A result is done although keys or versions were left out, and reports the
        lost, erased and kept backups."""
        result = Result(lost_keys=1, lost_versions=2, mended=3, erased=4, kept=5)
        self.assertTrue(result.is_done)
        self.assertEqual(
            result.lines(),
            [
                "0 backups copied, 0 merged, 0 unchanged; 0 keys written, 0 deleted",
                "3 keys had numbers that the target can't hold: now NULL",
                "1 keys left out: the target can't hold them",
                "2 backups left out: the target can't hold them",
                "5 backups left as the target has them, by --keep",
                "4 backups not copied: they were deleted at the target after they had"
                " been copied (--keep source --user USER copies a user's again)",
                "DONE: compared 0 backups, 0 keys: equal",
            ],
        )

    def test_not_done(self) -> None:
        """The last line names the remaining work, also after a dry run."""
        for result, todo in (
            (Result(undecided=1), "1 backups have changed at the target: run again"),
            (Result(differing=4), "4 backups differ after the copy"),
            (Result(missing_users=("@a:b",)), "check the names"),
        ):
            self.assertFalse(result.is_done)
            self.assertIn(f"NOT DONE: {todo}", result.lines()[-1])
            again = attrs.evolve(result, dry_run=True)
            self.assertFalse(again.is_done)
            self.assertIn(f"DRY RUN: nothing was written; {todo}", again.lines()[-1])
        self.assertIn("No backup at the source: @a:b", result.lines())


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
        """A single database is used with its arguments unchanged."""
        for database in (SQLITE, {**POSTGRES, "txn_limit": 0}):
            name, args = database["name"], database["args"]
            self.assertEqual(
                synapse_database({"database": database}), DatabaseConfig(name, args)
            )

    def test_several_databases(self) -> None:
        """Of several databases, the database with the data store "main", or without a
        list of data stores, is used."""
        state = {**SQLITE, "data_stores": ["state"]}
        for main in (POSTGRES, {**POSTGRES, "data_stores": ["main"]}):
            self.assertEqual(
                synapse_database({"databases": {"a": state, "b": main, "c": state}}),
                DatabaseConfig("psycopg2", POSTGRES["args"]),
            )

    def test_a_wrong_connection_string(self) -> None:
        """A wrong dsn raises an OptionError for ``database.args.dsn``; the text holds
        no part of the dsn."""
        database = {"name": "psycopg2", "args": {"dsn": "host=h password=my hush pass"}}
        error = self.assertRaises(OptionError, synapse_database, {"database": database})
        self.assertEqual(error.option, "database.args.dsn")
        self.assertNotIn("hush", str(error))

    def test_none(self) -> None:
        """A missing or unsuitable database raises an OptionError for ``database``; the
        text holds no password."""
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


class DendriteDatabaseTests(SynchronousTestCase):
    """`dendrite_database`."""

    def configured(self, component: Any, every: Any = None) -> Any:
        """Return a configuration with the connection strings of the component and of
        all components."""
        return {
            "user_api": {"account_database": {"connection_string": component}},
            "global": {"database": {"connection_string": every}},
        }

    def refused(self, content: Any) -> OptionError:
        """Return the error for a configuration; the text holds no password."""
        error: OptionError = self.assertRaises(OptionError, dendrite_database, content)
        self.assertNotIn("hush", str(error))
        return error

    def test_files(self) -> None:
        """The path of a file is relative or absolute; its query is ignored. Escapes are
        decoded in absolute paths alone, as Dendrite does."""
        for text, path in (
            ("file:userapi_accounts.db", "userapi_accounts.db"),
            ("file:a%20b.db?cache=shared", "a%20b.db"),
            ("file:/var/a%20b.db", "/var/a b.db"),
            ("file:///var/lib/dendrite/x.db?mode=rwc", "/var/lib/dendrite/x.db"),
        ):
            self.assertEqual(
                dendrite_database(self.configured(text)),
                DatabaseConfig("sqlite3", {"database": path}),
            )

    def test_servers(self) -> None:
        """A URI or a list of parameters becomes the arguments of psycopg2, so that the
        timeouts of a connection apply."""
        args = {"user": "u", "password": "p@ss", "host": "db", "dbname": "d"}
        for text in (
            "postgresql://u:p%40ss@db/d",
            "postgres://u:p%40ss@db/d",
            "user=u password=p@ss host=db dbname=d",
        ):
            self.assertEqual(
                dendrite_database(self.configured(text)),
                DatabaseConfig("psycopg2", args),
            )

    def test_without_psycopg2(self) -> None:
        """Without psycopg2 the connection string stays whole; opening the database then
        names the missing package."""
        modules = {"psycopg2": None, "psycopg2.extensions": None}
        with patch.dict(sys.modules, modules):
            found = dendrite_database(self.configured("postgres://u:hush@db/d"))
        self.assertEqual(found.args, {"dsn": "postgres://u:hush@db/d"})

    def test_the_order(self) -> None:
        """The component's database precedes the database of all components, unless it
        is empty or missing."""
        every = "file:all.db"
        for content, path in (
            (self.configured("file:own.db", every), "own.db"),
            (self.configured("", every), "all.db"),
            (self.configured(None, every), "all.db"),
            ({**self.configured("", every), "user_api": None}, "all.db"),
        ):
            found = dendrite_database(content)
            self.assertEqual(found.args, {"database": path})

    def test_none(self) -> None:
        """Without a connection string the error names both options."""
        contents: list[Any] = [
            *(None, [], {}, {"global": None}, {"user_api": "hush"}),
            *({"global": {"database": "hush"}}, self.configured(7), {"global": []}),
        ]
        for content in contents:
            error = self.refused(content)
            self.assertEqual(
                error.option, "user_api.account_database.connection_string"
            )
            self.assertIn("global.database.connection_string", str(error))

    def test_a_wrong_connection_string(self) -> None:
        """A string that libpq rejects is an error, which names the option and quotes no
        part of the string."""
        for text in (
            "postgres://u:hush@ush@db/d",
            "postgres://u:hush/ush@db/d",
            "postgres://u:hush@db/d?binary_parameters=yes",
            "hush",
        ):
            error = self.refused(self.configured("", text))
            self.assertEqual(error.option, "global.database.connection_string")
        self.refused(self.configured("file:?hush"))


class DendriteVersionTests(SynchronousTestCase):
    """Values of versions that only Dendrite has."""

    def test_etags(self) -> None:
        """A text of at most 18 digits is a number, which every BIGINT holds; any other
        text counts as 0, like NULL."""
        for etag, number in (
            *((7, 7), ("7", 7), ("007", 7), ("9" * 18, 10**18 - 1), (None, 0)),
            *(("", 0), ("x", 0), ("-1", 0), (" 7", 0), ("٣", 0), ("9" * 19, 0)),
        ):
            row = ("@u:x", 1, "a", "{}", 0, etag)
            self.assertEqual(parse_version(row, KEYS).etag, number)

    def test_lost_auth_data(self) -> None:
        """An auth_data that is empty, null or no JSON is lost; any other JSON isn't."""
        for lost in ("", " ", "null", " null\n", "{", "{'a': 1}", "text"):
            self.assertTrue(lacks_auth_data(attrs.evolve(COPY, auth_data=lost)), lost)
        for kept in ("{}", '{"a": null}', "[]", "0", '"text"', "[" * 2000 + "]" * 2000):
            self.assertFalse(lacks_auth_data(attrs.evolve(COPY, auth_data=kept)), kept)

"""The operator's commands: their arguments, and results in words."""

import io
import json
import sys
from datetime import datetime, timezone

from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys.admin.removal import (
    find_deleted,
    find_orphans,
    superseded_before,
)
from synapse_roomkeys.service.cli import main
from synapse_roomkeys.storage import Owner, VersionFacts
from synapse_roomkeys.tools.history import AuditFilter, change_text
from synapse_roomkeys.tools.output import (
    Output,
    parse_duration,
    parse_moment,
    plural,
    size_text,
    time_text,
)
from synapse_roomkeys.types import RecordedChange

NOW = 1_800_000_000.0
DAY_MS = 86_400_000


def facts(version: int, state: str, **fields: int | None) -> VersionFacts:
    """Return a version with a key and without times."""
    values: dict[str, int | None] = {
        "etag": 1,
        "keys": 1,
        "size": 900,
        "created_ms": None,
        "uploaded_ms": None,
        "deleted_ms": None,
        **fields,
    }
    return VersionFacts(
        user_id="@user:test.example",
        version=version,
        state=state,
        algorithm=None if state == "orphaned" else "a",
        auth_data=None if state == "orphaned" else "{}",
        device_id=None,
        **values,  # type: ignore[arg-type]
    )


class TextTests(SynchronousTestCase):
    """Numbers, sizes and times, as text and from text."""

    def test_durations(self) -> None:
        """A duration is a whole number of minutes, hours, days or weeks."""
        for text, seconds in (("30m", 1800), ("2h", 7200), ("7d", 604800)):
            self.assertEqual(parse_duration(text), seconds)
        self.assertEqual(parse_duration("4w"), 4 * 604800)
        for text in ("", "2", "h", "-1h", "1.5h", "2 h", "2s"):
            self.assertRaises(ValueError, parse_duration, text)

    def test_moments(self) -> None:
        """A moment is a duration before now, or a time that is in UTC unless it names
        an offset."""
        self.assertEqual(parse_moment("1d", NOW), int(1000 * NOW) - DAY_MS)
        noon = int(1000 * datetime(2026, 1, 31, 12, tzinfo=timezone.utc).timestamp())
        for text in (
            "2026-01-31T12:00:00",
            "2026-01-31T12:00:00Z",
            "2026-01-31 13:00:00+01:00",
        ):
            self.assertEqual(parse_moment(text, NOW), noon, text)
        for text in ("soon", "31.1.2026", "2026-13-01"):
            self.assertRaises(ValueError, parse_moment, text, NOW)

    def test_sizes_and_numbers(self) -> None:
        """Bytes have a decimal unit, and numbers the right noun."""
        sizes = (
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 kB"),
            (1_234_567, "1.2 MB"),
            (5 * 10**15, "5000.0 TB"),
        )
        for size, text in sizes:
            self.assertEqual(size_text(size), text)
        self.assertEqual(plural(1, "key"), "1 key")
        self.assertEqual(plural(2000, "key"), "2,000 keys")
        self.assertEqual(time_text(None), "-")
        self.assertEqual(time_text(1000), "1970-01-01 00:00:01")

    def test_json_is_one_object_a_line(self) -> None:
        """With JSON, results are objects, and remarks for people are left out."""
        stream = io.StringIO()
        output = Output(True, stream)
        output.say("a header")
        output.write({"user": "é\n"}, "text")
        self.assertEqual(stream.getvalue().count("\n"), 1)
        self.assertEqual(json.loads(stream.getvalue()), {"user": "é\n"})


class ChoiceTests(SynchronousTestCase):
    """The versions that a purge deletes."""

    def test_a_superseded_version_ages_from_its_last_change(self) -> None:
        """The last change is the last upload, or the creation of the next version; a
        version whose times are unknown is never chosen."""
        choose = superseded_before(100)
        for old, new, is_chosen in (
            (facts(1, "superseded"), facts(2, "current", created_ms=99), True),
            (facts(1, "superseded"), facts(2, "current", created_ms=100), False),
            (
                facts(1, "superseded", uploaded_ms=100),
                facts(2, "current", created_ms=50),
                False,
            ),
            (facts(1, "superseded"), facts(2, "current"), False),
            (facts(1, "deleted", uploaded_ms=1), facts(2, "current"), False),
        ):
            owner = Owner("@user:test.example", (old, new))
            self.assertEqual(list(choose(owner)), [old] if is_chosen else [])
        current = Owner("@user:test.example", (facts(1, "current", uploaded_ms=1),))
        self.assertEqual(list(choose(current)), [])

    def test_orphans_and_deleted_versions(self) -> None:
        """A deleted version without keys, and out of the sweeper's queue, is done."""
        orphan, done = facts(1, "orphaned"), facts(2, "deleted", keys=0)
        waiting = facts(3, "deleted", keys=0, deleted_ms=5)
        left = facts(4, "deleted")
        versions = (orphan, done, waiting, left, facts(5, "current"))
        owner = Owner("@user:test.example", versions)
        self.assertEqual(list(find_orphans(owner)), [orphan])
        self.assertEqual(list(find_deleted(owner)), [waiting, left])


class GenerateTests(SynchronousTestCase):
    """The manual page and the completions."""

    def test_each_names_all_commands(self) -> None:
        """The texts are generated from the program's own arguments."""
        for what, mark in (
            ("manual", ".TH"),
            ("bash", "complete -"),
            ("zsh", "#compdef"),
        ):
            stream = io.StringIO()
            self.patch(sys, "stdout", stream)
            self.assertEqual(main(["generate", what]), 0)
            self.assertIn(mark, stream.getvalue())
            for word in ("serve", "restore", "superseded"):
                self.assertIn(word, stream.getvalue(), what)


class ArgumentTests(SynchronousTestCase):
    """Wrong arguments of the commands."""

    def test_wrong_arguments_are_refused(self) -> None:
        """The program ends with the status of argparse, before it opens a database."""
        for arguments in (
            ["show"],
            ["restore", "@user:test.example", "seven"],
            ["audit", "@user:test.example", "--since", "soon"],
            ["purge"],
            ["purge", "--orphans", "--deleted"],
            ["purge", "--record-older-than", "5h"],
            ["users", "--limit", "0"],
            ["users", "--config", "a", "--synapse", "b"],
            ["sweep"],
        ):
            self.patch(sys, "stderr", io.StringIO())
            ended = self.assertRaises(SystemExit, main, arguments)
            self.assertEqual(ended.code, 2, arguments)


class AuditTests(SynchronousTestCase):
    """Recorded changes in words."""

    def test_an_export(self) -> None:
        """An export is named with its operator, also if a session is asked for."""
        change = RecordedChange(
            changed_ms=0,
            version=7,
            etag=2,
            act="export",
            device_id=None,
            operator="@admin:test.example",
            stored=0,
            replaced=0,
            unchanged=0,
            deleted=0,
            sessions=None,
        )
        self.assertEqual(
            change_text(change),
            "1970-01-01 00:00:00  version 7, etag 2: operator @admin:test.example"
            " exported the version",
        )
        self.assertTrue(AuditFilter(0, "!room", "session").matches({}, change))

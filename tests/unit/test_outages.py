"""An outage in the log."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys.outages import REMINDER_SECONDS, Cause, Outages

AWAY = Cause("away", "Look for it")
FULL = Cause("full", "Make room", settle_seconds=15.0)


class OutagesTests(SynchronousTestCase):
    """`Outages`."""

    def setUp(self) -> None:
        self.now = 100.0
        self.outages = Outages("Server a:1", lambda: self.now)
        self.seen = 0
        watched = self.assertLogs("synapse_roomkeys.outages", "DEBUG")
        self.lines: list[str] = watched.__enter__().output
        self.addCleanup(watched.__exit__, None, None, None)

    def logged(self) -> list[str]:
        """The lines since the last call."""
        lines = self.lines[self.seen :]
        self.seen = len(self.lines)
        return [line.replace(":synapse_roomkeys.outages", "") for line in lines]

    def test_a_beginning_reminders_and_an_end(self) -> None:
        """A minute of failing requests is four lines, with all that failed."""
        for _ in range(60):
            self.now += 1
            self.outages.note_failure(AWAY, "refused.")
            self.outages.note_refusal(AWAY, "refused.")
        self.now += 4
        self.outages.note_success()
        self.outages.note_success()
        self.assertEqual(
            self.logged(),
            [
                "WARNING:Server a:1 fails (away), trying again: refused. Look for it",
                "ERROR:Server a:1 fails (away), giving up: refused. Look for it",
                "WARNING:Server a:1 still fails (away) after 30 s: 31 retries, 30"
                " requests given up; the last: refused",
                "WARNING:Server a:1 is back (away) after 63.0 s: 60 retries, 60"
                " requests given up",
            ],
        )

    def test_others_succeed_meanwhile(self) -> None:
        """A success soon after a failure ends nothing; the time that is told ends with
        the first success after the last failure."""
        for _ in range(5):
            self.outages.note_failure(FULL, "no room")
            self.now += 10
            self.outages.note_success()
        self.assertEqual(len(self.logged()), 2)
        self.now += 5
        self.outages.note_success()
        (line,) = self.logged()
        self.assertIn("is back (full) after 50.0 s: 5 retries", line)

    def test_causes_are_told_apart(self) -> None:
        """Each has a beginning and an end of its own."""
        self.outages.note_failure(AWAY, "a")
        self.outages.note_failure(FULL, "b")
        self.assertEqual(len(self.logged()), 2)
        self.now += 3
        self.outages.note_success()
        (line,) = self.logged()
        self.assertIn("(away)", line)
        self.now += REMINDER_SECONDS
        self.outages.note_failure(FULL, "c")
        (line,) = self.logged()
        self.assertIn("still fails (full)", line)

    def test_a_refusal_alone(self) -> None:
        """A request that isn't tried again begins an outage too."""
        self.outages.note_refusal(AWAY, "gone")
        (line,) = self.logged()
        self.assertIn("giving up: gone. Look for it", line)

    def test_what_was_met(self) -> None:
        """A cause is known for as long as somebody asks for, over or not."""
        self.assertFalse(self.outages.has_failure([AWAY, FULL], 5))
        self.outages.note_failure(FULL, "no room")
        self.now += 5
        self.assertTrue(self.outages.has_failure([AWAY, FULL], 5))
        self.assertFalse(self.outages.has_failure([AWAY], 5))
        self.now += 0.1
        self.assertFalse(self.outages.has_failure([FULL], 5))

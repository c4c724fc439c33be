"""Tests of the log lines of an outage."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys.outages import REMINDER_SECONDS, Cause, Outages

AWAY = Cause("away", "Look for it")
FULL = Cause("full", "Make room", settle_seconds=15.0)


class OutagesTests(SynchronousTestCase):
    """Tests of `Outages`."""

    def setUp(self) -> None:
        self.now = 100.0
        self.outages = Outages("Server a:1", lambda: self.now)
        self.position = 0
        watched = self.assertLogs("synapse_roomkeys.outages", "DEBUG")
        self.lines: list[str] = watched.__enter__().output
        self.addCleanup(watched.__exit__, None, None, None)

    def logged(self) -> list[str]:
        """The lines logged since the last call."""
        lines = self.lines[self.position :]
        self.position = len(self.lines)
        return [line.replace(":synapse_roomkeys.outages", "") for line in lines]

    def test_an_outage_logs_beginning_reminders_and_end(self) -> None:
        """A minute of failed requests logs four lines with the numbers of retries and
        of failed requests."""
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

    def test_a_success_soon_after_a_failure_ends_no_outage(self) -> None:
        """A success within `settle_seconds` of a failure does not end the outage; the
        logged duration ends at the first success after the last failure."""
        for _ in range(5):
            self.outages.note_failure(FULL, "no room")
            self.now += 10
            self.outages.note_success()
        self.assertEqual(len(self.logged()), 2)
        self.now += 5
        self.outages.note_success()
        (line,) = self.logged()
        self.assertIn("is back (full) after 50.0 s: 5 retries", line)

    def test_each_cause_is_an_outage_of_its_own(self) -> None:
        """Each cause has its own beginning and end in the log."""
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

    def test_a_failure_without_a_retry_begins_an_outage(self) -> None:
        """A request that fails without a retry begins an outage too."""
        self.outages.note_refusal(AWAY, "gone")
        (line,) = self.logged()
        self.assertIn("giving up: gone. Look for it", line)

    def test_a_cause_is_remembered(self) -> None:
        """`has_failure` is true for a cause that failed within the given seconds, even
        after the outage is over."""
        self.assertFalse(self.outages.has_failure([AWAY, FULL], 5))
        self.outages.note_failure(FULL, "no room")
        self.now += 5
        self.assertTrue(self.outages.has_failure([AWAY, FULL], 5))
        self.assertFalse(self.outages.has_failure([AWAY], 5))
        self.now += 0.1
        self.assertFalse(self.outages.has_failure([FULL], 5))

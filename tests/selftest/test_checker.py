"""Tests of the history checker, with small histories written by hand."""

from twisted.trial.unittest import SynchronousTestCase

from ..reliability.linearizability import (
    Delete,
    Download,
    Event,
    GetInfo,
    NotLinearizable,
    Upload,
    linearize,
    tally,
)
from ..reliability.model import Backup, Key

A, B, C = ("!a", "1"), ("!a", "2"), ("!b", "1")
BAD = Key(False, 2, 0, '"bad"')
GOOD = Key(True, 0, 0, '"good"')
TWIN = Key(True, 0, 0, '"twin"')


def sequential(*operations: tuple[object, object]) -> list[Event]:
    """Events of operations that were each sent after the answer to the previous
    operation."""
    return [
        Event(operation, 2 * n, 2 * n + 1, answer)  # type: ignore[arg-type]
        for n, (operation, answer) in enumerate(operations)
    ]


def concurrent(*operations: tuple[object, object]) -> list[Event]:
    """Events of operations that were all sent before the first answer."""
    return [
        Event(operation, 0, 1, answer)  # type: ignore[arg-type]
        for operation, answer in operations
    ]


class CheckerTests(SynchronousTestCase):
    """Tests of `linearize`."""

    def accept(self, events: list[Event]) -> list[Event]:
        """Check that a history has a valid order, and return the order.

        The order must respect real time, contain all answered operations once, and
        explain every answer.
        """
        order = linearize(events)
        backup = Backup()
        latest = 0.0
        for event in order:
            self.assertLessEqual(latest, event.end)
            latest = max(latest, event.start)
            backup, answer = event.operation.apply(backup)
            self.assertTrue(event.is_lost or answer == event.answer)
        self.assertLessEqual({e for e in events if not e.is_lost}, set(order))
        self.assertEqual(len(order), len(set(order)))
        return order

    def refuse(self, events: list[Event]) -> None:
        """Check that a history has no valid order."""
        self.assertRaises(NotLinearizable, linearize, events)

    def test_an_empty_history_has_an_order(self) -> None:
        """A history without operations is valid."""
        self.assertEqual(self.accept([]), [])

    def test_each_kind_of_operation_is_accepted(self) -> None:
        """A sequential history with each kind of operation, answered according to the
        contract, is valid."""
        self.accept(
            sequential(
                (GetInfo(), (0, 0)),
                (Upload({A: BAD, C: BAD}), (1, 2)),
                (Upload({A: GOOD}), (2, 2)),
                (Upload({A: BAD}), (2, 2)),
                (Download(), {A: GOOD, C: BAD}),
                (Download("!a", "2"), {}),
                (Delete("!a"), (3, 1)),
                (Delete("!a", "1"), (3, 1)),
                (Download("!b"), {C: BAD}),
                (Delete(), (4, 0)),
            )
        )

    def test_etags_order_concurrent_operations(self) -> None:
        """The etags of the answers order concurrent operations, in whatever order the
        events are listed."""
        events = concurrent(
            (Upload({C: BAD}), (3, 3)),
            (Upload({A: BAD}), (1, 1)),
            (Upload({B: BAD}), (2, 2)),
        )
        order = self.accept(events)
        self.assertEqual(order, [events[1], events[2], events[0]])

    def test_one_of_two_uploads_of_equal_rank_changes_the_backup(self) -> None:
        """Of two concurrent uploads of keys of equal rank, the first changes the backup
        and the second leaves the backup unchanged."""
        twins = ((Upload({A: GOOD}), (1, 1)), (Upload({A: TWIN}), (1, 1)))
        read = Event(Download(), 2, 3, {A: TWIN})
        order = self.accept([*concurrent(*twins), read])
        self.assertEqual(order[0].operation, Upload({A: TWIN}))
        self.refuse([*sequential(*twins), Event(Download(), 5, 6, {A: TWIN})])

    def test_the_search_backtracks(self) -> None:
        """If only one of two possible changes allows the rest of the history, the
        search goes back and takes that change."""
        both = {A: BAD, B: BAD}
        events = concurrent(
            (Upload({A: GOOD, B: GOOD}), (1, 2)),
            (Upload(both), (1, 2)),
            (Delete("!a", "1"), (2, 1)),
            (Delete("!a", "2"), (3, 0)),
        )
        for read in ({A: GOOD}, {B: GOOD}, {A: BAD, B: BAD}):
            middle = Event(Download(), 0, 1, read)
            if read == {B: GOOD}:
                self.accept([*events, middle])
            else:
                self.refuse([*events, middle])

    def test_real_time_is_respected(self) -> None:
        """An operation that ended before another began cannot be ordered after the
        other."""
        changes = ((Upload({A: BAD}), (2, 2)), (Upload({B: BAD}), (1, 1)))
        self.accept(concurrent(*changes))
        self.refuse(sequential(*changes))

    def test_a_stale_read_is_refused(self) -> None:
        """A read returns all changes that were answered before the read was sent."""
        upload = (Upload({A: BAD}), (1, 1))
        stale_ones: list[tuple[object, object]] = [
            (Download(), {}),
            (GetInfo(), (0, 0)),
        ]
        for stale in stale_ones:
            self.accept(concurrent(upload, stale))
            self.refuse(sequential(upload, stale))

    def test_a_read_between_two_changes_is_ordered_between_them(self) -> None:
        """A read that returns only the first of two changes is ordered between the two
        changes."""
        events = [
            Event(Upload({A: BAD}), 0, 9, (1, 1)),
            Event(Upload({B: BAD}), 0, 3, (2, 2)),
            Event(Download(), 1, 2, {A: BAD}),
        ]
        self.accept(events)
        self.refuse([*events[:2], Event(Download(), 4, 5, {A: BAD})])

    def test_impossible_answers_are_refused(self) -> None:
        """A history is invalid if one answer has an impossible etag, count or key."""
        for fault in (
            (Upload({A: GOOD}), (1, 1)),
            (Upload({A: GOOD}), (3, 1)),
            (Upload({A: GOOD}), (2, 2)),
            (Upload({A: BAD}), (2, 1)),
            (Delete("!a"), (2, 1)),
            (Delete("!b"), (2, 1)),
            (GetInfo(), (1, 0)),
            (Download(), {}),
            (Download(), {A: GOOD}),
            (Download("!b"), {A: BAD}),
        ):
            self.refuse(sequential((Upload({A: BAD}), (1, 1)), fault))

    def test_two_changes_with_one_etag_are_refused(self) -> None:
        """Two changes cannot result in one etag."""
        self.refuse(concurrent((Upload({A: BAD}), (1, 1)), (Upload({B: BAD}), (1, 1))))

    def test_a_gap_in_the_etags_is_refused(self) -> None:
        """The etags of a history have no gap, unless the answer to a change was
        lost."""
        gap = sequential((Upload({A: BAD}), (1, 1)), (Upload({A: GOOD}), (3, 1)))
        self.refuse(gap)
        self.accept([*gap, Event(Upload({A: Key(True, 1, 0, '"x"')}), 0)])
        self.refuse([*gap, Event(Upload({B: GOOD}), 0)])

    def test_a_lost_operation_happened_or_did_not(self) -> None:
        """An operation with a lost answer may have happened or not; later answers
        decide, and the operation cannot have happened before it was sent."""
        lost = Event(Upload({B: BAD}), 2)
        first = Event(Upload({A: BAD}), 0, 1, (1, 1))
        happened = Event(Download(), 4, 5, {A: BAD, B: BAD})
        not_yet = Event(Download(), 4, 5, {A: BAD})
        later = Event(GetInfo(), 6, 7, (2, 2))
        self.assertIn(lost, self.accept([first, lost, happened, later]))
        self.assertIn(lost, self.accept([first, lost, not_yet, later]))
        self.assertNotIn(lost, self.accept([first, lost, not_yet]))
        self.refuse([first, lost, happened, Event(GetInfo(), 6, 7, (1, 1))])
        self.refuse([first, lost, Event(GetInfo(), 0, 1, (2, 2))])

    def test_a_lost_operation_happens_at_most_once(self) -> None:
        """An operation with a lost answer is not repeated after a deletion."""
        lost = Event(Upload({A: BAD}), 0)
        events = sequential((Download(), {A: BAD}), (Delete(), (2, 0)))
        self.accept([lost, *events])
        self.refuse([lost, *events, Event(Download(), 4, 5, {A: BAD})])

    def test_many_lost_operations_are_resolved(self) -> None:
        """Ten operations with lost answers, as many as a killed server leaves, are
        resolved by the later answers."""
        keys = [("!a", str(n)) for n in range(10)]
        lost = [Event(Upload({ids: BAD}), 0) for ids in keys]
        seen = dict.fromkeys(keys[::2], BAD)
        events = sequential((Download(), seen), (GetInfo(), (5, 5)))
        order = self.accept([*lost, *events])
        self.assertEqual(len(order), 7)
        self.refuse([*lost, *events, Event(Download(), 4, 5, {})])

    def test_the_error_names_both_answers(self) -> None:
        """The error names the given answer and the correct answer."""
        wrong = sequential((Upload({A: BAD}), (1, 1)), (GetInfo(), (1, 2)))
        error = self.assertRaises(NotLinearizable, linearize, wrong)
        self.assertIn("after 1 operations", str(error))
        self.assertIn("GetInfo() answered (1, 2), not (1, 1)", str(error))

    def test_a_history_may_begin_with_a_backup(self) -> None:
        """A history may begin with a backup that holds keys."""
        there = Backup(7, {A: GOOD})
        events = sequential((Upload({B: BAD}), (8, 2)))
        self.assertEqual(linearize(events, there), events)
        self.assertEqual(tally(there), (7, 1))

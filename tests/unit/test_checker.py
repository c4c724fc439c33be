"""The checker of histories, on small ones that were written by hand."""

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


def one_by_one(*operations: tuple[object, object]) -> list[Event]:
    """Operations and their answers, each sent when the one before was answered."""
    return [
        Event(operation, 2 * n, 2 * n + 1, answer)  # type: ignore[arg-type]
        for n, (operation, answer) in enumerate(operations)
    ]


def at_once(*operations: tuple[object, object]) -> list[Event]:
    """Operations and their answers, all sent before the first answer."""
    return [
        Event(operation, 0, 1, answer)  # type: ignore[arg-type]
        for operation, answer in operations
    ]


class CheckerTests(SynchronousTestCase):
    """`linearize`."""

    def accept(self, events: list[Event]) -> list[Event]:
        """There is an order; it does what it should."""
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
        """There is no order."""
        self.assertRaises(NotLinearizable, linearize, events)

    def test_nothing(self) -> None:
        """No operations need no explanation."""
        self.assertEqual(self.accept([]), [])

    def test_one_after_the_other(self) -> None:
        """Each kind of operation, answered as the contract has it."""
        self.accept(
            one_by_one(
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

    def test_the_etags_order_what_was_sent_at_once(self) -> None:
        """The answers tell who was first, whatever the order they are given in."""
        events = at_once(
            (Upload({C: BAD}), (3, 3)),
            (Upload({A: BAD}), (1, 1)),
            (Upload({B: BAD}), (2, 2)),
        )
        order = self.accept(events)
        self.assertEqual(order, [events[1], events[2], events[0]])

    def test_twins(self) -> None:
        """One of two uploads of the same key changed something, the other nothing."""
        twins = ((Upload({A: GOOD}), (1, 1)), (Upload({A: TWIN}), (1, 1)))
        read = Event(Download(), 2, 3, {A: TWIN})
        order = self.accept([*at_once(*twins), read])
        self.assertEqual(order[0].operation, Upload({A: TWIN}))
        self.refuse([*one_by_one(*twins), Event(Download(), 5, 6, {A: TWIN})])

    def test_a_wrong_turn_is_taken_back(self) -> None:
        """Of two changes that fit, only one leaves the other a place."""
        both = {A: BAD, B: BAD}
        events = at_once(
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
        """What had ended before another began can't come after it."""
        changes = ((Upload({A: BAD}), (2, 2)), (Upload({B: BAD}), (1, 1)))
        self.accept(at_once(*changes))
        self.refuse(one_by_one(*changes))

    def test_a_stale_read(self) -> None:
        """A read sees all that was answered before it was sent."""
        upload = (Upload({A: BAD}), (1, 1))
        stale_ones: list[tuple[object, object]] = [
            (Download(), {}),
            (GetInfo(), (0, 0)),
        ]
        for stale in stale_ones:
            self.accept(at_once(upload, stale))
            self.refuse(one_by_one(upload, stale))

    def test_a_read_holds_changes_back(self) -> None:
        """A read between two changes is of the time between them."""
        events = [
            Event(Upload({A: BAD}), 0, 9, (1, 1)),
            Event(Upload({B: BAD}), 0, 3, (2, 2)),
            Event(Download(), 1, 2, {A: BAD}),
        ]
        self.accept(events)
        self.refuse([*events[:2], Event(Download(), 4, 5, {A: BAD})])

    def test_faults_of_a_single_answer(self) -> None:
        """An etag, a count, a key that can't be."""
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
            self.refuse(one_by_one((Upload({A: BAD}), (1, 1)), fault))

    def test_two_with_one_etag(self) -> None:
        """Two changes can't have made the same state."""
        self.refuse(at_once((Upload({A: BAD}), (1, 1)), (Upload({B: BAD}), (1, 1))))

    def test_an_etag_that_nobody_moved(self) -> None:
        """There is no gap in the etags, unless an answer was lost."""
        gap = one_by_one((Upload({A: BAD}), (1, 1)), (Upload({A: GOOD}), (3, 1)))
        self.refuse(gap)
        self.accept([*gap, Event(Upload({A: Key(True, 1, 0, '"x"')}), 0)])
        self.refuse([*gap, Event(Upload({B: GOOD}), 0)])

    def test_a_lost_operation_happened_or_not(self) -> None:
        """What follows tells; before it was sent it can't have happened."""
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

    def test_a_lost_operation_happens_once(self) -> None:
        """It isn't done again after a deletion."""
        lost = Event(Upload({A: BAD}), 0)
        events = one_by_one((Download(), {A: BAD}), (Delete(), (2, 0)))
        self.accept([lost, *events])
        self.refuse([lost, *events, Event(Download(), 4, 5, {A: BAD})])

    def test_many_lost_operations(self) -> None:
        """As many as a killed server has under way are sorted out by what follows."""
        keys = [("!a", str(n)) for n in range(10)]
        lost = [Event(Upload({ids: BAD}), 0) for ids in keys]
        seen = dict.fromkeys(keys[::2], BAD)
        events = one_by_one((Download(), seen), (GetInfo(), (5, 5)))
        order = self.accept([*lost, *events])
        self.assertEqual(len(order), 7)
        self.refuse([*lost, *events, Event(Download(), 4, 5, {})])

    def test_the_complaint(self) -> None:
        """It names what was answered and what would have been right."""
        wrong = one_by_one((Upload({A: BAD}), (1, 1)), (GetInfo(), (1, 2)))
        error = self.assertRaises(NotLinearizable, linearize, wrong)
        self.assertIn("after 1 operations", str(error))
        self.assertIn("GetInfo() answered (1, 2), not (1, 1)", str(error))

    def test_a_beginning(self) -> None:
        """A history may begin with what was there."""
        there = Backup(7, {A: GOOD})
        events = one_by_one((Upload({B: BAD}), (8, 2)))
        self.assertEqual(linearize(events, there), events)
        self.assertEqual(tally(there), (7, 1))

"""Tests of the per-user queues, of the permits for downloads, of the lane for
transactions, and of the pauses of long steps."""

import gc
import time
from collections.abc import Callable, Iterable, Iterator

from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys.clock import Clock
from synapse_roomkeys.errors import LimitExceededError, OutageError, UnavailableError
from synapse_roomkeys.fairness import FairSemaphore, Lane, UserQueues
from synapse_roomkeys.throttling import MAX_PAUSE, PAUSE_FACTOR, SLICE, for_each

from ..memory import FakeReactor


class FairSemaphoreTests(SynchronousTestCase):
    """Tests of `FairSemaphore` with three permits, of which each user may hold two."""

    def setUp(self) -> None:
        self.reactor = FakeReactor()
        clock = Clock(self.reactor)
        self.semaphore = FairSemaphore(clock, 3, 2, max_waiting=2)
        self.served: list[str] = []

    def acquire(self, name: str) -> None:
        """Ask for a permit for the user whose name is the first letter, and note the
        name when the permit is granted."""
        taken = self.semaphore.acquire(name[0])
        taken.addCallback(lambda _: self.served.append(name))

    def release(self, user: str) -> None:
        """Return a permit of a user, and let the reactor run."""
        self.semaphore.release(user)
        self.reactor.advance(0)

    def test_one_user_never_holds_all_permits(self) -> None:
        """A user's request for a permit above the user's share waits, while another
        user's request is granted."""
        for name in ("a1", "a2", "a3", "b1"):
            self.acquire(name)
        self.assertEqual(self.served, ["a1", "a2", "b1"])
        self.assertTrue(self.semaphore.is_contended)
        self.release("b")
        self.assertEqual(self.served, ["a1", "a2", "b1"])
        self.release("a")
        self.assertEqual(self.served, ["a1", "a2", "b1", "a3"])
        self.assertFalse(self.semaphore.is_contended)

    def test_users_take_turns(self) -> None:
        """A free permit goes to the user who was served least recently, however many
        requests of another user came before."""
        for name in ("x", "x", "y", "a1", "a2", "b1"):
            self.acquire(name)
        for user in ("x", "y", "x"):
            self.release(user)
        self.assertEqual(self.served[3:], ["a1", "b1", "a2"])

    def test_a_user_at_the_limit_is_skipped(self) -> None:
        """If the next user holds the largest number of permits already, the free permit
        goes to the user after."""
        for name in ("a1", "a2", "b1", "a3", "c1"):
            self.acquire(name)
        self.release("b")
        self.assertEqual(self.served, ["a1", "a2", "b1", "c1"])

    def test_a_request_above_max_waiting_is_refused(self) -> None:
        """A user's request above `max_waiting` is refused, and another user's request
        is not."""
        for name in ("a1", "a2", "b1", "a3", "a4"):
            self.acquire(name)
        self.assertRaises(LimitExceededError, self.semaphore.acquire, "a")
        self.acquire("b2")
        self.release("b")
        self.assertEqual(self.served[3:], ["b2"])


class UserQueuesTests(SynchronousTestCase):
    """Tests of `UserQueues`, with calls that the test ends."""

    def setUp(self) -> None:
        self.reactor = FakeReactor()
        self.queues = UserQueues(Clock(self.reactor), max_waiting=2)
        self.begun: list[str] = []
        self.ends: dict[str, Deferred[str]] = {}

    def call(self, name: str) -> Callable[[], Deferred[str]]:
        """A function that notes the call's name in `begun` and returns an unfired
        Deferred."""

        def begin() -> Deferred[str]:
            self.begun.append(name)
            self.ends[name] = Deferred()
            return self.ends[name]

        return begin

    def run_call(self, user: str, name: str) -> Deferred[str]:
        """Queue a call for a user."""
        return self.queues.run(user, self.call(name))

    def test_calls_of_a_user_run_one_at_a_time(self) -> None:
        """The calls of a user run one at a time, in order: each begins after the
        previous call ended."""
        done = [self.run_call("a", name) for name in "123"]
        for count, name in enumerate("123", 1):
            self.assertEqual(self.begun, list("123"[:count]))
            self.ends[name].callback(name)
            self.reactor.advance(0)
        self.assertEqual([self.successResultOf(d) for d in done], list("123"))

    def test_users_do_not_wait_for_each_other(self) -> None:
        """A call does not wait for other users' calls."""
        for name in "123":
            self.run_call("a", name)
        self.run_call("b", "other")
        self.assertEqual(self.begun, ["1", "other"])

    def test_a_failed_call_starts_the_next_call(self) -> None:
        """The error of a call fires the Deferred of that call alone, and the next call
        begins."""
        done = [self.run_call("a", name) for name in "12"]
        self.ends["1"].errback(ZeroDivisionError())
        self.reactor.advance(0)
        self.failureResultOf(done[0], ZeroDivisionError)
        self.assertEqual(self.begun, ["1", "2"])

    def test_an_outage_fails_the_calls_queued_before(self) -> None:
        """If a call fails with an `OutageError`, the calls that were queued before the
        call began fail too, and calls that were queued later are tried."""
        done = [self.run_call("a", name) for name in "123"]
        self.ends["1"].callback("1")
        self.reactor.advance(0)
        late = self.run_call("a", "4")
        self.ends["2"].errback(OutageError(7))
        self.reactor.advance(0)
        self.failureResultOf(done[1], OutageError)
        self.failureResultOf(done[2], UnavailableError)
        self.reactor.advance(0)
        self.ends["4"].callback("4")
        self.assertEqual(self.successResultOf(late), "4")
        self.assertEqual(self.begun, ["1", "2", "4"])

    def test_an_error_other_than_an_outage_fails_one_call(self) -> None:
        """If a call fails for itself, for example at a time limit, the queued calls are
        tried."""
        done = [self.run_call("a", name) for name in "123"]
        self.ends["1"].callback("1")
        self.reactor.advance(0)
        self.ends["2"].errback(UnavailableError(7))
        self.reactor.advance(0)
        self.failureResultOf(done[1], UnavailableError)
        self.ends["3"].callback("3")
        self.assertEqual(self.successResultOf(done[2]), "3")

    def test_a_call_to_a_full_queue_is_429(self) -> None:
        """A call to a full queue fails with a 429 and Retry-After, and the queued calls
        are unaffected."""
        done = [self.run_call("a", name) for name in "1234"]
        error = self.failureResultOf(done[3], LimitExceededError).value
        self.assertEqual(error.code, 429)
        self.assertEqual(
            error.error_dict()["retry_after_ms"],
            int(error.headers()["Retry-After"]) * 1000,
        )
        for name in "123":
            self.ends[name].callback(name)
            self.reactor.advance(0)
        self.assertEqual([self.successResultOf(d) for d in done[:3]], list("123"))

    def test_an_empty_queue_is_removed(self) -> None:
        """A queue is removed when it is empty, so memory does not grow with the number
        of users."""
        done = [self.run_call("a", name) for name in "123"]
        for name in "123":
            self.ends[name].callback(name)
            self.reactor.advance(0)
        self.assertEqual([self.successResultOf(d) for d in done], list("123"))
        self.assertEqual(self.queues._queues, {})


class LaneTests(SynchronousTestCase):
    """Tests of `Lane` with two places."""

    def setUp(self) -> None:
        self.reactor = FakeReactor()
        self.lane = Lane(Clock(self.reactor), width=2)

    def wait(self, seconds: float) -> Deferred[None]:
        """Wait for a place, of which none is free."""
        turn = self.lane.enter(seconds)
        assert turn is not None
        return turn

    def test_places_are_given_in_order(self) -> None:
        """A returned place goes to the transaction that has waited longest."""
        self.assertEqual([self.lane.enter(10), self.lane.enter(10)], [None, None])
        first, second = self.wait(10), self.wait(10)
        self.lane.leave()
        self.reactor.advance(0)
        self.successResultOf(first)
        self.assertNoResult(second)
        self.lane.leave()
        self.reactor.advance(0)
        self.successResultOf(second)
        self.assertFalse(self.reactor.getDelayedCalls())

    def test_a_wait_has_a_timeout(self) -> None:
        """A transaction that gets no place before its timeout fails with a 503, and no
        place is lost."""
        self.assertEqual([self.lane.enter(10), self.lane.enter(10)], [None, None])
        late, patient = self.wait(1), self.wait(3)
        self.reactor.advance(2)
        self.failureResultOf(late, UnavailableError)
        self.lane.leave()
        self.reactor.advance(0)
        self.successResultOf(patient)
        self.lane.leave()
        self.assertIsNone(self.lane.enter(1))


class ForEachTests(SynchronousTestCase):
    """Tests of `for_each`, where two values take longer than a slice."""

    def setUp(self) -> None:
        self.reactor = FakeReactor()
        self.patch(time, "thread_time", self.reactor.seconds)
        self.got: list[int] = []

    def values(self, slices: float = 0.52) -> Iterator[int]:
        """Ten values; the computation of each takes `slices` slices."""
        for number in range(1, 11):
            self.reactor.rightNow += slices * SLICE
            yield number

    def for_each(self, values: Iterable[int]) -> Deferred[None]:
        """Call `for_each` with the values."""
        return for_each(Clock(self.reactor), self.got.append, values)

    def pause(self, seconds: float) -> None:
        """Check that no value is handled before a time, and let a little more than that
        time pass."""
        got = len(self.got)
        self.reactor.advance(0.99 * seconds)
        self.assertEqual(len(self.got), got)
        self.reactor.advance(0.02 * seconds)

    def test_a_pause_follows_each_slice(self) -> None:
        """After each slice of work, `for_each` pauses for the time of the work plus
        `PAUSE_FACTOR` times the excess over a slice."""
        done = self.for_each(self.values())
        for taken in (2, 4, 6, 8, 10):
            self.assertNoResult(done)
            self.assertEqual(self.got[-1], taken)
            self.pause((1.04 + 0.04 * PAUSE_FACTOR) * SLICE)
        self.successResultOf(done)
        self.assertEqual(self.got, list(range(1, 11)))

    def test_short_work_has_no_pause(self) -> None:
        """Work that takes less than a slice, like an ordinary upload, is done without a
        pause."""
        self.successResultOf(self.for_each(self.values(0.09)))

    def test_a_pause_grows_with_the_excess_of_a_step(self) -> None:
        """A step longer than a slice is followed by a pause of `PAUSE_FACTOR` times the
        excess, even if no other step follows."""

        def values() -> Iterator[int]:
            self.reactor.rightNow += 1.5 * SLICE
            yield 1

        done = self.for_each(values())
        self.reactor.advance(PAUSE_FACTOR * 0.5 * SLICE)
        self.assertNoResult(done)
        self.reactor.advance(2 * SLICE)
        self.successResultOf(done)

    def test_a_pause_is_bounded(self) -> None:
        """A pause is at most `MAX_PAUSE`, less than the timeout of clients, however
        slow the machine is."""

        def values() -> Iterator[int]:
            self.reactor.rightNow += 1
            yield 1

        done = self.for_each(values())
        self.reactor.advance(MAX_PAUSE - 0.1)
        self.assertNoResult(done)
        self.reactor.advance(0.2)
        self.successResultOf(done)

    def test_garbage_collection_is_disabled_during_a_step(self) -> None:
        """Garbage collection is disabled during a step, because its time would lengthen
        the pause, and restored afterwards."""
        found: list[bool] = []

        def values() -> Iterator[int]:
            found.append(gc.isenabled())
            yield 1

        for enabled in (True, False):
            (gc.enable if enabled else gc.disable)()
            self.addCleanup(gc.enable)
            self.successResultOf(self.for_each(values()))
            self.assertEqual(gc.isenabled(), enabled)
        self.assertEqual(found, [False, False])

    def test_time_of_other_threads_causes_no_pause(self) -> None:
        """A step that waited without using the CPU is followed by no pause."""
        self.patch(time, "thread_time", lambda: 0.0)
        done = self.for_each(self.values(100))
        for _ in range(10):
            self.reactor.advance(0)
        self.successResultOf(done)

    def test_an_error_of_the_iterator_is_raised(self) -> None:
        """An exception of the iterator fires the errback of `for_each`."""

        def values() -> Iterator[int]:
            yield from self.values()
            raise KeyError

        done = self.for_each(values())
        for _ in range(5):
            self.reactor.advance(20 * SLICE)
        self.failureResultOf(done, KeyError)

    def test_a_pause_precedes_the_error_of_a_long_step(self) -> None:
        """An exception after a long step is reported after the pause, so that the
        sender of a refused body waits as well."""

        def values() -> Iterator[int]:
            self.reactor.rightNow += 1.5 * SLICE
            yield from ()
            raise KeyError

        done = self.for_each(values())
        self.reactor.advance(PAUSE_FACTOR * 0.5 * SLICE)
        self.assertNoResult(done)
        self.reactor.advance(2 * SLICE)
        self.failureResultOf(done, KeyError)

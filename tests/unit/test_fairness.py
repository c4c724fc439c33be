"""One user's requests wait for each other, and hardly for anybody else's."""

import gc
import time
from collections.abc import Callable, Iterable, Iterator

from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys.clock import MAX_PAUSE, PRICE, SLICE, Clock
from synapse_roomkeys.errors import LimitExceededError, OutageError, UnavailableError
from synapse_roomkeys.fairness import FairSemaphore, Lane, UserQueues

from ..memory import FakeReactor


class FairSemaphoreTests(SynchronousTestCase):
    """`FairSemaphore` with three permits, two for each user."""

    def setUp(self) -> None:
        self.reactor = FakeReactor()
        clock = Clock(self.reactor)
        self.semaphore = FairSemaphore(clock, 3, 2, max_waiting=2)
        self.served: list[str] = []

    def acquire(self, name: str) -> None:
        """Ask for a permit; the user is the name's first letter."""
        taken = self.semaphore.acquire(name[0])
        taken.addCallback(lambda _: self.served.append(name))

    def release(self, user: str) -> None:
        """Give a permit back, and let the reactor run."""
        self.semaphore.release(user)
        self.reactor.advance(0)

    def test_one_user_never_holds_all_permits(self) -> None:
        """The user's next request waits, though another user's is served at once."""
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
        """A permit goes to the user who was served least recently, however many of
        another user's requests came before."""
        for name in ("x", "x", "y", "a1", "a2", "b1"):
            self.acquire(name)
        for user in ("x", "y", "x"):
            self.release(user)
        self.assertEqual(self.served[3:], ["a1", "b1", "a2"])

    def test_there_are_no_more_permits_than_were_given_back(self) -> None:
        """A user whose turn it is may hold no more, so the next user is served."""
        for name in ("a1", "a2", "b1", "a3", "c1"):
            self.acquire(name)
        self.release("b")
        self.assertEqual(self.served, ["a1", "a2", "b1", "c1"])

    def test_a_queue_has_an_end(self) -> None:
        """A user's request above `max_waiting` is refused, another user's is not."""
        for name in ("a1", "a2", "b1", "a3", "a4"):
            self.acquire(name)
        self.assertRaises(LimitExceededError, self.semaphore.acquire, "a")
        self.acquire("b2")
        self.release("b")
        self.assertEqual(self.served[3:], ["b2"])


class UserQueuesTests(SynchronousTestCase):
    """`UserQueues` with calls that end when the test says so."""

    def setUp(self) -> None:
        self.reactor = FakeReactor()
        self.queues = UserQueues(Clock(self.reactor), max_waiting=2)
        self.begun: list[str] = []
        self.ends: dict[str, Deferred[str]] = {}

    def call(self, name: str) -> Callable[[], Deferred[str]]:
        """A call that notes that it has begun, and ends with its own name."""

        def begin() -> Deferred[str]:
            self.begun.append(name)
            self.ends[name] = Deferred()
            return self.ends[name]

        return begin

    def run_call(self, user: str, name: str) -> Deferred[str]:
        """Have a call made in a user's turn."""
        return self.queues.run(user, self.call(name))

    def test_calls_begin_in_order_as_others_end(self) -> None:
        """One runs at a time; the next begins when it has ended."""
        done = [self.run_call("a", name) for name in "123"]
        for count, name in enumerate("123", 1):
            self.assertEqual(self.begun, list("123"[:count]))
            self.ends[name].callback(name)
            self.reactor.advance(0)
        self.assertEqual([self.successResultOf(d) for d in done], list("123"))

    def test_users_do_not_wait_for_each_other(self) -> None:
        """Another user's calls begin at once."""
        for name in "123":
            self.run_call("a", name)
        self.run_call("b", "other")
        self.assertEqual(self.begun, ["1", "other"])

    def test_a_failing_call_gives_its_turn_on(self) -> None:
        """The error reaches its own caller, and the next call begins."""
        done = [self.run_call("a", name) for name in "12"]
        self.ends["1"].errback(ZeroDivisionError())
        self.reactor.advance(0)
        self.failureResultOf(done[0], ZeroDivisionError)
        self.assertEqual(self.begun, ["1", "2"])

    def test_an_outage_is_found_once(self) -> None:
        """Those who have waited all the while are told too; others have a try."""
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

    def test_what_is_no_outage_is_tried_by_each(self) -> None:
        """One that failed by itself, as at a time limit, is nothing to the others."""
        done = [self.run_call("a", name) for name in "123"]
        self.ends["1"].callback("1")
        self.reactor.advance(0)
        self.ends["2"].errback(UnavailableError(7))
        self.reactor.advance(0)
        self.failureResultOf(done[1], UnavailableError)
        self.ends["3"].callback("3")
        self.assertEqual(self.successResultOf(done[2]), "3")

    def test_a_long_queue_is_refused(self) -> None:
        """A call too many fails, and those before it are not harmed."""
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

    def test_nothing_is_kept_of_users_who_are_done(self) -> None:
        """Memory doesn't grow with the number of users."""
        done = [self.run_call("a", name) for name in "123"]
        for name in "123":
            self.ends[name].callback(name)
            self.reactor.advance(0)
        self.assertEqual([self.successResultOf(d) for d in done], list("123"))
        self.assertEqual(self.queues._queues, {})


class LaneTests(SynchronousTestCase):
    """`Lane` with two places."""

    def setUp(self) -> None:
        self.reactor = FakeReactor()
        self.lane = Lane(Clock(self.reactor), width=2)

    def wait(self, seconds: float) -> Deferred[None]:
        """Wait for a place, none of which is free."""
        turn = self.lane.enter(seconds)
        assert turn is not None
        return turn

    def test_places_are_given_in_order(self) -> None:
        """A place that is given back goes to the transaction that waited longest."""
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

    def test_no_wait_is_longer_than_asked_for(self) -> None:
        """A transaction without a place in time is a 503; its place isn't lost."""
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
    """`Clock.for_each`, where two values take more than a slice."""

    def setUp(self) -> None:
        self.reactor = FakeReactor()
        self.patch(time, "thread_time", self.reactor.seconds)
        self.got: list[int] = []

    def values(self, slices: float = 0.52) -> Iterator[int]:
        """Ten values, each of which takes so many slices."""
        for number in range(1, 11):
            self.reactor.rightNow += slices * SLICE
            yield number

    def for_each(self, values: Iterable[int]) -> Deferred[None]:
        """Take the values."""
        return Clock(self.reactor).for_each(self.got.append, values)

    def pause(self, seconds: float) -> None:
        """Nothing is done for so long, and then it is."""
        got = len(self.got)
        self.reactor.advance(0.99 * seconds)
        self.assertEqual(len(self.got), got)
        self.reactor.advance(0.02 * seconds)

    def test_others_have_their_turn(self) -> None:
        """A few values are taken at one go, and then others have as long."""
        done = self.for_each(self.values())
        for taken in (2, 4, 6, 8, 10):
            self.assertNoResult(done)
            self.assertEqual(self.got[-1], taken)
            self.pause((1.04 + 0.04 * PRICE) * SLICE)
        self.successResultOf(done)
        self.assertEqual(self.got, list(range(1, 11)))

    def test_what_is_short_is_done_at_once(self) -> None:
        """Ordinary uploads wait for nothing."""
        self.successResultOf(self.for_each(self.values(0.09)))

    def test_a_long_step_is_paid_for(self) -> None:
        """Others have many times as long, also where it is the only one."""

        def values() -> Iterator[int]:
            self.reactor.rightNow += 1.5 * SLICE
            yield 1

        done = self.for_each(values())
        self.reactor.advance(PRICE * 0.5 * SLICE)
        self.assertNoResult(done)
        self.reactor.advance(2 * SLICE)
        self.successResultOf(done)

    def test_no_pause_is_endless(self) -> None:
        """Nobody waits for longer than clients do, however slow the machine."""

        def values() -> Iterator[int]:
            self.reactor.rightNow += 1
            yield 1

        done = self.for_each(values())
        self.reactor.advance(MAX_PAUSE - 0.1)
        self.assertNoResult(done)
        self.reactor.advance(0.2)
        self.successResultOf(done)

    def test_no_garbage_is_collected_meanwhile(self) -> None:
        """That would be paid for; afterwards it is as it was."""
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

    def test_waiting_for_another_thread_is_not_paid_for(self) -> None:
        """A step that didn't use the processor is no reason to wait."""
        self.patch(time, "thread_time", lambda: 0.0)
        done = self.for_each(self.values(100))
        for _ in range(10):
            self.reactor.advance(0)
        self.successResultOf(done)

    def test_an_error_ends_it(self) -> None:
        """What the iterator raises comes out."""

        def values() -> Iterator[int]:
            yield from self.values()
            raise KeyError

        done = self.for_each(values())
        for _ in range(5):
            self.reactor.advance(20 * SLICE)
        self.failureResultOf(done, KeyError)

    def test_a_long_error_is_paid_for(self) -> None:
        """A body that is refused after a long look costs its sender as much."""

        def values() -> Iterator[int]:
            self.reactor.rightNow += 1.5 * SLICE
            yield from ()
            raise KeyError

        done = self.for_each(values())
        self.reactor.advance(PRICE * 0.5 * SLICE)
        self.assertNoResult(done)
        self.reactor.advance(2 * SLICE)
        self.failureResultOf(done, KeyError)

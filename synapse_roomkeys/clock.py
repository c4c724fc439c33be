"""Waiting, in a way that suits the host."""

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from twisted.internet.defer import Deferred, inlineCallbacks

from .inline import Inline

T = TypeVar("T")

#: For how long the reactor is kept at one go by what may be interrupted, in seconds.
SLICE = 0.005
#: A step may take longer. What it takes of the processor above that is paid for by a
#: pause so many times as long: so one user keeps others waiting for longer less than
#: one time in a hundred, however often it is asked for.
PRICE = 200
#: No pause is longer, in seconds.
MAX_PAUSE = 10.0


class DelayedCall(Protocol):
    """A call that the reactor makes later: Twisted's ``IDelayedCall``."""

    def cancel(self) -> None:
        """Have it not made."""


class Reactor(Protocol):
    """A reactor: Twisted's ``IReactorTime``, and what threads call of it."""

    def callLater(
        self, delay: float, callable: Callable[..., object], *args: object
    ) -> DelayedCall:
        """Call something after a number of seconds."""

    def seconds(self) -> float:
        """The system's time, in seconds."""

    def callFromThread(self, callable: Callable[..., object], *args: object) -> None:
        """Call something in the reactor's thread, soon."""


def as_it_is(deferred: "Deferred[T]") -> "Deferred[T]":
    """The ``yieldable`` of a host that follows no log contexts."""
    return deferred


def at_once(call: "Callable[..., Deferred[T]]", *args: Any) -> "Deferred[T]":
    """The ``background`` of a host that follows no log contexts."""
    return call(*args)


class Clock:
    """The host's time, and the one way to wait for a Deferred of our own.

    Synapse keeps a log context for each request. A coroutine that waits must leave
    none behind and find its own again, and whoever ends its wait must not be left
    with it. So every Deferred that the plugin makes itself is waited for through
    `wait`, and fired from the reactor, never from another request's code.
    """

    def __init__(
        self,
        reactor: Reactor,
        yieldable: "Callable[[Deferred[Any]], Deferred[Any]]" = as_it_is,
        background: "Callable[..., Deferred[Any]]" = at_once,
    ) -> None:
        """
        Args:
            yieldable: what the host does to a Deferred before it is waited for:
                Synapse's ``make_deferred_yieldable``.
            background: how the host makes a call that isn't waited for at once:
                Synapse's ``run_in_background``.
        """
        self._reactor = reactor
        self._yieldable = yieldable
        self._background = background

    def wait(self, deferred: "Deferred[T]") -> "Deferred[T]":
        """A Deferred that fires as the given one does, in the waiter's context."""
        return self._yieldable(deferred)

    def begin(self, call: "Callable[..., Deferred[T]]", *args: Any) -> "Deferred[T]":
        """Make a call whose Deferred is waited for later, through `wait`."""
        return self._background(call, *args)

    def seconds(self) -> float:
        """The reactor's time in seconds, by which `call_later` goes."""
        return self._reactor.seconds()

    def call_later(self, seconds: float, call: Callable[[], object]) -> DelayedCall:
        """Have the reactor call something, outside of any request's context."""
        return self._reactor.callLater(seconds, call)

    def from_thread(self, call: Callable[[T], object], value: T) -> None:
        """Have the reactor call something, from any thread, as `call_later` does."""
        self._reactor.callFromThread(call, value)

    def fire(self, deferred: "Deferred[None]") -> None:
        """Fire a Deferred that somebody else waits for, in the reactor's next turn."""
        self._reactor.callLater(0, deferred.callback, None)

    def sleep(self, seconds: float) -> "Deferred[None]":
        """A Deferred that fires with None after a time."""
        slept: Deferred[None] = Deferred()
        self._reactor.callLater(seconds, slept.callback, None)
        return self.wait(slept)

    @inlineCallbacks
    def for_each(
        self, call: Callable[[T], object], values: "Iterable[T]"
    ) -> Inline[None]:
        """Call something with each value; others have their turn while it takes long.

        They have the reactor for as long afterwards, and for longer after a step that
        can't be interrupted.

        Raises:
            Exception: what the call or the iterator raises.
        """
        steps = map(call, values)
        goes_on = True
        while goes_on:
            before = time.thread_time()
            end = self._reactor.seconds() + SLICE
            try:
                with _uncollected():
                    goes_on = any(self._reactor.seconds() > end for _ in steps)
            finally:
                if self._reactor.seconds() > end:
                    yield self.sleep(_pause(time.thread_time() - before))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Put the garbage collector off: its work isn't to be paid for by whoever is being
    served when it comes."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _pause(taken: float) -> float:
    """For how long others have the reactor, after so much processor time: seconds."""
    return min(taken + PRICE * max(0, taken - SLICE), MAX_PAUSE)

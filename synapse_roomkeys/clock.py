"""Time, timers and waiting for Deferreds, in a form that works in either host."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from twisted.internet.defer import Deferred

T = TypeVar("T")


class DelayedCall(Protocol):
    """A call scheduled with the reactor: Twisted's ``IDelayedCall``."""

    def cancel(self) -> None:
        """Cancel the call before the reactor makes it."""


class Reactor(Protocol):
    """A reactor: Twisted's ``IReactorTime``, and ``callFromThread``."""

    def callLater(
        self, delay: float, callable: Callable[..., object], *args: object
    ) -> DelayedCall:
        """Call a function after `delay` seconds."""

    def seconds(self) -> float:
        """The system's time, in seconds."""

    def callFromThread(self, callable: Callable[..., object], *args: object) -> None:
        """Schedule a call in the reactor's thread, as soon as possible. Any thread may
        call this method."""


def identity(deferred: "Deferred[T]") -> "Deferred[T]":
    """Return the Deferred unchanged: the ``yieldable`` of a host without log
    contexts."""
    return deferred


def at_once(call: "Callable[..., Deferred[T]]", *args: Any) -> "Deferred[T]":
    """Make the call immediately and return the call's Deferred: the ``background`` of a
    host without log contexts."""
    return call(*args)


class Clock:
    """The host's time, and the only way to wait for a Deferred made by this package.

    Synapse keeps a log context for each request. A coroutine that waits must clear
    the current context and restore its own context afterwards. Code that fires the
    Deferred must not continue in the waiting coroutine's context. Therefore each
    Deferred made by this package is waited for through `wait`, and fired from the
    reactor, never from another request's code.
    """

    def __init__(
        self,
        reactor: Reactor,
        yieldable: "Callable[[Deferred[Any]], Deferred[Any]]" = identity,
        background: "Callable[..., Deferred[Any]]" = at_once,
    ) -> None:
        """
        Args:
            yieldable: wraps a Deferred before a coroutine waits for the Deferred; in
                Synapse ``make_deferred_yieldable``.
            background: makes a call whose Deferred is not waited for immediately; in
                Synapse ``run_in_background``.
        """
        self._reactor = reactor
        self._yieldable = yieldable
        self._background = background

    def wait(self, deferred: "Deferred[T]") -> "Deferred[T]":
        """Return a Deferred that fires with the same result as the given Deferred, in
        the log context of the waiting coroutine."""
        return self._yieldable(deferred)

    def begin(self, call: "Callable[..., Deferred[T]]", *args: Any) -> "Deferred[T]":
        """Make a call, and return a Deferred for its result. The caller waits for the
        Deferred later, through `wait`."""
        return self._background(call, *args)

    def seconds(self) -> float:
        """The reactor's time in seconds, as used by `call_later`."""
        return self._reactor.seconds()

    def call_later(self, seconds: float, call: Callable[[], object]) -> DelayedCall:
        """Schedule a call after `seconds`, outside any request's log context."""
        return self._reactor.callLater(seconds, call)

    def from_thread(self, call: Callable[[T], object], value: T) -> None:
        """Schedule ``call(value)`` in the reactor's thread, outside any request's log
        context. Any thread may call this method."""
        self._reactor.callFromThread(call, value)

    def fire(self, deferred: "Deferred[None]") -> None:
        """Fire a Deferred with None in the reactor's next iteration, for another
        coroutine that waits for the Deferred."""
        self._reactor.callLater(0, deferred.callback, None)

    def sleep(self, seconds: float) -> "Deferred[None]":
        """Return a Deferred that fires with None after `seconds`."""
        slept: Deferred[None] = Deferred()
        self._reactor.callLater(seconds, slept.callback, None)
        return self.wait(slept)

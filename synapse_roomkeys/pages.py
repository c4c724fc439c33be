"""Downloads, a few keys at a time."""

from collections import deque
from collections.abc import Callable, Generator
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.python.failure import Failure

from .clock import Clock
from .types import KeyPage, Position


class KeyPages:
    """The keys of a download, a page at a time, so that few are in memory at once.

    While its reader waits for a page, the next one is fetched as well; while it
    doesn't, no more than one page waits for it.

    Attributes:
        page: the keys at hand, none at first.
    """

    def __init__(
        self,
        fetch: "Callable[[Position | None, Callable[[KeyPage], bool]], Deferred[None]]",
        clock: Clock,
    ) -> None:
        """
        Args:
            fetch: gives the pages after a key, or the first ones, to a function that
                is called in a thread and says whether to go on.
        """
        self._fetch = fetch
        self._clock = clock
        self._arrived: deque[KeyPage] = deque()
        self._waiter: Deferred[None] | None = None
        self._failure: Failure | None = None
        self._is_fetching = False
        self._advanced = 0
        #: Set in the reactor's thread and read in another.
        self._wanted = 0
        #: The other way around. Only one thread fetches at a time.
        self._fetched = 0
        self._after: Position | None = None
        self.page = KeyPage((), None)

    @property
    def is_last(self) -> bool:
        """Whether there are no more keys after those at hand."""
        return self.page.last is None

    @inlineCallbacks
    def advance(self) -> "Generator[Deferred[Any], Any, None]":
        """Take the next page, once it is fetched.

        Raises:
            NotFoundError: the version is not there, or no longer.
        """
        self._wanted = self._advanced + 2
        while not self._arrived:
            if self._failure is not None:
                self._failure.raiseException()
            if self._is_fetching:
                yield self._wait()
            else:
                self._begin()
        self.page = self._arrived.popleft()
        self._advanced += 1
        self._wanted = self._advanced + (not self.is_last)
        may_begin = not self._is_fetching and self._failure is None
        if may_begin and self._fetched < self._wanted:
            self._begin()

    @inlineCallbacks
    def close(self) -> "Generator[Deferred[Any], Any, None]":
        """Have no more pages fetched, and fire when nothing is under way any more."""
        self._wanted = 0
        while self._is_fetching:
            yield self._wait()

    def _begin(self) -> None:
        """Have pages fetched."""
        self._is_fetching = True
        ended = self._clock.begin(self._fetch, self._after, self._take)
        ended.addBoth(self._end)

    def _take(self, page: KeyPage) -> bool:
        """Pass a page on, in a thread, and say whether another is wanted."""
        self._fetched += 1
        self._after = page.last
        self._clock.from_thread(self._arrive, page)
        return page.last is not None and self._fetched < self._wanted

    def _arrive(self, page: KeyPage) -> None:
        self._arrived.append(page)
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter.callback(None)

    def _end(self, result: Failure | None) -> None:
        self._is_fetching = False
        self._failure = result
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            self._clock.fire(waiter)

    def _wait(self) -> "Deferred[None]":
        """Fires with None when a page has come, or when no more will."""
        self._waiter = Deferred()
        return self._clock.wait(self._waiter)

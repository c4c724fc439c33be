"""Downloads, read from the database in pages of keys."""

from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from itertools import accumulate, compress

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.python.failure import Failure

from .clock import Clock
from .encoding import session_id_of
from .fairness import FairSemaphore
from .inline import Inline
from .json_text import are_valid_json, is_valid_json
from .types import KeyPage, Position

#: Seconds after which a download passes its permit to a waiting download, like the time
#: slice of a process. Each time, the download drops a prefetched page. With a slice of
#: a second, such losses are rare.
TIME_SLICE = 1.0
#: Seconds for which a download keeps its pages while the client doesn't read. A client
#: that reads 128 KiB a second never pauses for longer; therefore no page of such a
#: client is read from the database twice.
HOLD_SECONDS = 1.0
#: As `HOLD_SECONDS`, while other downloads wait for a permit. A client that reads as
#: fast as the database delivers pauses for a few milliseconds only.
CONTENDED_HOLD_SECONDS = 0.05
#: Number of prefetched pages while a page is written. With a single page, the database
#: thread overtook the writer after four pages and ended the transaction. With two
#: pages, the transaction lasts for nine pages if the client reads as fast as the
#: database delivers.
PREFETCHED_PAGES = 2
#: Number of keys in the first page after `KeyPages.release`: 0.1 MB of real keys. The
#: page is small because a client that was slow may be slow again.
_KEYS_AFTER_RELEASE = 100


class KeyPages:
    """The keys of a download, read from the database a page at a time.

    At most three pages are in memory: the current page and two prefetched pages. A
    download holds a permit while pages are in memory; the number of permits therefore
    limits the memory of all downloads together. `release` drops the pages and the
    permit. Afterwards the download continues after the last key that was taken.
    """

    def __init__(
        self,
        fetch: "Callable[[Position | None, Callable[[KeyPage], bool]], Deferred[None]]",
        permits: FairSemaphore,
        user_id: str,
        clock: Clock,
        on_broken: Callable[[str, str], object],
    ) -> None:
        """
        Args:
            fetch: reads the pages after a position (None: from the first key) and
                passes each page to a callback. The callback is called in a database
                thread and returns whether to fetch another page.
            permits: permits for all downloads of the process.
            user_id: the user whose permits are used.
            on_broken: called with the room and session id of each key that is left out
                because the key's data isn't JSON.
        """
        self._fetch = fetch
        self._on_broken = on_broken
        self._permits = permits
        self._user_id = user_id
        self._clock = clock
        self._has_permit = False
        #: Reactor time after which the permit is passed to a waiting download, in
        #: seconds.
        self._slice_ends = 0.0
        self._page = KeyPage((), (), None)
        #: For each key of the page, the total size of the keys up to and including the
        #: key, in bytes.
        self._ends: list[int] = []
        #: Number of keys of the page that were taken.
        self._taken = 0
        #: Position before the page's first key, or None at the beginning.
        self._before: Position | None = None
        self._arrived: deque[KeyPage] = deque()
        self._waiter: Deferred[None] | None = None
        self._failure: Failure | None = None
        self._is_fetching = False
        #: Whether the next page is the first one after a release.
        self._is_resuming = False
        #: Whether the running fetch began before a release. Pages of such a fetch are
        #: dropped.
        self._is_stale = False
        self._advanced = 0
        #: Number of pages to fetch. Written by the reactor thread, read by the database
        #: thread.
        self._wanted = 0
        #: Number of pages fetched. Written by the database thread during a fetch, by
        #: the reactor thread between two.
        self._fetched = 0

    @property
    def has_keys(self) -> bool:
        """Whether keys are left to `take`."""
        return self._taken < len(self._page.rows)

    @property
    def is_complete(self) -> bool:
        """Whether all keys were taken. Valid only after the first `advance`."""
        return not self.has_keys and self._page.last is None

    @inlineCallbacks
    def advance(self) -> Inline[None]:
        """Fire with None when keys are available to `take`. Without any keys in the
        backup, fire with None when the final, empty page is the current page.

        Wait for a permit and for the database, unless keys of the current page are
        left.

        Raises:
            LimitExceededError: too many downloads of the user wait for a permit.
            NotFoundError: the version doesn't exist, or was deleted meanwhile.
        """
        if self.has_keys:
            return
        if self._permits.is_contended and self._clock.seconds() >= self._slice_ends:
            self.release()
        while self._is_stale:
            yield self._wait()
        if not self._has_permit:
            yield self._permits.acquire(self._user_id)
            self._has_permit = True
            self._slice_ends = self._clock.seconds() + TIME_SLICE
        # A client that was slow may be slow again: fetch a small page without prefetch.
        prefetched = 0 if self._is_resuming else PREFETCHED_PAGES
        self._is_resuming = False
        self._wanted = self._advanced + 1 + prefetched
        while not self._arrived:
            failure = self._failure
            if failure is not None:
                self.release()
                failure.raiseException()
            if self._is_fetching:
                yield self._wait()
            else:
                self._begin()
        self._show(self._arrived.popleft())
        if self._page.last is None:
            prefetched = 0
        self._wanted = self._advanced + prefetched
        may_begin = not self._is_fetching and self._failure is None
        if may_begin and prefetched and not self._arrived:
            self._begin()

    def take(self, size: int) -> KeyPage:
        """Take the next keys of the page, in order. Keys whose data isn't JSON are left
        out and reported to `on_broken`.

        Args:
            size: maximum memory of the keys together, in bytes. A single larger key is
                taken nevertheless.

        Returns:
            At least one key, unless the data of all keys isn't JSON. `last` is None if
            no keys follow.
        """
        first = self._taken
        before = self._ends[first - 1] if first else 0
        end = bisect_right(self._ends, before + size, first)
        if end == first and self.has_keys:
            end += 1
        self._taken = end
        rows, sizes = self._page.rows[first:end], self._page.sizes[first:end]
        if are_valid_json([data for _, _, data in rows]):
            return KeyPage(rows, sizes, self._reached())
        are_whole = [is_valid_json(data) for _, _, data in rows]
        for (room_id, head, _), is_whole in zip(rows, are_whole, strict=True):
            if not is_whole:
                self._on_broken(room_id, session_id_of(head))
        whole_rows = list(compress(rows, are_whole))
        return KeyPage(whole_rows, list(compress(sizes, are_whole)), self._reached())

    def idle(self, seconds: float) -> None:
        """Release if the client has paused reading for too long.

        Args:
            seconds: length of the client's pause so far. If other downloads wait for a
                permit, release after `CONTENDED_HOLD_SECONDS`; otherwise after
                `HOLD_SECONDS`.
        """
        is_contended = self._permits.is_contended
        if seconds >= (CONTENDED_HOLD_SECONDS if is_contended else HOLD_SECONDS):
            self.release()

    def release(self) -> None:
        """Drop the pages and return the permit, unless `advance` is running.

        The next `advance` takes a permit again and continues after the last key that
        was taken: no key is missing or repeated. A running fetch ends after the current
        page.
        """
        if not self._has_permit or self._waiter is not None:
            return
        # Empty page with the position at which the next fetch begins.
        self._page = KeyPage((), (), self._reached())
        self._ends, self._taken = [], 0
        self._arrived.clear()
        self._wanted = 0
        self._is_stale = self._is_fetching
        self._is_resuming = True
        self._failure = None
        self._has_permit = False
        self._permits.release(self._user_id)

    @inlineCallbacks
    def close(self) -> Inline[None]:
        """Release, and fire with None when no fetch is running any more."""
        self.release()
        while self._is_fetching:
            yield self._wait()

    def _show(self, page: KeyPage) -> None:
        """Make a page the current page, after all keys of the previous page were
        taken."""
        self._before = self._page.last
        self._page = page
        self._ends = list(accumulate(page.sizes))
        self._taken = 0
        self._advanced += 1

    def _reached(self) -> Position | None:
        """Position after the keys that were taken. None before the first key and after
        the last key of the download."""
        if self._taken == len(self._page.rows):
            return self._page.last
        if not self._taken:
            return self._before
        room_id, head, _ = self._page.rows[self._taken - 1]
        keys = min(len(self._page.rows), _KEYS_AFTER_RELEASE)
        return Position(room_id, session_id_of(head), keys)

    def _begin(self) -> None:
        """Start a fetch after the current page. Call only if no later page has
        arrived."""
        self._is_fetching = True
        self._fetched = self._advanced
        ended = self._clock.begin(self._fetch, self._page.last, self._pass_on)
        ended.addBoth(self._end)

    def _pass_on(self, page: KeyPage) -> bool:
        """Pass a page to the reactor thread, and return whether to fetch another page.
        Called in a database thread."""
        self._fetched += 1
        self._clock.from_thread(self._arrive, page)
        return page.last is not None and self._fetched < self._wanted

    def _arrive(self, page: KeyPage) -> None:
        if self._is_stale:
            return
        self._arrived.append(page)
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter.callback(None)

    def _end(self, result: Failure | None) -> None:
        self._is_fetching = False
        self._failure = None if self._is_stale else result
        self._is_stale = False
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            self._clock.fire(waiter)

    def _wait(self) -> "Deferred[None]":
        """Return a Deferred that fires with None when a page arrives or the fetch
        ends."""
        self._waiter = Deferred()
        return self._clock.wait(self._waiter)

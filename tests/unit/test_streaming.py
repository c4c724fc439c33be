"""Downloads: pages, back-pressure, and what happens when either end goes away."""

import gc
from collections.abc import Callable

from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys.clock import Clock
from synapse_roomkeys.fairness import FairSemaphore
from synapse_roomkeys.handler import DOWNLOADS_PER_USER
from synapse_roomkeys.pages import (
    CONTENDED_HOLD_SECONDS,
    HOLD_SECONDS,
    PREFETCHED_PAGES,
    TIME_SLICE,
    KeyPages,
)
from synapse_roomkeys.rest.streaming import WRITE_SIZE
from synapse_roomkeys.storage import FIRST_KEYS, PAGE_KEYS
from synapse_roomkeys.types import KeyPage, Position

from ..contract import Client
from ..contract.base import PREFIX, Rooms, key, version_path
from ..memory import FakeReactor, MemoryHost, SlowTransport, read_answer

#: Four pages of keys, in rooms that end in the midst of pages.
ROOMS: Rooms = {
    f"!room{number}": {f"s{i:04}": key(data=f"{number}.{i}") for i in range(size)}
    for number, size in enumerate((PAGE_KEYS - 3, 7, FIRST_KEYS + PAGE_KEYS, 1))
}
PAGES = 4


class DownloadTests(SynchronousTestCase):
    """``GET /keys`` of a backup of several pages."""

    def setUp(self) -> None:
        self.host = MemoryHost()
        self.client = Client(self.host, self.host.new_user())
        self.version = self.successResultOf(self.client.create_version())
        for room, keys in ROOMS.items():
            self.successResultOf(self.client.upload(self.version, {room: keys}))
        self.host.database.statements.clear()

    @property
    def fetched(self) -> int:
        """How many pages were read."""
        statements = self.host.database.statements
        return sum("ORDER BY room_id" in statement for statement in statements)

    def begin(
        self, method: str = "GET", path: str = "/keys", slow: bool = False
    ) -> SlowTransport:
        """Send the request; the connection, with what was answered so far."""
        return self.host.send(
            method,
            f"{PREFIX}{path}?version={self.version}",
            token=self.client.user.access_token,
            slow=slow,
        )

    def assertCut(self, transport: SlowTransport) -> None:
        """The connection was broken in the midst of the answer."""
        self.assertTrue(transport.disconnected)
        self.assertTrue(transport.value().startswith(b"HTTP/1.1 200"))
        self.assertFalse(transport.value().endswith(b"0\r\n\r\n"))
        self.assertEqual(self.host.reactor.getDelayedCalls(), [])

    def test_pages_make_one_object(self) -> None:
        """All keys come, each once, whatever page they were on."""
        answer = read_answer(self.begin().value(), "GET")
        rooms = answer.json["rooms"]
        self.assertEqual({room: rooms[room]["sessions"] for room in rooms}, ROOMS)
        self.assertEqual(self.fetched, PAGES)

    def test_a_room_that_ends_with_a_page(self) -> None:
        """A room's sessions come without its id, and an empty last page ends them."""
        answer = read_answer(self.begin(path="/keys/!room2").value(), "GET")
        self.assertEqual(answer.json, {"sessions": ROOMS["!room2"]})
        self.assertEqual(self.fetched, 3)

    def test_large_pages_are_written_in_parts(self) -> None:
        """A slow client's transport holds 127 KiB of keys at most, though a page has
        ten times that, and all keys come in the end."""
        sent = {f"s{i:04}": key(data="x" * 30_000) for i in range(30)}
        self.successResultOf(self.client.upload(self.version, {"!large": sent}))
        transport = self.begin(path="/keys/!large", slow=True)
        most = WRITE_SIZE + 1000
        written = 0
        while not transport.value().endswith(b"0\r\n\r\n"):
            self.assertLess(len(transport.value()) - written, most)
            written = len(transport.value())
            transport.take_more()
        answer = read_answer(transport.value(), "GET")
        self.assertEqual(answer.json, {"sessions": sent})

    def test_a_stalled_download_is_read_again(self) -> None:
        """A download that a client doesn't read for a while drops its pages and reads
        them again later, also within a page, and no key is missing or twice."""
        sent = {f"s{i:04}": key(data="x" * 30_000) for i in range(30)}
        self.successResultOf(self.client.upload(self.version, {"!large": sent}))
        transport = self.begin(slow=True)
        while not transport.value().endswith(b"0\r\n\r\n"):
            fetched = self.fetched
            self.host.reactor.pump([CONTENDED_HOLD_SECONDS] * 30)
            self.assertEqual(self.fetched, fetched)
            transport.take_more()
        rooms = read_answer(transport.value(), "GET").json["rooms"]
        sessions = {room: rooms[room]["sessions"] for room in rooms}
        self.assertEqual(sessions, {**ROOMS, "!large": sent})
        self.assertEqual(self.host.reactor.getDelayedCalls(), [])

    def test_stalled_downloads_hold_nothing_up(self) -> None:
        """However many downloads of a user nobody reads, the user's next one comes when
        they have been paused for a moment, and another user's comes at once."""
        stalled = [self.begin(slow=True) for _ in range(10 * DOWNLOADS_PER_USER)]
        other = Client(self.host, self.host.new_user())
        version = self.successResultOf(other.create_version())
        self.successResultOf(other.download(version))
        mine = self.begin()
        self.assertEqual(mine.value(), b"")
        self.host.reactor.pump([CONTENDED_HOLD_SECONDS] * 20)
        rooms = read_answer(mine.value(), "GET").json["rooms"]
        self.assertEqual(rooms.keys(), ROOMS.keys())
        for transport in stalled:
            transport.loseConnection()
        self.assertEqual(self.host.reactor.getDelayedCalls(), [])

    def test_head_reads_three_pages(self) -> None:
        """The rest of the keys, which nobody will see, are not fetched."""
        transport = self.begin("HEAD")
        self.assertEqual(read_answer(transport.value(), "HEAD").status, 200)
        self.assertTrue(transport.value().endswith(b"\r\n\r\n"))
        self.assertEqual(self.fetched, 1 + PREFETCHED_PAGES)

    def test_nothing_is_written_before_the_client_took_the_last_part(self) -> None:
        """A slow client has two pages waiting for it; the rest stays where it is."""
        transport = self.begin(slow=True)
        sizes = [len(transport.value())]
        while not transport.value().endswith(b"0\r\n\r\n"):
            transport.take_more()
            sizes.append(len(transport.value()))
            self.assertLessEqual(self.fetched, len(sizes) + 2)
        self.assertEqual(sizes, sorted(set(sizes)))
        self.assertGreaterEqual(len(sizes), PAGES)
        self.assertEqual(read_answer(transport.value(), "GET").status, 200)

    def test_the_answer_ends_when_the_last_page_is_taken(self) -> None:
        """A slow reader isn't taken for an idle connection while it has yet to read."""
        transport = self.begin(path="/keys/!room1", slow=True)
        self.assertIn(b'"s0006"', transport.value())
        self.assertFalse(transport.value().endswith(b"0\r\n\r\n"))
        transport.take_more()
        answer = read_answer(transport.value(), "GET")
        self.assertEqual(answer.json, {"sessions": ROOMS["!room1"]})

    def test_a_reader_that_stops_is_dropped(self) -> None:
        """After the set time, the connection of a client that reads nothing breaks."""
        transport = self.begin(slow=True)
        patience = self.host.hs.stalled_download_seconds
        self.host.reactor.advance(patience - 1)
        self.assertFalse(transport.disconnected)
        with self.assertLogs("synapse_roomkeys", "INFO") as logged:
            self.host.reactor.advance(1)
        self.assertIn("read nothing for 300 seconds", logged.output[0])
        self.assertCut(transport)

    def test_each_read_gives_a_reader_new_time(self) -> None:
        """A client that reads slowly, but reads, gets all of it."""
        transport = self.begin(slow=True)
        for _ in range(PAGES):
            self.host.reactor.advance(self.host.hs.stalled_download_seconds - 1)
            transport.take_more()
        self.assertEqual(read_answer(transport.value(), "GET").status, 200)
        self.assertEqual(self.host.reactor.getDelayedCalls(), [])

    def test_a_reader_that_leaves_ends_the_download(self) -> None:
        """Nothing more is fetched for a client that is gone, and nothing is left."""
        transport = self.begin(slow=True)
        fetched = self.fetched
        transport.loseConnection()
        self.host.reactor.advance(3600)
        self.assertEqual(self.fetched, fetched)
        self.assertEqual(self.host.reactor.getDelayedCalls(), [])

    def test_a_page_that_nobody_waits_for_is_no_error(self) -> None:
        """What goes wrong with a page for a client that left concerns nobody."""
        transport = self.begin(slow=True)
        database = self.host.database
        database.fault = ZeroDivisionError()
        for _ in range(1 + PREFETCHED_PAGES):
            transport.take_more()
        self.assertIsNone(database.fault)
        transport.loseConnection()
        gc.collect()
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_a_version_deleted_meanwhile_breaks_the_connection(self) -> None:
        """What can't be finished is never taken for a whole answer."""
        transport = self.begin(slow=True)
        path = version_path(self.version)
        self.assertEqual(self.successResultOf(self.client.delete(path)).status, 200)
        transport.slow = False
        with self.assertLogs("synapse_roomkeys", "WARNING"):
            transport.take_more()
        self.assertCut(transport)

    def test_a_fault_after_the_first_byte_breaks_the_connection(self) -> None:
        """A defect in the midst of a download is logged, and not hidden."""
        transport = self.begin(slow=True)
        self.host.database.fault = ZeroDivisionError()
        transport.slow = False
        with self.assertLogs("synapse_roomkeys", "ERROR"):
            transport.take_more()
        self.assertCut(transport)

    def test_a_fault_before_the_first_byte_is_an_error_answer(self) -> None:
        """As long as nothing was sent the client is told what is wrong."""
        self.host.database.fault = ZeroDivisionError()
        with self.assertLogs("synapse_roomkeys", "ERROR"):
            transport = self.begin()
        self.assertEqual(read_answer(transport.value(), "GET").status, 500)


class KeyPagesTests(SynchronousTestCase):
    """`KeyPages` with transactions that give pages, and end, when the test says so."""

    def setUp(self) -> None:
        self.reactor = FakeReactor()
        clock = Clock(self.reactor)
        self.permits = FairSemaphore(clock, 1, 1, max_waiting=9)
        self.broken: list[tuple[str, str]] = []
        self.pages = KeyPages(
            *(self.fetch, self.permits, "@user:h", clock),
            lambda *ids: self.broken.append(ids),
        )
        self.begun: list[Position | None] = []
        self.given = 0

    def fetch(
        self, after: Position | None, take: Callable[[KeyPage], bool]
    ) -> "Deferred[None]":
        """A transaction that begins."""
        self.begun.append(after)
        self.take = take
        self.end: Deferred[None] = Deferred()
        return self.end

    def give(self, *, last: bool = False) -> bool:
        """Have the transaction give a page; whether it is to go on."""
        self.given += 1
        position = None if last else Position("!room", f"{self.given}", 1)
        keys = [("!room", f'"{self.given}.{number}":', "0") for number in range(2)]
        return self.take(KeyPage(keys, [1, 1], position))

    def finish(self, result: Exception | None = None) -> None:
        """End the transaction."""
        if result is None:
            self.end.callback(None)
        else:
            self.end.errback(result)
        self.reactor.advance(0)

    def assertTaken(self, number: int) -> None:
        """The page at hand is the one that was given at this place; take it."""
        rows = self.pages.take(100).rows
        self.assertEqual([row[1] for row in rows], [f'"{number}.{i}":' for i in (0, 1)])

    def test_a_transaction_goes_on_while_its_reader_waits(self) -> None:
        """Who is back for the next page before it is there gets it out of the same."""
        for number in range(1, 6):
            waits = self.pages.advance()
            self.assertNoResult(waits)
            self.assertTrue(self.give())
            self.successResultOf(waits)
            self.assertTaken(number)
        self.assertEqual(self.begun, [None])

    def test_two_pages_wait_for_a_slow_reader(self) -> None:
        """The transaction ends then; another begins when no page waits any more."""
        waits = self.pages.advance()
        self.assertTrue(self.give())
        self.successResultOf(waits)
        self.assertTrue(self.give())
        self.assertFalse(self.give())
        self.finish()
        self.assertTaken(1)
        self.successResultOf(self.pages.advance())
        self.assertTaken(2)
        self.assertEqual(self.begun, [None])
        self.successResultOf(self.pages.advance())
        self.assertTaken(3)
        self.assertEqual(self.begun, [None, Position("!room", "3", 1)])

    def test_a_transaction_that_ends_too_early_is_followed_by_another(self) -> None:
        """Few pages come of each: its connection is left to others."""
        waits = self.pages.advance()
        self.give()
        self.successResultOf(waits)
        self.assertTaken(1)
        waits = self.pages.advance()
        self.finish()
        self.assertEqual(self.begun, [None, Position("!room", "1", 1)])
        self.give()
        self.successResultOf(waits)
        self.assertTaken(2)

    def test_nothing_is_begun_after_the_last_page(self) -> None:
        """The end is known when the last page comes."""
        waits = self.pages.advance()
        self.assertFalse(self.give(last=True))
        self.successResultOf(waits)
        self.finish()
        self.assertIsNone(self.pages.take(100).last)
        self.assertEqual(self.begun, [None])

    def test_what_goes_wrong_is_told_after_the_pages_before_it(self) -> None:
        """They are whole."""
        waits = self.pages.advance()
        self.give()
        self.give()
        self.finish(ZeroDivisionError())
        self.successResultOf(waits)
        self.assertTaken(1)
        self.successResultOf(self.pages.advance())
        self.assertTaken(2)
        self.failureResultOf(self.pages.advance(), ZeroDivisionError)
        self.assertEqual(self.begun, [None])

    def test_a_reader_that_waits_is_told_what_goes_wrong(self) -> None:
        """There is no page that it could wait for."""
        waits = self.pages.advance()
        self.finish(ZeroDivisionError())
        self.failureResultOf(waits, ZeroDivisionError)

    def test_closing_waits_for_the_end(self) -> None:
        """No more than the page that is being read comes, and nothing is logged of
        what goes wrong with it."""
        waits = self.pages.advance()
        self.give()
        self.successResultOf(waits)
        closed = self.pages.close()
        self.assertFalse(self.give())
        self.assertNoResult(closed)
        self.finish(ZeroDivisionError())
        self.successResultOf(closed)
        gc.collect()
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_keys_that_are_not_json_are_left_out(self) -> None:
        """They are reported by their ids, once, and the others are taken."""
        waits = self.pages.advance()
        texts = ("1", "{", '"a"', '1},"x":{')
        keys = [("!room", f'"{number}":', data) for number, data in enumerate(texts)]
        self.take(KeyPage(keys, [1] * 4, None))
        self.successResultOf(waits)
        self.assertEqual(self.pages.take(100).rows, [keys[0], keys[2]])
        self.assertEqual(self.broken, [("!room", "1"), ("!room", "3")])
        self.assertTrue(self.pages.is_complete)

    def test_a_released_download_goes_on_after_the_last_key(self) -> None:
        """The permit is there for others, the page under way is dropped, and the next
        fetch begins after the last key that was taken, with one page and no more."""
        waits = self.pages.advance()
        self.give()
        self.successResultOf(waits)
        self.assertEqual(len(self.pages.take(1).rows), 1)
        self.pages.release()
        other = self.permits.acquire("@other:h")
        self.successResultOf(other)
        self.assertFalse(self.give())
        waits = self.pages.advance()
        self.finish()
        self.assertEqual(self.begun, [None])
        self.permits.release("@other:h")
        self.reactor.advance(0)
        self.assertEqual(self.begun, [None, Position("!room", "1.0", 2)])
        self.assertFalse(self.give())
        self.successResultOf(waits)
        self.assertTaken(3)
        self.finish()
        self.assertEqual(len(self.begun), 2)

    def test_a_release_before_the_first_key_is_no_loss(self) -> None:
        """A page of which no key was taken is read again from its beginning."""
        waits = self.pages.advance()
        self.give()
        self.give()
        self.finish()
        self.successResultOf(waits)
        self.assertTaken(1)
        self.successResultOf(self.pages.advance())
        self.pages.release()
        self.finish()
        self.pages.advance()
        self.assertEqual(self.begun[-1], Position("!room", "1", 1))

    def test_pages_are_kept_for_a_short_pause(self) -> None:
        """A download is released after a second, or after 0.05 seconds if another one
        waits for a permit."""
        for contended, seconds in (
            (False, HOLD_SECONDS),
            (True, CONTENDED_HOLD_SECONDS),
        ):
            self.setUp()
            self.pages.advance()
            self.give()
            self.finish()
            others = [self.permits.acquire("@other:h") for _ in range(contended)]
            self.pages.idle(seconds - 0.01)
            self.assertEqual(self.permits.is_contended, contended)
            self.assertTaken(1)
            self.pages.idle(seconds)
            self.reactor.advance(0)
            for other in others or [self.permits.acquire("@other:h")]:
                self.successResultOf(other)

    def test_a_fast_download_lets_others_go_on(self) -> None:
        """A download that never pauses gives its permit to one that waits for it after
        a second, at the end of a page, and goes on when its turn comes again."""
        waits = self.pages.advance()
        self.give()
        self.give()
        self.finish()
        self.successResultOf(waits)
        other = self.permits.acquire("@other:h")
        self.assertTaken(1)
        self.successResultOf(self.pages.advance())
        self.finish()
        self.assertTaken(2)
        self.reactor.advance(TIME_SLICE)
        self.assertNoResult(other)
        waits = self.pages.advance()
        self.reactor.advance(0)
        self.successResultOf(other)
        self.permits.release("@other:h")
        self.reactor.advance(0)
        self.assertEqual(self.begun[-1], Position("!room", "2", 1))
        self.give(last=True)
        self.successResultOf(waits)

    def test_a_failure_gives_the_permit_back(self) -> None:
        """Nobody closes a download that couldn't begin."""
        waits = self.pages.advance()
        self.finish(ZeroDivisionError())
        self.failureResultOf(waits, ZeroDivisionError)
        self.successResultOf(self.permits.acquire("@other:h"))

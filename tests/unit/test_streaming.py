"""Downloads: pages, back-pressure, and what happens when either end goes away."""

import gc

from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys.storage import PAGE_KEYS

from ..contract import Client
from ..contract.base import PREFIX, Rooms, key, version_path
from ..memory import MemoryHost, SlowTransport, read_answer

#: Four pages of keys, in rooms that end in the midst of pages.
ROOMS: Rooms = {
    f"!room{number}": {f"s{i:04}": key(data=f"{number}.{i}") for i in range(size)}
    for number, size in enumerate((PAGE_KEYS - 3, 7, PAGE_KEYS * 2, 1))
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
        self.host.database.transactions = 0

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
        self.assertEqual(self.host.database.transactions, PAGES)

    def test_a_room_that_ends_with_a_page(self) -> None:
        """A room's sessions come without its id, and an empty last page ends them."""
        answer = read_answer(self.begin(path="/keys/!room2").value(), "GET")
        self.assertEqual(answer.json, {"sessions": ROOMS["!room2"]})
        self.assertEqual(self.host.database.transactions, 3)

    def test_head_reads_one_page(self) -> None:
        """Keys that nobody will see are not fetched."""
        transport = self.begin("HEAD")
        self.assertEqual(read_answer(transport.value(), "HEAD").status, 200)
        self.assertTrue(transport.value().endswith(b"\r\n\r\n"))
        self.assertEqual(self.host.database.transactions, 1)

    def test_no_page_is_written_before_the_one_before_it_was_taken(self) -> None:
        """A slow reader has two pages waiting for it; the rest stays where it is."""
        transport = self.begin(slow=True)
        sizes = [len(transport.value())]
        for _ in range(PAGES - 1):
            transport.take_more()
            sizes.append(len(transport.value()))
            self.assertLessEqual(self.host.database.transactions, len(sizes) + 2)
        self.assertEqual(sizes, sorted(set(sizes)))
        transport.take_more()
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
        fetched = self.host.database.transactions
        transport.loseConnection()
        self.host.reactor.advance(3600)
        self.assertEqual(self.host.database.transactions, fetched)
        self.assertEqual(self.host.reactor.getDelayedCalls(), [])

    def test_a_page_that_nobody_waits_for_is_no_error(self) -> None:
        """What goes wrong with a page for a client that left concerns nobody."""
        transport = self.begin(slow=True)
        self.host.database.fault = ZeroDivisionError()
        transport.take_more()
        self.assertIsNone(self.host.database.fault)
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

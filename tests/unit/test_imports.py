"""Versions that an operator inserts, on a database in memory."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys.errors import RoomKeysVersionError
from synapse_roomkeys.storage import SQLITE, Imports
from synapse_roomkeys.types import (
    Actor,
    BackupId,
    BackupInfo,
    KeyMetadata,
    RoomKey,
)

from ..contract import Client
from ..contract.base import key
from ..memory import MemoryHost

OPERATOR = Actor(None, "eve")


def info(version: int) -> BackupInfo:
    """Return a version to insert."""
    return BackupInfo(version, "algorithm", '{"a":1}', 7, 0)


class ImportTests(SynchronousTestCase):
    """The transactions of an import."""

    def setUp(self) -> None:
        self.host = MemoryHost()
        self.client = Client(self.host, self.host.new_user())
        self.user_id = self.client.user.user_id
        seconds = self.host.reactor.seconds
        self.imports = Imports(self.host.database, SQLITE, seconds)

    def insert(self, version: int) -> None:
        """Insert a version."""
        inserted = self.imports.insert_version(self.user_id, info(version), OPERATOR)
        self.successResultOf(inserted)

    def test_a_version_gets_its_number_and_etag(self) -> None:
        """The inserted version becomes current and begins with the given etag, and the
        next version gets the next number."""
        number = int(self.host.reactor.seconds()) + 1000
        self.insert(number)
        found = self.successResultOf(self.client.info())
        self.assertEqual(found["version"], str(number))
        self.assertEqual((found["etag"], found["count"]), ("7", 0))
        tally = self.client.upload(str(number), {"!r": {"s": key()}})
        self.assertEqual(self.successResultOf(tally), (8, 1))
        later = self.successResultOf(self.client.create_version())
        self.assertEqual(int(later), number + 1)

    def test_a_newer_version_keeps_an_older_one_out(self) -> None:
        """A version older than the current version isn't inserted, because only the
        current version takes keys."""
        current = self.successResultOf(self.client.create_version())
        inserted = self.imports.insert_version(self.user_id, info(5), OPERATOR)
        error = self.failureResultOf(inserted, RoomKeysVersionError).value
        self.assertEqual(error.current_version, current)

    def test_a_taken_number_is_left_alone(self) -> None:
        """A second insertion of the same number changes nothing."""
        self.insert(5)
        self.successResultOf(self.client.upload("5", {"!r": {"s": key()}}))
        self.insert(5)
        found = self.successResultOf(self.client.info())
        self.assertEqual((found["etag"], found["count"]), ("8", 1))

    def test_a_comparison_writes_nothing(self) -> None:
        """New, better and worse keys are counted in a superseded version."""
        self.insert(5)
        stored = {"!r": {"same": key(3), "worse": key(3), "broken": key(3)}}
        self.successResultOf(self.client.upload("5", stored))
        self.insert(6)
        with self.host.database.connection as connection:
            connection.execute(
                "UPDATE e2e_room_keys SET session_data = 'broken'"
                " WHERE session_id = 'broken'"
            )
        indexes = {"new": 3, "same": 3, "worse": 2, "broken": 9}
        keys = [
            RoomKey("!r", name, KeyMetadata(index, 0, False), "{}")
            for name, index in indexes.items()
        ]
        backup = BackupId(self.user_id, 5)
        plan = self.successResultOf(self.imports.compare_keys(backup, keys))
        self.assertEqual([k.session_id for k in plan.new], ["new"])
        replaced = [k.session_id for k in plan.replaced]
        self.assertEqual((replaced, plan.unchanged), (["worse", "broken"], 1))
        found = self.successResultOf(self.client.download("5"))
        self.assertEqual(found["!r"]["worse"], key(3))

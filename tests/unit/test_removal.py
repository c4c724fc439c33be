"""Tests of deletions by an operator while the state of a version changes."""

from __future__ import annotations

from twisted.internet.defer import Deferred, succeed
from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys.admin.backend import Backend
from synapse_roomkeys.admin.removal import Choice, find_deleted, superseded_before
from synapse_roomkeys.storage import SQLITE, Owner
from synapse_roomkeys.types import Actor

from ..contract import Client
from ..contract.base import Rooms, key, version_path
from ..contract.operators import new_backup
from ..memory import MemoryAdminHost

ROOMS: Rooms = {"!a:h": {"s": key()}}
#: A time after the end of each test, in milliseconds.
LATER = 2**52


class RemovalTests(SynchronousTestCase):
    """A user with a version, read by an operator."""

    def setUp(self) -> None:
        self.host = MemoryAdminHost()
        clients = self.host.clients
        self.client: Client
        self.client, self.version = self.successResultOf(new_backup(self.host, ROOMS))
        self.backend = Backend(
            clients.database, SQLITE, clients.store, clients.reactor.seconds
        )

    def read(self) -> Owner:
        """Return the user."""
        user_id = self.client.user.user_id
        return self.successResultOf(self.backend.overview.find_owner(user_id))

    def delete(self, owner: Owner, wanted: Choice) -> bool:
        """Delete the chosen version of a user as read before; return whether the
        version was deleted."""
        [version] = wanted(owner)

        def after_batch(deleted: int) -> Deferred[None]:
            return succeed(None)

        done = self.backend.removal.delete_version(
            version, wanted, Actor(None, "@admin:h"), after_batch
        )
        return self.successResultOf(done)

    def test_a_version_that_became_current_stays(self) -> None:
        """If the user deletes the newer version, the superseded version becomes
        current, and a purge of superseded versions leaves the version unchanged."""
        second = self.successResultOf(self.client.create_version())
        owner, wanted = self.read(), superseded_before(LATER)
        self.successResultOf(self.client.delete(version_path(second)))
        self.assertFalse(self.delete(owner, wanted))
        found = self.successResultOf(self.client.download(self.version))
        self.assertEqual(found, ROOMS)

    def test_a_version_that_was_given_back_stays(self) -> None:
        """If an operator gives a deleted version back, a purge of deleted versions
        leaves the version unchanged."""
        self.successResultOf(self.client.delete(version_path(self.version)))
        owner = self.read()
        user_id = self.client.user.user_id
        restore = self.host.clients.handler.restore_version
        self.successResultOf(restore(user_id, self.version, "@admin:h"))
        self.assertFalse(self.delete(owner, find_deleted))
        found = self.successResultOf(self.client.download(self.version))
        self.assertEqual(found, ROOMS)

    def test_a_user_who_was_erased_is_left_out(self) -> None:
        """The version of an erased user is left out without an error: the deletions of
        other users' versions continue."""
        self.successResultOf(self.client.create_version())
        owner, wanted = self.read(), superseded_before(LATER)
        begun = self.backend.removal.begin_erasure(owner.user_id)
        erase = self.backend.removal.erase(
            self.successResultOf(begun), lambda deleted: succeed(None)
        )
        self.successResultOf(erase)
        self.assertFalse(self.delete(owner, wanted))

    def test_a_version_that_is_still_chosen_goes(self) -> None:
        """The version and its keys are deleted."""
        self.successResultOf(self.client.create_version())
        self.assertTrue(self.delete(self.read(), superseded_before(LATER)))
        self.assertEqual([v.keys for v in self.read().versions], [0, 0])

"""Deletions by an operator: unused versions and whole users, in small transactions."""

from collections.abc import Callable, Iterable

from twisted.internet.defer import Deferred, inlineCallbacks

from ..inline import Inline
from ..storage import (
    EndToEndRoomKeyStore,
    Engine,
    Erasure,
    Overview,
    Owner,
    Place,
    Sweeps,
    VersionFacts,
)
from ..storage.overview import DELETED, ORPHANED, SUPERSEDED
from ..storage.transactions import Transactions
from ..types import Actor, BackupId, Retention

#: Chooses a user's versions to delete.
Choice = Callable[[Owner], Iterable[VersionFacts]]
#: Is called after each batch with the number of deleted keys. The next batch begins
#: when the Deferred has fired.
AfterBatch = Callable[[int], "Deferred[None]"]


class Removal:
    """The deletions. A repeated call continues an interrupted deletion.

    The Deferreds fail as the `Transactions` do, and with the errors of the function
    that is called after each batch.
    """

    def __init__(
        self,
        database: Transactions,
        engine: Engine,
        store: EndToEndRoomKeyStore,
        now: Callable[[], float],
    ) -> None:
        """
        Args:
            now: returns the Unix time in seconds.
        """
        self._store = store
        self._overview = Overview(database, engine)
        self._erasure = Erasure(database, engine)
        self._batch_size = engine.swept_at_once
        self._sweeps = Sweeps(database, engine, now, Retention(deleted_versions_days=0))

    @inlineCallbacks
    def delete_version(
        self,
        version: VersionFacts,
        wanted: Choice,
        actor: Actor,
        after_batch: AfterBatch,
        most: int | None = None,
    ) -> Inline[bool]:
        """Delete a chosen version with its keys. The version can't be given back any
        more. Fire with False, without a change, if the version isn't chosen any more:
        since the user was read, the version became current, or was given back.

        Args:
            wanted: the function that has chosen the version.
            most: as for `delete_keys`, if the version has no row.
        """
        owner: Owner = yield self._overview.find_owner(version.user_id)
        if version.version not in [found.version for found in wanted(owner)]:
            return False
        backup = BackupId(version.user_id, version.version)
        if version.state == ORPHANED:
            yield self.delete_keys(backup, after_batch, most)
            return True
        # A second deletion puts a deleted version into the sweeper's queue. After the
        # first batch of the sweep, the version can't be given back any more.
        yield self._store.delete_version(backup.user_id, backup.version, actor)
        place: Place | None = Place()
        while place is not None:
            place = yield self._sweeps.delete_batch(backup, place)
            yield after_batch(self._batch_size)
        return True

    @inlineCallbacks
    def delete_keys(
        self, backup: BackupId, after_batch: AfterBatch, most: int | None = None
    ) -> Inline[int]:
        """Delete the keys of a version that is deleted or has no row. Fire with the
        number of deleted keys.

        Args:
            most: maximum number of keys in a batch; None for `Engine.swept_at_once`.
        """
        place: Place | None = Place()
        deleted = 0
        while place is not None:
            batch = yield self._erasure.delete_batch(backup, place, most)
            place = batch.next
            deleted += batch.deleted
            yield after_batch(batch.deleted)
        return deleted

    @inlineCallbacks
    def begin_erasure(self, user_id: str) -> Inline[Owner]:
        """Mark all versions of a user as deleted: clients can't change the versions any
        more. Fire with the user and the versions."""
        yield self._erasure.mark_deleted(user_id)
        owner: Owner = yield self._overview.find_owner(user_id)
        return owner

    @inlineCallbacks
    def erase(
        self, owner: Owner, after_batch: AfterBatch, most: int | None = None
    ) -> Inline[dict[str, int]]:
        """Delete a user's rows in all tables, except the last version number. Fire with
        the numbers of deleted rows by table.

        Args:
            owner: the user, as returned by `begin_erasure`.
            most: as for `delete_keys`.
        """
        keys = 0
        for version in owner.versions:
            backup = BackupId(owner.user_id, version.version)
            keys += yield self.delete_keys(backup, after_batch, most)
        rows: dict[str, int] = yield self._erasure.delete_rows(owner.user_id)
        return {"e2e_room_keys": keys, **rows}


def find_orphans(owner: Owner) -> Iterable[VersionFacts]:
    """Return the versions with keys and without a row."""
    return [version for version in owner.versions if version.state == ORPHANED]


def find_deleted(owner: Owner) -> Iterable[VersionFacts]:
    """Return the deleted versions that still have keys, or can be given back."""
    return [
        version
        for version in owner.versions
        if version.state == DELETED and (version.keys or version.deleted_ms is not None)
    ]


def superseded_before(due_ms: int) -> Choice:
    """Return a function that returns a user's superseded versions without a change
    since a time.

    A version changes until the next one is created. The time of a version is unknown if
    Synapse's own endpoints made all of the user's versions; such a version is never
    returned.

    Args:
        due_ms: a Unix time in milliseconds.
    """

    def find(owner: Owner) -> Iterable[VersionFacts]:
        for version in owner.versions:
            later = [v for v in owner.versions if v.version > version.version]
            times = [version.uploaded_ms, *(v.created_ms for v in later[:1])]
            known = [ms for ms in times if ms is not None]
            if version.state == SUPERSEDED and known and max(known) < due_ms:
                yield version

    return find

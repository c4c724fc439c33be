"""The operations of the key backup API, independent of HTTP and SQL."""

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

from twisted.internet.defer import Deferred, inlineCallbacks

from . import metrics
from .clock import Clock
from .errors import (
    DamagedVersionError,
    InvalidParamError,
    NotFoundError,
    unknown_version,
)
from .fairness import FairSemaphore, UserQueues
from .identifiers import parse_version, quote_for_log
from .inline import Inline
from .json_text import is_valid_json
from .pages import KeyPages
from .replacements import MESSAGE, describe
from .storage import EndToEndRoomKeyStore, report_broken_row
from .sweeper import Sweeper
from .throttling import for_each
from .types import (
    Actor,
    BackupId,
    BackupInfo,
    BackupState,
    KeyPage,
    Limits,
    Position,
    Restore,
    RoomKey,
    UploadResult,
)
from .wire import VersionInfo

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Number of downloads per process that may have pages in memory at the same time. A
#: download has at most four pages of 1 MiB (`storage.PAGE_SIZE`); the fourth page is
#: still being read from the database.
DOWNLOADS = 16
#: Number of these downloads that may belong to the same user. A user's reads run one
#: after the other anyway, and four downloads suffice to keep the user's share of the
#: database busy.
DOWNLOADS_PER_USER = 4
#: Seconds between two transactions of a deletion. Another process that waits for the
#: lock of an SQLite file retries every 0.1 s: the pause lets the other process take
#: the lock.
_DELETION_PAUSE = 0.1


class E2eRoomKeysHandler:
    """The seven operations of Synapse's handler of the same name.

    Versions are strings, as sent by clients. Each operation may fail with
    `LimitExceededError` if too many of the user's requests are waiting, and with
    `UnavailableError` during a database outage.
    """

    def __init__(
        self,
        store: EndToEndRoomKeyStore,
        clock: Clock,
        limits: Limits,
        sweeper: Sweeper,
    ) -> None:
        self._store = store
        self._sweeper = sweeper
        self._clock = clock
        waiting = limits.max_waiting_requests
        self._reads = UserQueues(clock, waiting)
        self._writes = UserQueues(clock, waiting)
        self._downloads = FairSemaphore(
            clock, DOWNLOADS, DOWNLOADS_PER_USER, max_waiting=waiting
        )

    @inlineCallbacks
    def _write(
        self, user_id: str, call: "Callable[..., Deferred[T]]", *args: Any
    ) -> Inline[T]:
        """Run a write after the user's earlier writes, set the metric of the last write
        to the current time, and fire with the write's result."""
        result: T = yield self._writes.run(user_id, call, *args)
        metrics.last_write.set_to_current_time()
        return result

    def get_room_key(
        self, user_id: str, version: str, room_id: str, session_id: str
    ) -> "Deferred[RoomKey | None]":
        """Fire with the key of a session, or with None if the version has no such key.

        Raises:
            NotFoundError: the version doesn't exist.
        """
        number = parse_version(version)
        return self._reads.run(
            user_id, self._store.get_key, user_id, number, room_id, session_id
        )

    @inlineCallbacks
    def get_room_keys(
        self, user_id: str, version: str, room_id: str | None = None
    ) -> Inline[KeyPages]:
        """Fire with the keys of a version or of a room, after the first page was read.

        The caller must call `KeyPages.close`.

        Raises:
            NotFoundError: the version doesn't exist.
        """
        number = parse_version(version)

        def fetch(
            after: Position | None, on_page: Callable[[KeyPage], bool]
        ) -> "Deferred[None]":
            return self._reads.run(
                user_id,
                self._store.get_pages,
                user_id,
                number,
                room_id,
                after,
                on_page,
            )

        pages = KeyPages(
            fetch,
            self._downloads,
            user_id,
            self._clock,
            partial(report_broken_row, BackupId(user_id, number)),
        )
        yield pages.advance()
        return pages

    @inlineCallbacks
    def upload_room_keys(
        self,
        user_id: str,
        version: str,
        room_keys: Iterable[RoomKey],
        device_id: str | None = None,
    ) -> Inline[UploadResult]:
        """Merge all keys into the current version, or change nothing and fail.

        Args:
            room_keys: an iterator is read one key at a time, after the user's earlier
                writes. Exceptions of the iterator are raised here.

        Raises:
            NotFoundError: the version doesn't exist.
            RoomKeysVersionError: the version isn't the current version.
            UserLimitError: the user's backups would become too large.
        """
        result: UploadResult = yield self._write(
            user_id, self._upload, user_id, version, room_keys, device_id
        )
        return result

    @inlineCallbacks
    def _upload(
        self,
        user_id: str,
        version: str,
        room_keys: Iterable[RoomKey],
        device_id: str | None,
    ) -> Inline[UploadResult]:
        keys: list[RoomKey] = []
        yield for_each(self._clock, keys.append, room_keys)
        result: UploadResult = yield self._store.upload_keys(
            user_id, parse_version(version), keys, Actor(device_id)
        )
        metrics.uploaded_keys.labels("stored").inc(result.stored)
        metrics.uploaded_keys.labels("replaced").inc(len(result.replaced))
        metrics.uploaded_keys.labels("kept").inc(result.unchanged)

        backup = f"user={user_id} device={device_id} version={version}"

        def log(keys: str) -> None:
            logger.info(MESSAGE, backup, keys)

        yield for_each(self._clock, log, describe(backup, result.replaced))
        return result

    @inlineCallbacks
    def delete_room_keys(
        self,
        user_id: str,
        version: str,
        room_id: str | None = None,
        session_id: str | None = None,
        device_id: str | None = None,
    ) -> Inline[BackupState]:
        """Delete the keys of a version, of a room or of a session. Fire with the
        backup's state after the deletion.

        Raises:
            NotFoundError: the version doesn't exist.
        """
        number = parse_version(version)
        state, deleted = yield self._write(
            user_id,
            self._delete_keys,
            user_id,
            number,
            room_id,
            session_id,
            Actor(device_id),
        )
        logger.info(
            "Deleted keys: user=%s device=%s version=%s room=%s session=%s count=%d",
            user_id,
            device_id,
            number,
            quote_for_log(room_id),
            quote_for_log(session_id),
            deleted,
        )
        return state  # type: ignore[no-any-return]

    @inlineCallbacks
    def _delete_keys(
        self,
        user_id: str,
        version: int,
        room_id: str | None,
        session_id: str | None,
        actor: Actor,
    ) -> Inline[tuple[BackupState, int]]:
        """Delete keys, in several transactions if the store limits the number of keys
        per transaction. Fire with the backup's state after the deletion and the number
        of deleted keys."""
        total = 0
        while True:
            done = yield self._store.delete_keys(
                user_id, version, room_id, session_id, actor
            )
            total += done.deleted
            if done.is_complete:
                return done.state, total
            yield self._clock.sleep(_DELETION_PAUSE)

    @inlineCallbacks
    def create_version(
        self,
        user_id: str,
        version_info: VersionInfo,
        device_id: str | None = None,
    ) -> Inline[str]:
        """Create a version and make it the current version. Fire with the version's
        number."""
        number: int = yield self._write(
            user_id,
            self._store.create_version,
            user_id,
            version_info.algorithm,
            version_info.auth_data,
            Actor(device_id),
        )
        logger.info(
            "Created version: user=%s device=%s version=%s", user_id, device_id, number
        )
        return str(number)

    @inlineCallbacks
    def get_version_info(
        self, user_id: str, version: str | None = None
    ) -> Inline[BackupInfo]:
        """Fire with the description of a version, by default of the current version.

        Raises:
            NotFoundError: the version doesn't exist, or the user has no version.
            DamagedVersionError: the version's ``auth_data`` isn't JSON.
        """
        number = None if version is None else parse_version(version)
        info: BackupInfo | None = yield self._reads.run(
            user_id, self._store.get_info, user_id, number
        )
        if info is None:
            raise (
                NotFoundError("No backup found")
                if number is None
                else unknown_version()
            )
        if not is_valid_json(info.auth_data):
            logger.error(
                "Damaged version: its auth_data isn't JSON: user=%s version=%s",
                user_id,
                info.version,
            )
            raise DamagedVersionError
        return info

    @inlineCallbacks
    def update_version(
        self,
        user_id: str,
        version: str,
        version_info: VersionInfo,
        device_id: str | None = None,
    ) -> Inline[None]:
        """Change the ``auth_data`` of a version.

        Raises:
            NotFoundError: the version doesn't exist.
            InvalidParamError: the body names another version or another algorithm.
        """
        if version_info.version not in (None, version):
            raise InvalidParamError("The body's version is not the path's")
        yield self._write(
            user_id,
            self._store.update_version,
            user_id,
            parse_version(version),
            version_info.algorithm,
            version_info.auth_data,
            Actor(device_id),
        )

    @inlineCallbacks
    def delete_version(
        self, user_id: str, version: str, device_id: str | None = None
    ) -> Inline[None]:
        """Delete a version. Deleting a version again is not an error.

        Clients see neither the version nor its keys any more. The sweeper deletes the
        keys in the background.

        Raises:
            NotFoundError: the version never existed.
        """
        number = parse_version(version)
        is_first: bool = yield self._write(
            user_id, self._store.delete_version, user_id, number, Actor(device_id)
        )
        if is_first:
            logger.info(
                "Deleted version: user=%s device=%s version=%s",
                user_id,
                device_id,
                number,
            )
        self._sweeper.wake()

    @inlineCallbacks
    def restore_version(
        self, user_id: str, version: str, operator: str
    ) -> Inline[None]:
        """Give a deleted version back to the user: as the current version, if the user
        has no newer one, or else as a readable version.

        Args:
            operator: the name for the record.

        Raises:
            NotFoundError: the version isn't kept: it never existed, isn't deleted, or
                some of its keys are deleted already.
        """
        number = parse_version(version)
        actor = Actor(None, operator)
        yield self._write(user_id, self._store.restore_version, user_id, number, actor)
        logger.info(
            "Restored version: user=%s operator=%s version=%s",
            user_id,
            operator,
            number,
        )

    @inlineCallbacks
    def restore_room_keys(
        self, user_id: str, version: str, restore: Restore, operator: str
    ) -> Inline[int]:
        """Give replaced keys back as they were before a time. Fire with the number of
        sessions whose keys were given back.

        A key that isn't better than the stored key is given back only if the restore is
        forced. The keys that are replaced hereby are kept, so that a second restore can
        undo the first.

        Args:
            operator: the name for the record.

        Raises:
            NotFoundError: the version doesn't exist.
        """
        number = parse_version(version)
        actor = Actor(None, operator)
        restored: int = yield self._write(
            user_id, self._store.restore_keys, user_id, number, restore, actor
        )
        logger.info(
            "Restored keys: user=%s operator=%s version=%s count=%d",
            user_id,
            operator,
            number,
            restored,
        )
        return restored

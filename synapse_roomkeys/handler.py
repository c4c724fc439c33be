"""The operations of the API, with no HTTP and no SQL in them."""

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

from twisted.internet.defer import Deferred, inlineCallbacks

from . import metrics, wire
from .clock import Clock
from .errors import (
    DamagedVersionError,
    InvalidParamError,
    NotFoundError,
    unknown_version,
)
from .fairness import FairSemaphore, UserQueues
from .inline import Inline
from .pages import KeyPages
from .storage import EndToEndRoomKeyStore, report_broken_row
from .types import (
    BackupInfo,
    BackupState,
    KeyMetadata,
    KeyPage,
    Limits,
    Position,
    Replacement,
    RoomKey,
    UploadResult,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: How many downloads may have pages in memory at once in a process. Each has four at
#: most, of 1 MiB (`storage.PAGE_SIZE`), one of which is on its way from the database.
DOWNLOADS = 16
#: How many of these may be one user's. One user's reads run one after the other anyway,
#: so a few keep that user's share of the database busy.
DOWNLOADS_PER_USER = 4
#: What a line says of replaced keys, where it is of more than one, in characters of
#: ASCII and the backslashes that JSON adds: the service cuts what is longer.
_MESSAGE_SIZE = 1792
#: Seconds between two transactions of one deletion. A process that waits for the lock
#: of an SQLite file tries every 0.1 s: the pause lets it in.
_DELETION_PAUSE = 0.1
_REPLACED = "Replaced keys (first_message_index/forwarded_count/is_verified): %s%s"


class E2eRoomKeysHandler:
    """The seven operations that Synapse's handler of this name has.

    Versions are strings here, as clients send them. Each operation may fail with
    `LimitExceededError` when too many of the user's requests are waiting, and with
    `UnavailableError` when the database is away.
    """

    def __init__(
        self, store: EndToEndRoomKeyStore, clock: Clock, limits: Limits
    ) -> None:
        self._store = store
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
        """Make a call that writes when it is the user's turn, and note its time."""
        result: T = yield self._writes.run(user_id, call, *args)
        metrics.last_write.set_to_current_time()
        return result

    def get_room_key(
        self, user_id: str, version: str, room_id: str, session_id: str
    ) -> "Deferred[RoomKey | None]":
        """A key, or None.

        Raises:
            NotFoundError: there is no such version.
        """
        number = wire.parse_version(version)
        return self._reads.run(
            user_id, self._store.get_key, user_id, number, room_id, session_id
        )

    @inlineCallbacks
    def get_room_keys(
        self, user_id: str, version: str, room_id: str | None = None
    ) -> Inline[KeyPages]:
        """The keys of a version or of a room, the first page at hand.

        Whoever has them closes them.

        Raises:
            NotFoundError: there is no such version.
        """
        number = wire.parse_version(version)

        def fetch(
            after: Position | None, take: Callable[[KeyPage], bool]
        ) -> "Deferred[None]":
            return self._reads.run(
                user_id,
                self._store.get_pages,
                *(user_id, number, room_id, after, take),
            )

        pages = KeyPages(
            *(fetch, self._downloads, user_id, self._clock),
            partial(report_broken_row, (user_id, number)),
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
        """Merge keys into the current version, all of them or none.

        Args:
            room_keys: are taken one by one when it is the user's turn, and what that
                raises is raised here.

        Raises:
            NotFoundError: there is no such version.
            RoomKeysVersionError: it isn't the current one.
            UserLimitError: the user's backups would get too large.
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
        yield self._clock.for_each(keys.append, room_keys)
        result: UploadResult = yield self._store.upload_keys(
            user_id, wire.parse_version(version), keys
        )
        metrics.uploaded_keys.labels("stored").inc(result.stored)
        metrics.uploaded_keys.labels("replaced").inc(len(result.replaced))
        metrics.uploaded_keys.labels("kept").inc(result.kept)

        who = f"user={user_id} device={device_id} version={version}"
        room = _MESSAGE_SIZE - len(_REPLACED) - _size(ascii(who))

        def log(keys: str) -> None:
            logger.info(_REPLACED, who, keys)

        yield self._clock.for_each(log, _shown(result.replaced, room))
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
        """Delete the keys of a version, of a room or of a session.

        Raises:
            NotFoundError: there is no such version.
        """
        number = wire.parse_version(version)
        state, deleted = yield self._write(
            user_id,
            self._delete_keys,
            *(user_id, number, room_id, session_id),
        )
        logger.info(
            "Deleted keys: user=%s device=%s version=%s room=%s session=%s count=%d",
            *(user_id, device_id, number),
            *(wire.shown(room_id), wire.shown(session_id), deleted),
        )
        return state  # type: ignore[no-any-return]

    @inlineCallbacks
    def _delete_keys(
        self, user_id: str, version: int, room_id: str | None, session_id: str | None
    ) -> Inline[tuple[BackupState, int]]:
        """Delete keys, in several transactions where one may not delete all; the state
        afterwards, and how many were deleted."""
        total = 0
        while True:
            done = yield self._store.delete_keys(user_id, version, room_id, session_id)
            total += done.deleted
            if done.is_complete:
                return done.state, total
            yield self._clock.sleep(_DELETION_PAUSE)

    @inlineCallbacks
    def create_version(
        self,
        user_id: str,
        version_info: wire.VersionInfo,
        device_id: str | None = None,
    ) -> Inline[str]:
        """Make a version, the current one from now on, and fire with its number."""
        number: int = yield self._write(
            user_id,
            self._store.create_version,
            *(user_id, version_info.algorithm, version_info.auth_data),
        )
        logger.info(
            "Created version: user=%s device=%s version=%s", user_id, device_id, number
        )
        return str(number)

    @inlineCallbacks
    def get_version_info(
        self, user_id: str, version: str | None = None
    ) -> Inline[BackupInfo]:
        """A version, or the current one.

        Raises:
            NotFoundError: there is none.
            DamagedVersionError: its ``auth_data`` isn't JSON.
        """
        number = None if version is None else wire.parse_version(version)
        info: BackupInfo | None = yield self._reads.run(
            user_id, self._store.get_info, user_id, number
        )
        if info is None:
            raise (
                NotFoundError("No backup found")
                if number is None
                else unknown_version()
            )
        if not wire.is_json(info.auth_data):
            logger.error(
                "Damaged version: its auth_data isn't JSON: user=%s version=%s",
                *(user_id, info.version),
            )
            raise DamagedVersionError
        return info

    @inlineCallbacks
    def update_version(
        self, user_id: str, version: str, version_info: wire.VersionInfo
    ) -> Inline[None]:
        """Change the ``auth_data`` of a version.

        Raises:
            NotFoundError: there is no such version.
            InvalidParamError: the body speaks of another version or algorithm.
        """
        if version_info.version not in (None, version):
            raise InvalidParamError("The body's version is not the path's")
        yield self._write(
            user_id,
            self._store.update_version,
            user_id,
            wire.parse_version(version),
            *(version_info.algorithm, version_info.auth_data),
        )

    @inlineCallbacks
    def delete_version(
        self, user_id: str, version: str, device_id: str | None = None
    ) -> Inline[None]:
        """Delete a version and its keys; one that was deleted before is no error.

        Raises:
            NotFoundError: there never was such a version.
        """
        number = wire.parse_version(version)
        yield self._write(user_id, self._delete_version, user_id, number, device_id)

    @inlineCallbacks
    def _delete_version(
        self, user_id: str, version: int, device_id: str | None
    ) -> Inline[None]:
        """Delete a version, then its keys, in several transactions where one may not
        delete all. A repeated call deletes the keys that an interrupted one left."""
        while True:
            is_first, is_complete = yield self._store.delete_version(user_id, version)
            if is_first:
                logger.info(
                    "Deleted version: user=%s device=%s version=%s",
                    *(user_id, device_id, version),
                )
            if is_complete:
                return
            yield self._clock.sleep(_DELETION_PAUSE)


def _shown(replaced: Iterable[Replacement], most: int) -> Iterator[str]:
    """Replaced keys as lines of a log show them: as many in each as there is room for,
    as a line takes a host as long as several keys do. A room stands before the first
    of its keys."""
    text = room = ""
    size = 0
    last_room: str | None = None
    for key in replaced:
        shown = f" session={wire.shown(key.session_id)}"
        shown += f" old={_order(key.old)} new={_order(key.new)}"
        if key.room_id == last_room:
            added = shown
        else:
            last_room, room = key.room_id, f" room={wire.shown(key.room_id)}"
            added = room + shown
        size += _size(added)
        if text and size > most:
            yield text
            text = room + shown
            size = _size(text)
        else:
            text += added
    if text:
        yield text


def _order(key: KeyMetadata) -> str:
    """What decides between two keys, in short."""
    return f"{key.first_message_index}/{key.forwarded_count}/{key.is_verified}"


def _size(text: str) -> int:
    return len(text) + text.count('"') + text.count("\\")

"""The backups in the database: one transaction for each operation."""

from collections.abc import Callable, Generator, Sequence
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks

from ..types import (
    Actor,
    BackupId,
    BackupInfo,
    KeyPage,
    Limits,
    Position,
    RecordedChange,
    Restore,
    Retention,
    RoomKey,
    UploadResult,
    VersionRecord,
)
from .counts import KeyCounts
from .downloads import Download, read_key
from .engine import Engine, NotJsonError
from .measuring import MeasuringDatabase
from .record import EXPORT, Change, Record, read_newest, read_user, read_version
from .transactions import ConflictError, Transactions
from .undo import Undo
from .uploads import InsertGuess, Upload, Uploads
from .versions import Deletion, FoundInfo, Versions


class EndToEndRoomKeyStore:
    """The backups that the homeserver's two tables and the plugin's own hold.

    The methods return Deferreds, which may fail with whatever the `Transactions` fail
    with besides the errors that each method names.
    """

    def __init__(
        self,
        database: Transactions,
        engine: Engine,
        now: Callable[[], float],
        limits: Limits,
        retention: Retention,
        guess: InsertGuess | None = None,
    ) -> None:
        """
        Args:
            now: returns the Unix time in seconds.
            retention: what is recorded and kept.
            guess: tells uploads whether to insert their keys before reading.
        """
        self._database = database
        self._engine = engine
        self._guess = InsertGuess() if guess is None else guess
        counts = KeyCounts(engine, now, limits)
        #: Runs transactions that may need the bytes of a user's keys.
        self._write = database.write
        if limits.max_user_bytes is not None and engine.key_sizes is not None:
            self._write = MeasuringDatabase(database, engine, counts).write
        self._record = record = Record(now, retention)
        self._uploads = Uploads(engine, counts, limits, self._guess, record)
        self._versions = Versions(engine, counts, limits, record)
        self._undo = Undo(engine, record)

    @inlineCallbacks
    def upload_keys(
        self, user_id: str, version: int, keys: Sequence[RoomKey], actor: Actor
    ) -> "Generator[Deferred[Any], Any, UploadResult]":
        """Merge keys into the current version, all of them or none.

        Raises:
            NotFoundError: there is no such version.
            RoomKeysVersionError: it isn't the current one.
            UserLimitError: the user's backups would exceed a limit.
        """
        write, transaction = self._write, self._uploads.upload
        backup = BackupId(user_id, version)
        upload = Upload(backup, keys, actor, checks_data=False)
        result: UploadResult
        try:
            result = yield write("roomkeys_upload_keys", transaction, upload)
        except (ConflictError, NotJsonError):
            # A process that takes no lock has just inserted one of the keys, or the
            # session_data of a stored key isn't JSON.
            upload = Upload(backup, keys, actor, checks_data=True)
            result = yield write("roomkeys_upload_keys", transaction, upload)
        self._guess.note(user_id, result)
        return result

    def get_key(
        self, user_id: str, version: int, room_id: str, session_id: str
    ) -> "Deferred[RoomKey | None]":
        """Fire with a key, or None if it isn't stored.

        Raises:
            NotFoundError: there is no such version.
        """
        backup = BackupId(user_id, version)
        return self._database.run(
            "roomkeys_get_key", read_key, self._engine, backup, room_id, session_id
        )

    def get_pages(
        self,
        user_id: str,
        version: int,
        room_id: str | None,
        after: Position | None,
        on_page: Callable[[KeyPage], bool],
    ) -> "Deferred[None]":
        """Push keys of a version or of a room, ordered by id, page by page.

        Args:
            after: the key after which the first page begins; None for the first key.
            on_page: is called with each page, one at least, in the database's thread,
                and returns whether to go on. After `Engine.pages_at_once` pages the
                connection returns to the pool all the same.

        Raises:
            NotFoundError: there is no such version, or no longer.
        """
        backup = BackupId(user_id, version)
        download = Download(self._engine, backup, room_id, after, on_page)
        return self._database.run("roomkeys_get_pages", download.read)

    def delete_keys(
        self,
        user_id: str,
        version: int,
        room_id: str | None,
        session_id: str | None,
        actor: Actor,
    ) -> "Deferred[Deletion]":
        """Delete keys of a version, of a room, or of a session, as many as one
        transaction may. If the `Deletion` isn't complete, repeat the call.

        Raises:
            NotFoundError: there is no such version.
        """
        return self._write(
            "roomkeys_delete_keys",
            self._versions.delete_keys,
            BackupId(user_id, version),
            room_id,
            session_id,
            actor,
        )

    def create_version(
        self, user_id: str, algorithm: str, auth_data: str, actor: Actor
    ) -> "Deferred[int]":
        """Insert a version and fire with its number, which the user never had before.

        The number is the Unix time in seconds, or the user's last number plus one if
        that is larger. The last number is kept when the user's versions are erased.

        Raises:
            UserLimitError: the user would have too many versions, or too many bytes.
        """
        create = self._versions.create
        return self._write(
            "roomkeys_create_version", create, user_id, algorithm, auth_data, actor
        )

    @inlineCallbacks
    def get_info(
        self, user_id: str, version: int | None
    ) -> "Generator[Deferred[Any], Any, BackupInfo | None]":
        """Fire with a version, or the current one; None if there is none."""
        found: FoundInfo = yield self._database.run(
            "roomkeys_get_info", self._versions.find, user_id, version
        )
        if found.info is not None and not found.is_cached:
            # A database that is full, read-only or locked still answers.
            cache = self._versions.cache_count
            yield self._database.attempt(
                "roomkeys_keep_count", cache, user_id, found.info
            )
        return found.info

    def update_version(
        self,
        user_id: str,
        version: int,
        algorithm: str,
        auth_data: str,
        actor: Actor,
    ) -> "Deferred[None]":
        """Replace a version's ``auth_data``.

        Raises:
            NotFoundError: there is no such version.
            InvalidParamError: it has another algorithm.
            UserLimitError: the user's backups would exceed a limit.
        """
        return self._write(
            "roomkeys_update_version",
            self._versions.update,
            BackupId(user_id, version),
            algorithm,
            auth_data,
            actor,
        )

    def delete_version(
        self, user_id: str, version: int, actor: Actor
    ) -> "Deferred[bool]":
        """Delete a version. The version and its keys are gone for every client; the
        sweeper deletes the keys' rows later.

        Returns:
            A Deferred that fires with whether this call deleted the version; False if
            it was deleted before.

        Raises:
            NotFoundError: there never was such a version.
        """
        delete, backup = self._versions.delete, BackupId(user_id, version)
        return self._database.write("roomkeys_delete_version", delete, backup, actor)

    def get_user_record(
        self, user_id: str, since_ms: int
    ) -> "Deferred[tuple[RecordedChange, ...]]":
        """Fire with the recorded changes of a user's backups since a Unix time in
        milliseconds, in their order."""
        return self._database.run("roomkeys_get_record", read_user, user_id, since_ms)

    def get_newest_record(
        self, user_id: str, since_ms: int, skipped: int, most: int
    ) -> "Deferred[tuple[list[RecordedChange], int]]":
        """Fire with a page of the recorded changes of a user's backups since a Unix
        time in milliseconds, the newest first, and the number of all of them. See
        `record.read_newest` for a page's size.

        Args:
            skipped: number of changes before the page.
            most: maximum number of changes of the page.
        """
        page = (user_id, since_ms, skipped, most)
        return self._database.run("roomkeys_get_newest", read_newest, *page)

    def note_export(self, user_id: str, version: int, actor: Actor) -> "Deferred[None]":
        """Record that an operator has exported a version."""
        backup, change = BackupId(user_id, version), Change(EXPORT, actor)
        note = self._record.note
        return self._database.write("roomkeys_note_export", note, backup, change)

    def get_version_record(
        self, user_id: str, version: int
    ) -> "Deferred[VersionRecord]":
        """Fire with the record of a version, deleted or not.

        Raises:
            NotFoundError: there never was such a version.
        """
        backup = BackupId(user_id, version)
        return self._database.run("roomkeys_get_record", read_version, backup)

    def restore_version(
        self, user_id: str, version: int, actor: Actor
    ) -> "Deferred[None]":
        """Make a deleted version readable again: the current one, if none is newer.

        Raises:
            NotFoundError: the version isn't kept: it never existed, isn't deleted, or
                some of its keys are deleted already.
        """
        restore, backup = self._versions.restore, BackupId(user_id, version)
        return self._database.write("roomkeys_restore_version", restore, backup, actor)

    def restore_keys(
        self, user_id: str, version: int, restore: Restore, actor: Actor
    ) -> "Deferred[int]":
        """Give keys back as they were before a time, and keep the keys that they
        replace. Fire with the number of sessions whose keys were given back.

        Raises:
            NotFoundError: there is no such version.
        """
        backup, undo = BackupId(user_id, version), self._undo.restore_keys
        return self._database.write(
            "roomkeys_restore_keys", undo, backup, restore, actor
        )

    def forget_user(self, user_id: str) -> "Deferred[None]":
        """Delete a user's rows in the plugin's own tables, such as the record and the
        kept keys, except the last number of a version."""
        forget = self._versions.forget_user
        return self._database.write("roomkeys_forget_user", forget, user_id)

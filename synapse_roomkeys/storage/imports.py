"""The operator's imports: insertion of a version under a given number."""

from collections.abc import Callable, Sequence

from twisted.internet.defer import Deferred

from ..errors import RoomKeysVersionError
from ..merge import MergePlan, merge
from ..types import Actor, BackupId, BackupInfo, Limits, Retention, RoomKey
from . import statements
from .counts import KeyCounts
from .engine import Engine
from .record import CREATE_VERSION, Change, Record
from .transactions import Transaction, Transactions
from .uploads import Upload, find_sessions
from .values import names
from .versions import lock_current


class Imports:
    """The transactions of an import, one method each, without the limits for clients.
    The Deferreds fail as the `Transactions` do."""

    def __init__(
        self, database: Transactions, engine: Engine, now: Callable[[], float]
    ) -> None:
        """
        Args:
            now: returns the Unix time in seconds.
        """
        self._database = database
        self._engine = engine
        self._counts = KeyCounts(engine, now, Limits())
        self._record = Record(now, Retention())

    def insert_version(
        self, user_id: str, info: BackupInfo, actor: Actor
    ) -> "Deferred[None]":
        """Insert a version without keys as the current version. If the number is taken,
        change nothing.

        The version begins with the etag of `info`, so no etag returns with other keys.

        Raises:
            RoomKeysVersionError: the user has a newer version.
        """
        return self._database.write(
            "roomkeys_insert_version", self._insert_version, user_id, info, actor
        )

    def _insert_version(
        self, txn: Transaction, user_id: str, info: BackupInfo, actor: Actor
    ) -> None:
        self._engine.begin_write(txn)
        current = lock_current(self._engine, txn, user_id)
        if current is not None and current > info.version:
            raise RoomKeysVersionError(str(current))
        backup = BackupId(user_id, info.version)
        is_inserted = self._engine.insert_version(
            txn, backup, info.algorithm, info.auth_data
        )
        if not is_inserted:
            return
        etag = {"expected_etag": 0, "new_etag": info.etag}
        txn.execute(statements.SET_ETAG, {**names(backup), **etag})
        txn.execute(statements.SAVE_NUMBER, names(backup))
        count = {"key_count": 0, "key_bytes": 0, "now": self._counts.now()}
        txn.execute(
            statements.SAVE_COUNT, {**names(backup), **count, "etag": info.etag}
        )
        self._record.note(txn, backup, Change(CREATE_VERSION, actor))

    def compare_keys(
        self, backup: BackupId, keys: Sequence[RoomKey]
    ) -> "Deferred[MergePlan]":
        """Fire with the changes that an upload would make to a version, current or not.
        Write nothing.

        Raises:
            NotFoundError: the user has no version of this number.
        """

        def compare(txn: Transaction) -> MergePlan:
            upload = Upload(backup, keys, Actor(None), checks_data=True)
            found = find_sessions(self._engine, self._counts, txn, upload)
            return merge(found.stored, keys)

        return self._database.run("roomkeys_compare_keys", compare)

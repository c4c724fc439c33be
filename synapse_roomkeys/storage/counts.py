"""The cached numbers of keys: how long they are valid, recounts, and users' limits."""

from collections.abc import Callable

import attrs

from ..errors import NotFoundError, UserLimitError, unknown_version
from ..types import BackupId, BackupState, Limits
from . import statements
from .engine import Engine
from .transactions import Transaction
from .values import CountWindow, Snapshot, names

#: For how many seconds after its recount a cached count is valid. The homeserver may
#: delete keys without moving the etag; a count shows that after an hour at most.
COUNT_LIFETIME = 3600


@attrs.frozen
class RecountedKeys:
    """The outcome of a recount.

    Attributes:
        size: the bytes of all ``session_data``; None if they weren't measured.
    """

    state: BackupState
    size: int | None


class NotMeasuredError(Exception):
    """A transaction needs the bytes of a version's keys. The bytes aren't cached, and
    the engine measures keys in batches, which are transactions of their own."""

    def __init__(self, backup: BackupId) -> None:
        super().__init__(backup)
        self.backup = backup


class KeyCounts:
    """The cached numbers of keys and bytes of the users' backups."""

    def __init__(
        self, engine: Engine, now: Callable[[], float], limits: Limits
    ) -> None:
        """
        Args:
            now: returns the Unix time in seconds.
        """
        self._engine = engine
        self._now = now
        self._limits = limits

    def now(self) -> int:
        """The Unix time in whole seconds."""
        return int(self._now())

    def window(self) -> CountWindow:
        """Return the window of the times at which valid counts were counted."""
        now = self.now()
        return CountWindow(now - COUNT_LIFETIME, now)

    def state_after(
        self, txn: Transaction, backup: BackupId, before: Snapshot, added: int
    ) -> BackupState:
        """Return the state of a version after a write that moved the etag and the
        cached count. Recount the keys if no count was cached.

        Args:
            before: the version before the write.
            added: number of added keys.
        """
        if before.count is None:
            return self.recount(txn, backup).state
        return BackupState(before.etag + 1, before.count + added)

    def unchanged_state(
        self, txn: Transaction, backup: BackupId, before: Snapshot
    ) -> BackupState:
        """Return the state of an unchanged version. Recount the keys if no count was
        cached."""
        if before.count is None:
            return self.recount(txn, backup).state
        return BackupState(before.etag, before.count)

    def recount(self, txn: Transaction, backup: BackupId) -> RecountedKeys:
        """Count the keys of a version, and their bytes if users' bytes are limited, and
        cache the result.

        Raises:
            NotMeasuredError: users' bytes are limited, and the engine measures keys in
                batches.
            NotFoundError: there is no such version, or no longer.
        """
        parameters = {**names(backup), "now": self.now()}
        if self._limits.max_user_bytes is None:
            txn.execute(statements.COUNT_KEYS, parameters)
        elif self._engine.count_keys_and_bytes is None:
            raise NotMeasuredError(backup)
        else:
            txn.execute(self._engine.count_keys_and_bytes, parameters)
        rows = txn.fetchall()
        if not rows:
            raise unknown_version()
        ((etag, count, size),) = rows
        return RecountedKeys(BackupState(etag, count), size)

    def check_user(self, txn: Transaction, user_id: str) -> None:
        """Add up the keys and bytes of a user's backups, if the operator limits them.

        Raises:
            UserLimitError: they exceed a limit.
            NotMeasuredError: the bytes of a version must be measured in batches first.
        """
        max_keys, max_bytes = self._limits.max_user_keys, self._limits.max_user_bytes
        if max_keys is None and max_bytes is None:
            return
        window = attrs.asdict(self.window())
        txn.execute(self._engine.user_sizes, {"user_id": user_id, **window})
        keys = size = 0
        for version, auth_data_size, its_keys, its_size in txn.fetchall():
            if its_keys is None or (its_size is None and max_bytes is not None):
                try:
                    counted = self.recount(txn, BackupId(user_id, version))
                except NotFoundError:
                    # Another process has deleted the version since the query.
                    continue
                its_keys, its_size = counted.state.count, counted.size
            keys += its_keys
            size += (its_size or 0) + auth_data_size
        if max_keys is not None and keys > max_keys:
            raise UserLimitError(f"A user may back up {max_keys} keys at most")
        if max_bytes is not None and size > max_bytes:
            raise UserLimitError(f"A user may back up {max_bytes} bytes at most")

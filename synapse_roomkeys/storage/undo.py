"""Undo: replaced keys are given back, in one transaction."""

from collections.abc import Sequence
from typing import Any

import attrs

from ..errors import unknown_version
from ..merge import is_better, is_complete
from ..types import Actor, BackupId, Restore, StoredKey
from . import statements
from .engine import Engine
from .record import RESTORE_KEYS, Change, Record, name_sessions
from .rows import metadata
from .transactions import Transaction
from .values import KeyRestore, ReplacedKey, names


@attrs.frozen
class _Choice:
    """A replaced key to give back.

    Attributes:
        is_new: Whether its session has no stored key now.
    """

    key: ReplacedKey
    is_new: bool


class Undo:
    """The transaction that gives replaced keys back."""

    def __init__(self, engine: Engine, record: Record) -> None:
        self._engine = engine
        self._record = record

    def restore_keys(
        self, txn: Transaction, backup: BackupId, restore: Restore, actor: Actor
    ) -> int:
        """Give keys of a version back as they were before a time, and keep the keys
        that they replace. The etag moves once, unless no key changes.

        Returns:
            The number of sessions whose keys were given back.

        Raises:
            NotFoundError: there is no such version.
        """
        self._engine.begin_write(txn)
        version = self._engine.lock_version(txn, backup)
        if version is None or version.is_deleted:
            raise unknown_version()
        choices = self._choose(txn, backup, restore)
        if not choices:
            return 0
        txn.execute(statements.FIND_ETAG, names(backup))
        ((etag,),) = txn.fetchall()
        keys = [choice.key for choice in choices]
        now_ms = self._record.now_ms()
        self._engine.restore_keys(txn, KeyRestore(backup, etag + 1, now_ms, keys))
        added = sum(choice.is_new for choice in choices)
        moved = {
            **names(backup),
            "expected_etag": etag,
            "new_etag": etag + 1,
            "added_keys": added,
            "added_bytes": None,
        }
        txn.execute(statements.SET_ETAG, moved)
        txn.execute(statements.MOVE_COUNT, moved)
        change = Change(
            RESTORE_KEYS,
            actor,
            stored=added,
            replaced=len(choices) - added,
            sessions=name_sessions(
                [choice.key for choice in choices if choice.is_new],
                [choice.key for choice in choices if not choice.is_new],
            ),
        )
        self._record.note(txn, backup, change)
        return len(choices)

    def _choose(
        self, txn: Transaction, backup: BackupId, restore: Restore
    ) -> list[_Choice]:
        """Return the keys to give back: for each session the key that was replaced
        first since the time, unless the stored key is the same, or, without force, is
        as good."""
        parameters = {**names(backup), **attrs.asdict(restore)}
        txn.execute(statements.FIND_REPLACED, parameters)
        first: dict[tuple[str, str], tuple[Any, ...]] = {}
        for row in txn.fetchall():
            first.setdefault((row[0], row[1]), row)
        choices = []
        for row in first.values():
            replaced, stored = _read_key(row[4:8]), _read_key(row[8:12])
            is_new = row[11] is None
            beats = is_complete(replaced) and is_better(replaced.metadata, stored)
            is_same = row[12]
            if is_new or (not is_same and (restore.is_forced or beats)):
                choices.append(_Choice(ReplacedKey(*row[:4]), is_new))
        return choices


def _read_key(columns: Sequence[Any]) -> StoredKey:
    """Return a key from its three fields and whether it has data. The key's size isn't
    read."""
    return StoredKey(metadata(columns[:3]), bool(columns[3]), 0)

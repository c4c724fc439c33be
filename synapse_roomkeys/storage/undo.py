"""Undo: replaced keys are given back, in one transaction."""

from typing import Any

import attrs

from ..errors import unknown_version
from ..merge import is_better
from ..types import Actor, BackupId, Restore, StoredKey
from . import statements
from .engine import Engine, KeyRestore, ReplacedKey, names
from .record import RESTORE_KEYS, Change, Record, name_sessions
from .rows import metadata
from .transactions import Transaction


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
            has_data, is_same = row[10:]
            is_new = has_data is None
            stored = StoredKey(metadata(row[7:10]), bool(has_data), 0)
            is_worse = not is_new and not is_better(metadata(row[4:7]), stored)
            if not is_same and (restore.is_forced or not is_worse):
                choices.append(_Choice(ReplacedKey(*row[:4]), is_new))
        return choices

"""Faults for a store, each of which a test must notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias
from unittest import mock

import attrs

from synapse_roomkeys import merge
from synapse_roomkeys.storage import database, rows, sql, store
from synapse_roomkeys.types import KeyMetadata, KeyPage, RoomKey, StoredKey

Patch: TypeAlias = Any
"""What `mock.patch.object` gives: the fault, while it is entered."""


def changed(text: str, old: str, new: str) -> str:
    """A statement with a fault; the place for it must be there."""
    assert text.count(old) == 1, text
    return text.replace(old, new)


def statement(name: str, old: str, new: str) -> Patch:
    """A fault in a statement that both engines share."""
    return mock.patch.object(sql, name, changed(getattr(sql, name), old, new))


def rank_forwarded_first(key: KeyMetadata) -> tuple[bool, int, int]:
    """A rank that takes the fields in another order."""
    return (
        not key.is_verified,
        key.forwarded_count or 0,
        key.first_message_index or 0,
    )


def is_not_worse(uploaded: KeyMetadata, stored: StoredKey) -> bool:
    """A rule by which an equal key takes the old one's place."""
    return not merge.is_sound(stored) or (
        merge.rank(uploaded) <= merge.rank(stored.metadata)
    )


def all_but_one(
    keys: Sequence[RoomKey], *, chunks: Callable[..., Any] = rows.chunks
) -> Any:
    """What is written, without the first key of several."""
    return chunks(keys[1:] or keys)


def off_by_one(name: str) -> Patch:
    """A fault in the first number of one of the parameters of an upload."""
    parameters = sql.Step.parameters

    def wrong(self: sql.Step, write: sql.Write) -> Any:
        first, *others = getattr(write, name)
        changes: dict[str, Any] = {name: (first + 1, *others)}
        return parameters(self, attrs.evolve(write, **changes))

    return mock.patch.object(sql.Step, "parameters", wrong)


def on_postgres(old: str, new: str) -> Patch:
    """A fault in what writes keys on PostgreSQL."""
    faults: dict[str, Any] = {}
    for name in ("write_keys", "write_more_keys"):
        (step,) = getattr(sql.POSTGRES, name)
        wrong = attrs.evolve(step, statement=changed(step.statement, old, new))
        faults[name] = (wrong,)
    dialect = attrs.evolve(sql.POSTGRES, **faults)
    return mock.patch.object(sql, "POSTGRES", dialect)


def execute_and_commit(
    self: Any,
    statement: str,
    parameters: Any = (),
    *,
    execute: Callable[..., Any] = database._PostgresTransaction.execute,
) -> Any:
    """A statement that is a transaction of its own."""
    result = execute(self, statement, parameters)
    self._connection.commit()
    return result


def only_page(
    found: list[tuple[Any, ...]],
    asked: int,
    *,
    pages: Callable[..., Iterator[KeyPage]] = rows.key_pages,
) -> Iterator[KeyPage]:
    """A page that claims to be the last one."""
    for page in pages(found, asked):
        yield attrs.evolve(page, last=None)


def adds_anything() -> Patch:
    """PostgreSQL that takes all keys for new ones, and writes over others."""
    always = "EXISTS (SELECT 1 UNION ALL"
    text = changed(sql.POSTGRES.add_keys, "NOT EXISTS (", f"{always} ")
    over = sql._REPLACE_KEYS.removeprefix(sql._INSERT_KEYS)
    end = ")\n    SELECT etag, CASE"
    text = changed(text, end, over + end)
    return mock.patch.object(sql, "POSTGRES", attrs.evolve(sql.POSTGRES, add_keys=text))


def without_lock() -> Patch:
    """PostgreSQL without a lock on the version, but for that of its UPDATE."""
    lock = changed(sql.POSTGRES.lock_version, " FOR UPDATE", "")
    (step,) = sql.POSTGRES.write_keys
    write = attrs.evolve(step, statement=changed(step.statement, " FOR UPDATE", ""))
    add = changed(sql.POSTGRES.add_keys, " FOR UPDATE", "")
    dialect = attrs.evolve(
        sql.POSTGRES, lock_version=lock, add_keys=add, write_keys=(write,)
    )
    return mock.patch.object(sql, "POSTGRES", dialect)


#: What one request after the other can show.
PLAIN: dict[str, Callable[[], Patch]] = {
    "wrong rank": lambda: mock.patch.object(merge, "rank", rank_forwarded_first),
    "equal keys replace": lambda: mock.patch.object(merge, "is_better", is_not_worse),
    "etag moves twice": lambda: off_by_one("moved"),
    "count off": lambda: off_by_one("added"),
    "lost key": lambda: mock.patch.object(store, "chunks", all_but_one),
    "deletes too much": lambda: statement(
        "DELETE_ROOM_KEY", "session_id = ?", "session_id >= ?"
    ),
}
#: What only requests at the same time can show.
RACES: dict[str, Callable[[], Patch]] = {
    "no etag in the claim": lambda: on_postgres(
        "COALESCE(etag, 0) = ?", "? IS NOT NULL"
    ),
    "no lock": without_lock,
    "adds anything": adds_anything,
    "no transaction": lambda: mock.patch.object(
        database._PostgresTransaction, "execute", execute_and_commit
    ),
}
#: What clients of one version can't see.
HIDDEN: dict[str, Callable[[], Patch]] = {
    "a count for ever": lambda: mock.patch.object(sql, "COUNT_LIFETIME", 10**9),
    "nobody forgotten": lambda: statement("FORGET_USER", "user_id = ?", "? IS NULL"),
    "one page of many": lambda: mock.patch.object(store, "key_pages", only_page),
}

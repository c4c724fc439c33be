"""Faults for a store. A test must detect each fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias
from unittest import mock

import attrs

from synapse_roomkeys import merge
from synapse_roomkeys.storage import (
    counts,
    downloads,
    postgres_statements,
    rows,
    statements,
    uploads,
)
from synapse_roomkeys.storage.engine import KeyWrite
from synapse_roomkeys.storage.postgres_engine import PostgresEngine, PostgresTransaction
from synapse_roomkeys.storage.sqlite_engine import SqliteEngine
from synapse_roomkeys.types import KeyMetadata, KeyPage, RoomKey, StoredKey

Patch: TypeAlias = Any
"""What `mock.patch.object` gives: the fault, while it is entered."""


def changed(text: str, old: str, new: str) -> str:
    """Return a statement with a fault in a given place."""
    assert text.count(old) == 1, text
    return text.replace(old, new)


def statement(name: str, old: str, new: str) -> Patch:
    """A fault in a statement of both engines."""
    return mock.patch.object(
        statements, name, changed(getattr(statements, name), old, new)
    )


def rank_forwarded_first(key: KeyMetadata) -> tuple[bool, int, int]:
    """A rank with a wrong order of the fields."""
    return (
        not key.is_verified,
        key.forwarded_count or 0,
        key.first_message_index or 0,
    )


def is_not_worse(uploaded: KeyMetadata, stored: StoredKey) -> bool:
    """A rule by which an equal key replaces the stored key."""
    return not merge.is_complete(stored) or (
        merge.rank(uploaded) <= merge.rank(stored.metadata)
    )


def all_but_one(
    keys: Sequence[RoomKey], *, batches: Callable[..., Any] = rows.batches
) -> Any:
    """Return the batches of all keys but the first of several."""
    return batches(keys[1:] or keys)


@contextmanager
def off_by_one(name: str) -> Iterator[None]:
    """A fault in a number of an upload, on both engines."""
    with ExitStack() as patches:
        for engine in (SqliteEngine, PostgresEngine):
            patches.enter_context(_off_by_one(engine, name))
        yield


def _off_by_one(engine: type[SqliteEngine] | type[PostgresEngine], name: str) -> Patch:
    compare_and_write: Callable[..., bool] = engine.compare_and_write

    def wrong(self: Any, txn: Any, write: KeyWrite, has_lock: bool) -> bool:
        changes: dict[str, Any] = {name: getattr(write, name) + 1}
        return compare_and_write(self, txn, attrs.evolve(write, **changes), has_lock)

    return mock.patch.object(engine, "compare_and_write", wrong)


def on_postgres(old: str, new: str) -> Patch:
    """A fault in the statements that write keys on PostgreSQL."""
    names = ("CLAIM_WRITE", "WRITE_KEYS", "SETTLE_WRITE")
    texts = {name: getattr(postgres_statements, name) for name in names}
    (place,) = (name for name, text in texts.items() if old in text)
    fault = changed(texts[place], old, new)
    return mock.patch.object(postgres_statements, place, fault)


def execute_and_commit(
    self: Any,
    statement: str,
    parameters: Any = (),
    *,
    execute: Callable[..., Any] = PostgresTransaction.execute,
) -> Any:
    """Execute a statement and commit."""
    result = execute(self, statement, parameters)
    self._txn._connection.commit()
    return result


def only_page(
    found: list[tuple[Any, ...]],
    asked: int,
    *,
    pages: Callable[..., Iterator[KeyPage]] = rows.key_pages,
) -> Iterator[KeyPage]:
    """Return pages without a position for the next page."""
    for page in pages(found, asked):
        yield attrs.evolve(page, last=None)


def adds_anything() -> Patch:
    """PostgreSQL that inserts keys without a check and overwrites stored keys."""
    always = "EXISTS (SELECT UNION ALL "
    claim = changed(postgres_statements.CLAIM_INSERT, "NOT EXISTS (", always)
    _, conflict, over = postgres_statements.WRITE_KEYS.partition("ON CONFLICT")
    insert = f"{postgres_statements.INSERT_KEYS} {conflict}{over}"
    faults: Any = {"CLAIM_INSERT": claim, "INSERT_KEYS": insert}
    return mock.patch.multiple(postgres_statements, **faults)


def without_lock() -> Patch:
    """PostgreSQL without the lock on the version before an upload."""
    unlocked = changed(postgres_statements.LOCK_VERSION, " FOR UPDATE", "")
    return mock.patch.object(postgres_statements, "LOCK_VERSION", unlocked)


#: Faults that consecutive requests can show.
PLAIN: dict[str, Callable[[], Patch]] = {
    "wrong rank": lambda: mock.patch.object(merge, "rank", rank_forwarded_first),
    "equal keys replace": lambda: mock.patch.object(merge, "is_better", is_not_worse),
    "etag moves twice": lambda: off_by_one("new_etag"),
    "count off": lambda: off_by_one("added_keys"),
    "lost key": lambda: mock.patch.object(uploads, "batches", all_but_one),
    "deletes too much": lambda: statement(
        "DELETE_ROOM_KEY", "session_id = :", "session_id >= :"
    ),
}
#: Faults that only concurrent requests can show.
RACES: dict[str, Callable[[], Patch]] = {
    "no etag in the claim": lambda: on_postgres(
        "COALESCE(etag, 0) = :expected_etag", ":expected_etag IS NOT NULL"
    ),
    "keys without a claim": lambda: on_postgres(
        "etag < 0\n    ON CONFLICT", "ABS(etag) = :new_etag\n    ON CONFLICT"
    ),
    "no lock": without_lock,
    "adds anything": adds_anything,
    "no transaction": lambda: mock.patch.object(
        PostgresTransaction, "execute", execute_and_commit
    ),
}
#: Faults that are invisible to the clients of a single version.
HIDDEN: dict[str, Callable[[], Patch]] = {
    "a count for ever": lambda: mock.patch.object(counts, "COUNT_LIFETIME", 10**9),
    "nobody forgotten": lambda: statement(
        "FORGET_USER", "user_id = :user_id", ":user_id IS NULL"
    ),
    "one page of many": lambda: mock.patch.object(downloads, "key_pages", only_page),
}

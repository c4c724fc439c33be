"""Faults for a store. A test must detect each fault."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any, TypeAlias
from unittest import mock

import attrs

from synapse_roomkeys import merge
from synapse_roomkeys.storage import (
    counts,
    downloads,
    postgres_statements,
    record,
    rows,
    sqlite_statements,
    statements,
    sweeps,
    undo,
    uploads,
    versions,
)
from synapse_roomkeys.storage.postgres_engine import PostgresEngine, PostgresTransaction
from synapse_roomkeys.storage.record import Change, Record
from synapse_roomkeys.storage.sqlite_engine import SqliteEngine
from synapse_roomkeys.storage.undo import Undo
from synapse_roomkeys.storage.values import KeyWrite
from synapse_roomkeys.types import KeyMetadata, KeyPage, Replacement, RoomKey, StoredKey

Patch: TypeAlias = Any
"""What `mock.patch.object` gives: the fault, while it is entered."""


def changed(text: str, old: str, new: str) -> str:
    """Return a statement with a fault in a given place."""
    assert text.count(old) == 1, text
    return text.replace(old, new)


@contextmanager
def statement(name: str, old: str, new: str) -> Iterator[None]:
    """A fault in a statement that both engines share."""
    fault = changed(getattr(statements, name), old, new)
    with ExitStack() as patches:
        for module in (statements, sqlite_statements):
            if hasattr(module, name):
                patches.enter_context(mock.patch.object(module, name, fault))
        yield


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


def statement_in(module: ModuleType, name: str, old: str, new: str) -> Patch:
    """A fault in a statement, only where one module sends the statement."""
    fault = changed(getattr(statements, name), old, new)
    faulty = SimpleNamespace(**{**vars(statements), name: fault})
    return mock.patch.object(module, "statements", faulty)


#: Two rows for a FROM clause.
TWICE = "(SELECT 1 UNION ALL SELECT 2) AS n"


def in_sweeps(name: str, old: str, new: str) -> Patch:
    """A fault in a statement of the sweeper."""
    return mock.patch.object(sweeps, name, changed(getattr(sweeps, name), old, new))


def swap_numbers(
    self: Record,
    change: Change,
    *,
    parameters: Callable[..., Any] = Record.parameters,
) -> Mapping[str, Any] | None:
    """The row of a change, with the numbers of new and of replaced keys swapped."""
    swapped = attrs.evolve(change, stored=change.replaced, replaced=change.stored)
    row: Mapping[str, Any] | None = parameters(self, swapped)
    return row


def keep_new_keys(
    self: SqliteEngine,
    txn: Any,
    write: KeyWrite,
    has_lock: bool,
    *,
    compare_and_write: Callable[..., bool] = SqliteEngine.compare_and_write,
) -> bool:
    """Keep the keys that replace others, instead of the replaced ones."""
    unchanged = attrs.evolve(write, kept=())
    is_written = compare_and_write(self, txn, unchanged, has_lock)
    if is_written and write.kept:
        ids = [(key.room_id, key.session_id) for key in write.kept]
        times = {"replaced_ms": write.now_ms, "etag": write.new_etag}
        backup = attrs.asdict(write.backup)
        parameters = {**backup, **times, "ids": json.dumps(ids)}
        txn.execute(sqlite_statements.KEEP_KEYS, parameters)
    return is_written


def has_no_lower_index(key: Replacement) -> bool:
    """A choice of kept keys that is the wrong way round."""
    return not is_lossy(key)


is_lossy = record.is_lossy


def choose_as_replaced(
    self: Undo,
    *arguments: Any,
    choose: Callable[..., Any] = Undo._choose,
) -> Any:
    """Keys to give back, none of which seems to be new."""
    choices = choose(self, *arguments)
    return [attrs.evolve(choice, is_new=False) for choice in choices]


#: Faults that sequential requests can show.
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
#: Faults of the record that only concurrent requests can show, and some that
#: sequential requests can.
RECORD: dict[str, Callable[[], Patch]] = {
    "recorded without a claim": lambda: mock.patch.object(
        postgres_statements,
        "NOTE_WRITE",
        changed(postgres_statements.NOTE_WRITE, "AND etag < 0", ""),
    ),
    "insert not recorded": lambda: mock.patch.object(
        postgres_statements,
        "NOTE_INSERT",
        changed(postgres_statements.NOTE_INSERT, "etag < 0", "etag < etag"),
    ),
    "numbers swapped": lambda: mock.patch.object(Record, "parameters", swap_numbers),
}
#: Faults that clients of one version can't see.
HIDDEN: dict[str, Callable[[], Patch]] = {
    "a count for ever": lambda: mock.patch.object(counts, "COUNT_LIFETIME", 10**9),
    "nobody forgotten": lambda: statement(
        "FORGET_USER", "user_id = :user_id", ":user_id IS NULL"
    ),
    "one page of many": lambda: mock.patch.object(downloads, "key_pages", only_page),
}
#: Faults of the record, of undo and of the sweeper that sequential requests can show,
#: each with the beginning of the expected error.
UNDO: dict[str, tuple[str, Callable[[], Patch]]] = {
    "no record": (
        "record: missing",
        lambda: mock.patch.object(Record, "parameters", lambda *_: None),
    ),
    "recorded twice": (
        "record: .*unexpected",
        lambda: statement("NOTE_CHANGE", "FROM", f"FROM {TWICE},"),
    ),
    "record of the old etag": (
        "record: missing",
        lambda: statement(
            "NOTE_CHANGE", "COALESCE(v.etag, 0)", "COALESCE(etag, 1) - 1"
        ),
    ),
    "numbers swapped": (
        "record: missing",
        lambda: mock.patch.object(Record, "parameters", swap_numbers),
    ),
    "old count of deleted keys": (
        "record: .* keys deleted",
        lambda: statement("QUEUE_DELETION", "AND etag = COALESCE(v.etag, 0)", ""),
    ),
    "new key kept": (
        "replaced: missing",
        lambda: mock.patch.object(SqliteEngine, "compare_and_write", keep_new_keys),
    ),
    "wrong keys kept": (
        "replaced: ",
        lambda: mock.patch.object(record, "is_lossy", has_no_lower_index),
    ),
    "restore forgets the count": (
        ".* is not in|record: .*unexpected",
        lambda: mock.patch.object(Undo, "_choose", choose_as_replaced),
    ),
    "restore forgets the etag": (
        "etag: |record: missing",
        lambda: statement_in(undo, "SET_ETAG", "etag = :new_etag", "etag = etag"),
    ),
    "restore takes the last key": (
        "keys: missing|restored",
        lambda: statement(
            "FIND_REPLACED", "ORDER BY r.replaced_ms, r.etag", "ORDER BY -r.etag"
        ),
    ),
    "restored version keeps its etag": (
        "versions: missing|record: missing",
        lambda: statement("UNMARK_DELETED", "COALESCE(etag, 0) + 1", "etag"),
    ),
    "restored version stays queued": (
        "(queue|due): .*unexpected",
        lambda: statement_in(
            versions, "LEAVE_QUEUE", "version = :version", "version < :version"
        ),
    ),
    "started version restored": (
        "None where .* is due",
        lambda: statement("UNMARK_DELETED", "is_started = 0", "is_started >= 0"),
    ),
    "second deletion can be undone": (
        "queue: missing",
        lambda: statement("QUEUE_DELETION", ", v.deleted", ", 0"),
    ),
    "swept too early": (
        "due: ",
        lambda: in_sweeps("LIST_DELETED", "deleted_ms <= :due_ms", ":due_ms > 0"),
    ),
    "swept too little": (
        "sweep: .* keys left",
        lambda: in_sweeps("DELETE_BATCH", "<=", "<"),
    ),
    "rest not swept": (
        "sweep: .* keys left",
        lambda: in_sweeps("DELETE_REST", "version =", "room_id > '!a:h' AND version ="),
    ),
    "another version swept": (
        "keys: missing",
        lambda: in_sweeps("DELETE_REST", "version =", "version >="),
    ),
    "replaced keys not swept": (
        "sweep: replaced keys left",
        lambda: in_sweeps("DELETE_REPLACED_REST", "version =", "version <"),
    ),
    "record expires too early": (
        "record: missing",
        lambda: in_sweeps("EXPIRE_CHANGES", ":record_ms", ":record_ms + 86400000"),
    ),
    "replaced keys don't expire": (
        "replaced: .*unexpected",
        lambda: in_sweeps("EXPIRE_REPLACED_REST", "replaced_ms <", "replaced_ms >"),
    ),
    "record not forgotten": (
        ".* rows of the user in changes",
        lambda: statement("FORGET_CHANGES", "user_id = :user_id", ":user_id IS NULL"),
    ),
}

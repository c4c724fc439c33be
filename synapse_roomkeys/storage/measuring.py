"""The bytes of a version's keys, measured in transactions that are short."""

from collections.abc import Callable, Generator
from typing import Any, Concatenate, ParamSpec, TypeVar

import attrs
from twisted.internet.defer import Deferred, inlineCallbacks

from ..types import BackupId
from . import statements
from .counts import KeyCounts, NotMeasuredError
from .engine import Engine
from .transactions import Transaction, Transactions
from .values import names

T = TypeVar("T")
P = ParamSpec("P")

#: Number of keys that a transaction measures. A process has a single connection to an
#: SQLite file, so other users wait for the end of the transaction: 5,000 keys of 900
#: bytes took 0.05 seconds with the file in the system's cache, and 0.5 seconds without.
MEASURED_AT_ONCE = 5000


@attrs.frozen
class Measurement:
    """The sizes of a version's first keys, in the order of the ids.

    Attributes:
        etag: the version's etag during the first batch; None before that batch.
        keys: number of measured keys.
        size: bytes of their ``session_data``.
        room_id, session_id: ids with which the next batch begins.
        is_complete: Whether no batch is left.
    """

    etag: int | None = None
    keys: int = 0
    size: int = 0
    room_id: str = ""
    session_id: str = ""
    is_complete: bool = False


class MeasuringDatabase:
    """Writes that measure the keys of a user's versions when a limit has to be checked
    and no valid number of bytes is cached."""

    def __init__(
        self, database: Transactions, engine: Engine, counts: KeyCounts
    ) -> None:
        self._database = database
        self._engine = engine
        self._counts = counts

    @inlineCallbacks
    def write(
        self,
        desc: str,
        function: Callable[Concatenate[Transaction, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> "Generator[Deferred[Any], Any, T]":
        """As `Transactions.write`.

        If the function raises `NotMeasuredError`, measure the version in batches, cache
        the result, and run the transaction again. A write between two batches moves the
        version's etag: the result is discarded, and the version is measured again.
        """
        while True:
            try:
                result: T = yield self._database.write(desc, function, *args, **kwargs)
                return result
            except NotMeasuredError as error:
                backup = error.backup
            measured = Measurement()
            while not measured.is_complete:
                measured = yield self._database.run(
                    "roomkeys_measure_keys", self._measure_batch, backup, measured
                )
            yield self._database.write(
                "roomkeys_keep_size", self._cache, backup, measured
            )

    def _measure_batch(
        self, txn: Transaction, backup: BackupId, before: Measurement
    ) -> Measurement:
        """Measure the next keys of a version. If the etag has moved since the first
        batch or the version was deleted, end the measurement."""
        txn.execute(statements.FIND_ETAG, names(backup))
        row = txn.fetchone()
        etag = None if row is None else row[0]
        if etag is None or before.etag not in (None, etag):
            return attrs.evolve(before, is_complete=True)
        start = {"room_id": before.room_id, "session_id": before.session_id}
        parameters = {**names(backup), **start, "limit": MEASURED_AT_ONCE + 1}
        statement = self._engine.key_sizes
        assert statement is not None
        txn.execute(statement, parameters)
        rows = txn.fetchall()
        is_complete = len(rows) <= MEASURED_AT_ONCE
        # The last row is over the limit: the next batch begins with its key.
        room_id, session_id, _ = ("", "", 0) if is_complete else rows.pop()
        return Measurement(
            etag=etag,
            keys=before.keys + len(rows),
            size=before.size + sum(size for *_, size in rows),
            room_id=room_id,
            session_id=session_id,
            is_complete=is_complete,
        )

    def _cache(self, txn: Transaction, backup: BackupId, measured: Measurement) -> None:
        """Cache a measurement, unless the etag has moved since the first batch."""
        parameters = {
            **names(backup),
            "etag": measured.etag,
            "key_count": measured.keys,
            "key_bytes": measured.size,
            "now": self._counts.now(),
        }
        txn.execute(statements.KEEP_COUNT, parameters)

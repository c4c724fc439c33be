"""Counts transactions in PostgreSQL's log, autocommitted ones as well.

With ``log_duration`` each statement leaves a line when it is done, and the ``%v`` in
front of it ends in ``/0`` when it was the last of its transaction. So one such line is
one transaction.
"""

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

from .databases import PostgresDatabase

_PREFIX = "db=%d vxid=%v "
_ON = (
    "ALTER SYSTEM SET log_duration = on",
    f"ALTER SYSTEM SET log_line_prefix = '{_PREFIX}'",
    "SELECT pg_reload_conf()",
)
_OFF = ("ALTER SYSTEM RESET ALL", "SELECT pg_reload_conf()")
_RELOAD_SECONDS = 0.3


class TransactionLog:
    """A server's log, read from where the last look at it ended."""

    def __init__(self, file: Path, database: str) -> None:
        """Follow one database in a log."""
        name = re.escape(database)
        self._pattern = re.compile(rf"^db={name} vxid=\d+/0 LOG:  duration", re.M)
        self._file = file
        self._position = 0

    def count(self) -> int:
        """Count transactions since the last look."""
        with self._file.open("rb") as stream:
            stream.seek(self._position)
            text = stream.read()
        self._position += len(text)
        return len(self._pattern.findall(text.decode(errors="replace")))


@contextlib.contextmanager
def logging(database: PostgresDatabase) -> Iterator[None]:
    """Have the ends of transactions logged for a while."""
    for statement in _ON:
        database.execute(statement)
    time.sleep(_RELOAD_SECONDS)
    try:
        yield
    finally:
        for statement in _OFF:
            database.execute(statement)

"""Transaction counter over PostgreSQL's log; autocommitted statements count too.

With ``log_duration`` each completed statement writes a line. Its prefix has the virtual
transaction id (``%v``), which ends in ``/0`` after the last statement of a transaction.
So each such line stands for a transaction.
"""

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

from .databases import PostgresDatabase

_PREFIX = "db=%d vxid=%v "
_ENABLE = (
    "ALTER SYSTEM SET log_duration = on",
    f"ALTER SYSTEM SET log_line_prefix = '{_PREFIX}'",
    "SELECT pg_reload_conf()",
)
_DISABLE = ("ALTER SYSTEM RESET ALL", "SELECT pg_reload_conf()")
# Time for the server's processes to reload the configuration.
_RELOAD_SECONDS = 0.3


class TransactionLog:
    """Reader of a PostgreSQL log; its position is kept between counts."""

    def __init__(self, file: Path, database: str) -> None:
        """Read a log for the transactions of a database."""
        name = re.escape(database)
        self._pattern = re.compile(rf"^db={name} vxid=\d+/0 LOG:  duration", re.M)
        self._file = file
        self._position = 0

    def count_new(self) -> int:
        """Return the number of transactions logged since the last call."""
        with self._file.open("rb") as stream:
            stream.seek(self._position)
            text = stream.read()
        self._position += len(text)
        return len(self._pattern.findall(text.decode(errors="replace")))


@contextlib.contextmanager
def log_transactions(database: PostgresDatabase) -> Iterator[None]:
    """Have PostgreSQL log the end of every transaction inside the context."""
    for statement in _ENABLE:
        database.execute(statement)
    time.sleep(_RELOAD_SECONDS)
    try:
        yield
    finally:
        for statement in _DISABLE:
            database.execute(statement)

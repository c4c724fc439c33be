"""Downloads: keys are read page by page, and a single key."""

import logging
from collections.abc import Callable
from itertools import islice

from .. import metrics
from ..errors import unknown_version
from ..identifiers import quote_for_log
from ..json_text import is_valid_json
from ..types import BackupId, KeyPage, Position, RoomKey
from . import rows, statements
from .engine import Engine, NotJsonError, not_json_errors
from .rows import key_pages, keys_after, metadata
from .transactions import Transaction
from .values import PageQuery, names

logger = logging.getLogger(__name__)


class Download:
    """A download of a version or of a room, and the place that it has reached.

    The place outlasts a transaction: a repeated one goes on where the last one failed.
    """

    def __init__(
        self,
        engine: Engine,
        backup: BackupId,
        room_id: str | None,
        after: Position | None,
        on_page: Callable[[KeyPage], bool],
    ) -> None:
        """
        Args:
            room_id: only the keys of this room; None for all.
            after: the key after which the first page begins; None for the first key.
            on_page: is called with each page, in the database's thread, and returns
                whether to go on.
        """
        self._engine = engine
        self._backup = backup
        self._room_id = room_id
        self._after = after
        self._on_page = on_page
        self._is_wanted = True

    def read(self, txn: Transaction) -> None:
        """Push pages until `on_page` returns False or the transaction has had its share
        of pages; then the connection returns to the pool.

        Raises:
            NotFoundError: there is no such version, or no longer.
        """
        pages_left = self._engine.pages_at_once
        has_cursor = False
        while self._is_wanted and pages_left > 0:
            count = keys_after(self._after)
            # At the end, a cursor has no rows. A query has no rows only if the version
            # was deleted, else at least one of NULLs.
            if has_cursor:
                found = self._engine.next_page(txn, count)
            elif not (found := self._engine.read_page(txn, self._query(count))):
                raise unknown_version()
            pages = key_pages(found, count)
            for page in islice(pages, pages_left):
                pages_left -= 1
                if not self._push(page):
                    return
            has_cursor = self._engine.has_cursor

    def _query(self, count: int) -> PageQuery:
        """Return the query of the keys after the place.

        Args:
            count: maximum number of keys that the query itself returns.
        """
        return PageQuery(
            backup=self._backup,
            room_id=self._room_id,
            after=self._after,
            limit=rows.PAGE_KEYS * self._engine.pages_at_once,
            count=count,
        )

    def _push(self, page: KeyPage) -> bool:
        """Push one page, note the page's last key, and return whether to continue."""
        self._after, self._is_wanted = page.last, self._on_page(page)
        return self._is_wanted


def read_key(
    txn: Transaction, engine: Engine, backup: BackupId, room_id: str, session_id: str
) -> RoomKey | None:
    """Return a key; None if it isn't stored, or if its data aren't JSON or UTF-8.

    Raises:
        NotFoundError: there is no such version.
    """
    ids = {"room_id": room_id, "session_id": session_id}
    try:
        with not_json_errors(engine):
            txn.execute(statements.GET_KEY, {**names(backup), **ids})
            row = txn.fetchone()
    except NotJsonError:
        report_broken_row(backup, room_id, session_id)
        return None
    if row is None:
        raise unknown_version()
    *fields, session_data = row
    if session_data is None:
        return None
    if not is_valid_json(session_data):
        report_broken_row(backup, room_id, session_id)
        return None
    return RoomKey(room_id, session_id, metadata(fields), session_data)


def report_broken_row(backup: BackupId, room_id: str, session_id: str) -> None:
    """Log and count a stored key without readable data."""
    metrics.broken_rows.inc()
    logger.error(
        "Left out a key: its session_data isn't JSON:"
        " user=%s version=%s room=%s session=%s",
        backup.user_id,
        backup.version,
        quote_for_log(room_id),
        quote_for_log(session_id),
    )

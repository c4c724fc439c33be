"""Readiness of the database, for load balancers that send a request every second."""

import math
import time
from collections.abc import Callable

from twisted.internet.defer import inlineCallbacks

from ..errors import UnavailableError
from ..inline import Inline
from ..outages import Cause, Outages
from ..storage import (
    CONNECTIONS,
    LOCK,
    SCHEMA,
    WRITE_CAUSES,
    Engine,
    PoolDatabase,
    SchemaError,
    brief,
    probe_tables,
)

#: Seconds between two full tests. A full test took 9 ms (median of 200 tests on a busy
#: machine) on a PostgreSQL that waits for its disk: 0.1 % of the time.
TEST_SECONDS = 10.0
#: Seconds for which the database isn't ready after a request's write failed because the
#: disk is full or the database read-only. The test's own write is small, and may
#: succeed where an upload fails. Retries of a request are at most 1.6 s apart.
HOLD_SECONDS = 5.0
#: Seconds since the last full test after which a lock that stops the next one counts as
#: a failure. Another process may hold the lock of an SQLite file for some seconds, and
#: requests retry for as long.
LOCK_SECONDS = TEST_SECONDS + HOLD_SECONDS


class Unready(Exception):
    """The database doesn't serve requests. The text has the cause and no secret."""


class DatabaseReadiness:
    """Test of a database: a round trip, the tables and a write."""

    def __init__(
        self,
        database: PoolDatabase,
        engine: Engine,
        outages: Outages,
        seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            outages: log of the database's outages, shared with requests.
            seconds: a clock that is never set back.
        """
        self._database = database
        self._engine = engine
        self._outages = outages
        self._seconds = seconds
        #: Time of the last full test that succeeded.
        self._tested = -math.inf

    @inlineCallbacks
    def check(self) -> Inline[None]:
        """Fire with None if the database serves requests.

        The full test runs once in `TEST_SECONDS`, and each time after a failure.
        Between two full tests one round trip shows that the database answers.

        Raises:
            Unready: the database doesn't serve requests.
        """
        now = self._seconds()
        refused = self._outages.has_failure(WRITE_CAUSES, HOLD_SECONDS)
        try:
            if now - self._tested < TEST_SECONDS:
                yield self._database.check()
            else:
                yield self._database.run("roomkeys_probe", probe_tables, self._engine)
                self._tested = now
        # The drivers have no common base class for the errors of connections.
        except Exception as error:
            cause = self._find_cause(error)
            if cause is LOCK and now - self._tested < LOCK_SECONDS:
                return
            self._tested = -math.inf
            self._outages.note_failure(cause, f"{brief(error)} (in a test)")
            raise Unready(brief(error)) from None
        self._outages.note_success()
        if refused:
            raise Unready("writes of requests fail")

    def _find_cause(self, error: Exception) -> Cause:
        if isinstance(error, SchemaError):
            return SCHEMA
        if isinstance(error, UnavailableError):
            return CONNECTIONS
        return self._engine.find_cause(error)

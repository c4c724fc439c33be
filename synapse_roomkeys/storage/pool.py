"""Connection pools of `twisted.enterprise.adbapi`."""

import math
import os
import sqlite3
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

from twisted.enterprise import adbapi
from twisted.internet.defer import Deferred, DeferredSemaphore, inlineCallbacks

from .. import metrics
from ..errors import UnavailableError
from .arguments import with_timeouts
from .causes import RETRY_AFTER
from .engine import Engine
from .faults import Fault
from .postgres_engine import postgres
from .sqlite_engine import SQLITE
from .transactions import Transaction

T = TypeVar("T")
P = ParamSpec("P")

#: While another connection turns a new SQLite file's write-ahead log on, a connection
#: retries for this long, with this pause, both in seconds. SQLite itself returns
#: "database is locked" without waiting there.
_WAL_SECONDS = 5.0
_WAL_PAUSE = 0.02
#: Longest wait for an SQLite file that another process has locked, in seconds. The
#: transaction holds the file's only connection meanwhile, which readers need.
_LOCK_SECONDS = 0.5
#: Longest wait of a transaction for a connection, in seconds.
_WAIT_SECONDS = 5
#: Sets TCP timeouts of the server's end of a connection, unless the server's
#: configuration sets them. If a client vanishes, the server rolls its transaction back
#: after the times of `LIBPQ_DEFAULTS`; Linux would take 2 hours. The parameter is the
#: connection's backend pid.
_SERVER_DEFAULTS = """
    SELECT set_config(name, value, false) FROM pg_settings JOIN (VALUES
        ('tcp_user_timeout', '10000'), ('tcp_keepalives_idle', '5'),
        ('tcp_keepalives_interval', '5'), ('tcp_keepalives_count', '2')
    ) AS ours (name, value) USING (name)
    WHERE source = 'default' AND pg_backend_pid() = %s"""
#: If a read-only connection is younger than these seconds, older connections are kept:
#: a server that stays read-only must not make all reconnect at each write.
_YOUNG_SECONDS = 1.0


class PoolDatabase:
    """A database over a connection pool of `twisted.enterprise.adbapi`.

    A transaction waits for a connection in a semaphore of this class, with a timeout,
    and not for a thread of the pool, which has none.

    Attributes:
        connections: maximum number of connections.
    """

    def __init__(self, pool: adbapi.ConnectionPool, engine: Engine) -> None:
        # Imported late, as adbapi does: importing the reactor installs the default one.
        from twisted.internet import reactor

        self._reactor = reactor
        self._pool = pool
        self._engine = engine
        self.connections = pool.max
        self._connections = DeferredSemaphore(pool.max)

    @property
    def size(self) -> int:
        """Maximum number of connections."""
        return self._connections.limit

    @property
    def in_use(self) -> int:
        """Number of transactions that have a connection."""
        return self._connections.limit - self._connections.tokens

    @property
    def waiting(self) -> int:
        """Number of transactions that wait for a connection."""
        return len(self._connections.waiting)

    @inlineCallbacks
    def run(
        self,
        desc: str,
        function: Callable[Concatenate[Transaction, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> "Generator[Deferred[Any], Any, T]":
        """As `Database.run`.

        Raises:
            UnavailableError: no connection was free for `_WAIT_SECONDS`.
        """
        turn = self._connections.acquire()
        yield turn.addTimeout(_WAIT_SECONDS, self._reactor, _give_up)
        interact: Any = self._pool.runInteraction
        began = time.perf_counter()
        try:
            result: T = yield interact(function, *args, **kwargs)
            return result
        finally:
            seconds = time.perf_counter() - began
            metrics.series(metrics.transaction_seconds, desc).observe(seconds)
            self._connections.release()

    def check(self) -> "Deferred[None]":
        """Fire with None if the database answers and accepts writes.

        Raises:
            ReadOnlyError: the database refuses writes.
            Exception: any error of the driver.
        """
        return self.run("check", self._check)

    def _check(self, txn: Transaction) -> None:
        txn.execute(self._engine.tables.find_read_only)
        if txn.fetchall() != [(0,)]:
            raise ReadOnlyError("the database is read-only")

    def close(self) -> None:
        """Close the connections and end the threads."""
        self._pool.close()


def _give_up(result: object, seconds: float) -> NoReturn:
    raise UnavailableError(RETRY_AFTER)


class ReadOnlyError(Exception):
    """The database refuses writes; `PoolDatabase.check` found it read-only."""


class _PostgresConnection(adbapi.Connection):
    """A connection whose rollback logs nothing if the connection is lost: the
    transaction's own error is logged."""

    def rollback(self) -> None:
        """Roll the transaction back, unless the connection is closed."""
        connection: Any = self._connection
        if not connection.closed:
            super().rollback()  # type: ignore[no-untyped-call]


class _PostgresPool(adbapi.ConnectionPool):
    """A pool that replaces all connections when a connection is lost or read-only.

    After a restart of the server all connections are dead. After a failover behind an
    address all connections lead to the new standby. Each thread replaces its own
    connection before the next transaction.
    """

    connectionFactory = _PostgresConnection

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)  # type: ignore[no-untyped-call]
        self._judge = postgres().judge
        self._thread: Callable[[], int] = self.threadID
        self._drop: Callable[[Any], None] = self.disconnect
        #: Monotonic time in seconds at which each thread connected, by thread id.
        self._connected: dict[int, float] = {}
        #: Connections older than this monotonic time are replaced.
        self._stale = -math.inf

    def connect(self) -> Any:
        """Return the thread's connection; connect if there is none or it is stale."""
        thread = self._thread()
        connection = self.connections.get(thread)
        if connection is not None and self._connected[thread] < self._stale:
            self._drop(connection)
            connection = None
        if connection is None:
            self._connected[thread] = time.monotonic()
        connect: Any = super().connect
        return connect()

    def _runInteraction(self, *args: Any, **keywords: Any) -> Any:
        run: Any = super()._runInteraction
        try:
            return run(*args, **keywords)
        except Exception as error:
            connection = self.connections.get(self._thread())
            if connection is not None:
                is_lost = bool(connection.closed)
                is_read_only = isinstance(error, ReadOnlyError)
                is_read_only |= self._judge(error) is Fault.READ_ONLY
                if is_lost or is_read_only:
                    self._replace(connection, is_lost)
            raise

    def _replace(self, connection: Any, is_lost: bool) -> None:
        """Close the thread's connection, and mark older connections as stale.

        Args:
            is_lost: Whether the connection was lost, not read-only.
        """
        self._drop(connection)
        now = time.monotonic()
        if is_lost or self._connected[self._thread()] < now - _YOUNG_SECONDS:
            self._stale = now


class _PrivateConnection(sqlite3.Connection):
    """A connection that creates a missing file readable by its owner alone, whatever
    the umask is. SQLite gives the -wal and -shm files the same mode."""

    def __init__(self, database: str, *args: Any, **kwargs: Any) -> None:
        # O_EXCL leaves an existing file unopened, with its mode: closing any descriptor
        # of the file would release SQLite's locks.
        with suppress(OSError):
            os.close(os.open(database, os.O_CREAT | os.O_EXCL, 0o600))
        super().__init__(database, *args, **kwargs)


def sqlite_database(path: str) -> PoolDatabase:
    """Return an SQLite database. A missing file is created, for its owner alone."""

    def prepare(connection: sqlite3.Connection) -> None:
        end = time.monotonic() + _WAL_SECONDS
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError:
                if time.monotonic() > end:
                    raise
                time.sleep(_WAL_PAUSE)

    pool = adbapi.ConnectionPool(
        "sqlite3",
        path,
        cp_min=1,
        cp_max=1,
        cp_openfun=prepare,
        factory=_PrivateConnection,
        timeout=_LOCK_SECONDS,
        check_same_thread=False,
    )
    return PoolDatabase(pool, SQLITE)


def postgres_database(arguments: Mapping[str, Any]) -> PoolDatabase:
    """Return a database of a PostgreSQL server.

    Args:
        arguments: those of ``psycopg2.connect``, and ``cp_min`` and ``cp_max`` of
            `adbapi.ConnectionPool`, how many connections there are.
    """

    def prepare(connection: Any) -> None:
        connection.set_session(isolation_level="READ COMMITTED")
        # PgBouncer reports a pid that is not the server's, so the condition fails and
        # nothing is set: other programs share PgBouncer's connection to the server.
        with connection, connection.cursor() as cursor:
            cursor.execute(_SERVER_DEFAULTS, (connection.info.backend_pid,))

    pool = _PostgresPool(
        "psycopg2",
        **{
            "cp_min": 1,
            "cp_max": 10,
            "cp_reconnect": True,
            "cp_openfun": prepare,
            **with_timeouts(arguments),
            # Statements and keys are UTF-8, also if PGCLIENTENCODING differs.
            "client_encoding": "UTF8",
        },
    )
    return PoolDatabase(pool, postgres())

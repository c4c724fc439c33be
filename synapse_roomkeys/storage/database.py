"""Transactions, over `twisted.enterprise.adbapi` or over the host's own pool."""

import math
import os
import sqlite3
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Concatenate, NoReturn, ParamSpec, Protocol, TypeVar

import attrs
from twisted.enterprise import adbapi
from twisted.internet.defer import Deferred, DeferredSemaphore, inlineCallbacks

from .. import metrics
from ..clock import Clock
from ..describe import error_line
from ..errors import OutageError, UnavailableError
from ..fairness import Lane
from ..outages import Cause, Outages
from . import sql
from .faults import Fault, judge_sqlite, judge_sqlstate

#: For how long a connection waits, and how long between two tries, while another is
#: turning a new SQLite file's write-ahead log on: SQLite doesn't wait there. Seconds.
_WAL_SECONDS = 5.0
_WAL_PAUSE = 0.02
#: For how long one try waits while another process has an SQLite file locked. It holds
#: the one connection meanwhile, and readers need that. Seconds.
_LOCK_SECONDS = 0.5
#: For how long a transaction waits for a connection. Seconds.
_WAIT_SECONDS = 5
#: What libpq is told where the arguments say nothing. It waits 5 seconds for each host.
#: A server that vanished without a word, as one does that loses its power, is believed
#: to be gone after 10 seconds (in milliseconds) without an answer to what was sent or,
#: while an answer is waited for, to a probe. Linux takes 15 minutes, or two hours.
LIBPQ_DEFAULTS = {
    "connect_timeout": 5,
    "tcp_user_timeout": 10_000,
    "keepalives_idle": 5,
    "keepalives_interval": 5,
}

#: TCP settings of the server's end of a connection, by which the server notices a
#: client that vanished and rolls its transaction back: the same times as in
#: `LIBPQ_DEFAULTS`. Linux would take 2 hours.
_SERVER_DEFAULTS = """
    SELECT set_config(name, value, false) FROM pg_settings JOIN (VALUES
        ('tcp_user_timeout', '10000'), ('tcp_keepalives_idle', '5'),
        ('tcp_keepalives_interval', '5'), ('tcp_keepalives_count', '2')
    ) AS ours (name, value) USING (name)
    WHERE source = 'default' AND pg_backend_pid() = %s"""
#: Age in seconds below which a connection that turned out read-only says nothing of the
#: others: a server that stays read-only would have all of them reconnect at each write.
_YOUNG_SECONDS = 1.0

#: Share of the connections that writes may hold at once, tries after a lock timeout
#: apart. Reads have the others when every write waits for a lock.
_WRITE_SHARE = 0.7
#: How many transactions may run at once that are likely to wait for a lock.
_LOCKED_WIDTH = 1
#: Longest wait of `Transactions.attempt` for its turn, in seconds: the answer to a
#: request doesn't depend on it.
_ATTEMPT_WAIT = 0.5

T = TypeVar("T")
P = ParamSpec("P")

#: Seconds between the tries of a transaction while the database is away.
_RETRY_DELAYS = (0.1, 0.2, 0.4, 0.8, 1.6)
#: No try begins later than that after the first one, in seconds: each may take a while.
_TRY_SECONDS = 4
#: What a client is told to wait when all tries have failed, in seconds.
RETRY_AFTER = 10

#: Reads go on while nothing can be written, and a client that was answered 503 sends
#: its upload again after `RETRY_AFTER` seconds: a write outage is over only later.
_WRITE_SETTLE_SECONDS = RETRY_AFTER + 5.0
UNREACHABLE = Cause(
    "unreachable", "See that the database runs, and that this address is the right one"
)
READ_ONLY = Cause(
    "read_only",
    "Connect to the primary (target_session_attrs: read-write), or see what made the"
    " database read-only",
    _WRITE_SETTLE_SECONDS,
)
DISK_FULL = Cause(
    "disk_full",
    "Make room where the database keeps its files, and see its own log",
    _WRITE_SETTLE_SECONDS,
)
LOCK = Cause(
    "lock",
    "If it lasts, look for who holds the lock: pg_stat_activity in PostgreSQL, another"
    " process with the file in SQLite",
)
CONNECTIONS = Cause(
    "connections", "If it lasts, look for slow queries, or raise cp_max of the pool"
)
SCHEMA = Cause(
    "schema",
    "A table is missing, not of this version, or not granted: put it back from a copy,"
    " or install the version that made it",
)
OTHER = Cause("other", "See the database's own log")
#: All causes, as metrics label them.
CAUSES = (UNREACHABLE, READ_ONLY, DISK_FULL, LOCK, CONNECTIONS, SCHEMA, OTHER)
#: The causes that stop writes and leave reads.
WRITE_CAUSES = (READ_ONLY, DISK_FULL)

# A rate needs a series that begins at 0.
for _cause in CAUSES:
    metrics.transaction_retries.labels(_cause.name)
    metrics.transaction_failures.labels(_cause.name)


class Transaction(Protocol):
    """A cursor in a transaction; statements have ``?`` for their parameters."""

    @property
    def rowcount(self) -> int:
        """How many rows the last statement wrote."""

    @property
    def description(self) -> Any:
        """The columns of the last statement's rows, their names first."""

    def execute(self, statement: str, parameters: Any = ()) -> Any:
        """Run a statement."""

    def fetchone(self) -> Any:
        """The next row, or None."""

    def fetchall(self) -> list[tuple[Any, ...]]:
        """The rows that are left."""


class Database(Protocol):
    """Runs functions in transactions; the host brings one.

    Attributes:
        connections: how many transactions may run at once.
    """

    connections: int

    def run(
        self,
        desc: str,
        function: Callable[Concatenate[Transaction, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> "Deferred[T]":
        """Call a function with a transaction, in a thread, and commit.

        On PostgreSQL it is READ COMMITTED: each statement sees what was committed
        before it, so a writer that has waited for a lock goes on with what is true now.

        Args:
            desc: names the transaction in logs and metrics.

        Returns:
            A Deferred that fires with the function's result after the commit, or
            fails with its exception after a rollback.
        """


class Transactions(Protocol):
    """Runs transactions with retries: the port of the store to its database."""

    def run(
        self,
        desc: str,
        function: Callable[Concatenate[Transaction, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> "Deferred[T]":
        """As `RetryingDatabase.run`."""

    def write(
        self,
        desc: str,
        function: Callable[Concatenate[Transaction, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> "Deferred[T]":
        """As `RetryingDatabase.write`."""

    def attempt(
        self,
        desc: str,
        function: Callable[Concatenate[Transaction, P], object],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> "Deferred[None]":
        """As `RetryingDatabase.attempt`."""


@attrs.frozen
class Engine:
    """A database engine: its SQL, and the meaning of its driver's errors.

    Attributes:
        name: its name in metrics.
        error: base class of the driver's exceptions.
        judge: returns the kind of an exception, DEFECT for one that isn't the driver's.
        find_cause: returns the cause of a driver's error, for metrics and logs.
    """

    name: str
    dialect: sql.Dialect
    error: type[Exception]
    judge: Callable[[Exception], Fault]
    find_cause: Callable[[Exception], Cause]


#: The causes of SQLite's errors by the beginning of their texts. (Python 3.10 doesn't
#: give their numbers.)
_SQLITE_TEXTS = {
    "database is locked": LOCK,
    "database table is locked": LOCK,
    "database or disk is full": DISK_FULL,
    "disk I/O error": DISK_FULL,
    "attempt to write a readonly database": READ_ONLY,
    "unable to open database file": UNREACHABLE,
    "no such table": SCHEMA,
}
#: The causes of PostgreSQL's errors by the beginning of their SQLSTATE, from the
#: documentation's "PostgreSQL Error Codes".
_POSTGRES_STATES = {
    "08": UNREACHABLE,
    "57P": UNREACHABLE,
    "25006": READ_ONLY,
    "53100": DISK_FULL,
    "58030": DISK_FULL,
    "40": LOCK,
    "55P03": LOCK,
    "57014": LOCK,
    "25P03": LOCK,
    "53300": CONNECTIONS,
    # A password, a role or the database itself.
    "28": UNREACHABLE,
    "3D000": UNREACHABLE,
    # A privilege, a table, a unique index or a schema.
    "42501": SCHEMA,
    "42P01": SCHEMA,
    "42P10": SCHEMA,
    "3F000": SCHEMA,
}


def _find_cause(text: str, causes: Mapping[str, Cause]) -> Cause:
    found = (cause for start, cause in causes.items() if text.startswith(start))
    return next(found, OTHER)


def _find_postgres_cause(error: Exception) -> Cause:
    """The cause of an error; one without an SQLSTATE is libpq's, which found no
    server."""
    return _find_cause(getattr(error, "pgcode", None) or "08", _POSTGRES_STATES)


SQLITE = Engine(
    "sqlite",
    sql.SQLITE,
    sqlite3.Error,
    judge_sqlite,
    lambda error: _find_cause(str(error), _SQLITE_TEXTS),
)


def postgres() -> Engine:
    """The engine PostgreSQL.

    Raises:
        ImportError: psycopg2 isn't installed.
    """
    import psycopg2

    # Errors without a SQLSTATE are libpq's, for a connection that failed or broke, or,
    # of the latter classes, psycopg2's own, for a wrong call.
    ours = (
        psycopg2.DataError,
        psycopg2.IntegrityError,
        psycopg2.NotSupportedError,
        psycopg2.ProgrammingError,
    )

    def judge(error: Exception) -> Fault:
        if isinstance(error, adbapi.ConnectionLost):
            return Fault.OUTAGE
        if not isinstance(error, psycopg2.Error):
            return Fault.DEFECT
        if error.pgcode:
            return judge_sqlstate(error.pgcode)
        return Fault.DEFECT if isinstance(error, ours) else Fault.OUTAGE

    return Engine(
        "postgresql", sql.POSTGRES, psycopg2.Error, judge, _find_postgres_cause
    )


class ConflictError(Exception):
    """A row is there already, which the transaction could not see when it began."""


class LockedError(Exception):
    """A lock was not free within the lock timeout; the driver's error is the cause.

    Synapse runs a transaction again, on the same connection, at each of psycopg2's
    operational errors, of which a lock timeout is one. It passes on other exceptions.
    """


class _Limited:
    """A transaction whose first statement brings the engine's limits in its message."""

    def __init__(self, txn: Transaction, dialect: sql.Dialect) -> None:
        self._txn = txn
        self._dialect = dialect
        self._is_new = True
        self.fetchone = txn.fetchone
        self.fetchall = txn.fetchall

    @property
    def rowcount(self) -> int:
        """As `Transaction.rowcount`."""
        return self._txn.rowcount

    @property
    def description(self) -> Any:
        """As `Transaction.description`."""
        return self._txn.description

    def execute(self, statement: str, parameters: Any = ()) -> Any:
        """As `Transaction.execute`."""
        limits = self._dialect.limits if self._is_new else ""
        self._is_new = False
        return self._txn.execute(limits + statement, parameters)


class RetryingDatabase:
    """A database whose transactions are retried for some seconds before a 503.

    Transactions must be safe to repeat. Merging is idempotent; repeating
    create_version leaves an unused version.

    On PostgreSQL, a transaction waits for a lock for a second at most
    (`sql.LOCK_SECONDS`). To keep those that wait from taking every connection, writes
    share some of the connections, and a try after a lock timeout has to take one narrow
    lane. An SQLite file has one connection and one lock, so there are no lanes.
    """

    def __init__(
        self, database: Database, engine: Engine, clock: Clock, outages: Outages
    ) -> None:
        """
        Args:
            outages: where failed tries are logged.
        """
        self._database = database
        self._engine = engine
        self._clock = clock
        self._outages = outages
        self._writes = self._locked = None
        if database.connections > 1:
            width = max(1, int(database.connections * _WRITE_SHARE))
            self._writes = Lane(clock, width)
            self._locked = Lane(clock, _LOCKED_WIDTH)

    def run(
        self,
        desc: str,
        function: Callable[Concatenate[Transaction, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> "Deferred[T]":
        """Run a transaction that takes no row lock, as `Database.run`.

        Raises:
            UnavailableError: all tries have failed; the last one's error is the cause.
            OutageError: the same, and the user's other requests would fail as well.
            ConflictError: a row is there already.
        """
        return self._retry(None, _RETRY_DELAYS, desc, function, *args, **kwargs)

    def write(
        self,
        desc: str,
        function: Callable[Concatenate[Transaction, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> "Deferred[T]":
        """Run a transaction that may wait for a row lock.

        Raises:
            UnavailableError, OutageError, ConflictError: as `run`.
        """
        lane = self._writes
        return self._retry(lane, _RETRY_DELAYS, desc, function, *args, **kwargs)

    @inlineCallbacks
    def attempt(
        self,
        desc: str,
        function: Callable[Concatenate[Transaction, P], object],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> "Generator[Deferred[Any], Any, None]":
        """Run a transaction once, where the answer doesn't depend on its success.

        A database that is locked, full, read-only or away is logged, not raised.
        """
        try:
            yield self._retry(self._locked, (), desc, function, *args, **kwargs)
        except UnavailableError:
            # It is logged already.
            return

    @inlineCallbacks
    def _retry(
        self,
        lane: Lane | None,
        delays: Sequence[float],
        desc: str,
        function: Callable[Concatenate[Transaction, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> "Generator[Deferred[Any], Any, T]":
        """Try until a try succeeds, or its error isn't passing, or time is up.

        Args:
            lane: limits how many of these tries run at once.
            delays: seconds between tries; after the last one there is one try more.
        """
        end = time.monotonic() + _TRY_SECONDS
        wait: float = _WAIT_SECONDS if delays else _ATTEMPT_WAIT
        failure: Exception | None = None
        fault = Fault.PASSING
        for delay in (*delays, math.inf):
            try:
                turn = lane.enter(wait) if lane else None
                if turn is not None:
                    yield turn
                try:
                    result: T = yield self._database.run(
                        desc, self._in_thread, function, *args, **kwargs
                    )
                    self._outages.note_success()
                    return result
                finally:
                    if lane is not None:
                        lane.leave()
            except UnavailableError:
                # No place in the lane, or no connection, was free in time.
                if failure is None:
                    what = f"no connection was free (for {desc})"
                    self._refuse(CONNECTIONS, what, is_needed=bool(delays))
                    raise
                break
            except Exception as error:
                failure, fault = self._judge(error)
                if fault is Fault.DEFECT:
                    raise
                if fault is Fault.CONFLICT:
                    raise ConflictError(desc) from failure
                cause = self._engine.find_cause(failure)
                what = f"{brief(failure)} (in {desc})"
            if fault is Fault.LOCKED and lane is not None:
                lane = self._locked
            wait = end - time.monotonic() - delay
            if wait < 0:
                break
            self._outages.note_failure(cause, what)
            metrics.transaction_retries.labels(cause.name).inc()
            yield self._clock.sleep(delay)
        assert failure is not None
        self._refuse(cause, what, is_needed=bool(delays))
        kind = UnavailableError if fault is Fault.PASSING else OutageError
        raise kind(RETRY_AFTER) from failure

    def _in_thread(
        self,
        txn: Transaction,
        function: Callable[Concatenate[Transaction, P], T],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Call a function with a transaction that has the engine's limits."""
        if self._engine.dialect.limits:
            txn = _Limited(txn, self._engine.dialect)
        try:
            return function(txn, *args, **kwargs)
        except self._engine.error as error:
            if self._engine.judge(error) is Fault.LOCKED:
                raise LockedError from error
            raise

    def _judge(self, error: Exception) -> tuple[Exception, Fault]:
        """Return the driver's error behind an exception, and its kind."""
        if isinstance(error, LockedError) and isinstance(error.__cause__, Exception):
            error = error.__cause__
        return error, self._engine.judge(error)

    def _refuse(self, cause: Cause, what: str, is_needed: bool) -> None:
        """Count and log a transaction that isn't tried again.

        Args:
            is_needed: whether its request is answered 503.
        """
        if is_needed:
            self._outages.note_refusal(cause, what)
            metrics.transaction_failures.labels(cause.name).inc()
        else:
            self._outages.note_failure(cause, what)


def brief(error: Exception) -> str:
    """An exception's kind and its line for operators."""
    return f"{type(error).__name__}: {error_line(error)}"


class PoolDatabase:
    """A database over a connection pool of `twisted.enterprise.adbapi`.

    Transactions wait for a connection here, not for a thread there, so that they can
    give up.

    Attributes:
        connections: how many connections there are at most.
    """

    def __init__(self, pool: adbapi.ConnectionPool, dialect: sql.Dialect) -> None:
        # As adbapi does: whoever only imports this has no reactor yet.
        from twisted.internet import reactor

        self._reactor = reactor
        self._pool = pool
        self._dialect = dialect
        self.connections = pool.max
        self._connections = DeferredSemaphore(pool.max)

    @property
    def size(self) -> int:
        """How many connections there are at most."""
        return self._connections.limit

    @property
    def in_use(self) -> int:
        """How many transactions have a connection."""
        return self._connections.limit - self._connections.tokens

    @property
    def waiting(self) -> int:
        """How many transactions wait for a connection."""
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
            UnavailableError: others have had all connections for too long.
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
        """Fires with None when the database answers and takes writes.

        Raises:
            ReadOnlyError: it takes none.
            Exception: whatever else the driver raises.
        """
        return self.run("check", self._check)

    def _check(self, txn: Transaction) -> None:
        txn.execute(self._dialect.find_read_only)
        if txn.fetchall() != [(0,)]:
            raise ReadOnlyError("the database is read-only")

    def close(self) -> None:
        """Close the connections and end the threads."""
        self._pool.close()


def _give_up(result: object, seconds: float) -> NoReturn:
    raise UnavailableError(RETRY_AFTER)


class ReadOnlyError(Exception):
    """The database refuses writes; `PoolDatabase.check` found it read-only."""


class _PostgresTransaction(adbapi.Transaction):
    """A transaction that translates the marks of parameters for psycopg2."""

    def execute(self, statement: str, parameters: Any = ()) -> Any:
        cursor: Any = self._cursor
        return cursor.execute(statement.replace("?", "%s"), parameters)


class _PostgresConnection(adbapi.Connection):
    """A connection that logs nothing when it is lost; the transaction's error does."""

    def rollback(self) -> None:
        """Undo the transaction, if the connection is still there."""
        connection: Any = self._connection
        if not connection.closed:
            super().rollback()  # type: ignore[no-untyped-call]


class _PostgresPool(adbapi.ConnectionPool):
    """A pool that replaces its connections when one was lost or is read-only.

    After a restart of the server all connections are dead; after a failover behind one
    address all lead to what is a standby now. Each thread replaces its own connection
    before its next transaction.
    """

    connectionFactory = _PostgresConnection
    transactionFactory = _PostgresTransaction

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)  # type: ignore[no-untyped-call]
        self._judge = postgres().judge
        self._thread: Callable[[], int] = self.threadID
        self._drop: Callable[[Any], None] = self.disconnect
        #: When each thread connected, in monotonic seconds.
        self._connected: dict[int, float] = {}
        #: Connections made before this time are replaced.
        self._stale = -math.inf

    def connect(self) -> Any:
        """Return the thread's connection, a new one where there is none or a stale."""
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
                is_read_only = isinstance(error, ReadOnlyError)
                is_read_only |= self._judge(error) is Fault.READ_ONLY
                if connection.closed or is_read_only:
                    self._replace(connection)
            raise

    def _replace(self, connection: Any) -> None:
        """Close the thread's connection, and have older ones replaced as well."""
        self._drop(connection)
        now = time.monotonic()
        if self._connected[self._thread()] < now - _YOUNG_SECONDS:
            self._stale = now


class _PrivateConnection(sqlite3.Connection):
    """A connection that makes a new file readable by its owner alone, whatever the
    umask is. SQLite gives -wal and -shm the file's mode."""

    def __init__(self, database: str, *args: Any, **kwargs: Any) -> None:
        # An existing file keeps its mode. It isn't opened here: closing any descriptor
        # of it would release SQLite's locks.
        with suppress(OSError):
            os.close(os.open(database, os.O_CREAT | os.O_EXCL, 0o600))
        super().__init__(database, *args, **kwargs)


def sqlite_database(path: str) -> PoolDatabase:
    """A database in a file, made when it isn't there, for its owner alone."""

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
    return PoolDatabase(pool, sql.SQLITE)


def database_address(engine: Engine, arguments: Mapping[str, Any]) -> str:
    """Describe where a database is: hosts and ports, or the path of a file.

    Other arguments are left out, because operators put passwords in wrong places.

    Args:
        arguments: those of ``psycopg2.connect`` or ``sqlite3.connect``.
    """
    if engine is SQLITE:
        return str(arguments["database"])
    found = dict(arguments)
    if "dsn" in found:
        from psycopg2 import ProgrammingError
        from psycopg2.extensions import parse_dsn

        try:
            found |= parse_dsn(found["dsn"])
        except ProgrammingError:
            return "of database.args.dsn"
    host = found.get("host") or found.get("hostaddr") or "a local socket"
    return f"{host}:{found.get('port', 5432)}"


def with_timeouts(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``psycopg2.connect``, and the timeouts that they don't have.

    A dsn has to have its own: what stands in it gives way to arguments of its name.
    """
    return {**({} if "dsn" in arguments else LIBPQ_DEFAULTS), **arguments}


def find_wrong_argument(arguments: Mapping[str, Any]) -> str | None:
    """Find an argument of ``psycopg2.connect`` that libpq rejects, without connecting.

    A host with an @ and a port that isn't a number are wrong too. In a URI an @ or / in
    the password ends the password, and the rest becomes host or port. Only at its start
    a host may have an @: it names a socket of Linux's abstract namespace.

    Returns:
        The name of the argument, or None: all are right, or psycopg2 isn't installed.
    """
    try:
        from psycopg2 import ProgrammingError
        from psycopg2.extensions import parse_dsn
    except ImportError:
        return None
    # psycopg2's own name for dbname.
    for name in arguments.keys() - {"dsn", "database"}:
        try:
            parse_dsn(f"{name}=''")
        except ProgrammingError:
            return name
    try:
        parsed = parse_dsn(str(arguments.get("dsn", "")))
    except ProgrammingError:
        return "dsn"
    if _find_wrong_place(parsed) is not None:
        return "dsn"
    return _find_wrong_place(arguments)


def _find_wrong_place(arguments: Mapping[str, Any]) -> str | None:
    """The one of host and port that can't be what its name says, or None."""
    hosts = str(arguments.get("host", "")).split(",")
    if any("@" in host[1:] for host in hosts):
        return "host"
    ports = str(arguments.get("port", "")).replace(",", "0")
    return None if ports.isdecimal() or not ports else "port"


def postgres_database(arguments: Mapping[str, Any]) -> PoolDatabase:
    """A database of a PostgreSQL server.

    Args:
        arguments: those of ``psycopg2.connect``, and ``cp_min`` and ``cp_max`` of
            `adbapi.ConnectionPool`, how many connections there are.
    """

    def prepare(connection: Any) -> None:
        connection.set_session(isolation_level="READ COMMITTED")
        # PgBouncer makes up a pid of its own. Its connection to the server is shared
        # with others, whose settings are none of ours.
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
            # Statements and keys are UTF-8, whatever the operator's environment says.
            "client_encoding": "UTF8",
        },
    )
    return PoolDatabase(pool, sql.POSTGRES)

"""Transactions, over `twisted.enterprise.adbapi` or over the host's own pool."""

import logging
import math
import sqlite3
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, Concatenate, NoReturn, ParamSpec, Protocol, TypeVar

import attrs
from twisted.enterprise import adbapi
from twisted.internet.defer import Deferred, DeferredSemaphore, inlineCallbacks

from ..clock import Clock
from ..describe import error_line
from ..errors import OutageError, UnavailableError
from . import sql

logger = logging.getLogger(__name__)

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

T = TypeVar("T")
P = ParamSpec("P")

#: Seconds between the tries of a transaction while the database is away.
_RETRY_DELAYS = (0.1, 0.2, 0.4, 0.8, 1.6)
#: No try begins later than that after the first one, in seconds: each may take a while.
_TRY_SECONDS = 4
#: What a client is told to wait when all tries have failed, in seconds.
RETRY_AFTER = 10


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
    """Runs functions in transactions; the host brings one."""

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


@attrs.frozen
class Engine:
    """A database engine: how it is spoken to and how it says that it is away.

    Attributes:
        error: what all of the driver's exceptions are.
        transient: those after which trying again may help.
        conflict: those that say that a row is there already.
        is_outage: whether one of these says that any transaction would fail.
    """

    dialect: sql.Dialect
    error: type[Exception]
    transient: tuple[type[Exception], ...]
    conflict: tuple[type[Exception], ...]
    is_outage: Callable[[Exception], bool]


SQLITE = Engine(
    sql.SQLITE,
    sqlite3.Error,
    (sqlite3.OperationalError,),
    (),
    lambda error: str(error).startswith("database is locked"),
)


def postgres() -> Engine:
    """The engine PostgreSQL.

    Raises:
        ImportError: psycopg2 isn't installed.
    """
    import psycopg2.errors

    return Engine(
        sql.POSTGRES,
        psycopg2.Error,
        (psycopg2.OperationalError, psycopg2.InterfaceError, adbapi.ConnectionLost),
        (psycopg2.errors.UniqueViolation,),
        # One that can't be reached says nothing; 57P is one that stops or starts.
        lambda error: (getattr(error, "pgcode", None) or "57P").startswith("57P"),
    )


class ConflictError(Exception):
    """A row is there already, which the transaction could not see when it began."""


class RetryingDatabase:
    """A database that is tried for some seconds before it is said to be away.

    Every transaction of the plugin may run twice: writing the same again changes
    nothing, and a version that was made twice leaves one that nobody was told of.
    """

    def __init__(self, database: Database, engine: Engine, clock: Clock) -> None:
        self._database = database
        self._engine = engine
        self._clock = clock

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
            UnavailableError: all tries have failed; its cause is what the last one met.
            OutageError: others would fail as well.
            ConflictError: a row is there already.
        """
        end = time.monotonic() + _TRY_SECONDS
        for delay in (*_RETRY_DELAYS, math.inf):
            try:
                result: T = yield self._database.run(desc, function, *args, **kwargs)
                return result
            except self._engine.conflict as error:
                raise ConflictError(desc) from error
            except self._engine.transient as error:
                failure = error
            if time.monotonic() + delay > end:
                break
            logger.warning("%s failed, trying again: %s", desc, _brief(failure))
            yield self._clock.sleep(delay)
        logger.error("%s failed for good: %s", desc, _brief(failure))
        is_outage = self._engine.is_outage(failure)
        kind = OutageError if is_outage else UnavailableError
        raise kind(RETRY_AFTER) from failure


def _brief(error: Exception) -> str:
    """An exception's kind and its line for operators."""
    return f"{type(error).__name__}: {error_line(error)}"


class PoolDatabase:
    """A database over a connection pool of `twisted.enterprise.adbapi`.

    Transactions wait for a connection here, not for a thread there, so that they can
    give up.
    """

    def __init__(self, pool: adbapi.ConnectionPool) -> None:
        # As adbapi does: whoever only imports this has no reactor yet.
        from twisted.internet import reactor

        self._reactor = reactor
        self._pool = pool
        self._connections = DeferredSemaphore(pool.max)

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
        try:
            result: T = yield interact(function, *args, **kwargs)
            return result
        finally:
            self._connections.release()

    def check(self) -> "Deferred[None]":
        """Fires with None when the database answers, or fails with its error."""
        return self.run("check", _ask_for_nothing)

    def close(self) -> None:
        """Close the connections and end the threads."""
        self._pool.close()


def _give_up(result: object, seconds: float) -> NoReturn:
    logger.error("All connections to the database are taken for %d s", seconds)
    raise UnavailableError(RETRY_AFTER)


def _ask_for_nothing(txn: Transaction) -> None:
    txn.execute("SELECT 1")


class _PostgresTransaction(adbapi.Transaction):
    """A transaction that translates the marks of parameters for psycopg2."""

    def execute(self, statement: str, parameters: Any = ()) -> Any:
        cursor: Any = self._cursor
        return cursor.execute(statement.replace("?", "%s"), parameters)


class _PostgresConnection(adbapi.Connection):
    """A connection that is left without a word when it is lost.

    The error that says so is on its way to whoever asked for the transaction.
    """

    def rollback(self) -> None:
        """Undo the transaction, or have the next one connect anew."""
        connection: Any = self._connection
        if connection.closed:
            self._pool.disconnect(connection)
        else:
            super().rollback()  # type: ignore[no-untyped-call]


def sqlite_database(path: str) -> PoolDatabase:
    """A database in a file, made when it isn't there."""

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
        timeout=_LOCK_SECONDS,
        check_same_thread=False,
    )
    return PoolDatabase(pool)


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

    defaults = {
        "cp_min": 1,
        "cp_max": 10,
        "cp_reconnect": True,
        "cp_openfun": prepare,
    }
    pool = adbapi.ConnectionPool("psycopg2", **{**defaults, **with_timeouts(arguments)})
    pool.connectionFactory = _PostgresConnection
    pool.transactionFactory = _PostgresTransaction
    return PoolDatabase(pool)

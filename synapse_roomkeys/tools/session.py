"""A command's connection to a database, and the end of the command's process."""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

import attrs
from twisted.internet.defer import CancelledError, Deferred, inlineCallbacks
from twisted.python.failure import Failure

from ..admin.removal import Removal
from ..clock import Clock
from ..describe import error_line
from ..errors import RoomKeysError, UnavailableError
from ..inline import Inline
from ..outages import Outages
from ..service.app import make_database
from ..service.config import DatabaseConfig
from ..storage import (
    EndToEndRoomKeyStore,
    Erasure,
    Imports,
    Inspection,
    Overview,
    RetryingDatabase,
    SchemaError,
    database_address,
    open_tables,
)
from ..storage.transactions import Transaction, Transactions
from ..types import Limits, Retention

P = ParamSpec("P")
T = TypeVar("T")

#: Exit statuses of the commands.
DONE = 0
FINDINGS = 1
USAGE = 2
AWAY = 3
INTERRUPTED = 130


class ToolError(Exception):
    """The command can't do the work. The text has the operator's next step.

    Attributes:
        code: exit status of the process.
    """

    def __init__(self, text: str, code: int = FINDINGS) -> None:
        super().__init__(text)
        self.code = code


class _RollbackError(Exception):
    """Rolls a transaction back whose result is known."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.result = result


class _DryRun:
    """Transactions without a commit: a rollback ends each transaction."""

    def __init__(self, database: Transactions) -> None:
        self.run = database.run
        self.attempt = database.attempt
        self._database = database

    @inlineCallbacks
    def write(
        self,
        desc: str,
        function: Callable[Concatenate[Transaction, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Inline[T]:
        """As `Transactions.write`, without the commit."""

        def roll_back(txn: Transaction) -> None:
            raise _RollbackError(function(txn, *args, **kwargs))

        try:
            yield self._database.write(desc, roll_back)
        except _RollbackError as error:
            result: T = error.result
            return result
        raise AssertionError("not rolled back")


class Session:
    """A connection to the service's database or to a Synapse's.

    Attributes:
        address: the database for the operator, without a password.
        is_synapse: Whether the database is a Synapse's.
        reactor: makes connections to a homeserver.
        clock: the time, and pauses.
        store: the backups of users.
        dry_store: the same, whose writes are rolled back once their result is known.
        overview: queries over all users.
        erasure: deletions that no client can ask for.
        removal: deletions of versions and users.
        inspection: all rows as they are stored.
        has_port: Whether Synapse's ``synapse_port_db`` can copy the database.
        imports: the insertion of versions under their own number.
    """

    def __init__(self, config: DatabaseConfig, is_synapse: bool, reactor: Any) -> None:
        """
        Raises:
            OptionError: the database's driver isn't installed.
            ToolError: the SQLite file doesn't exist.
        """
        if config.name == "sqlite3":
            path = Path(config.args["database"])
            if not path.is_file():
                raise ToolError(f"{path}: there is no such file", USAGE)
        else:
            # With a single connection, its temporary tables are always at hand.
            config = attrs.evolve(
                config, args={**config.args, "cp_min": 1, "cp_max": 1}
            )
        self.pool, self._engine = make_database(config)
        self.address = database_address(self._engine, config.args)
        self.is_synapse = is_synapse
        self.reactor = reactor
        self.clock = Clock(reactor)
        self.database = RetryingDatabase(
            self.pool, self._engine, self.clock, Outages(f"Database {self.address}")
        )
        self.store = self._make_store(self.database)
        self.dry_store = self._make_store(_DryRun(self.database))
        self.overview = Overview(self.database, self._engine)
        self.erasure = Erasure(self.database, self._engine)
        self.removal = Removal(self.database, self._engine, self.store, time.time)
        self.inspection = Inspection(self.database, self._engine)
        self.has_port = is_synapse and config.name == "sqlite3"
        self.imports = Imports(self.database, self._engine, time.time)

    def _make_store(self, database: Transactions) -> EndToEndRoomKeyStore:
        return EndToEndRoomKeyStore(
            database, self._engine, time.time, Limits(), Retention()
        )

    def open(self) -> "Deferred[None]":
        """Connect. Fire with None once the tables are found.

        Raises:
            SchemaError: the homeserver's tables are missing, or the plugin's own are of
                another version.
        """
        return self.database.run("roomkeys_open", open_tables, self._engine)

    def explain(self, error: Exception) -> ToolError:
        """Return an error of a transaction as an error for the operator.

        Raises:
            Exception: `error`, if it isn't the database's.
        """
        if isinstance(error, ToolError):
            return error
        if isinstance(error, SchemaError):
            return ToolError(f"{self.address}: {error}", USAGE)
        if isinstance(error, UnavailableError):
            cause = error.__cause__ or error
            return ToolError(f"{self.address}: {error_line(cause)}", AWAY)
        if isinstance(error, self._engine.error):
            return ToolError(f"{self.address}: {error_line(error)}", AWAY)
        if isinstance(error, RoomKeysError):
            return ToolError(str(error))
        raise error


#: A command: does the work in a session, and fires with an exit status.
Command = Callable[[Session], "Deferred[int]"]


def run(session: Session, command: Command, reactor: Any) -> int:
    """Run a command in the reactor; return its exit status.

    SIGINT and SIGTERM cancel the command: temporary files are removed, and the
    process ends immediately. The database rolls the running transaction back.

    Raises:
        ToolError: the command can't do its work.
        Exception: the command has a defect.
    """
    results: list[Any] = []
    is_interrupted = False

    def end(result: Any) -> None:
        # A cancelled request over HTTP fails with an error of the connection.
        if isinstance(result, Failure) and is_interrupted:
            _leave("interrupted: run the same command again to go on", INTERRUPTED)
        results.append(result)
        reactor.stop()

    def begin() -> None:
        work = _work(session, command)

        def interrupt() -> None:
            nonlocal is_interrupted
            is_interrupted = True
            work.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: reactor.callFromThread(interrupt))
        work.addBoth(end)

    reactor.callWhenRunning(begin)
    reactor.run()
    if isinstance(results[0], Failure):
        results[0].raiseException()
    code: int = results[0]
    return code


def _leave(text: str, code: int) -> NoReturn:
    """End the process, without waiting for the thread of a running transaction."""
    sys.stdout.flush()
    print(f"synapse-roomkeys: {text}", file=sys.stderr, flush=True)
    logging.shutdown()
    os._exit(code)


@inlineCallbacks
def _work(session: Session, command: Command) -> Inline[int]:
    """Connect, and run a command; fire with its exit status.

    Raises:
        ToolError: the command can't do its work.
    """
    try:
        yield session.open()
        code: int = yield command(session)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # A pager or head has read enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except CancelledError:
        raise
    except Exception as error:
        raise session.explain(error) from error

"""The ports to a database: a transaction, the host's database, and retries."""

from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from twisted.internet.defer import Deferred

T = TypeVar("T")
P = ParamSpec("P")


class Transaction(Protocol):
    """A cursor in a transaction; statements have named parameters (``:user_id``)."""

    @property
    def rowcount(self) -> int:
        """Number of rows that the last statement wrote."""

    @property
    def description(self) -> Any:
        """The columns of the last statement's rows; each begins with its name."""

    def execute(self, statement: str, parameters: Any = ()) -> Any:
        """Run a statement, with a mapping of its named parameters."""

    def fetchone(self) -> Any:
        """Return the next row of the last statement, or None."""

    def fetchall(self) -> list[tuple[Any, ...]]:
        """Return the remaining rows of the last statement."""


class Database(Protocol):
    """The host's database, which runs functions in transactions.

    Attributes:
        connections: maximum number of transactions that run at the same time.
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

        On PostgreSQL the isolation level is READ COMMITTED: each statement sees all
        earlier commits, so a writer that has waited for a lock goes on with the state
        that the lock's last holder committed.

        Args:
            desc: name of the transaction in logs and metrics.

        Returns:
            A Deferred that fires with the function's result after the commit, or
            fails with its exception after a rollback.
        """


class Transactions(Protocol):
    """The store's port to its database, which retries transactions."""

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


class ConflictError(Exception):
    """A row exists that the transaction could not see when it began."""


class LockedError(Exception):
    """A lock was not free within the lock timeout; the driver's error is the cause.

    A lock timeout is one of psycopg2's operational errors. Synapse repeats a
    transaction at each of these, on the same connection, and passes on other
    exceptions, such as this one.
    """

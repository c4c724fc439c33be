"""Leases: each lets one process at a time do a kind of background work."""

from collections.abc import Callable

from twisted.internet.defer import Deferred

from .transactions import Transaction, Transactions

#: Duration of a lease, in seconds. If the process with the lease is killed, another
#: process takes the lease after this time.
LEASE_SECONDS = 60

#: Takes or renews a lease. Writes no row if another process has the lease.
TAKE_LEASE = """
    INSERT INTO roomkeys_leases (name, owner, until_ms, expired_ms)
    VALUES (:name, :owner, :until_ms, 0)
    ON CONFLICT (name) DO UPDATE SET
    owner = excluded.owner, until_ms = excluded.until_ms
    WHERE roomkeys_leases.owner = :owner OR roomkeys_leases.until_ms < :now_ms"""
#: Gives a lease back.
END_LEASE = """
    UPDATE roomkeys_leases SET until_ms = 0 WHERE name = :name AND owner = :owner"""


class Leases:
    """The transactions of leases. The Deferreds fail as the `Transactions` do."""

    def __init__(self, database: Transactions, now: Callable[[], float]) -> None:
        """
        Args:
            now: returns the Unix time in seconds.
        """
        self._database = database
        self._now = now

    def take(self, name: str, owner: str) -> "Deferred[bool]":
        """Take or renew a lease; fire with whether this process has it.

        Args:
            name: the kind of work.
            owner: name of the process, different from all others.
        """
        return self._database.write("roomkeys_take_lease", self._take, name, owner)

    def _take(self, txn: Transaction, name: str, owner: str) -> bool:
        now_ms = int(1000 * self._now())
        until_ms = now_ms + 1000 * LEASE_SECONDS
        times = {"now_ms": now_ms, "until_ms": until_ms}
        txn.execute(TAKE_LEASE, {"name": name, "owner": owner, **times})
        return bool(txn.rowcount)

    def end(self, name: str, owner: str) -> "Deferred[None]":
        """Give a lease back."""

        def end(txn: Transaction) -> None:
            txn.execute(END_LEASE, {"name": name, "owner": owner})

        return self._database.write("roomkeys_end_lease", end)

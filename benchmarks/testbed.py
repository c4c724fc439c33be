"""The testbed: measured servers with equal backups on each of them."""

from collections.abc import Mapping, Sequence

import attrs

from tests.servers import PostgresServer

from .backups import Account, Backup, MeasuredServer
from .databases import PostgresDatabase
from .keys import Key, KeySource
from .results import LIMIT, Goal, at_least


@attrs.frozen
class Plan:
    """The sizes and sample counts of a run.

    Args:
        keys: The number of keys of a full backup.
        quick: Whether the run has small sizes and few samples.
        fast_samples: The number of samples of an operation of some milliseconds.
        slow_samples: The number of samples of an operation of some 100 ms.
        heavy_samples: The number of samples of an operation of a second or more.
        restore_seconds: The duration of a round of probes during a restore.
        rounds: The number of rounds of the rows that measure by time.
    """

    keys: int = 100_000
    quick: bool = False
    fast_samples: int = 400
    slow_samples: int = 40
    heavy_samples: int = 9
    restore_seconds: float = 8.0
    rounds: int = 4

    @classmethod
    def of(cls, keys: int | None, quick: bool) -> "Plan":
        """Return the plan of a quick or a full run; None selects the default size."""
        if not quick:
            return cls(keys=keys or 100_000)
        return cls(
            keys=keys or 5_000,
            quick=True,
            fast_samples=60,
            slow_samples=20,
            heavy_samples=3,
            restore_seconds=2.0,
            rounds=1,
        )


@attrs.define
class Testbed:
    """Measured servers, side by side, and the keys that their backups are filled from.

    Args:
        title: The name of the database engine.
        plan: The sizes and sample counts of the run.
        full_size: The number of keys of a full backup.
        servers: All servers by name.
        key_source: The generator of new keys.
        template_keys: The keys that every database holds, to fill backups from.
        postgres: The PostgreSQL server; None on SQLite.
    """

    title: str
    plan: Plan
    full_size: int
    servers: dict[str, MeasuredServer]
    key_source: KeySource
    template_keys: list[Key]
    on_sqlite: bool = False
    postgres: PostgresServer | None = None
    _users: int = 0
    _versions: int = 1_000_000_000

    @property
    def synapses(self) -> dict[str, MeasuredServer]:
        """Return the two Synapses, without the service and the limit."""
        return {
            name: server
            for name, server in self.servers.items()
            if server.synapse is not None
        }

    @property
    def without_limit(self) -> dict[str, MeasuredServer]:
        """Return all servers but the limit."""
        return {n: server for n, server in self.servers.items() if n != LIMIT}

    def database_version(self) -> str:
        """Return PostgreSQL's version."""
        database = self.servers[LIMIT].database
        assert isinstance(database, PostgresDatabase)
        return str(database.query("SHOW server_version")[0][0])

    def speedup_goal(self, bound: float) -> Goal:
        """Return the goal for a ratio; on SQLite the goal is 1, no slowdown."""
        return at_least(1 if self.on_sqlite else bound)

    def postgres_goal(self, goal: Goal) -> Goal | None:
        """Return the goal on PostgreSQL, and None on SQLite."""
        return None if self.on_sqlite else goal

    def register_users(self) -> dict[str, Account]:
        """Register a new user of the same name on every server."""
        self._users += 1
        name = f"user{self._users}"
        return {key: each.register(name) for key, each in self.servers.items()}

    def create_backups(
        self,
        keys: int,
        *,
        copies: int = 1,
        names: Sequence[str] = (),
        vacuumed: bool = True,
    ) -> dict[str, Backup]:
        """Create a user with a backup on each server, or on the named ones."""
        accounts = self.register_users()
        chosen = {name: accounts[name] for name in names} if names else accounts
        return self.create_backups_for(chosen, keys, copies=copies, vacuumed=vacuumed)

    def create_backups_for(
        self,
        accounts: Mapping[str, Account],
        keys: int,
        *,
        copies: int = 1,
        vacuumed: bool = True,
    ) -> dict[str, Backup]:
        """Create another backup for each account, and warm the servers up.

        Args:
            accounts: The accounts by server name.
            keys: The number of template keys in each backup.
            copies: How many times each of these keys is stored, under different ids.
            vacuumed: Whether the tables are vacuumed afterwards, or only analyzed.
        """
        self._versions += 1
        backups = {}
        for name, account in accounts.items():
            database = self.servers[name].database
            database.insert_backup(account.user_id, self._versions, keys, copies)
            if not vacuumed:
                database.analyze_only()
            elif keys:
                database.run_maintenance()
            backups[name] = Backup(self.servers[name], account, self._versions)
        for backup in backups.values():
            backup.send(backup.get_version())
        return backups

    def run_maintenance(self) -> None:
        """Run the maintenance of all databases."""
        for server in self.servers.values():
            server.database.run_maintenance()

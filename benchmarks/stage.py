"""The servers that are compared, with the same backups on all of them."""

from collections.abc import Mapping, Sequence

import attrs

from tests.servers import PostgresServer

from .backups import Account, Backup, Subject
from .databases import PostgresDatabase
from .keys import Key, KeySource
from .results import LIMIT, Goal, at_least


@attrs.frozen
class Plan:
    """How much is measured: sizes, and samples of what takes how long."""

    keys: int = 100_000
    quick: bool = False
    fast: int = 400
    slow: int = 40
    heavy: int = 9
    restore_seconds: float = 8.0
    rounds: int = 4

    @classmethod
    def of(cls, keys: int | None, quick: bool) -> "Plan":
        """Plan a run."""
        if not quick:
            return cls(keys=keys or 100_000)
        return cls(
            keys=keys or 5_000,
            quick=True,
            fast=60,
            slow=20,
            heavy=3,
            restore_seconds=2.0,
            rounds=1,
        )


@attrs.define
class Stage:
    """Servers side by side with the same backups on them."""

    title: str
    plan: Plan
    size: int
    subjects: dict[str, Subject]
    source: KeySource
    master: list[Key]
    on_sqlite: bool = False
    postgres: PostgresServer | None = None
    _users: int = 0
    _versions: int = 1_000_000_000

    @property
    def synapses(self) -> dict[str, Subject]:
        """Leave the service and the limit out."""
        return {
            name: subject
            for name, subject in self.subjects.items()
            if subject.synapse is not None
        }

    @property
    def servers(self) -> dict[str, Subject]:
        """Leave the limit out."""
        return {n: subject for n, subject in self.subjects.items() if n != LIMIT}

    def database_version(self) -> str:
        """Tell which version of PostgreSQL this is."""
        database = self.subjects[LIMIT].database
        assert isinstance(database, PostgresDatabase)
        return str(database.query("SHOW server_version")[0][0])

    def speedup(self, bound: float) -> Goal:
        """Ask for a ratio; on SQLite for no loss only."""
        return at_least(1 if self.on_sqlite else bound)

    def unless_sqlite(self, goal: Goal) -> Goal | None:
        """Ask for something on PostgreSQL only."""
        return None if self.on_sqlite else goal

    def register(self) -> dict[str, Account]:
        """Make a user of the same name everywhere."""
        self._users += 1
        name = f"user{self._users}"
        return {key: each.register(name) for key, each in self.subjects.items()}

    def backup(
        self,
        count: int,
        *,
        copies: int = 1,
        names: Sequence[str] = (),
        vacuumed: bool = True,
    ) -> dict[str, Backup]:
        """Make a new user with a backup of so many keys, everywhere or somewhere."""
        accounts = self.register()
        chosen = {name: accounts[name] for name in names} if names else accounts
        return self.refill(chosen, count, copies=copies, vacuumed=vacuumed)

    def refill(
        self,
        accounts: Mapping[str, Account],
        count: int,
        *,
        copies: int = 1,
        vacuumed: bool = True,
    ) -> dict[str, Backup]:
        """Give users another backup of so many keys, and warm the servers up."""
        self._versions += 1
        backups = {}
        for name, account in accounts.items():
            database = self.subjects[name].database
            database.fill(account.user_id, self._versions, count, copies)
            if not vacuumed:
                database.analyze()
            elif count:
                database.settle()
            backups[name] = Backup(self.subjects[name], account, self._versions)
        for backup in backups.values():
            backup.send(backup.get_version())
        return backups

    def settle(self) -> None:
        """Have the databases put in order."""
        for subject in self.subjects.values():
            subject.database.settle()

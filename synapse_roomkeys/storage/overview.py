"""The operator's view: users, the versions of their backups, and sums of the record.

The lists of users read rows of several users, a page of users at a time. The queries
take no lock for which a server's requests would wait.
"""

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import attrs
from twisted.internet.defer import Deferred

from .engine import Engine
from .transactions import Transaction, Transactions

#: Maximum number of users on a page of `Overview.list_owners`, which reads all keys of
#: these users, and of the other lists.
OWNERS = 100
USERS = 1000
#: States of a version.
CURRENT = "current"
SUPERSEDED = "superseded"
DELETED = "deleted"
ORPHANED = "orphaned"


#: The tables with backups, and those with all of a user's rows, apart from the last
#: version number, which stays when a user is erased.
_BACKUPS = ("e2e_room_keys_versions", "e2e_room_keys")
_ALL = (*_BACKUPS, "roomkeys_changes", "roomkeys_replaced", "roomkeys_deleted")


def list_owners(start: str, columns: str, tables: Sequence[str] = _BACKUPS) -> str:
    """Return the query of a page of users, in order, from a user on. Each step of the
    recursion finds the next user by an index, past all rows of the last one.

    Args:
        start: expression of the user after whom the page begins.
        columns: expressions of ``user_id``, which are the columns of the rows.
        tables: users with a row in any of these tables are listed.
    """
    following = " UNION ALL ".join(
        f"SELECT MIN(user_id) AS next_id FROM {table} WHERE user_id > owners.user_id"
        for table in tables
    )
    return f"""
    WITH RECURSIVE owners (user_id, place) AS (
        SELECT {start}, 0
        UNION ALL
        SELECT (SELECT MIN(next_id) FROM ({following}) AS n), place + 1
        FROM owners WHERE user_id IS NOT NULL AND place < :page)
    SELECT {columns} FROM owners
    WHERE place > 0 AND user_id IS NOT NULL ORDER BY place"""


def _list_distributed(tables: Sequence[str]) -> str:
    """Return the query of a page of users in distributed tables, over which Citus runs
    no recursive query. Each node reads all index entries of the page's users."""
    lists = " UNION ".join(
        f"""SELECT user_id FROM (SELECT DISTINCT user_id FROM {table}
        WHERE user_id > :user_id ORDER BY user_id LIMIT :page) AS {table}_page"""
        for table in tables
    )
    return f"{lists} ORDER BY user_id LIMIT :page"


_START = "CAST(:user_id AS TEXT)"
#: Returns a page of users with a version or a key, after a user.
LIST_OWNERS = list_owners(_START, "user_id")
#: Returns a page of users of whom anything is stored, after a user.
LIST_USERS = list_owners(_START, "user_id", _ALL)
#: As these, in distributed tables.
LIST_DISTRIBUTED_OWNERS = _list_distributed(_BACKUPS)
LIST_DISTRIBUTED_USERS = _list_distributed(_ALL)
#: Returns the versions of users from a first to a last one, and the time of the
#: deletion of a version that is queued for the sweeper, or NULL.
FIND_VERSIONS = """
    SELECT v.user_id, v.version, v.algorithm, COALESCE(d.auth_data, v.auth_data),
        COALESCE(v.deleted, 0),
        COALESCE(v.etag, 0), d.deleted_ms
    FROM e2e_room_keys_versions AS v LEFT JOIN roomkeys_deleted AS d
        ON d.user_id = v.user_id AND d.version = v.version
    WHERE v.user_id BETWEEN :first AND :last ORDER BY v.user_id, v.version"""
#: Returns the last recorded creation and upload of each version of these users.
LAST_CHANGES = """
    SELECT user_id, version, act, changed_ms, device_id FROM (
        SELECT user_id, version, act, changed_ms, device_id, ROW_NUMBER() OVER (
            PARTITION BY user_id, version, act
            ORDER BY changed_ms DESC, etag DESC) AS place
        FROM roomkeys_changes WHERE user_id BETWEEN :first AND :last
        AND act IN ('create_version', 'upload')) AS c WHERE place = 1"""
#: Returns the sums of these users' record since a time.
SUM_CHANGES = """
    SELECT COUNT(*), COALESCE(SUM(stored), 0), COALESCE(SUM(replaced), 0),
        COALESCE(SUM(deleted), 0)
    FROM roomkeys_changes
    WHERE user_id BETWEEN :first AND :last AND changed_ms >= :since_ms"""
#: Returns the number of keys in each room of a version.
COUNT_ROOMS = """
    SELECT room_id, COUNT(*) FROM e2e_room_keys
    WHERE user_id = :user_id AND version = :version GROUP BY room_id ORDER BY room_id"""
#: Returns a row if a user's account is active, in a Synapse's database.
FIND_ACTIVE = "SELECT 1 FROM users WHERE name = :user_id AND deactivated = 0"
#: By table, the statement that counts a user's rows in it.
COUNT_ROWS = {
    table: f"SELECT COUNT(*) FROM {table} WHERE user_id = :user_id"
    for table in (
        "e2e_room_keys_versions",
        "roomkeys_changes",
        "roomkeys_counts",
        "roomkeys_deleted",
        "roomkeys_replaced",
    )
}

#: The version numbers of the plugin are Unix times in seconds, those of Synapse's own
#: endpoints count from 1. This is the smallest Unix time that any server can have
#: used: 9 September 2001.
_FIRST_TIME = 1_000_000_000


@attrs.frozen
class VersionFacts:
    """A version of a user's backup, or the keys of a version that has no row.

    Attributes:
        state: ``current``; ``superseded`` by a newer version; ``deleted``; or
            ``orphaned``, if the keys have no version.
        algorithm: None if the version is orphaned.
        auth_data: JSON text; None if the version is orphaned.
        keys: number of stored keys.
        size: length of their ``session_data`` in bytes.
        created_ms: Unix time of the creation in milliseconds, or None if neither the
            record nor the version number tells the time.
        uploaded_ms: Unix time of the last recorded upload in milliseconds, or None.
        device_id: device of this upload, or None.
        deleted_ms: Unix time of the deletion in milliseconds, while the version is
            queued for the sweeper, or None.
    """

    user_id: str
    version: int
    state: str
    algorithm: str | None
    auth_data: str | None
    etag: int
    keys: int
    size: int
    created_ms: int | None
    uploaded_ms: int | None
    device_id: str | None
    deleted_ms: int | None


@attrs.frozen
class Owner:
    """A user, and the versions of the user's backups in the order of their numbers."""

    user_id: str
    versions: tuple[VersionFacts, ...]

    @property
    def keys(self) -> int:
        """Number of the user's stored keys."""
        return sum(version.keys for version in self.versions)

    @property
    def size(self) -> int:
        """Length of the ``session_data`` of all these keys, in bytes."""
        return sum(version.size for version in self.versions)

    @property
    def uploaded_ms(self) -> int | None:
        """Unix time of the last recorded upload in milliseconds, or None."""
        return max(
            (v.uploaded_ms for v in self.versions if v.uploaded_ms), default=None
        )


@attrs.frozen
class Activity:
    """Sums of the record.

    Attributes:
        changes: number of recorded changes.
        stored: number of new keys.
        replaced: number of replaced keys.
        deleted: number of deleted keys.
    """

    changes: int = 0
    stored: int = 0
    replaced: int = 0
    deleted: int = 0

    def __add__(self, other: "Activity") -> "Activity":
        """Return the sums of both."""
        return Activity(
            self.changes + other.changes,
            self.stored + other.stored,
            self.replaced + other.replaced,
            self.deleted + other.deleted,
        )


class Overview:
    """The operator's queries. The Deferreds fail as the `Transactions` do."""

    def __init__(self, database: Transactions, engine: Engine) -> None:
        self._database = database
        self._engine = engine

    def list_owners(self, after: str) -> "Deferred[list[Owner]]":
        """Fire with a page of users and their versions; an empty list after the last
        user.

        Args:
            after: the last user of the page before; "" for the first page.
        """
        return self._database.run("roomkeys_list_owners", self._list, after)

    def list_users(
        self, after: str, *, with_backup: bool = False
    ) -> "Deferred[list[str]]":
        """Fire with a page of users, without a look at their keys; an empty list after
        the last user.

        Args:
            after: the last user of the page before; "" for the first page.
            with_backup: Whether to leave users out of whom the record alone is stored.
        """

        def read(txn: Transaction) -> list[str]:
            if with_backup:
                return self._read_owners(txn, after, USERS)
            is_distributed = self._engine.is_distributed
            statement = LIST_DISTRIBUTED_USERS if is_distributed else LIST_USERS
            txn.execute(statement, {"user_id": after, "page": USERS})
            return [user_id for (user_id,) in txn.fetchall()]

        return self._database.run("roomkeys_list_users", read)

    def find_owner(self, user_id: str) -> "Deferred[Owner]":
        """Fire with a user, who may have no version."""

        def read(txn: Transaction) -> Owner:
            found = self._read_versions(txn, user_id, user_id)
            return Owner(user_id, found.get(user_id, ()))

        return self._database.run("roomkeys_find_owner", read)

    def count_rooms(self, user_id: str, version: int) -> "Deferred[dict[str, int]]":
        """Fire with the number of a version's keys by room."""

        def read(txn: Transaction) -> dict[str, int]:
            txn.execute(COUNT_ROOMS, {"user_id": user_id, "version": version})
            return {str(row[0]): int(row[1]) for row in txn.fetchall()}

        return self._database.run("roomkeys_count_rooms", read)

    def sum_changes(self, first: str, last: str, since_ms: int) -> "Deferred[Activity]":
        """Fire with the sums of the record of users from a first to a last one, since a
        Unix time in milliseconds."""

        def read(txn: Transaction) -> Activity:
            values = {"first": first, "last": last, "since_ms": since_ms}
            txn.execute(SUM_CHANGES, values)
            return Activity(*map(int, txn.fetchone()))

        return self._database.run("roomkeys_sum_changes", read)

    def count_rows(self, user_id: str) -> "Deferred[dict[str, int]]":
        """Fire with the numbers of a user's rows by table, without the keys."""

        def read(txn: Transaction) -> dict[str, int]:
            found = {}
            for table, statement in COUNT_ROWS.items():
                txn.execute(statement, {"user_id": user_id})
                ((found[table],),) = txn.fetchall()
            return found

        return self._database.run("roomkeys_count_rows", read)

    def find_gone(self, user_ids: Sequence[str]) -> "Deferred[frozenset[str]]":
        """Fire with those of some users that are deactivated, or that the homeserver
        doesn't have, in a Synapse's database."""

        def read(txn: Transaction) -> frozenset[str]:
            gone = set()
            for user_id in user_ids:
                txn.execute(FIND_ACTIVE, {"user_id": user_id})
                if not txn.fetchall():
                    gone.add(user_id)
            return frozenset(gone)

        return self._database.run("roomkeys_find_gone", read)

    def measure_tables(self) -> "Deferred[dict[str, int]]":
        """Fire with the sizes of the tables with their indexes, in bytes by name.
        SQLite knows the size of the whole file only."""

        def read(txn: Transaction) -> dict[str, int]:
            txn.execute(self._engine.tables.measure_tables)
            return {str(row[0]): int(row[1]) for row in txn.fetchall()}

        return self._database.run("roomkeys_measure_tables", read)

    def _read_owners(self, txn: Transaction, after: str, page: int) -> list[str]:
        """Return a page of users with a version or a key, in order.

        Args:
            page: maximum number of users.
        """
        is_distributed = self._engine.is_distributed
        statement = LIST_DISTRIBUTED_OWNERS if is_distributed else LIST_OWNERS
        txn.execute(statement, {"user_id": after, "page": page})
        return [user_id for (user_id,) in txn.fetchall()]

    def _list(self, txn: Transaction, after: str) -> list[Owner]:
        users = self._read_owners(txn, after, OWNERS)
        if not users:
            return []
        found = self._read_versions(txn, users[0], users[-1])
        return [Owner(user_id, found.get(user_id, ())) for user_id in users]

    def _read_versions(
        self, txn: Transaction, first: str, last: str
    ) -> dict[str, tuple[VersionFacts, ...]]:
        """Return the versions of users from a first to a last one, by user."""
        values = {"first": first, "last": last}
        txn.execute(FIND_VERSIONS, values)
        versions = txn.fetchall()
        txn.execute(self._engine.tables.measure_keys, values)
        sizes = {tuple(row[:2]): (int(row[2]), int(row[3])) for row in txn.fetchall()}
        txn.execute(LAST_CHANGES, values)
        changes = {tuple(row[:3]): row[3:] for row in txn.fetchall()}
        known = {tuple(row[:2]) for row in versions}
        orphans = [(*ids, None, None, 0, 0, None) for ids in sizes if ids not in known]
        rows = sorted([*versions, *orphans], key=itemgetter(0, 1))
        return {
            user_id: tuple(_describe(list(group), sizes, changes))
            for user_id, group in groupby(rows, itemgetter(0))
        }


def _describe(
    rows: list[tuple[Any, ...]],
    sizes: dict[tuple[Any, ...], tuple[int, int]],
    changes: dict[tuple[Any, ...], Any],
) -> list[VersionFacts]:
    """Return a user's versions.

    Args:
        rows: the rows of `FIND_VERSIONS`, and rows without an algorithm for orphans.
        sizes: number of keys and bytes, by user and version.
        changes: time and device, by user, version and act.
    """
    current = max((row[1] for row in rows if row[2] and not row[4]), default=None)
    found = []
    for user_id, version, algorithm, auth_data, deleted, etag, deleted_ms in rows:
        if algorithm is None:
            state = ORPHANED
        elif deleted:
            state = DELETED
        else:
            state = CURRENT if version == current else SUPERSEDED
        keys, size = sizes.get((user_id, version), (0, 0))
        created_ms, _ = changes.get((user_id, version, "create_version"), (None, None))
        if created_ms is None and version >= _FIRST_TIME:
            created_ms = 1000 * version
        uploaded = changes.get((user_id, version, "upload"), (None, None))
        found.append(
            VersionFacts(
                user_id=user_id,
                version=version,
                state=state,
                algorithm=algorithm,
                auth_data=auth_data,
                etag=etag,
                keys=keys,
                size=size,
                created_ms=created_ms,
                uploaded_ms=uploaded[0],
                device_id=uploaded[1],
                deleted_ms=deleted_ms,
            )
        )
    return found

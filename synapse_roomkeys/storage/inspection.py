"""Reads all versions and keys as they are stored, for a search for faults.

An SQLite file can hold a value of any type in any column, and text that isn't UTF-8.
The statements therefore return text as bytes, which the driver doesn't decode, and a
position is sent back with its type. Pages are small, each is a transaction of its own,
and no query takes a lock for which a server's requests would wait.
"""

from collections.abc import Callable, Sequence
from typing import Any

import attrs
from twisted.internet.defer import Deferred

from ..types import BackupId
from .engine import Engine
from .overview import OWNERS, list_owners
from .statements import FORGET_COUNT
from .transactions import Transaction, Transactions
from .values import names

#: Maximum number of keys or versions on a page: 26 MB of the largest keys that the
#: plugin accepts (64 KiB), and 0.4 MB of real ones.
PAGE = 400
#: The smallest number of a version's column, with which a page begins.
_FIRST_VERSION = -(2**63)


class Blob(bytes):
    """A BLOB of an SQLite file. Bytes of any other class are text."""


#: A value as stored: text as bytes, numbers, booleans, None for NULL.
Value = Any


@attrs.frozen
class StoredVersion:
    """A row of ``e2e_room_keys_versions``.

    Attributes:
        cached_keys: the cached number of keys, if the cache has the version's etag.
        cached_bytes: the cached bytes of ``session_data``, likewise.
    """

    user_id: Value
    version: Value
    algorithm: Value
    auth_data: Value
    deleted: Value
    etag: Value
    cached_keys: Value
    cached_bytes: Value


@attrs.frozen
class StoredRow:
    """A row of ``e2e_room_keys``."""

    user_id: Value
    version: Value
    room_id: Value
    session_id: Value
    first_message_index: Value
    forwarded_count: Value
    is_verified: Value
    session_data: Value


@attrs.frozen
class Tally:
    """The keys of a version, and the facts about the version at the same moment.

    Attributes:
        is_stored: Whether the version has a row.
        is_live: Whether the version has a row and isn't deleted.
        is_queued: Whether the version is queued for the sweeper.
        cached_keys: the cached number of keys, if the cache has the version's etag.
        cached_bytes: the cached bytes of ``session_data``, likewise.
        keys: number of keys.
        size: bytes of ``session_data``.
    """

    is_stored: bool
    is_live: bool
    is_queued: bool
    cached_keys: int | None
    cached_bytes: int | None
    keys: int
    size: int


@attrs.frozen
class _Statements:
    """The statements of one engine. The rows of the first three begin with the types
    of their columns if one is a BLOB, else with NULL.

    Attributes:
        list_users: returns a page of users after ``user_id``.
        read_versions: returns a page of the versions of the users up to ``last``, after
            the version ``user_id``, ``version``.
        read_keys: returns a page of these users' keys, after the key ``user_id``,
            ``version``, ``room_id``, ``session_id``. With a lower bound of the user
            as well, SQLite would read all keys of the user before that key again.
        tally: returns a row of the fields of `Tally`.
    """

    list_users: str
    read_versions: str
    read_keys: str
    tally: str


_VERSION_COLUMNS = (
    *("v.user_id", "v.version", "v.algorithm", "v.auth_data", "v.deleted"),
    *("v.etag", "c.key_count", "c.key_bytes"),
)
_KEY_COLUMNS = (
    *("user_id", "version", "room_id", "session_id", "first_message_index"),
    *("forwarded_count", "is_verified", "session_data"),
)


def _sqlite_columns(columns: Sequence[str]) -> str:
    """Return the expressions of columns whose text becomes a BLOB, after the types."""
    types = [f"typeof({column})" for column in columns]
    values = [
        f"CASE {kind} WHEN 'text' THEN CAST({column} AS BLOB) ELSE {column} END"
        for kind, column in zip(types, columns, strict=True)
    ]
    found = f"CASE WHEN 'blob' IN ({', '.join(types)}) THEN {' || '.join(types)} END"
    return ", ".join([found.replace("||", "|| ' ' ||"), *values])


def _sqlite_given(name: str) -> str:
    """Return the expression of a parameter, which is text if ``name_is_text`` is 1."""
    return f"CASE :{name}_is_text WHEN 1 THEN CAST(:{name} AS TEXT) ELSE :{name} END"


#: Columns of text. PostgreSQL's other columns have one type each.
_TEXTS = ("user_id", "room_id", "session_id", "session_data", "algorithm", "auth_data")


def _postgres_columns(columns: Sequence[str]) -> str:
    """Return the expressions of columns whose text becomes bytes, after NULL. Nothing
    is converted to the encoding SQL_ASCII, so the bytes are those of the database."""
    values = [
        f"convert_to({column}, 'SQL_ASCII')"
        if column.rpartition(".")[2] in _TEXTS
        else column
        for column in columns
    ]
    return ", ".join(["NULL", *values])


def _postgres_given(name: str) -> str:
    """Return the expression of a parameter, whose text is sent as bytes. Without the
    collation of the column, PostgreSQL wouldn't use the index: the name of an encoding
    has the collation "C"."""
    if name not in _TEXTS:
        return f":{name}"
    return f"(convert_from(:{name}, 'SQL_ASCII') COLLATE \"default\")"


#: Settings of PostgreSQL for a page: the rows come in the order of the index. Else
#: PostgreSQL reads and sorts all keys that may follow, for each page.
_UNSORTED = "SET LOCAL enable_sort = off; SET LOCAL enable_incremental_sort = off;"


def _make(
    columns: Callable[[Sequence[str]], str],
    given: Callable[[str], str],
    size: str,
    settings: str,
) -> _Statements:
    """Return the statements of an engine.

    Args:
        columns: returns the expressions of columns.
        given: returns the expression of a parameter.
        size: expression of the bytes of ``session_data``.
        settings: statements before the query of a page.
    """
    user, version = given("user_id"), given("version")
    place = f"{user}, {version}, {given('room_id')}, {given('session_id')}"
    last = given("user_id").replace(":user_id", ":last")
    return _Statements(
        list_users=list_owners(user, columns(["user_id"])),
        read_versions=f"""{settings}
    SELECT {columns(_VERSION_COLUMNS)}
    FROM e2e_room_keys_versions AS v LEFT JOIN roomkeys_counts AS c
        ON c.user_id = v.user_id AND c.version = v.version
        AND c.etag = COALESCE(v.etag, 0)
    WHERE v.user_id <= {last}
    AND (v.user_id, v.version) > ({user}, {version})
    ORDER BY v.user_id, v.version LIMIT {PAGE}""",
        read_keys=f"""{settings}
    SELECT {columns(_KEY_COLUMNS)} FROM e2e_room_keys
    WHERE user_id <= {last}
    AND (user_id, version, room_id, session_id) > ({place})
    ORDER BY user_id, version, room_id, session_id LIMIT {PAGE}""",
        tally=f"""
    SELECT v.version IS NOT NULL, COALESCE(v.deleted = 0, 1 = 0),
        d.version IS NOT NULL, c.key_count, c.key_bytes, k.number, k.bytes
    FROM (SELECT COUNT(*) AS number, COALESCE(SUM({size}), 0) AS bytes
        FROM e2e_room_keys WHERE user_id = {user} AND version = {version}) AS k
    LEFT JOIN e2e_room_keys_versions AS v
        ON v.user_id = {user} AND v.version = {version}
    LEFT JOIN roomkeys_counts AS c ON c.user_id = {user} AND c.version = {version}
        AND c.etag = COALESCE(v.etag, 0)
    LEFT JOIN roomkeys_deleted AS d ON d.user_id = {user} AND d.version = {version}""",
    )


#: By the name of an engine, its statements.
_STATEMENTS = {
    "sqlite": _make(
        _sqlite_columns, _sqlite_given, "LENGTH(CAST(session_data AS BLOB))", ""
    ),
    "postgresql": _make(
        _postgres_columns, _postgres_given, "OCTET_LENGTH(session_data)", _UNSORTED
    ),
}


class Inspection:
    """The reads of a search for faults. The Deferreds fail as the `Transactions` do."""

    def __init__(self, database: Transactions, engine: Engine) -> None:
        self._database = database
        self._engine = engine
        self._statements = _STATEMENTS[engine.name]

    def list_users(self, after: Value) -> "Deferred[list[Value]]":
        """Fire with a page of the users that have a version or a key, in order; an
        empty list after the last user.

        Args:
            after: the last user of the page before; b"" for the first page.
        """

        def read(txn: Transaction) -> list[Value]:
            values = _given(user_id=after)
            txn.execute(self._statements.list_users, {**values, "page": OWNERS})
            return [_values(row)[0] for row in txn.fetchall()]

        return self._database.run("roomkeys_inspect_users", read)

    def read_versions(
        self, first: Value, last: Value, after: StoredVersion | None
    ) -> "Deferred[list[StoredVersion]]":
        """Fire with a page of the versions of users from a first to a last one; an
        empty list after the last version.

        Args:
            after: the last version of the page before; None for the first page.
        """
        ids = (first, _FIRST_VERSION)
        if after is not None:
            ids = (after.user_id, after.version)

        def read(txn: Transaction) -> list[StoredVersion]:
            values = _given(last=last, user_id=ids[0], version=ids[1])
            txn.execute(self._statements.read_versions, values)
            return [StoredVersion(*_values(row)) for row in txn.fetchall()]

        return self._database.run("roomkeys_inspect_versions", read)

    def read_keys(
        self, first: Value, last: Value, after: StoredRow | None
    ) -> "Deferred[list[StoredRow]]":
        """Fire with a page of the keys of users from a first to a last one; an empty
        list after the last key.

        Args:
            after: the last key of the page before; None for the first page.
        """
        place = {
            "user_id": first if after is None else after.user_id,
            "version": _FIRST_VERSION if after is None else after.version,
            "room_id": b"" if after is None else after.room_id,
            "session_id": b"" if after is None else after.session_id,
        }

        def read(txn: Transaction) -> list[StoredRow]:
            values = _given(last=last, **place)
            txn.execute(self._statements.read_keys, values)
            return [StoredRow(*_values(row)) for row in txn.fetchall()]

        return self._database.run("roomkeys_inspect_keys", read)

    def tally(self, user_id: Value, version: Value) -> "Deferred[Tally]":
        """Fire with the keys of a version and with the facts about it, all of one
        moment: a server may write between two pages of a search."""

        def read(txn: Transaction) -> Tally:
            txn.execute(
                self._statements.tally, _given(user_id=user_id, version=version)
            )
            row = txn.fetchone()
            return Tally(
                is_stored=bool(row[0]),
                is_live=bool(row[1]),
                is_queued=bool(row[2]),
                cached_keys=row[3],
                cached_bytes=row[4],
                keys=int(row[5]),
                size=int(row[6]),
            )

        return self._database.run("roomkeys_inspect_tally", read)

    def forget_count(self, backup: BackupId) -> "Deferred[None]":
        """Delete the cached count of a version. The server recounts when it next needs
        the count."""

        def forget(txn: Transaction) -> None:
            txn.execute(FORGET_COUNT, names(backup))

        return self._database.write("roomkeys_inspect_forget", forget)


def _given(**values: Value) -> dict[str, Any]:
    """Return parameters of a statement, with their types."""
    given: dict[str, Any] = {}
    for name, value in values.items():
        is_text = isinstance(value, bytes) and not isinstance(value, Blob)
        given[name] = bytes(value) if isinstance(value, bytes) else value
        given[f"{name}_is_text"] = int(is_text)
    return given


def _values(row: Sequence[Any]) -> list[Value]:
    """Return the values of a row whose first column has the types, or NULL."""
    types, *values = row
    if types is not None:
        kinds = types.split()
        pairs = zip(kinds, values, strict=True)
        return [Blob(value) if kind == "blob" else value for kind, value in pairs]
    # psycopg2 returns bytes as a memoryview.
    return [bytes(v) if isinstance(v, memoryview) else v for v in values]

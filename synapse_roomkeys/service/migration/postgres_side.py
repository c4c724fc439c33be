"""A PostgreSQL server's database as a side of a migration."""

from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from typing import Any

from ...storage import PAGE_KEYS, postgres, sql, upgrade_tables, with_timeouts
from .side import (
    HELD,
    HELD_ONE,
    KEY_COLUMNS,
    KEYS,
    MAKE_MIGRATED,
    PAGE_VERSIONS,
    VERSIONS,
    Held,
    Row,
    Version,
    is_text,
    parse_held,
    saving,
)


class PostgresSide:
    """A database of a PostgreSQL server."""

    def __init__(self, args: Mapping[str, Any], source: bool) -> None:
        """
        Args:
            args: those of ``psycopg2.connect``, and those of adbapi's pool, which are
                of no use here.
            source: what is read is as it was at one moment, and nothing is written.
        """
        import psycopg2

        self._unfit = (psycopg2.DataError, psycopg2.errors.ProgramLimitExceeded)
        own = {name: v for name, v in args.items() if not name.startswith("cp_")}
        self._connection = psycopg2.connect(**with_timeouts(own))
        self._connection.set_client_encoding("UTF8")
        self._connection.set_session(
            isolation_level="REPEATABLE READ" if source else "READ COMMITTED",
            readonly=source,
        )
        # Each side waits for the other, for as long as the largest backup takes.
        self._execute("SET idle_in_transaction_session_timeout TO 0")
        self._execute("SET statement_timeout TO 0")
        self._connection.commit()

    def close(self) -> None:
        """As `Side.close`."""
        self._connection.close()

    def count_versions(self) -> int:
        """As `Side.count_versions`."""
        ((number,),) = self._execute("SELECT COUNT(*) FROM e2e_room_keys_versions")
        found: int = number
        return found

    def versions(self) -> Iterator[list[Row]]:
        """As `Side.versions`."""
        with self._connection.cursor("roomkeys_versions") as cursor:
            cursor.execute(VERSIONS)
            while page := cursor.fetchmany(PAGE_VERSIONS):
                yield page

    def keys(self, version: Version, count: int, ordered: bool) -> Iterator[Row]:
        """As `Side.keys`."""
        order = ' ORDER BY room_id COLLATE "C", session_id COLLATE "C"'
        statement = (KEYS + order if ordered else KEYS).replace("?", "%s")
        # A cursor of the server's takes more round trips, and bounds the memory.
        name = "roomkeys_keys" if count > PAGE_KEYS else None
        with self._connection.cursor(name) as cursor:
            if name is not None:
                cursor.itersize = PAGE_KEYS
            cursor.execute(statement, version.ids)
            yield from cursor

    def prepare(self) -> None:
        """As `Side.prepare`."""
        with self._connection.cursor() as cursor:
            upgrade_tables(_Transaction(cursor), postgres(), True)
            cursor.execute(MAKE_MIGRATED)
        self._connection.commit()

    def holds(self, *texts: Any) -> bool:
        """As `Side.holds`."""
        return all(map(is_text, texts)) and "\0" not in "".join(texts)

    def fit(self, row: Row) -> Row:
        """As `Side.fit`."""
        room_id, session_id, index, forwarded, verified, data = row
        return (
            *(room_id, session_id, _int4(index), _int4(forwarded)),
            *(bool(verified) if isinstance(verified, int) else None, data),
        )

    def find(self, versions: Sequence[Version]) -> list[Held]:
        """As `Side.find`."""
        statement = f"""{HELD} JOIN unnest(?::text[], ?::bigint[])
            AS u (user_id, version) USING (user_id, version)"""
        parameters = sql.pack_arrays([version.ids for version in versions])
        return [parse_held(row) for row in self._execute(statement, parameters)]

    def lock(self, version: Version) -> Held | None:
        """As `Side.lock`."""
        rows = self._execute(f"{HELD_ONE} FOR UPDATE OF v", version.ids)
        return parse_held(rows[0]) if rows else None

    def write(self, version: Version, rows: Sequence[Row]) -> int:
        """As `Side.write`."""
        self._execute("SAVEPOINT roomkeys_rows")
        try:
            with self._connection.cursor() as cursor:
                cursor.copy_expert(
                    f"COPY e2e_room_keys (user_id, version, {KEY_COLUMNS}) FROM STDIN",
                    BytesIO(_copy_text(version, rows).encode()),
                )
        except self._unfit:
            self._execute("ROLLBACK TO SAVEPOINT roomkeys_rows")
            if len(rows) == 1:
                return 1
            half = len(rows) // 2
            return self.write(version, rows[:half]) + self.write(version, rows[half:])
        self._execute("RELEASE SAVEPOINT roomkeys_rows")
        return 0

    def delete(self, version: Version, ids: Sequence[tuple[str, str]]) -> None:
        """As `Side.delete`."""
        statement = """
            DELETE FROM e2e_room_keys AS k
            USING unnest(?::text[], ?::text[]) AS u (room_id, session_id)
            WHERE k.user_id = ? AND k.version = ?
            AND k.room_id = u.room_id AND k.session_id = u.session_id"""
        self._execute(statement, [*sql.pack_arrays(ids), *version.ids])

    def clear(self, version: Version) -> None:
        """As `Side.clear`."""
        self._execute(sql.DELETE_KEYS, version.ids)

    def save(self, version: Version, new: bool) -> None:
        """As `Side.save`."""
        for statement, parameters in saving(version, new):
            self._execute(statement, parameters)

    def commit(self) -> None:
        """As `Side.commit`."""
        self._connection.commit()

    def _execute(self, statement: str, parameters: Sequence[Any] = ()) -> list[Row]:
        with self._connection.cursor() as cursor:
            cursor.execute(statement.replace("?", "%s"), parameters)
            return list(cursor.fetchall()) if cursor.description else []


class _Transaction:
    """A cursor of psycopg2 whose statements have ``?`` for their parameters."""

    def __init__(self, cursor: Any) -> None:
        self._cursor = cursor

    @property
    def rowcount(self) -> int:
        """As `Transaction.rowcount`."""
        number: int = self._cursor.rowcount
        return number

    @property
    def description(self) -> Any:
        """As `Transaction.description`."""
        return self._cursor.description

    def execute(self, statement: str, parameters: Any = ()) -> Any:
        """As `Transaction.execute`."""
        return self._cursor.execute(statement.replace("?", "%s"), parameters)

    def fetchone(self) -> Any:
        """As `Transaction.fetchone`."""
        return self._cursor.fetchone()

    def fetchall(self) -> list[tuple[Any, ...]]:
        """As `Transaction.fetchall`."""
        return list(self._cursor.fetchall())


def _int4(value: Any) -> int | None:
    fits = isinstance(value, int) and -(2**31) <= value < 2**31
    return value if fits else None


def _copy_text(version: Version, rows: Sequence[Row]) -> str:
    """Rows in the text format of PostgreSQL's COPY."""
    start = f"{_copy_value(version.user_id)}\t{version.version}\t"
    lines = (start + "\t".join(map(_copy_value, row)) for row in rows)
    return "\n".join(lines) + "\n"


def _copy_value(value: Any) -> str:
    if value is None:
        return "\\N"
    text = str(value).replace("\\", "\\\\").replace("\t", "\\t")
    return text.replace("\n", "\\n").replace("\r", "\\r")

"""A PostgreSQL server's database as a side of a migration."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import psycopg2
import psycopg2.errors
import psycopg2.extensions

from ...storage import (
    PAGE_KEYS,
    find_cluster,
    pack_array,
    postgres,
    upgrade_tables,
    with_timeouts,
)
from .copy_text import copy_text
from .layouts import KEY_COLUMNS, SYNAPSE, Layout
from .side import (
    COUNTS,
    DELETE_KEYS,
    KEYS,
    LOCK_SECONDS,
    MAKE_MIGRATED,
    MIGRATED,
    PAGE_VERSIONS,
    Ids,
    KeyCount,
    MigrateError,
    Page,
    RefusedError,
    Target,
    check_tables,
    failure,
    has_sound_version,
    pages_of,
    parse_held,
    parse_version,
    saving,
)
from .values import Held, KeysDigest, Row, SourceVersion, Version, is_text

#: The digest of the keys of a version v, as `values.digest_keys` computes it.
_DIGEST = """
    SELECT COUNT(*), COALESCE(SUM(('x' || LEFT(ENCODE(SHA256(CONVERT_TO(CONCAT(
        LENGTH(room_id), ',', LENGTH(session_id), ',', first_message_index, ',',
        forwarded_count, ',', is_verified::int, ',', room_id, session_id, session_data
    ), 'UTF8')), 'hex'), 16))::bit(64)::bigint), 0)
    FROM e2e_room_keys AS k WHERE k.user_id = v.user_id AND k.version = v.version"""
_COPIED = f"""(SELECT m.copied FROM {MIGRATED} AS m
    WHERE m.user_id = v.user_id AND m.version = v.version)"""
_NOT_COPIED = "NULL::text"
_VERSIONS = """
    SELECT v.user_id, v.version, v.algorithm, v.auth_data, v.deleted, v.etag,
        {copied}, k.*
    FROM e2e_room_keys_versions AS v CROSS JOIN LATERAL ({digest}) AS k"""
_FIND = """
    SELECT v.user_id, v.version, h.algorithm, h.auth_data, h.deleted, h.etag,
        {copied}, k.*
    FROM unnest(?::text[], ?::bigint[]) AS v (user_id, version)
    LEFT JOIN e2e_room_keys_versions AS h
        ON h.user_id = v.user_id AND h.version = v.version
    CROSS JOIN LATERAL ({digest}) AS k"""
_COUNT = "SELECT COUNT(*) FROM"
_LOCK = """
    SELECT 1 FROM e2e_room_keys_versions WHERE user_id = ? AND version = ? FOR UPDATE"""
_OF_USERS = " WHERE v.user_id = ANY (?)"
_FIND_TABLES = """
    SELECT name FROM unnest(?::text[]) AS name WHERE to_regclass(name) IS NOT NULL"""
#: The cluster, the database, and the table that the search path leads to.
_IDENTIFY = """
    SELECT c.system_identifier, d.oid, to_regclass(?)::oid
    FROM pg_control_system() AS c, pg_database AS d
    WHERE d.datname = current_database()"""
_CLAIM = "SELECT pg_try_advisory_xact_lock(hashtext('roomkeys migration'))"
#: A statement may take as long as the largest backup needs. A side idles while the
#: other side sorts such a backup: 10 minutes are enough, and release the locks of a
#: stopped process.
_SETTINGS = f"""
    SET idle_in_transaction_session_timeout TO '10min'; SET statement_timeout TO 0;
    SET lock_timeout TO '{LOCK_SECONDS}s'"""
#: The transaction that holds the claim idles for as long as the migration runs.
_IDLE_FOR_EVER = "SET LOCAL idle_in_transaction_session_timeout TO 0"


class _PostgresSide:
    """A connection to a database of a PostgreSQL server.

    Attributes:
        place: as `Keys.place`.
    """

    def __init__(
        self,
        role: str,
        args: Mapping[str, Any],
        layout: Layout,
        snapshot: bool,
        readonly: bool,
    ) -> None:
        """
        Args:
            role: "source" or "target".
            args: the arguments of ``psycopg2.connect``, and those of adbapi's pool,
                which are of no use here.
            layout: the homeserver's tables.
            snapshot: all is read as it was at one moment.
        """
        own = {name: v for name, v in args.items() if not name.startswith("cp_")}
        self._layout = layout
        self._args = with_timeouts(own)
        self.place = f"{role}, {_described(own)}"
        self._connection = self._connect()
        info = self._connection.info
        where = f" on {info.host}, port {info.port}" if info.host else ""
        self.place = f"{role}, PostgreSQL database {info.dbname}{where}"
        with self._errors():
            self._connection.set_session(
                isolation_level="REPEATABLE READ" if snapshot else "READ COMMITTED",
                readonly=readonly,
            )
        self._find_tables()
        self._refuse_distributed()

    def close(self) -> None:
        """As `Keys.close`."""
        self._connection.close()

    def identity(self) -> Hashable | None:
        """As `Keys.identity`."""
        ((*whole, table),) = self._execute(_IDENTIFY, (self._layout.keys,))
        return None if table is None else (*whole, table)

    def keys(self, ids: Ids, count: int, ordered: bool) -> Iterator[Row]:
        """As `Keys.keys`."""
        order = ' ORDER BY room_id COLLATE "C", session_id COLLATE "C"'
        # A cursor on the server bounds the memory, and takes two more round trips.
        name = "roomkeys_keys" if count > PAGE_KEYS else None
        statement = self._layout.with_clause + KEYS + (order if ordered else "")
        return self._stream(statement, ids, name, PAGE_KEYS)

    def _find_tables(self) -> None:
        """Note which of the tables exist."""
        names = [*self._layout.tables, MIGRATED, COUNTS]
        self._tables = {name for (name,) in self._execute(_FIND_TABLES, (names,))}

    def _refuse_distributed(self) -> None:
        """Close the connection and raise a RefusedError if Citus has distributed the
        tables: the digests of all versions would need joins of several nodes."""
        with self._errors(), self._connection.cursor() as cursor:
            cluster = find_cluster(cursor)
        if cluster is not None and cluster.distributed:
            self._connection.close()
            raise RefusedError(
                f"{self.place}: its tables are distributed by Citus, which a migration"
                " can't use. Migrate before you distribute the tables, or call"
                " undistribute_table() for each of them first"
            )

    def _connect(self) -> Any:
        with self._errors():
            connection = psycopg2.connect(**self._args)
            connection.set_client_encoding("UTF8")
            with connection, connection.cursor() as cursor:
                cursor.execute(_SETTINGS)
            return connection

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn the driver's exceptions into those of the migration."""
        passing = (psycopg2.OperationalError, psycopg2.InterfaceError)
        try:
            yield
        except psycopg2.Error as error:
            raise failure(self.place, error, isinstance(error, passing)) from error
        except UnicodeDecodeError as error:
            raise MigrateError(
                f"{self.place}: it holds text that isn't UTF-8"
            ) from error

    def _execute(self, statement: str, parameters: Sequence[Any] = ()) -> list[Row]:
        with self._errors(), self._connection.cursor() as cursor:
            cursor.execute(statement.replace("?", "%s"), parameters)
            return list(cursor.fetchall()) if cursor.description else []

    def _stream(
        self, statement: str, parameters: Sequence[Any], name: str | None, size: int
    ) -> Iterator[Row]:
        """Yield the rows of a query.

        Args:
            name: of a cursor on the server, or None to fetch all rows at once.
            size: rows that a round trip of that cursor fetches.
        """
        with self._errors(), self._connection.cursor(name) as cursor:
            if name is not None:
                cursor.itersize = size
            cursor.execute(statement.replace("?", "%s"), parameters)
            yield from cursor


class PostgresSource(_PostgresSide):
    """A `Source` in a database of a PostgreSQL server."""

    def __init__(
        self, args: Mapping[str, Any], layout: Layout, users: Sequence[str]
    ) -> None:
        """
        Args:
            args: the arguments of ``psycopg2.connect``.
            layout: the homeserver's tables.
            users: the only ones to read, or none for all.
        """
        super().__init__("source", args, layout, snapshot=True, readonly=True)
        self._of_users = _OF_USERS if users else ""
        self._users = [list(users)] if users else []
        try:
            check_tables(self.place, layout, self._tables)
        except MigrateError:
            self.close()
            raise

    def take_snapshot(self) -> None:
        """As `Source.take_snapshot`: the first query of the transaction took it."""

    def count_keys(self) -> KeyCount:
        """As `Source.count_keys`."""
        clause, keys = self._layout.with_clause, self._layout.keys
        statement = f"{clause}{_COUNT} e2e_room_keys AS v{self._of_users}"
        ((read,),) = self._execute(statement, self._users)
        if not clause:
            return KeyCount(read)
        statement = f"{_COUNT} {keys} AS v{self._of_users}"
        ((present,),) = self._execute(statement, self._users)
        return KeyCount(read, present - read)

    def versions(self, target: Target) -> Iterator[Page]:
        """As `Source.versions`."""
        copied = _COPIED if MIGRATED in self._tables else _NOT_COPIED
        query = _VERSIONS.format(copied=copied, digest=_DIGEST)
        statement = self._layout.with_clause + query + self._of_users
        rows = self._stream(statement, self._users, "roomkeys_versions", PAGE_VERSIONS)
        for page in pages_of(rows, PAGE_VERSIONS):
            sound = [row for row in page if has_sound_version(row, target)]
            versions = [
                SourceVersion(parse_version(row, KeysDigest(*row[7:])), row[6])
                for row in sound
            ]
            yield Page(versions, len(page) - len(sound))


class PostgresTarget(_PostgresSide):
    """A `Target` in a database of a PostgreSQL server."""

    def __init__(self, args: Mapping[str, Any], dry_run: bool) -> None:
        """
        Args:
            args: the arguments of ``psycopg2.connect``.
            dry_run: the server refuses each write.
        """
        super().__init__("target", args, SYNAPSE, snapshot=False, readonly=dry_run)
        self._claim: Any = None

    def close(self) -> None:
        """As `Keys.close`."""
        super().close()
        if self._claim is not None:
            self._claim.close()

    def claim(self) -> None:
        """As `Target.claim`."""
        # A lock of a transaction on a separate connection: valid across the migration's
        # transactions, and through a transaction pooler.
        self._claim = self._connect()
        with self._errors(), self._claim.cursor() as cursor:
            cursor.execute(_IDLE_FOR_EVER)
            cursor.execute(_CLAIM)
            ((is_free,),) = cursor.fetchall()
        if not is_free:
            raise MigrateError(
                f"{self.place}: another migration writes to it. Wait for its end, then"
                " run this command again"
            )

    def prepare(self, make_tables: bool) -> None:
        """As `Target.prepare`."""
        with self._errors(), self._connection.cursor() as cursor:
            if make_tables:
                upgrade_tables(cursor, postgres(), True)
            cursor.execute(MAKE_MIGRATED)
        self._find_tables()
        check_tables(self.place, SYNAPSE, self._tables)
        self.commit()

    def holds(self, *texts: Any) -> bool:
        """As `Target.holds`."""
        return all(map(is_text, texts)) and "\0" not in "".join(texts)

    def fit(self, row: Row) -> Row | None:
        """As `Target.fit`."""
        room_id, session_id, index, forwarded, verified, data = row
        if not self.holds(room_id, session_id, data):
            return None
        is_verified = bool(verified) if isinstance(verified, int) else None
        return (room_id, session_id, _int4(index), _int4(forwarded), is_verified, data)

    def find(self, ids: Sequence[Ids]) -> dict[Ids, Held]:
        """As `Target.find`."""
        if not set(SYNAPSE.tables) <= self._tables:
            return {}
        copied = _COPIED if MIGRATED in self._tables else _NOT_COPIED
        statement = _FIND.format(copied=copied, digest=_DIGEST)
        users, versions = zip(*ids, strict=True) if ids else ((), ())
        rows = self._execute(statement, [pack_array(users), pack_array(versions)])
        states = {
            row[:2]: parse_held(row, row[6], KeysDigest(*row[7:])) for row in rows
        }
        return {ids: held for ids, held in states.items() if held is not None}

    def lock(self, ids: Ids) -> Held | None:
        """As `Target.lock`."""
        self._execute(_LOCK, ids)
        return self.find([ids]).get(ids)

    def write(self, ids: Ids, rows: Sequence[Row]) -> list[Row]:
        """As `Target.write`."""
        self._execute("SAVEPOINT roomkeys_rows")
        with self._errors(), self._connection.cursor() as cursor:
            try:
                cursor.copy_expert(
                    f"COPY e2e_room_keys (user_id, version, {KEY_COLUMNS}) FROM STDIN",
                    BytesIO(copy_text(ids, rows).encode()),
                )
            except (psycopg2.DataError, psycopg2.errors.ProgramLimitExceeded):
                cursor.execute("ROLLBACK TO SAVEPOINT roomkeys_rows")
                if len(rows) == 1:
                    return list(rows)
                half = len(rows) // 2
                return self.write(ids, rows[:half]) + self.write(ids, rows[half:])
        self._execute("RELEASE SAVEPOINT roomkeys_rows")
        return []

    def delete(self, ids: Ids, rows: Sequence[Row]) -> None:
        """As `Target.delete`."""
        statement = """
            DELETE FROM e2e_room_keys AS k
            USING unnest(?::text[], ?::text[]) AS u (room_id, session_id)
            WHERE k.user_id = ? AND k.version = ?
            AND k.room_id = u.room_id AND k.session_id = u.session_id"""
        room_ids = pack_array([row[0] for row in rows])
        session_ids = pack_array([row[1] for row in rows])
        self._execute(statement, [room_ids, session_ids, *ids])

    def clear(self, ids: Ids) -> None:
        """As `Target.clear`."""
        self._execute(DELETE_KEYS, ids)

    def save(self, version: Version, copied: str, is_new: bool) -> None:
        """As `Target.save`."""
        has_counts = COUNTS in self._tables
        for statement, parameters in saving(version, copied, is_new, has_counts):
            self._execute(statement, parameters)

    def commit(self) -> None:
        """As `Target.commit`."""
        with self._errors():
            self._connection.commit()


def _described(args: Mapping[str, Any]) -> str:
    """Describe a database before the connection.

    A dsn isn't shown, as any part of a malformed dsn may hold the password. Nor is the
    database's name before the server knows it: a password may stand in its place.
    """
    if "dsn" in args:
        return "PostgreSQL as database.args.dsn says"
    host = args.get("host")
    return (
        f"PostgreSQL on {host}, port {args.get('port', 5432)}" if host else "PostgreSQL"
    )


def _int4(value: Any) -> int | None:
    fits = isinstance(value, int) and -(2**31) <= value < 2**31
    return value if fits else None

"""The tables: created or upgraded when a process starts, and checked."""

import re
from importlib import resources
from itertools import chain

from ..describe import error_line
from ..version import __version__
from . import statements
from .causes import OTHER, SCHEMA
from .citus import Cluster, distribute_own_tables, find_asynchronous_nodes
from .engine import Engine
from .transactions import Transaction

#: Number of the file that creates the homeserver's tables; the other files create the
#: plugin's own.
_HOMESERVERS_FILE = 1
#: By table of the plugin, the numbers of the files that create the table. The files are
#: applied again if an operator has dropped the table.
_FILES_OF = {
    "roomkeys_counts": (2, 3),
    "roomkeys_numbers": (4,),
    **dict.fromkeys(statements.RECORD_TABLES, (5,)),
    "roomkeys_tasks": (6,),
}

_FIND_NUMBER = "SELECT number FROM roomkeys_schema"
#: Replace the schema number, which is the only row.
_SAVE_NUMBER = (
    "CREATE TABLE IF NOT EXISTS roomkeys_schema (number BIGINT PRIMARY KEY)",
    "DELETE FROM roomkeys_schema",
    "INSERT INTO roomkeys_schema (number) VALUES ({number})",
)
#: Create and drop a table, to test that the role may create tables. The transaction
#: is rolled back or drops the table.
_TRY_TABLE = "CREATE TABLE roomkeys_check (number BIGINT)"
_DROP_TABLE = "DROP TABLE roomkeys_check"
#: The table that a statement of a file creates or alters.
_OF_TABLE = re.compile(r"\s*(?:CREATE|ALTER) TABLE (?:IF NOT EXISTS )?(\w+)")
#: The beginning of a statement of a file that creates a table.
_CREATE = "CREATE TABLE IF NOT EXISTS"

#: The encoding of a database that can hold every character of a client's JSON.
_ENCODING = "UTF8"


class SchemaError(Exception):
    """A table is missing or of another version, or the encoding isn't UTF8."""


def upgrade_tables(txn: Transaction, engine: Engine, homeserver_tables: bool) -> None:
    """Create or upgrade the tables, one process after the other.

    The files in ``schema/`` are applied in the order of their numbers, each file once:
    the table ``roomkeys_schema`` holds the last file's number. The function must be the
    first work of its transaction. If no file has to be applied, no lock is taken.

    Args:
        homeserver_tables: create the homeserver's tables too, in a database without a
            homeserver.

    In a Citus cluster, the coordinator alone creates tables. Once the homeserver's
    tables are distributed, the plugin's own tables are distributed too.

    Raises:
        SchemaError: the tables are newer than this version of the plugin, the
            database's encoding isn't UTF8, or the node is a worker of Citus on which a
            table isn't distributed.
    """
    files = _read_files(engine)
    missing = _find_missing(txn, engine, max(files))
    cluster = engine.find_cluster(txn)
    _check_cluster(txn, cluster)
    _check_encoding(txn, engine)
    if not missing and (cluster is None or not cluster.undistributed):
        return
    txn.execute(engine.tables.lock)
    for number in _find_missing(txn, engine, max(files)):
        if number != _HOMESERVERS_FILE or homeserver_tables:
            for statement in files[number]:
                txn.execute(statement)
    for statement in _SAVE_NUMBER:
        txn.execute(statement.format(number=max(files)))
    cluster = engine.find_cluster(txn)
    if cluster is not None:
        distribute_own_tables(txn, cluster)


def open_tables(txn: Transaction, engine: Engine) -> None:
    """Prepare a connection for an operator's command, without a change to the database.

    The plugin's own tables that the database lacks, such as in a Synapse that never
    loaded the plugin, are created as temporary, empty tables of the connection.

    Raises:
        SchemaError: the homeserver's tables are missing, or the plugin's own tables are
            of another version of the plugin.
    """
    files = _read_files(engine)
    tables = _find_tables(txn, engine)
    absent = [table for table in statements.TABLES if table not in tables]
    if absent:
        raise SchemaError(
            f"there is no table {' or '.join(absent)}. Is it the database with a"
            " homeserver's key backups?"
        )
    newest = max(files)
    _find_missing(txn, engine, newest)
    if 0 < _read_number(txn, tables) < newest:
        raise SchemaError(
            f"its roomkeys tables lack a part of number {newest}, which"
            f" synapse-roomkeys {__version__} needs: start a server with this version"
            " once, which makes them"
        )
    engine.find_cluster(txn)
    for number in sorted(files):
        for statement in files[number]:
            table = _OF_TABLE.match(statement)
            if table is not None and table[1] not in tables:
                txn.execute(statement.replace(_CREATE, "CREATE TEMPORARY TABLE"))


def probe_tables(txn: Transaction, engine: Engine) -> None:
    """Check that all tables exist in this version, and write a row without a change.

    The function must be the first work of its transaction. Two processes that probe
    the tables never wait for each other.

    Raises:
        SchemaError: a table is missing, or of another version of the plugin.
    """
    newest = max(_read_files(engine))
    if _find_missing(txn, engine, newest):
        raise SchemaError(
            f"its roomkeys tables lack a part of number {newest}, which"
            f" synapse-roomkeys {__version__} needs: restart it, which makes them"
        )
    txn.execute(engine.tables.touch)
    problem = check_tables(txn, engine)
    if problem is not None:
        raise SchemaError(problem)


def rehearse_start(txn: Transaction, engine: Engine) -> str:
    """Check that the service could start on the database, without a change.

    The function must be the first work of its transaction.

    Returns:
        A sentence for the operator about the tables.

    Raises:
        SchemaError: the service wouldn't start.
    """
    newest = max(_read_files(engine))
    tables = _find_tables(txn, engine)
    _check_cluster(txn, engine.find_cluster(txn))
    if not tables:
        txn.execute(engine.tables.lock)
        txn.execute(_TRY_TABLE)
        txn.execute(_DROP_TABLE)
        return "there are no tables yet; the service makes them at its start"
    if not _find_missing(txn, engine, newest):
        probe_tables(txn, engine)
        return f"all tables are there, of number {newest}, and can be written to"
    problem = check_tables(txn, engine)
    if problem is not None:
        raise SchemaError(problem)
    return f"the service brings the tables to number {newest} at its start"


def _find_tables(txn: Transaction, engine: Engine) -> set[str]:
    """Return the names of the homeserver's and the plugin's tables that exist."""
    txn.execute(engine.tables.find_tables)
    return {name for (name,) in txn.fetchall()}


def _read_number(txn: Transaction, tables: set[str]) -> int:
    """Return the database's schema number; 0 without the plugin's tables."""
    if "roomkeys_schema" not in tables:
        return 0
    txn.execute(_FIND_NUMBER)
    ((number,),) = txn.fetchall()
    return int(number)


def _find_missing(txn: Transaction, engine: Engine, newest: int) -> list[int]:
    """Return the numbers of the files to apply: numbers above the database's schema
    number, and the files of tables that were dropped.

    Raises:
        SchemaError: the database's schema number is above the newest file's.
    """
    tables = _find_tables(txn, engine)
    last = _read_number(txn, tables)
    if last > newest:
        raise SchemaError(
            f"its roomkeys tables have number {last}, but this is synapse-roomkeys"
            f" {__version__}, which knows them up to number {newest}: install the"
            " version that was here before, or a later one"
        )
    dropped = [_FILES_OF[table] for table in _FILES_OF if table not in tables]
    return sorted({*range(last + 1, newest + 1), *chain.from_iterable(dropped)})


def _check_cluster(txn: Transaction, cluster: Cluster | None) -> None:
    """Raise a SchemaError if the tables aren't distributed as they have to be, or if a
    node with tables may lose committed keys."""
    if cluster is None:
        return
    problem = cluster.find_problem()
    if problem is not None:
        raise SchemaError(problem)
    nodes = find_asynchronous_nodes(txn) if cluster.is_distributed else []
    if nodes:
        raise SchemaError(
            f"synchronous_commit is off on {', '.join(nodes)}: a crash would lose keys"
            " whose upload was answered. Turn it on at the coordinator with ALTER ROLE"
            " ... SET synchronous_commit TO on, and see docs/scaling.rst for the other"
            " settings of the role"
        )


def _check_encoding(txn: Transaction, engine: Engine) -> None:
    """Raise a SchemaError unless the database can hold every Unicode character."""
    txn.execute(engine.tables.find_encoding)
    ((encoding,),) = txn.fetchall()
    if encoding != _ENCODING:
        raise SchemaError(
            f"its encoding is {encoding}, but keys need {_ENCODING}: make a new"
            " database with createdb -E UTF8 -T template0 NAME"
        )


def _read_files(engine: Engine) -> dict[int, list[str]]:
    """Return the statements of each number; the numbers have no gap.

    A file is named after its number and its subject (``005_record.sql``). A second file
    of the number, for one engine alone (``005_record.postgresql.sql``), is applied
    after it.
    """
    files: dict[int, list[str]] = {}
    folder = resources.files(__package__) / "schema"
    # The file for one engine has the longer name.
    for file in sorted(folder.iterdir(), key=lambda file: len(file.name)):
        subject, *engines, _ = file.name.split(".")
        if engines in ([], [engine.name]):
            lines = file.read_text().splitlines()
            code = "\n".join(line for line in lines if not line.startswith("--"))
            statements = [part for part in code.split(";") if part.strip()]
            number = int(subject.partition("_")[0])
            files.setdefault(number, []).extend(statements)
    return files


def check_tables(txn: Transaction, engine: Engine) -> str | None:
    """Check the homeserver's tables. The caller must roll the transaction back, because
    a failed statement ends it.

    Returns:
        The expected and the found state of a wrong table, for the operator; None if
        all tables are right.

    Raises:
        Exception: an error of the driver that isn't about the tables.
    """
    for table, columns in statements.TABLES.items():
        expected = f"expected table {table} with columns {', '.join(columns)}"
        try:
            txn.execute(statements.COLUMNS.format(table=table))
            found = [column[0] for column in txn.description]
            if not set(columns) <= set(found):
                return f"{expected}; found {', '.join(found)}"
            expected = f"expected table {table} with its unique index"
            # Citus would ask a node of a distributed table, which may be down.
            if not engine.is_distributed:
                txn.execute(statements.PROBES[table])
        except engine.error as error:
            if engine.find_cause(error) not in (SCHEMA, OTHER):
                raise
            return f"{expected}; found {error_line(error)}"
    return None


def estimate_keys(txn: Transaction, engine: Engine) -> int:
    """Return the approximate number of keys in all backups: see `TableStatements`."""
    txn.execute(engine.tables.estimate_keys)
    ((number,),) = txn.fetchall()
    return int(number)

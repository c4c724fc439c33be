"""The tables: made and brought up to date when a process starts, and checked."""

from importlib import resources
from itertools import chain

from ..describe import error_line
from ..version import __version__
from . import sql
from .database import OTHER, SCHEMA, Engine, Transaction

#: The file that makes the homeserver's tables; the others make the plugin's own.
_HOMESERVERS_FILE = 1
#: The files that make each of the plugin's own tables. They run again for a table that
#: an operator has dropped.
_FILES_OF = {"roomkeys_counts": (2, 3), "roomkeys_numbers": (4,)}

_FIND_NUMBER = "SELECT number FROM roomkeys_schema"
#: The statements that make a number the only one.
_SAVE_NUMBER = (
    "CREATE TABLE IF NOT EXISTS roomkeys_schema (number BIGINT PRIMARY KEY)",
    "DELETE FROM roomkeys_schema",
    "INSERT INTO roomkeys_schema (number) VALUES ({number})",
)
#: Statements that show whether tables can be made, in a transaction of their own.
_TRY_TABLE = "CREATE TABLE roomkeys_check (number BIGINT)"
_DROP_TABLE = "DROP TABLE roomkeys_check"


#: The encoding of a database that can hold every character of a client's JSON.
_ENCODING = "UTF8"


class SchemaError(Exception):
    """A table is missing or of another version, or the encoding isn't UTF8."""


def upgrade_tables(txn: Transaction, engine: Engine, homeserver_tables: bool) -> None:
    """Make what is missing of the tables, one process after the other.

    What the files in ``schema/`` say is done in the order of their numbers, each once:
    the table ``roomkeys_schema`` holds the number of the last one. It must be the
    transaction's first work. Where nothing is missing, nothing is locked.

    Args:
        homeserver_tables: make the homeserver's tables too, where there is no
            homeserver that does.

    Raises:
        SchemaError: the tables are newer than this version of the plugin, or the
            database's encoding isn't UTF8.
    """
    files = _read_files()
    missing = _find_missing(txn, engine, max(files))
    _check_encoding(txn, engine)
    if not missing:
        return
    txn.execute(engine.dialect.lock_schema)
    for number in _find_missing(txn, engine, max(files)):
        if number != _HOMESERVERS_FILE or homeserver_tables:
            for statement in files[number]:
                txn.execute(statement)
    for statement in _SAVE_NUMBER:
        txn.execute(statement.format(number=max(files)))


def probe_tables(txn: Transaction, engine: Engine) -> None:
    """Check that all tables exist in this version, and write a row without a change.

    It must be the transaction's first work. It never waits for another process that
    does the same.

    Raises:
        SchemaError: a table is missing, or of another version of the plugin.
    """
    newest = max(_read_files())
    if _find_missing(txn, engine, newest):
        raise SchemaError(
            f"its roomkeys tables lack a part of number {newest}, which"
            f" synapse-roomkeys {__version__} needs: restart it, which makes them"
        )
    txn.execute(engine.dialect.touch_schema)
    problem = check_tables(txn, engine)
    if problem is not None:
        raise SchemaError(problem)


def rehearse_start(txn: Transaction, engine: Engine) -> str:
    """Check that the service could start on the database, and change nothing.

    It must be the transaction's first work.

    Returns:
        A sentence for the operator about the tables.

    Raises:
        SchemaError: the service wouldn't start.
    """
    newest = max(_read_files())
    if not _find_tables(txn, engine):
        txn.execute(engine.dialect.lock_schema)
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
    """The names of those of the homeserver's and the plugin's tables that are there."""
    txn.execute(engine.dialect.find_tables)
    return {name for (name,) in txn.fetchall()}


def _find_missing(txn: Transaction, engine: Engine, newest: int) -> list[int]:
    """The numbers of the files that have to be applied: those above the last one that
    was, and those of tables that were dropped.

    Raises:
        SchemaError: the last number is above the newest.
    """
    tables = _find_tables(txn, engine)
    last = 0
    if "roomkeys_schema" in tables:
        txn.execute(_FIND_NUMBER)
        ((last,),) = txn.fetchall()
    if last > newest:
        raise SchemaError(
            f"its roomkeys tables have number {last}, but this is synapse-roomkeys"
            f" {__version__}, which knows them up to number {newest}: install the"
            " version that was here before, or a later one"
        )
    dropped = [_FILES_OF[table] for table in _FILES_OF if table not in tables]
    return sorted({*range(last + 1, newest + 1), *chain.from_iterable(dropped)})


def _check_encoding(txn: Transaction, engine: Engine) -> None:
    """Raise a SchemaError unless the database can hold every Unicode character."""
    txn.execute(engine.dialect.find_encoding)
    ((encoding,),) = txn.fetchall()
    if encoding != _ENCODING:
        raise SchemaError(
            f"its encoding is {encoding}, but keys need {_ENCODING}: make a new"
            " database with createdb -E UTF8 -T template0 NAME"
        )


def _read_files() -> dict[int, list[str]]:
    """The statements of each file by its number; the numbers have no gap."""
    files = {}
    for file in (resources.files(__package__) / "schema").iterdir():
        lines = file.read_text().splitlines()
        code = "\n".join(line for line in lines if not line.startswith("--"))
        statements = [part for part in code.split(";") if part.strip()]
        files[int(file.name.partition("_")[0])] = statements
    return files


def check_tables(txn: Transaction, engine: Engine) -> str | None:
    """What is wrong with the homeserver's tables, or None.

    The transaction is of no more use afterwards.

    Raises:
        Exception: the driver's, where it isn't about the tables.
    """
    for table, columns in sql.TABLES.items():
        expected = f"expected table {table} with columns {', '.join(columns)}"
        try:
            txn.execute(sql.COLUMNS.format(table=table))
            found = [column[0] for column in txn.description]
            if not set(columns) <= set(found):
                return f"{expected}; found {', '.join(found)}"
            expected = f"expected table {table} with its unique index"
            txn.execute(sql.PROBES[table])
        except engine.error as error:
            if engine.find_cause(error) not in (SCHEMA, OTHER):
                raise
            return f"{expected}; found {error_line(error)}"
    return None


def estimate_keys(txn: Transaction, engine: Engine) -> int:
    """About how many keys there are in all backups; see `Dialect.estimate_keys`."""
    txn.execute(engine.dialect.estimate_keys)
    ((number,),) = txn.fetchall()
    return int(number)

"""The tables: made and brought up to date when a process starts, and checked."""

from importlib import resources
from itertools import chain

from ..describe import error_line
from ..version import __version__
from . import sql
from .database import Engine, Transaction

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


#: The encoding of a database that can hold every character of a client's JSON.
_ENCODING = "UTF8"


class SchemaError(Exception):
    """The database can't be used: its tables are newer, or its encoding isn't UTF8."""


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


def _find_missing(txn: Transaction, engine: Engine, newest: int) -> list[int]:
    """The numbers of the files that have to be applied: those above the last one that
    was, and those of tables that were dropped.

    Raises:
        SchemaError: the last number is above the newest.
    """
    txn.execute(engine.dialect.find_own_tables)
    tables = {name for (name,) in txn.fetchall()}
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
            return f"{expected}; found {error_line(error)}"
    return None

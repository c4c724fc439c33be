"""The tables: made and brought up to date when a process starts, and checked."""

from importlib import resources

from ..describe import error_line
from ..version import __version__
from . import sql
from .database import Engine, Transaction

#: The file that makes the homeserver's tables; the others make the plugin's own.
_HOMESERVERS_FILE = 1

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
    newest = max(files)
    found = _find_number(txn, engine, newest)
    _check_encoding(txn, engine)
    if found == newest:
        return
    txn.execute(engine.dialect.lock_schema)
    found = _find_number(txn, engine, newest)
    for number in range(found + 1, newest + 1):
        if number != _HOMESERVERS_FILE or homeserver_tables:
            for statement in files[number]:
                txn.execute(statement)
    for statement in _SAVE_NUMBER:
        txn.execute(statement.format(number=newest))


def _find_number(txn: Transaction, engine: Engine, newest: int) -> int:
    """The number of the last file that was applied: 0 for none, or before there were
    numbers.

    Raises:
        SchemaError: it is above the newest.
    """
    txn.execute(engine.dialect.find_own_tables)
    ((tables,),) = txn.fetchall()
    if tables < len(sql.OWN_TABLES):
        return 0
    txn.execute(_FIND_NUMBER)
    ((number,),) = txn.fetchall()
    found: int = number
    if found > newest:
        raise SchemaError(
            f"its roomkeys tables have number {found}, but this is synapse-roomkeys"
            f" {__version__}, which knows them up to number {newest}: install the"
            " version that was here before, or a later one"
        )
    return found


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

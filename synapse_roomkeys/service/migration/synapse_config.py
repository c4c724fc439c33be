"""The database of a Synapse, by its configuration."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...config import OptionError
from ..config import DatabaseConfig, check_arguments, read_yaml


def load_synapse_database(paths: Sequence[Path]) -> DatabaseConfig:
    """Read the database of a Synapse's configuration.

    Args:
        paths: files such as homeserver.yaml, one at least. As in Synapse, a section in
            a later file replaces the section of an earlier one.

    Raises:
        OptionError: a file can't be read, or no file has a usable database. The error
            names the file.
    """
    path = paths[0]
    content: dict[str, Any] = {}
    try:
        for path in paths:
            found = read_yaml(path)
            content |= found if isinstance(found, Mapping) else {}
        return synapse_database(content)
    except OptionError as error:
        raise OptionError(str(path), str(error)) from None


def synapse_database(homeserver: Any) -> DatabaseConfig:
    """The database with the backups, of a Synapse's configuration.

    Args:
        homeserver: what homeserver.yaml holds.

    Raises:
        OptionError: the configuration names no such database, or libpq rejects an
            argument.
    """
    content = homeserver if isinstance(homeserver, Mapping) else {}
    several = content.get("databases")
    found = [content.get("database")]
    if isinstance(several, Mapping):
        found = [one for one in several.values() if _is_main(one)]
    for one in found:
        if isinstance(one, Mapping) and one.get("name") in ("sqlite3", "psycopg2"):
            args = one.get("args")
            if isinstance(args, Mapping) and (
                one["name"] == "psycopg2" or "database" in args
            ):
                if one["name"] == "psycopg2":
                    check_arguments(args)
                return DatabaseConfig(one["name"], dict(args))
    raise OptionError(
        "database", "must be there, with a name of sqlite3 or psycopg2 and its args"
    )


def _is_main(database: Any) -> bool:
    """Whether one of Synapse's databases is the one for all but the rooms' states."""
    if not isinstance(database, Mapping):
        return False
    return "main" in (database.get("data_stores") or ["main"])

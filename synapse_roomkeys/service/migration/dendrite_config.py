"""The database of a Dendrite, by its configuration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ...config import OptionError
from ...storage import find_wrong_argument, split_dsn
from ..config import DatabaseConfig, read_yaml

#: The options with the database's address. As in Dendrite, the database of the
#: component precedes the database of all components.
_OPTIONS = (
    ("user_api", "account_database", "connection_string"),
    ("global", "database", "connection_string"),
)


def load_dendrite_database(path: Path) -> DatabaseConfig:
    """Read the database of a Dendrite's configuration.

    Args:
        path: the file dendrite.yaml.

    Raises:
        OptionError: as `dendrite_database`, or the file can't be read. The error names
            the file.
    """
    try:
        return dendrite_database(read_yaml(path))
    except OptionError as error:
        raise OptionError(str(path), str(error)) from None


def dendrite_database(content: Any) -> DatabaseConfig:
    """Return the database with the backups, from the content of a dendrite.yaml.

    Args:
        content: the decoded YAML.

    Raises:
        OptionError: no option names a database, or libpq rejects the connection string.
            The error leaves the string out, because it may hold a password.
    """
    for keys in _OPTIONS:
        text = _find(content, keys)
        if isinstance(text, str) and text:
            return _parse(".".join(keys), text)
    first, second = (".".join(keys) for keys in _OPTIONS)
    raise OptionError(first, f"must name the database, or {second}")


def _find(content: Any, keys: tuple[str, ...]) -> Any:
    """Return the value at the end of a path through nested mappings, or None."""
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def _parse(name: str, text: str) -> DatabaseConfig:
    """Parse a connection string of Dendrite.

    Args:
        name: the name of the option.
        text: the URI of a file, or a connection string of PostgreSQL.
    """
    if text.startswith("file:"):
        # Dendrite decodes %-sequences in absolute paths alone, and ignores the query.
        path = urlsplit(text).path
        path = unquote(path) if path.startswith("/") else path
        if not path:
            raise OptionError(name, "has no path after file:")
        return DatabaseConfig("sqlite3", {"database": path})
    if find_wrong_argument({"dsn": text}) is not None:
        raise OptionError(
            name,
            "isn't a connection string of libpq: percent-encode special characters of"
            " the password, and remove parameters that libpq doesn't know, such as"
            " binary_parameters, from a copy of the file",
        )
    return DatabaseConfig("psycopg2", split_dsn(text))

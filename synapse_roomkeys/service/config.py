"""The configuration of the service, from YAML files and the environment.

The environment wins over the files. The name of an option consists of the keys of its
place in YAML with dots between them, such as ``homeserver.url``. The option's variable
in the environment is ``ROOMKEYS_HOMESERVER_URL``. A variable with ``_FILE`` at the end,
such as ``ROOMKEYS_HOMESERVER_URL_FILE``, has the path of a file with the value.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import attrs
import yaml
from msgspec import Meta, convert

from ..config import OptionError, check_option, make_section, options_of
from ..homeserver import HomeserverOptions
from ..storage import find_wrong_argument
from ..types import Boolean, Limits, PositiveInt, Retention
from .endpoints import Endpoint
from .forwarded import Network

#: Start of the names of all variables.
PREFIX = "ROOMKEYS_"
#: Ends of the variables that Kubernetes sets in each container if a Service's name
#: starts with "roomkeys". These variables are no options and are ignored.
_KUBERNETES = re.compile(r"_SERVICE_(HOST|PORT\w*)$|_PORT(_\d+_[A-Z]+(_[A-Z]+)?)?$")
_ARGS = "database.args."
_ARGUMENT = re.compile(re.escape(_ARGS) + "[a-z_]+")
#: Options of Synapse's section ``database`` and of Synapse's connection pool. The
#: service ignores them with any value, so that an operator can copy the section.
_SYNAPSES = frozenset(
    [
        "database.allow_unsafe_locale",
        "database.data_stores",
        "database.idle_in_transaction_session_timeout",
        "database.statement_timeout",
        "database.synchronous_commit",
        "database.txn_limit",
        _ARGS + "cp_good_sql",
        _ARGS + "cp_name",
        _ARGS + "cp_noisy",
        _ARGS + "cp_openfun",
        _ARGS + "cp_reconnect",
    ]
)
_POOL = {_ARGS + "cp_min": PositiveInt, _ARGS + "cp_max": PositiveInt}
#: Type of an argument of ``sqlite3.connect`` or ``psycopg2.connect``.
_Argument = Annotated[str | int, Meta(description="a string or an integer")]
_STRINGS = Meta(description="a list of strings")


@attrs.frozen
class DatabaseConfig:
    """The section ``database:`` of a configuration, in Synapse's syntax.

    Attributes:
        name: ``sqlite3`` or ``psycopg2``.
        args: for SQLite, ``database`` with the path of the file. For PostgreSQL, the
            arguments of ``psycopg2.connect``, and ``cp_min`` and ``cp_max``, the
            minimum and maximum number of connections in adbapi's pool. The arguments
            may have a password, and are left out of ``repr``.
    """

    name: Literal["sqlite3", "psycopg2"] = "sqlite3"
    args: Mapping[str, Any] = attrs.field(
        factory=lambda: {"database": "roomkeys.db"}, repr=False
    )


@attrs.frozen
class LogConfig:
    """The section ``log:``.

    Attributes:
        format: plain text, or one JSON object a line.
        level: the lowest level that is logged.
    """

    format: Literal["text", "json"] = "text"
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"


@attrs.frozen
class AdminConfig:
    """The section ``admin:``, the HTTP interface for operators.

    Attributes:
        listeners: endpoints of the interface, in Twisted's syntax; without any, the
            service doesn't have the interface.
        token_path: file with a token by which an operator is authenticated, or None.
        synapse_admins: whether the administrators of the homeserver, which is a
            Synapse, are operators.
    """

    listeners: Annotated[tuple[Endpoint, ...], _STRINGS] = ()
    token_path: Annotated[str, Meta(description="the path of a file")] | None = None
    synapse_admins: Boolean = False


@attrs.frozen
class ServiceConfig:
    """All options of the service.

    Attributes:
        homeserver: the homeserver whose users have their backups here.
        database: the service's database.
        listeners: endpoints for clients, in Twisted's syntax.
        metrics_listeners: endpoints that serve only metrics and status.
        trusted_proxies: networks of the proxies whose X-Forwarded-For and X-Request-ID
            are believed. Peers of a unix socket are always believed.
        log: the format of the log, and its lowest level.
        shutdown_seconds: time in which requests under way may end after a signal to
            stop.
        stalled_download_seconds: time for which a client may read nothing before its
            download is dropped.
        limits: sizes and numbers above which a request is refused.
        retention: what is kept of changed and deleted backups.
        admin: the HTTP interface for operators.
    """

    homeserver: HomeserverOptions
    database: DatabaseConfig = attrs.field(factory=DatabaseConfig)
    listeners: Annotated[
        tuple[Endpoint, ...],
        Meta(min_length=1, description="a list of strings, at least one"),
    ] = (Endpoint("tcp:8009:interface=127.0.0.1"),)
    metrics_listeners: Annotated[tuple[Endpoint, ...], _STRINGS] = ()
    trusted_proxies: Annotated[tuple[Network, ...], _STRINGS] = ()
    log: LogConfig = attrs.field(factory=LogConfig)
    shutdown_seconds: PositiveInt = 30
    stalled_download_seconds: PositiveInt = 300
    limits: Limits = attrs.field(factory=Limits)
    retention: Retention = attrs.field(factory=Retention)
    admin: AdminConfig = attrs.field(factory=AdminConfig)


#: Types of the options by name, without those in ``database.args``.
OPTIONS = options_of(ServiceConfig)
_VARIABLES = {PREFIX + name.replace(".", "_").upper(): name for name in OPTIONS}
_SECTIONS = {name.rpartition(".")[0] for name in OPTIONS} | {"database.args"}


def example() -> str:
    """Return a configuration in YAML, with each option and its default."""
    return (resources.files(__package__) / "example.yaml").read_text()


def load_config(
    paths: Sequence[Path], environ: Mapping[str, str], homeserver: str | None
) -> ServiceConfig:
    """Read the configuration.

    Args:
        paths: YAML files. An option in a later file wins over the same option in an
            earlier one.
        environ: the environment, which wins over the files.
        homeserver: an address of the homeserver, which wins over files and environment.

    Raises:
        OptionError: an option is unknown, missing or wrong, or a file can't be read.
    """
    values = _read(paths, environ)
    name = "homeserver.url"
    if homeserver is not None:
        types = {"--homeserver": OPTIONS[name]}
        values[name] = check_option("--homeserver", homeserver, types)
    values["homeserver"] = _homeserver(values, "or --homeserver")
    values["database"] = _database(values)
    config: ServiceConfig = make_section(ServiceConfig, values)
    admin = config.admin
    if admin.listeners and admin.token_path is None and not admin.synapse_admins:
        msg = "need admin.token_path or admin.synapse_admins, which say who may"
        raise OptionError("admin.listeners", msg)
    return config


def load_database(paths: Sequence[Path], environ: Mapping[str, str]) -> DatabaseConfig:
    """Read the options of the database alone, for commands that need no others.

    The database must be configured: its default is a file in the working directory, and
    a command in another directory would create a second file.

    Raises:
        OptionError: as `load_config`, or no database is configured.
    """
    values = _read(paths, environ)
    is_named = any(name.startswith(_ARGS) for name in values)
    if not is_named and values.get("database.name") != "psycopg2":
        raise OptionError(
            "database.args",
            "must name the service's database: give its file with --config, or set"
            f" {PREFIX}DATABASE_NAME and {PREFIX}DATABASE_ARGS_...",
        )
    return _database(values)


def load_homeserver(
    paths: Sequence[Path], environ: Mapping[str, str]
) -> HomeserverOptions:
    """Read the options of the homeserver alone, for a command that asks the homeserver.

    Raises:
        OptionError: as `load_config`.
    """
    return _homeserver(_read(paths, environ), "or name it in a file with --config")


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file. An empty file is an empty mapping.

    Raises:
        OptionError: the file can't be read. The error has the number of the line and
            leaves out its text, because the text may be a secret.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError("can't be read", str(error.strerror)) from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise OptionError(f"line {line}", "isn't YAML") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise OptionError("content", "isn't YAML in UTF-8") from None
    return {} if content is None else content


def _read(paths: Sequence[Path], environ: Mapping[str, str]) -> dict[str, Any]:
    """Read and check the values of files and environment, by the names of options."""
    values: dict[str, Any] = {}
    for path in paths:
        try:
            found = dict(_flat(read_yaml(path), ""))
            values |= {name: _check(name, value) for name, value in found.items()}
        except OptionError as error:
            raise OptionError(str(path), str(error)) from None
    for variable, text in environ.items():
        if variable.startswith(PREFIX):
            values |= _variable(variable, text, environ)
    return {name: v for name, v in values.items() if name not in _SYNAPSES}


def _homeserver(values: Mapping[str, Any], other: str) -> HomeserverOptions:
    """
    Args:
        other: another way to set the address, for the error.

    Raises:
        OptionError: the address of the homeserver isn't set.
    """
    name = "homeserver.url"
    if name not in values:
        msg = f"must be set, or {PREFIX}HOMESERVER_URL, {other}"
        raise OptionError(name, msg)
    values = {**values, name: values[name].rstrip("/")}
    options: HomeserverOptions = make_section(HomeserverOptions, values, "homeserver.")
    return options


def _database(values: Mapping[str, Any]) -> DatabaseConfig:
    name = values.get("database.name", "sqlite3")
    args = {
        option.removeprefix(_ARGS): value
        for option, value in values.items()
        if option.startswith(_ARGS)
    }
    if name == "psycopg2":
        check_arguments(args)
        return DatabaseConfig(name, args)
    # The size of Synapse's pool is ignored: the service has one connection to SQLite.
    args = {n: value for n, value in args.items() if _ARGS + n not in _POOL}
    for argument, value in args.items():
        check_option(_ARGS + argument, value, {_ARGS + "database": _Argument})
    return DatabaseConfig(name, args) if args else DatabaseConfig()


def check_arguments(args: Mapping[str, Any]) -> None:
    """Check the ``args`` of a ``psycopg2`` database without connecting to a server.

    Raises:
        OptionError: libpq rejects an argument. The error names the argument and leaves
            out libpq's message, which quotes text that can't be parsed, such as the
            second word of a password.
    """
    own = {name: v for name, v in args.items() if not str(name).startswith("cp_")}
    wrong = find_wrong_argument(own)
    if wrong == "dsn":
        raise OptionError(
            _ARGS + "dsn",
            "isn't a connection string of libpq: put single quotes around a value with"
            " spaces, and percent-encode what is special in a URI's password, or write"
            " host, user, password and dbname each by itself",
        )
    if wrong is not None:
        raise OptionError(_ARGS + wrong, "isn't known to libpq, or has a wrong value")


def _check(name: str, value: Any) -> Any:
    """Return the value of an option in the option's type.

    Raises:
        OptionError: the option is unknown, or the value is wrong.
    """
    if name in _SYNAPSES:
        return value
    if name.startswith(_ARGS) and not _ARGUMENT.fullmatch(name):
        # Don't show the name: after a comma in an unquoted password, YAML's flow
        # mappings take the rest of the password for a name.
        msg = "has a key with other characters than a-z and _"
        raise OptionError("database.args", msg)
    if name.startswith(_ARGS + "cp_"):
        return check_option(name, _number(value), _POOL)
    if name.startswith(_ARGS):
        return check_option(name, value, {name: _Argument})
    known = {**OPTIONS, "database.args": _Argument}
    return check_option(name, value, known, _parse)


def _parse(expected: Any, value: Any) -> Any:
    """Convert an item of a list to an endpoint or a network.

    Raises:
        ValueError: the item is wrong. The error quotes the item.
    """
    text = convert(value, str)
    return ip_network(text) if expected is Network else Endpoint.parse(text)


def _flat(content: Any, section: str) -> Iterator[tuple[str, Any]]:
    """Yield the values in nested mappings, by the names of their options.

    Raises:
        OptionError: a section isn't a mapping.
    """
    if not isinstance(content, Mapping):
        raise OptionError(section or "content", "must be a mapping")
    for key, value in content.items():
        name = f"{section}.{key}" if section else str(key)
        if name in _SECTIONS:
            yield from _flat(value, name)
        else:
            yield name, value


def _variable(
    variable: str, text: str, environ: Mapping[str, str]
) -> Mapping[str, Any]:
    """Return the option that a variable of the environment sets, and its value.

    Raises:
        OptionError: no option has the variable, or the value or its file is wrong.
    """
    stem = variable.removesuffix("_FILE")
    args = PREFIX + "DATABASE_ARGS_"
    name = _VARIABLES.get(stem)
    if stem.startswith(args):
        name = _ARGS + stem.removeprefix(args).lower()
    if name is None:
        if _KUBERNETES.search(variable):
            return {}
        raise OptionError(variable, "no option has this variable")
    if stem != variable:
        if stem in environ:
            raise OptionError(variable, f"is set, and {stem} too")
        try:
            text = Path(text).read_text(encoding="utf-8").rstrip("\n")
        except OSError as error:
            msg = f"its file can't be read: {error.strerror}"
            raise OptionError(variable, msg) from None
        except ValueError:
            raise OptionError(variable, "its file isn't text in UTF-8") from None
    try:
        return {name: _check(name, _decode(name, text))}
    except OptionError as error:
        raise OptionError(variable, str(error)) from None


def _decode(name: str, text: str) -> Any:
    """Convert the text of a variable: a list at its commas, digits to an integer, and
    "true" and "false" to a boolean. An argument of the database stays a text."""
    if name.startswith(_ARGS):
        return text
    if get_origin(get_args(OPTIONS[name])[0]) is tuple:
        return [part.strip() for part in text.split(",") if part.strip()]
    return {"true": True, "false": False}.get(text.lower(), _number(text))


def _number(value: Any) -> Any:
    """Convert a string of digits to an integer. Return other values unchanged."""
    is_number = isinstance(value, str) and value.isdecimal()
    return int(value) if is_number else value

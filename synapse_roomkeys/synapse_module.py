"""The Synapse module, which replaces the built-in endpoints of the key backup.

Synapse 1.120 and newer mounts its client API from a registry of functions,
``synapse.rest.SERVLET_GROUPS["client"]``. Older versions call an attribute of each
module of endpoints. Synapse loads modules before it builds the listeners, so the module
puts its own function in that place.
"""

import inspect
import logging
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version as version_of
from typing import Any, Concatenate, ParamSpec, TypeVar

from synapse import rest
from synapse.http.server import JsonResource as SynapseResource
from synapse.module_api import (
    ModuleApi,
    make_deferred_yieldable,
    run_in_background,
)
from synapse.module_api.errors import ConfigError
from synapse.rest.client import room_keys
from synapse.storage.database import make_conn
from synapse.storage.databases.main import purge_events
from synapse.storage.engines._base import IsolationLevel
from twisted.internet.defer import Deferred

from . import metrics
from .admin.backend import Backend
from .admin.handler import AdminHandler
from .admin.runner import TaskRunner
from .background import Start
from .clock import Clock, DelayedCall
from .config import ModuleConfig, OptionError, parse_module_config
from .handler import E2eRoomKeysHandler
from .outages import Outages
from .rest import (
    AdminHost,
    HomeServer,
    HttpServer,
    register_admin_servlets,
    register_servlets,
)
from .rest.admin import ROOT
from .storage import (
    SQLITE,
    EndToEndRoomKeyStore,
    Engine,
    RetryingDatabase,
    SchemaError,
    Sweeps,
    Transaction,
    check_tables,
    database_address,
    postgres,
    upgrade_tables,
)
from .sweeper import Sweeper
from .synapse_auth import SynapseAdminAuth, SynapseAuth
from .version import __version__

logger = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")

Register = Callable[[Any, HttpServer], None]

#: Name of the function that mounts Synapse's own endpoints.
BUILTIN = "synapse.rest.client.room_keys.register_servlets"


class RoomKeysModule:
    """The module, in homeserver.yaml under ``synapse_roomkeys.RoomKeysModule``."""

    def __init__(self, config: ModuleConfig, api: ModuleApi) -> None:
        """
        Raises:
            ConfigError: Synapse or its database differs from the plugin's expectations.
        """
        self._config = config
        hs, database = _internals(api)
        engine = _engine(database)
        _prepare_database(hs, database, engine)
        self._clock = Clock(
            hs.get_reactor(), make_deferred_yieldable, run_in_background
        )
        retrying = RetryingDatabase(
            ModuleApiDatabase(api, database),
            engine,
            self._clock,
            _outages(database, engine),
        )
        self._store = EndToEndRoomKeyStore(
            retrying, engine, time.time, config.limits, config.retention
        )
        sweeps = Sweeps(retrying, engine, time.time, config.retention)

        sweeper = Sweeper(sweeps, self._clock, _background(api, "roomkeys_sweep"))
        sweeper.start()
        self._handler = E2eRoomKeysHandler(
            self._store, self._clock, config.limits, sweeper
        )
        api.register_third_party_rules_callbacks(
            on_user_deactivation_status_changed=self.forget_deactivated_user
        )
        metrics.note_build(__version__, engine.name)
        if config.admin_api:
            backend = Backend(retrying, engine, self._store, time.time)
            self._serve_operators(hs, api, backend)
        if config.keep_keys_on_room_purge:
            keep_keys_on_room_purge()
        place = replace_servlets(self.register_servlets)
        logger.info(
            "synapse_roomkeys %s answers /room_keys in Synapse %s: it replaced %s",
            __version__,
            version_of("matrix-synapse"),
            place,
        )

    @staticmethod
    def parse_config(config: dict[str, Any]) -> ModuleConfig:
        """Check the module's ``config:``. Synapse calls this method.

        Raises:
            ConfigError: an option is unknown or wrong. The error names the option.
        """
        try:
            return parse_module_config(config)
        except OptionError as error:
            raise ConfigError(str(error), (error.option,)) from None

    def register_servlets(self, hs: Any, http_server: HttpServer) -> None:
        """Mount the API. Synapse calls this method for each client listener."""
        host = HomeServer(
            self._clock,
            self._config.limits,
            self._config.stalled_download_seconds,
            SynapseAuth(hs.get_auth()),
            self._handler,
        )
        register_servlets(host, http_server)

    def _serve_operators(self, hs: Any, api: ModuleApi, backend: Backend) -> None:
        """Mount the HTTP interface for operators on the listeners of this process."""
        runner = TaskRunner(backend, self._clock, _background(api, "roomkeys_tasks"))
        handler = AdminHandler(
            backend, self._handler, runner, self._clock, knows_accounts=True
        )
        host = AdminHost(
            self._clock,
            self._config.stalled_download_seconds,
            SynapseAdminAuth(hs.get_auth()),
            handler,
        )
        resource = SynapseResource(hs, canonical_json=False)
        register_admin_servlets(host, resource)
        api.register_web_resource(ROOT, resource)
        runner.start()

    async def forget_deactivated_user(
        self, user_id: str, deactivated: bool, by_admin: bool
    ) -> None:
        """Forget a deactivated user. Synapse calls this method after deactivating or
        reactivating a user."""
        if deactivated:
            await self._store.forget_user(user_id)


class ModuleApiDatabase:
    """Transactions on Synapse's own connections.

    Attributes:
        connections: limit of Synapse's connections (``cp_max``), for all of its work.
    """

    def __init__(self, api: ModuleApi, database: Any) -> None:
        """
        Args:
            database: Synapse's ``DatabasePool``.
        """
        self.connections: int = database._db_pool.max
        #: Passes all arguments on to `runInteraction`, which takes ``isolation_level``.
        self._interact: Callable[..., Deferred[Any]] = api.run_db_interaction

    def run(
        self,
        desc: str,
        function: Callable[Concatenate[Transaction, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> "Deferred[T]":
        """As `synapse_roomkeys.storage.Database.run`."""
        level = IsolationLevel.READ_COMMITTED
        return self._interact(desc, function, *args, isolation_level=level, **kwargs)


def _background(api: ModuleApi, desc: str) -> Start:
    """Return the function that starts background work in Synapse.

    Args:
        desc: name of the work in Synapse's log and metrics.
    """

    def start(seconds: float, call: "Callable[[], Deferred[None]]") -> DelayedCall:
        return api.delayed_background_call(1000 * seconds, call, desc=desc)

    return start


def replace_servlets(register: Register) -> str:
    """Replace the function that mounts the built-in endpoints.

    Returns:
        Description of the function and its place, for the log.

    Raises:
        ConfigError: Synapse has no such function, or not in the expected place.
    """
    builtin: Any = getattr(room_keys, "register_servlets", None)
    if builtin is None:
        raise _unexpected(f"a function {BUILTIN}", "no such name")
    resource: Any = getattr(rest, "ClientRestResource", None)
    mount = getattr(resource, "register_servlets", None)
    names = getattr(getattr(mount, "__code__", None), "co_names", ())
    if "SERVLET_GROUPS" in names:
        return _replace_in_group(builtin, register)
    if "room_keys" in names:
        _refuse_second((builtin,))
        vars(room_keys)["register_servlets"] = register
        return BUILTIN
    raise _unexpected(
        "synapse.rest.ClientRestResource.register_servlets to mount SERVLET_GROUPS"
        " or room_keys.register_servlets",
        f"one that uses {', '.join(names) or 'neither'}",
    )


def _replace_in_group(builtin: Any, register: Register) -> str:
    place = 'synapse.rest.SERVLET_GROUPS["client"]'
    groups: Any = getattr(rest, "SERVLET_GROUPS", {})
    functions = tuple(groups.get("client", ()))
    _refuse_second(functions)
    times = functions.count(builtin)
    if times != 1:
        raise _unexpected(f"{BUILTIN} once in {place}", f"it {times} times")
    groups["client"] = tuple(register if f is builtin else f for f in functions)
    return f"{BUILTIN} in {place}"


def keep_keys_on_room_purge() -> None:
    """Have Synapse keep the backed up keys of a room that it purges.

    Synapse deletes the rows of a purged room from the tables in a tuple. The function
    takes the table of keys out of the tuple.

    Raises:
        ConfigError: Synapse has no such tuple, or doesn't use it.
    """
    name, table = "purge_room_tables_with_room_id_column", "e2e_room_keys"
    tables: tuple[str, ...] = getattr(purge_events, name, ())
    purge: Any = getattr(purge_events.PurgeEventsStore, "_purge_room_txn", None)
    used = getattr(getattr(purge, "__code__", None), "co_names", ())
    if tables.count(table) != 1 or name not in used:
        raise _unexpected(
            f"{purge_events.__name__}.{name} with {table}, for the option"
            " keep_keys_on_room_purge",
            "no such tuple, or one that isn't used",
        )
    vars(purge_events)[name] = tuple(t for t in tables if t != table)


def _refuse_second(functions: Iterable[Any]) -> None:
    """Raise ConfigError if a second copy of this module is loaded."""
    if any(function.__module__ == __name__ for function in functions):
        raise _unexpected("this module once under modules:", "it there twice")


def _internals(api: ModuleApi) -> tuple[Any, Any]:
    """Return the homeserver and its main database.

    Raises:
        ConfigError: the module API lacks them, or the database can't set the isolation
            level of a transaction.
    """
    try:
        hs: Any = api._hs
        database: Any = hs.get_datastores().main.db_pool
        known = inspect.signature(database.runInteraction).parameters
        _ = database._db_pool.max
    except AttributeError as error:
        raise _unexpected("ModuleApi._hs with its main database", str(error)) from None
    if "isolation_level" not in known:
        raise _unexpected(
            "DatabasePool.runInteraction with isolation_level",
            f"one with {', '.join(known)}",
        )
    return hs, database


def _engine(database: Any) -> Engine:
    """Return the engine of Synapse's database.

    Raises:
        ConfigError: the engine is unknown to the plugin.
    """
    driver: str = database.engine.module.__name__
    if driver == "sqlite3":
        return SQLITE
    if driver == "psycopg2":
        return postgres()
    raise _unexpected("a database driver sqlite3 or psycopg2", driver)


def _outages(database: Any, engine: Engine) -> Outages:
    """Create the log of outages of Synapse's database, with the database's address.

    Raises:
        ConfigError: the database has no arguments of its connections.
    """
    try:
        arguments = database._database_config.config["args"]
    except (AttributeError, KeyError) as error:
        raise _unexpected("DatabaseConnectionConfig with args", repr(error)) from None
    return Outages(f"Database {database_address(engine, arguments)}")


def _prepare_database(hs: Any, database: Any, engine: Engine) -> None:
    """Check Synapse's tables and create the plugin's tables before Synapse serves.

    This blocks the start of Synapse for a few milliseconds.

    Raises:
        ConfigError: Synapse's tables aren't as expected, or the plugin's tables belong
            to a later version.
    """
    arguments: dict[str, Any] = {
        "db_config": database._database_config,
        "engine": database.engine,
        "default_txn_name": "roomkeys_start",
    }
    if "server_name" in inspect.signature(make_conn).parameters:
        arguments["server_name"] = hs.hostname
    connection: Any = make_conn(**arguments)
    try:
        txn = connection.cursor()
        problem = check_tables(txn, engine)
        connection.rollback()
        if problem is None:
            upgrade_tables(txn, engine, homeserver_tables=False)
            connection.commit()
    except SchemaError as error:
        problem = str(error)
    finally:
        connection.close()
    if problem is not None:
        raise ConfigError(f"synapse_roomkeys can't work on this database: {problem}")


def _unexpected(expected: str, found: str) -> ConfigError:
    return ConfigError(
        f"synapse_roomkeys {__version__} can't be loaded into Synapse"
        f" {version_of('matrix-synapse')}: expected {expected}; found {found}"
    )

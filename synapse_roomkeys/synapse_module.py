"""The Synapse module: the plugin in the place of the built-in endpoints.

Synapse mounts its client API from a registry of functions,
``synapse.rest.SERVLET_GROUPS["client"]`` (1.120 and newer), or by attributes of the
modules that it imports (older ones). Modules are loaded before the listeners are
built, so the module puts its own function there.
"""

import inspect
import logging
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version as version_of
from typing import Any, Concatenate, ParamSpec, TypeVar

from synapse import rest
from synapse.module_api import (
    ModuleApi,
    make_deferred_yieldable,
    run_in_background,
)
from synapse.module_api.errors import ConfigError
from synapse.rest.client import room_keys
from synapse.storage.database import make_conn
from synapse.storage.engines._base import IsolationLevel
from twisted.internet.defer import Deferred, ensureDeferred, inlineCallbacks
from twisted.web.http import Request

from . import metrics
from .clock import Clock
from .config import ModuleConfig, OptionError, parse_module_config
from .handler import E2eRoomKeysHandler
from .inline import Inline
from .outages import Outages
from .rest import HomeServer, HttpServer, register_servlets
from .storage import (
    SQLITE,
    EndToEndRoomKeyStore,
    Engine,
    RetryingDatabase,
    SchemaError,
    Transaction,
    check_tables,
    database_address,
    postgres,
    upgrade_tables,
)
from .types import Requester
from .version import __version__

logger = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")

Register = Callable[[Any, HttpServer], None]

#: What mounts Synapse's own endpoints.
BUILTIN = "synapse.rest.client.room_keys.register_servlets"


class RoomKeysModule:
    """What homeserver.yaml names as ``synapse_roomkeys.RoomKeysModule``."""

    def __init__(self, config: ModuleConfig, api: ModuleApi) -> None:
        """
        Raises:
            ConfigError: this Synapse, or its database, isn't as the plugin expects.
        """
        self._config = config
        hs, database = _internals(api)
        engine = _engine(database)
        _prepare_database(hs, database, engine)
        self._clock = Clock(
            hs.get_reactor(), make_deferred_yieldable, run_in_background
        )
        self._store = EndToEndRoomKeyStore(
            RetryingDatabase(
                ModuleApiDatabase(api, database),
                engine,
                self._clock,
                _outages(database, engine),
            ),
            engine.dialect,
            time.time,
            config.limits,
        )
        self._handler = E2eRoomKeysHandler(self._store, self._clock, config.limits)
        api.register_third_party_rules_callbacks(
            on_user_deactivation_status_changed=self.forget_deactivated_user
        )
        metrics.note_build(__version__, engine.name)
        place = replace_servlets(self.register_servlets)
        logger.info(
            "synapse_roomkeys %s answers /room_keys in Synapse %s: it replaced %s",
            *(__version__, version_of("matrix-synapse"), place),
        )

    @staticmethod
    def parse_config(config: dict[str, Any]) -> ModuleConfig:
        """What Synapse calls with the module's ``config:``.

        Raises:
            ConfigError: an option is unknown or wrong; it names the option.
        """
        try:
            return parse_module_config(config)
        except OptionError as error:
            raise ConfigError(str(error), (error.option,)) from None

    def register_servlets(self, hs: Any, http_server: HttpServer) -> None:
        """What Synapse calls, for each of its client listeners, to mount the API."""
        host = HomeServer(
            self._clock,
            self._config.limits,
            self._config.stalled_download_seconds,
            SynapseAuth(hs.get_auth()),
            self._handler,
        )
        register_servlets(host, http_server)

    async def forget_deactivated_user(
        self, user_id: str, deactivated: bool, by_admin: bool
    ) -> None:
        """What Synapse calls when it has deactivated a user, or activated one again."""
        if deactivated:
            await self._store.forget_user(user_id)


class SynapseAuth:
    """Synapse's own authentication, as the servlets ask for it."""

    def __init__(self, auth: Any) -> None:
        self._auth = auth

    @inlineCallbacks
    def get_user_by_req(self, request: Request) -> Inline[Requester]:
        """Who sends a request; fails with Synapse's own errors, guests refused."""
        requester = yield ensureDeferred(
            self._auth.get_user_by_req(request, allow_guest=False)
        )
        return Requester(requester.user.to_string(), requester.device_id)


class ModuleApiDatabase:
    """Transactions on Synapse's own connections.

    Attributes:
        connections: how many Synapse has at most (``cp_max``), for all of its work.
    """

    def __init__(self, api: ModuleApi, database: Any) -> None:
        """
        Args:
            database: Synapse's ``DatabasePool``.
        """
        self.connections: int = database._db_pool.max
        #: It hands on what names no parameter of the function to `runInteraction`.
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


def replace_servlets(register: Register) -> str:
    """Have Synapse call another function where it calls the built-in endpoints' one.

    Returns:
        The name of the place.

    Raises:
        ConfigError: the place, or the function, is not what is expected.
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


def _refuse_second(functions: Iterable[Any]) -> None:
    if any(function.__module__ == __name__ for function in functions):
        raise _unexpected("this module once under modules:", "it there twice")


def _internals(api: ModuleApi) -> tuple[Any, Any]:
    """The homeserver and its main database.

    Raises:
        ConfigError: the module API hasn't got them, or the database can't be told what
            a transaction is to be like.
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
    """The engine that Synapse's database runs on.

    Raises:
        ConfigError: the plugin doesn't know it.
    """
    driver: str = database.engine.module.__name__
    if driver == "sqlite3":
        return SQLITE
    if driver == "psycopg2":
        return postgres()
    raise _unexpected("a database driver sqlite3 or psycopg2", driver)


def _outages(database: Any, engine: Engine) -> Outages:
    """The outages of Synapse's database, with its address.

    Raises:
        ConfigError: the database doesn't say how Synapse connects to it.
    """
    try:
        arguments = database._database_config.config["args"]
    except (AttributeError, KeyError) as error:
        raise _unexpected("DatabaseConnectionConfig with args", repr(error)) from None
    return Outages(f"Database {database_address(engine, arguments)}")


def _prepare_database(hs: Any, database: Any, engine: Engine) -> None:
    """Check Synapse's tables and make the plugin's own, before anything is served.

    It holds up the start for the few milliseconds that this takes.

    Raises:
        ConfigError: Synapse's tables aren't as expected, or the plugin's are those of
            a later version.
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

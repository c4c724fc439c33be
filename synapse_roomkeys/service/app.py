"""The parts of the service, and its start and stop."""

import gc
import logging
import os
import signal
import sys
import time
from typing import Any

from twisted.application.service import MultiService
from twisted.application.strports import service as listener_service
from twisted.internet.defer import Deferred, gatherResults, inlineCallbacks
from twisted.internet.error import CannotListenError

from .. import metrics
from ..admin.backend import Backend
from ..admin.handler import AdminHandler
from ..admin.runner import TaskRunner
from ..clock import Clock
from ..config import OptionError
from ..describe import error_line
from ..errors import UnavailableError
from ..handler import E2eRoomKeysHandler
from ..inline import Inline
from ..outages import Outages
from ..request_queue import MAX_CONNECTIONS
from ..rest import (
    AdminHost,
    HomeServer,
    JsonResource,
    register_admin_servlets,
    register_servlets,
)
from ..storage import (
    SQLITE,
    EndToEndRoomKeyStore,
    Engine,
    PoolDatabase,
    RetryingDatabase,
    SchemaError,
    Sweeps,
    check_tables,
    database_address,
    estimate_keys,
    postgres,
    postgres_database,
    sqlite_database,
    upgrade_tables,
)
from ..sweeper import Sweeper
from ..version import __version__
from ..whoami import WhoamiAuth
from .admin_auth import ServiceAdminAuth
from .config import DatabaseConfig, ServiceConfig
from .endpoints import Endpoint
from .files import max_client_connections, raise_file_limit
from .readiness import DatabaseReadiness
from .site import ConnectionLimits, ServiceSite
from .status import MetricsResource, Probe, ReadyResource, Root

logger = logging.getLogger(__name__)

#: Seconds between two checks for transactions under way during a stop.
_POLL_SECONDS = 0.05
#: Number of regular connections to the ``metrics_listeners`` and to the
#: ``admin.listeners``, and of spare connections to each. A monitoring system and an
#: operator's browser open a few connections.
_FEW_CONNECTIONS = 16
#: Number of spare connections of the listeners. Half of the number is above 50, the
#: default backlog of a listener in Twisted.
_SPARES = 128
#: Python's switch interval in seconds: the time after which a thread that runs Python
#: code yields to another. With the default of 0.005 s, the reactor would wait so long
#: after each system call, some six times a request, while a database thread packs a
#: large upload.
_SWITCH_SECONDS = 0.0005


class StartError(Exception):
    """The service can't start. The text has the cause for the operator."""


def make_database(config: DatabaseConfig) -> tuple[PoolDatabase, Engine]:
    """Create the connection pool of the configured database, without connecting.

    Raises:
        OptionError: the database's driver isn't installed.
    """
    if config.name == "sqlite3":
        return sqlite_database(config.args["database"]), SQLITE
    try:
        return postgres_database(config.args), postgres()
    except ImportError as error:
        raise OptionError("database.name", str(error)) from None


class Service(MultiService):
    """The service: a process that serves ``/room_keys`` until a signal stops it.

    Each endpoint has its own child service, which listens. The listeners of clients
    have a parent of their own, because a stop ends them first.

    Attributes:
        exit_code: exit status of the process.
    """

    def __init__(self, config: ServiceConfig, reactor: Any) -> None:
        """
        Raises:
            OptionError: the database's driver isn't installed, or the operators' token
                can't be read.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.exit_code = 0
        self._config = config
        self._reactor = reactor
        self._clock = Clock(reactor)
        self._database, self._engine = make_database(config.database)
        self._address = database_address(self._engine, config.database.args)
        outages = Outages(f"Database {self._address}")
        self._retrying = RetryingDatabase(
            self._database, self._engine, self._clock, outages
        )
        sweeps = Sweeps(self._retrying, self._engine, time.time, config.retention)
        self._sweeper = Sweeper(sweeps, self._clock, self._clock.call_later)
        self._auth = WhoamiAuth(reactor, self._clock, config.homeserver)
        self._homeserver = Probe(self._auth.check, reactor, self._auth.outages)
        readiness = DatabaseReadiness(self._database, self._engine, outages)
        probe = Probe(readiness.check, reactor, outages)
        ready = ReadyResource(probe, self._homeserver, lambda: self._site.draining)
        self._files = raise_file_limit()
        connections = self._max_client_connections()
        stall_seconds = config.stalled_download_seconds
        limits = ConnectionLimits(connections, _SPARES, stall_seconds)
        self._handler = self._make_handler()
        self._site = self._make_site(Root(ready, self._make_resource()), limits)
        metrics.max_connections.set(connections)
        metrics.connections.set_function(lambda: len(self._site.channels))
        root = Root(ready, JsonResource())
        root.putChild(b"metrics", MetricsResource(self._count_keys))
        few = _FEW_CONNECTIONS
        limits = ConnectionLimits(few, few, stall_seconds)
        self._metrics_site = self._make_site(root, limits)
        self._runner, admin = self._make_admin()
        self._admin_site = self._make_site(Root(ready, admin), limits)
        self._listeners = MultiService()
        self._listeners.setServiceParent(self)
        self._stopping = False
        metrics.note_build(__version__, self._engine.name)
        pool = metrics.pool_transactions
        pool.labels("in_use").set_function(lambda: self._database.in_use)
        pool.labels("waiting").set_function(lambda: self._database.waiting)

    def run(self) -> int:
        """Serve until a signal comes; return the exit status of the process."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # Under nohup SIGHUP is ignored: a closed terminal must not end the service.
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle_signal)
        sys.setswitchinterval(_SWITCH_SECONDS)
        # Objects from before the start live until the end: exempt them from the garbage
        # collection.
        gc.collect()
        gc.freeze()
        self._reactor.callWhenRunning(self.startService)
        self._reactor.run(installSignalHandlers=False)
        return self.exit_code

    def _make_handler(self) -> E2eRoomKeysHandler:
        config = self._config
        self._store = EndToEndRoomKeyStore(
            self._retrying,
            self._engine,
            time.time,
            config.limits,
            config.retention,
        )
        return E2eRoomKeysHandler(
            self._store, self._clock, config.limits, self._sweeper
        )

    def _make_resource(self) -> JsonResource:
        """Create the resource for clients."""
        hs = HomeServer(
            self._clock,
            self._config.limits,
            self._config.stalled_download_seconds,
            self._auth,
            self._handler,
        )
        resource = JsonResource()
        register_servlets(hs, resource)
        return resource

    def _make_admin(self) -> tuple[TaskRunner, JsonResource]:
        """Create the resource for operators, and the background work of their tasks."""
        backend = Backend(self._retrying, self._engine, self._store, time.time)
        runner = TaskRunner(backend, self._clock, self._clock.call_later)
        hs = AdminHost(
            self._clock,
            self._config.stalled_download_seconds,
            ServiceAdminAuth(self._auth, self._config.admin),
            AdminHandler(
                backend, self._handler, runner, self._clock, knows_accounts=False
            ),
        )
        resource = JsonResource()
        register_admin_servlets(hs, resource)
        return runner, resource

    def _max_client_connections(self) -> int:
        """The number of clients' connections that the limit of open files allows."""
        few = 4 * _FEW_CONNECTIONS
        return max_client_connections(
            self._files,
            database_connections=self._database.size,
            other_connections=MAX_CONNECTIONS + few + _SPARES,
        )

    def _make_site(self, root: Root, connections: ConnectionLimits) -> ServiceSite:
        return ServiceSite(
            root,
            self._reactor,
            self._config.limits.max_body_bytes,
            self._config.trusted_proxies,
            connections,
        )

    def startService(self) -> None:
        """As `IService.startService`. The service listens after the tables are
        upgraded."""
        super().startService()  # type: ignore[no-untyped-call]
        self._start()

    @inlineCallbacks
    def stopService(self) -> Inline[None]:
        """As `IService.stopService`. Stop listening for clients, finish requests and
        transactions for ``shutdown_seconds``, drop the connections that are still
        open, and then stop the ``metrics_listeners``."""
        seconds = self._config.shutdown_seconds
        end = self._reactor.seconds() + seconds
        self._sweeper.stop()
        self._runner.stop()
        sites = self._site, self._admin_site
        drained = gatherResults([site.drain() for site in sites])
        yield self._listeners.stopService()
        late = self._reactor.callLater(seconds, self._drop)
        yield drained
        if late.active():
            late.cancel()
        while self._database.in_use and self._reactor.seconds() < end:
            yield self._clock.sleep(_POLL_SECONDS)
        yield super().stopService()  # type: ignore[no-untyped-call]

    @inlineCallbacks
    def _start(self) -> Inline[None]:
        """Upgrade the tables and listen. If either fails, log the cause and end the
        process with status 1."""
        try:
            if self._max_client_connections() < 1:
                raise StartError(
                    f"{self._files} open files leave no room for a client's"
                    " connection: raise LimitNOFILE, or ulimit -n"
                )
            yield self._upgrade()
            if self._stopping:
                return
            for endpoint in self._config.metrics_listeners:
                self._listen("metrics_listeners", endpoint, self._metrics_site, self)
            for endpoint in self._config.listeners:
                self._listen("listeners", endpoint, self._site, self._listeners)
            for endpoint in self._config.admin.listeners:
                site = self._admin_site
                self._listen("admin.listeners", endpoint, site, self._listeners)
        except StartError as error:
            logger.critical("Can't start: %s", error)
            self._end(1)
            return
        except Exception:
            logger.critical("Can't start", exc_info=True)
            self._end(1)
            return
        logger.info(
            "synapse_roomkeys %s listens on %s, for the users of %s",
            __version__,
            ", ".join(self._config.listeners),
            self._config.homeserver.url,
        )
        self._sweeper.start()
        if self._config.admin.listeners:
            self._runner.start()
        yield self._homeserver.ask()

    @inlineCallbacks
    def _upgrade(self) -> Inline[None]:
        """Upgrade and check the tables, with retries.

        Raises:
            StartError: the tables can't be used, or the database is unavailable.
        """
        try:
            yield self._retrying.run("upgrade", upgrade_tables, self._engine, True)
            problem = yield self._retrying.run("check", check_tables, self._engine)
        except (SchemaError, UnavailableError, self._engine.error) as error:
            problem = error_line(error.__cause__ or error)
        if problem is not None:
            raise StartError(f"database: {self._address}: {problem}")

    def _count_keys(self) -> "Deferred[int]":
        """Fire with an estimate of the number of keys in all backups."""
        return self._database.run("roomkeys_estimate", estimate_keys, self._engine)

    def _listen(
        self, option: str, endpoint: Endpoint, site: ServiceSite, parent: MultiService
    ) -> None:
        """Listen on an endpoint.

        Args:
            option: name of the option that has the endpoint, for the error.
            parent: running service that becomes the parent of the listener.

        Raises:
            StartError: the endpoint can't be opened.
        """
        try:
            listener = listener_service(str(endpoint), site, self._reactor)
            listener.setServiceParent(parent)
        except (LookupError, AttributeError, TypeError):
            msg = f"{option}: {endpoint}: systemd passed no such socket"
            raise StartError(msg) from None
        except (CannotListenError, OSError, ValueError) as error:
            raise StartError(f"{option}: {endpoint}: {error}") from None

    def _handle_signal(self, number: int, frame: object) -> None:
        """Begin to stop. A second signal ends the process without waiting."""
        if self._stopping:
            os._exit(1)
        self._stopping = True
        self._reactor.callFromThread(self._stop)

    @inlineCallbacks
    def _stop(self) -> Inline[None]:
        """Stop the service and end the process."""
        logger.info("Stopping within %d seconds", self._config.shutdown_seconds)
        yield self.stopService()
        logger.info("Stopped")
        self._end(0)

    def _drop(self) -> None:
        """Drop the connections that are still open."""
        sites = self._site, self._admin_site
        left = sum(len(site.channels) for site in sites)
        logger.warning(
            "Dropping %d connections that are open after shutdown_seconds", left
        )
        for site in sites:
            site.abort()

    def _end(self, code: int) -> None:
        """End the process with an exit status."""
        self.exit_code = code
        end_process(self._reactor, self._database, code)


def end_process(reactor: Any, database: PoolDatabase, code: int) -> None:
    """Stop the reactor. If transactions are under way, end the process instead.

    The reactor would wait for the threads of the transactions without a limit, because
    a thread can't be ended. The database rolls the transactions back.
    """
    if not database.in_use:
        reactor.stop()
        return
    logger.warning("Leaving %d transactions unfinished", database.in_use)
    logging.shutdown()
    os._exit(code)

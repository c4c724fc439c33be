"""The plugin's own site on a real database and a real socket."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, cast

import attrs
from twisted.internet import reactor
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.interfaces import IListeningPort

from synapse_roomkeys import E2eRoomKeysHandler
from synapse_roomkeys.clock import Clock, Reactor
from synapse_roomkeys.outages import Outages
from synapse_roomkeys.rest import HomeServer
from synapse_roomkeys.storage import (
    SQLITE,
    EndToEndRoomKeyStore,
    Engine,
    InsertGuess,
    PoolDatabase,
    RetryingDatabase,
    Sweeps,
    postgres,
    postgres_database,
    sqlite_database,
    upgrade_tables,
)
from synapse_roomkeys.sweeper import Sweeper
from synapse_roomkeys.types import Limits, Retention

from .client import HttpHost
from .memory import StubAuth, own_site


@attrs.frozen
class Backend:
    """A real database, for any number of connection pools.

    Attributes:
        arguments: the arguments of psycopg2, or None for an SQLite file.
        path: the SQLite file.
    """

    name: str
    arguments: Mapping[str, Any] | None
    path: Path

    @property
    def engine(self) -> Engine:
        """A new engine for the database."""
        return SQLITE if self.arguments is None else postgres()

    def connect(self) -> PoolDatabase:
        """Return a new connection pool, like the pool of another process."""
        if self.arguments is None:
            return sqlite_database(str(self.path))
        return postgres_database(self.arguments)


class OwnSite:
    """A server of the plugin's own, listening on the loopback interface.

    For the backend, two servers are like two processes.
    """

    def __init__(
        self,
        backend: Backend,
        auth: StubAuth | None = None,
        stalled_download_seconds: float = 300,
        limits: Limits | None = None,
        retention: Retention | None = None,
    ) -> None:
        self.backend = backend
        self.database = backend.connect()
        clock = Clock(cast(Reactor, reactor))
        limits = limits or Limits()
        self.guess = InsertGuess()
        retention = retention or Retention()
        self.engine = engine = backend.engine
        retrying = RetryingDatabase(self.database, engine, clock, Outages("Database"))
        self.store = EndToEndRoomKeyStore(
            retrying, engine, time.time, limits, retention, self.guess
        )
        sweeps = Sweeps(retrying, engine, time.time, retention)
        self.sweeper = Sweeper(sweeps, clock, clock.call_later)
        self.handler = E2eRoomKeysHandler(self.store, clock, limits, self.sweeper)
        self.auth = auth or StubAuth()
        self.hs = HomeServer(
            clock, limits, stalled_download_seconds, self.auth, self.handler
        )
        self._port: IListeningPort | None = None

    @inlineCallbacks
    def start(self) -> Generator[Deferred[Any], Any, HttpHost]:
        """Make the tables, listen, and fire with the address to talk to."""
        yield self.database.run("upgrade", upgrade_tables, self.engine, True)
        self.sweeper.start()
        listen: Any = reactor.listenTCP
        self._port = listen(0, own_site(self.hs), interface="127.0.0.1")
        self.host = HttpHost(
            f"http://127.0.0.1:{self.port}",
            self.auth.new_user,
            lambda: self.auth.new_user(guest=True),
        )
        return self.host

    @property
    def port(self) -> int:
        """The TCP port of the server."""
        port: Any = self._port
        number: int = port.getHost().port
        return number

    @inlineCallbacks
    def stop(self) -> Generator[Deferred[Any], Any, None]:
        """Stop listening and close the connections to the database."""
        port: Any = self._port
        self.sweeper.stop()
        yield self.host.close()
        yield port.stopListening()
        self.database.close()

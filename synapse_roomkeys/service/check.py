"""The command ``check``: a test of everything that the service needs to start."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.endpoints import (
    HostnameEndpoint,
    UNIXClientEndpoint,
)
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.protocol import Factory, Protocol
from twisted.web.client import Agent, readBody
from twisted.web.iweb import IAgentEndpointFactory
from zope.interface import implementer

from ..clock import Clock
from ..inline import Inline
from ..storage import SchemaError, brief, database_address, rehearse_start
from ..whoami import WhoamiAuth, error_text
from .admin_auth import ServiceAdminAuth
from .app import end_process, make_database
from .config import ServiceConfig
from .endpoints import Endpoint

#: Timeout of each part in seconds. The timeouts of the homeserver (10 s) and of libpq
#: (5 s for each host) are shorter by default, and their messages say more.
SECONDS = 15
#: Timeout in seconds of ``/health`` at an address in use. A service answers ``/health``
#: without a query.
HEALTH_SECONDS = 2
#: Addresses that mean all addresses of a machine, and the loopback address at which
#: the machine itself reaches such a listener.
_WILDCARDS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
#: Start of the body of ``/health``.
_HEALTHY = b'{"status":"ok"'


class Problem(Exception):
    """The service couldn't start or serve. The text has the cause and what to try."""


class Check:
    """Test of listeners, database and homeserver, with a printed line about each."""

    def __init__(self, config: ServiceConfig, reactor: Any) -> None:
        """
        Raises:
            OptionError: the database's driver isn't installed, or the operators' token
                can't be read.
        """
        self._config = config
        self._reactor = reactor
        self._database, self._engine = make_database(config.database)
        self._auth = WhoamiAuth(reactor, Clock(reactor), config.homeserver)
        ServiceAdminAuth(self._auth, config.admin)
        self._code = 0

    def run(self) -> int:
        """Print a line for each part; return 0 if all parts are ok, else 1."""
        self._reactor.callWhenRunning(self._run)
        self._reactor.run()
        return self._code

    @inlineCallbacks
    def _run(self) -> Inline[None]:
        config = self._config
        _print("configuration", "ok", "all options are known")
        admin = config.admin.listeners
        for endpoint in (*config.listeners, *config.metrics_listeners, *admin):
            yield self._report(f"listener {endpoint}", self._try_listener, endpoint)
        address = database_address(self._engine, config.database.args)
        yield self._report(f"database {address}", self._try_database)
        yield self._report(f"homeserver {config.homeserver.url}", self._try_homeserver)
        end_process(self._reactor, self._database, self._code)

    @inlineCallbacks
    def _report(
        self, name: str, test: "Callable[..., Deferred[str]]", *args: Any
    ) -> Inline[None]:
        """Run a test, print its line, and note a failure for the exit status.

        Args:
            test: fires with a sentence for the operator, or fails with `Problem`.
        """
        try:
            found: str = yield test(*args).addTimeout(SECONDS, self._reactor)
        except Problem as error:
            self._code = 1
            _print(name, "FAILED", str(error))
        except TimeoutError:
            self._code = 1
            _print(name, "FAILED", f"no answer in {SECONDS} seconds")
        else:
            _print(name, "ok", found)

    @inlineCallbacks
    def _try_listener(self, endpoint: Endpoint) -> Inline[str]:
        """Open a listener and close it; fire with a sentence for the operator.

        Raises:
            Problem: opening failed, and no key backup service answers at the address.
        """
        if endpoint.startswith("systemd:"):
            return "not tested: systemd opens the socket when it starts the service"
        listening = endpoint.server(self._reactor)
        try:
            port = yield listening.listen(Factory.forProtocol(Protocol))
        except (CannotListenError, OSError) as error:
            if (yield self._is_served(endpoint)):
                return "in use by a running service, which answers /health"
            raise Problem(
                f"{str(error).rstrip('.')}. If another program uses the address, choose"
                " another one. Else check that the address belongs to this machine, or"
                " that the directory exists"
            ) from None
        yield port.stopListening()
        return "the listener can be opened"

    @inlineCallbacks
    def _is_served(self, endpoint: Endpoint) -> Inline[bool]:
        """Fire with whether a key backup service answers ``/health`` at an endpoint."""
        agent = Agent.usingEndpointFactory(
            self._reactor, _FixedEndpoint(self._client_endpoint(endpoint))
        )
        try:
            asked = agent.request(b"GET", b"http://service/health")
            asked.addCallback(readBody).addTimeout(HEALTH_SECONDS, self._reactor)
            body: bytes = yield asked
        # Another program may send any bytes, or no response.
        except Exception:
            return False
        return body.startswith(_HEALTHY)

    def _client_endpoint(self, endpoint: Endpoint) -> IStreamClientEndpoint:
        parameters = endpoint.parameters()
        if "address" in parameters:
            return UNIXClientEndpoint(self._reactor, parameters["address"])
        host = parameters.get("interface", "")
        port = int(parameters["port"])
        return HostnameEndpoint(self._reactor, _WILDCARDS.get(host, host), port)

    @inlineCallbacks
    def _try_database(self) -> Inline[str]:
        """Rehearse the service's start on the database; fire with a sentence for the
        operator. An SQLite file isn't created, because the file would belong to the
        user who runs the command.

        Raises:
            Problem: the service couldn't start on the database or write to it.
        """
        if self._config.database.name == "sqlite3":
            path = Path(self._config.database.args["database"])
            if not path.exists():
                return _describe_new_file(path)
        try:
            found: str = yield self._database.run("check", rehearse_start, self._engine)
        except SchemaError as error:
            raise Problem(str(error)) from None
        # The drivers have no common base class for the errors of connections.
        except Exception as error:
            advice = self._engine.find_cause(error).advice
            raise Problem(f"{brief(error)}. {advice}") from None
        return found

    @inlineCallbacks
    def _try_homeserver(self) -> Inline[str]:
        """Ask the homeserver for its versions, and for the user of an invented token;
        fire with a sentence for the operator.

        Raises:
            Problem: a response isn't as specified.
        """
        try:
            yield self._auth.check_versions(self._reactor.seconds())
        # Twisted has no common base class for the errors of connections.
        except Exception as error:
            raise Problem(
                f"/versions: {error_text(error)}. Check that the homeserver"
                " runs, and that homeserver.url is the address of its client API,"
                " without /_matrix"
            ) from None
        try:
            yield self._auth.check_whoami(self._reactor.seconds())
        except Exception as error:
            raise Problem(
                f"/account/whoami with an invented token: {error_text(error)}. The"
                " answer should be 401 M_UNKNOWN_TOKEN. Check that homeserver.url is"
                " the homeserver's own address, or a proxy that passes whoami on"
            ) from None
        return "the homeserver answers, and refuses an invented token"


@implementer(IAgentEndpointFactory)
@attrs.frozen
class _FixedEndpoint:
    """Endpoint factory that returns the same endpoint for each URI."""

    endpoint: IStreamClientEndpoint

    def endpointForURI(self, uri: object) -> IStreamClientEndpoint:
        """As `IAgentEndpointFactory.endpointForURI`."""
        return self.endpoint


def _describe_new_file(path: Path) -> str:
    """Return a sentence about an SQLite file that doesn't exist yet.

    Raises:
        Problem: this user can't create the file.
    """
    directory = path.absolute().parent
    if not directory.is_dir():
        raise Problem(
            f"the directory {directory} doesn't exist. Create it, or name another one"
        )
    if not os.access(directory, os.W_OK | os.X_OK):
        raise Problem(
            f"this user can't write to {directory}. Run the command as the"
            " service's user, or change the directory's owner"
        )
    return "the file doesn't exist yet; the service creates it at its start"


def _print(name: str, outcome: str, text: str) -> None:
    print(f"{name}: {outcome}: {text}", flush=True)

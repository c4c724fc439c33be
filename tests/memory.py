"""A server in memory: the plugin's own site on an SQLite database, without a socket."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from typing import Any, TypeVar, cast

from twisted.internet.defer import Deferred, execute, fail, succeed
from twisted.internet.interfaces import IPushProducer
from twisted.internet.task import Clock as FakeTime
from twisted.internet.testing import StringTransportWithDisconnection
from twisted.web.http import Request
from twisted.web.server import Site

from synapse_roomkeys import E2eRoomKeysHandler, register_servlets
from synapse_roomkeys.admin.backend import Backend
from synapse_roomkeys.admin.handler import AdminHandler
from synapse_roomkeys.admin.runner import TaskRunner
from synapse_roomkeys.clock import Clock
from synapse_roomkeys.errors import ForbiddenError, RoomKeysError
from synapse_roomkeys.rest import (
    AdminHost,
    HomeServer,
    JsonResource,
    register_admin_servlets,
)
from synapse_roomkeys.storage import (
    SQLITE,
    EndToEndRoomKeyStore,
    Sweeps,
    upgrade_tables,
)
from synapse_roomkeys.sweeper import Sweeper
from synapse_roomkeys.types import Limits, Requester, Retention

from .contract import Answer, User

T = TypeVar("T")


class FakeReactor(FakeTime):
    """A reactor of one thread, whose time moves only by ``advance``."""

    def callFromThread(self, callable: Callable[..., object], *args: object) -> None:
        """Call the function immediately, in the same thread."""
        callable(*args)


class TriesOnce:
    """Adds the methods of `Transactions` to a database with ``run``; never retries."""

    run: Any

    def write(
        self, desc: str, function: Callable[..., T], *args: Any, **kwargs: Any
    ) -> Deferred[T]:
        """As `Transactions.write`, without a retry."""
        return self.run(desc, function, *args, **kwargs)  # type: ignore[no-any-return]

    def attempt(
        self, desc: str, function: Callable[..., object], *args: Any, **kwargs: Any
    ) -> Deferred[None]:
        """As `Transactions.attempt`, but fail with the errors."""
        return self.run(desc, function, *args, **kwargs)  # type: ignore[no-any-return]


class ImmediateDatabase(TriesOnce):
    """An SQLite database in memory, whose Deferreds have fired on return.

    Attributes:
        statements: all statements that were run.
        fault: raised instead of running the next transaction, once.
    """

    def __init__(self) -> None:
        self.connection = sqlite3.connect(":memory:")
        self.statements: list[str] = []
        self.connection.set_trace_callback(self.statements.append)
        self.fault: Exception | None = None
        self.transactions = 0
        self.connections = 1
        self.run("upgrade", upgrade_tables, SQLITE, True)

    def run(
        self, desc: str, function: Callable[..., T], *args: Any, **kwargs: Any
    ) -> Deferred[T]:
        """As `Database.run`, finished on return."""
        return execute(self._run, function, *args, **kwargs)

    def _run(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        fault, self.fault = self.fault, None
        if fault is not None:
            raise fault
        self.transactions += 1
        with self.connection:
            return function(self.connection.cursor(), *args, **kwargs)


class SlowTransport(StringTransportWithDisconnection):
    """A connection that, if ``slow``, pauses its producer after each write until
    `take_more`."""

    slow = False

    def writeSequence(self, data: Iterable[bytes]) -> None:
        """Write; if ``slow``, act as if the socket's buffer were full afterwards."""
        super().writeSequence(data)
        if self.slow and self.connected:
            cast(IPushProducer, self.producer).pauseProducing()

    def take_more(self) -> None:
        """Resume the producer, as if the client had read all sent bytes."""
        cast(IPushProducer, self.producer).resumeProducing()


class TokenError(RoomKeysError):
    """The error for a missing or unknown access token, or a guest's."""

    def __init__(self, code: int, errcode: str) -> None:
        super().__init__("Not allowed")
        self.code = code
        self.errcode = errcode


class StubAuth:
    """Finds users by their access tokens, as a homeserver does."""

    def __init__(self) -> None:
        self._users: dict[str, str] = {}
        self._guests: set[str] = set()
        self._numbers = count()

    def new_user(self, guest: bool = False) -> User:
        """Return a new user or guest, with a token."""
        number = next(self._numbers)
        user = User(f"@user{number}:test.example", f"token_{number:020}")
        self._users[user.access_token] = user.user_id
        if guest:
            self._guests.add(user.access_token)
        return user

    def get_user_by_req(self, request: Request) -> Deferred[Requester]:
        """As `Auth.get_user_by_req`."""
        header = request.getHeader("Authorization")
        if header is None:
            return fail(TokenError(401, "M_MISSING_TOKEN"))
        token = header.removeprefix("Bearer ")
        if token not in self._users:
            return fail(TokenError(401, "M_UNKNOWN_TOKEN"))
        if token in self._guests:
            return fail(TokenError(403, "M_GUEST_ACCESS_FORBIDDEN"))
        return succeed(Requester(self._users[token], "DEVICE"))


def own_site(hs: HomeServer) -> Site:
    """Return a `Site` that serves only the plugin."""
    resource = JsonResource()
    register_servlets(hs, resource)
    return Site(resource)


class MemoryServer:
    """A server that answers a request before `request` returns.

    Attributes:
        site: the server's site.
    """

    site: Site

    def request(
        self,
        method: str,
        path: str,
        *,
        token: str | None,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Deferred[Answer]:
        """As `Host.request`."""
        transport = self.send(method, path, token=token, body=body, headers=headers)
        return execute(read_answer, transport.value(), method)

    def send(
        self,
        method: str,
        path: str,
        *,
        token: str | None,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        slow: bool = False,
    ) -> SlowTransport:
        """Send a request; return the connection, even if the answer isn't complete."""
        lines = [f"{method} {path} HTTP/1.1", "Host: test.example"]
        if token is not None:
            lines.append(f"Authorization: Bearer {token}")
        lines.append(f"Content-Length: {len(body or b'')}")
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        transport = SlowTransport()
        transport.slow = slow
        protocol = self.site.buildProtocol(None)
        transport.protocol = protocol
        protocol.makeConnection(transport)
        protocol.dataReceived("\r\n".join([*lines, "", ""]).encode() + (body or b""))
        return transport


class MemoryHost(MemoryServer):
    """A server under test, for clients.

    Attributes:
        reactor: the fake reactor, whose time moves only by ``advance``.
        sweeps: the sweeper's transactions.
        sweeper: the sweeper, whose passes a test starts with ``run``.
    """

    def __init__(
        self, limits: Limits | None = None, retention: Retention | None = None
    ) -> None:
        self.reactor = FakeReactor()
        self.reactor.advance(time.time())
        self.database = ImmediateDatabase()
        clock = Clock(self.reactor)
        limits = limits or Limits()
        retention = retention or Retention()
        seconds = self.reactor.seconds
        self.store = EndToEndRoomKeyStore(
            self.database, SQLITE, seconds, limits, retention
        )
        self.sweeps = Sweeps(self.database, SQLITE, seconds, retention)
        self.sweeper = Sweeper(self.sweeps, clock, clock.call_later)
        self.handler = E2eRoomKeysHandler(self.store, clock, limits, self.sweeper)
        self.auth = StubAuth()
        self.hs = HomeServer(clock, limits, 300, self.auth, self.handler)
        self.site = own_site(self.hs)

    def new_user(self) -> User:
        """As `Host.new_user`."""
        return self.auth.new_user()

    def new_guest(self) -> User:
        """As `Host.new_guest`."""
        return self.auth.new_user(guest=True)


class MemoryAdminHost(MemoryServer):
    """A server under test, for operators.

    Attributes:
        clients: the same server for clients.
        runner: runs the tasks.
        tasks: the transactions of tasks.
    """

    def __init__(self) -> None:
        retention = Retention(deleted_versions_days=1)
        self.clients = host = MemoryHost(retention=retention)
        self._operators = StubAdminAuth(host.auth)
        self._reactor = host.reactor
        clock = Clock(host.reactor)
        backend = Backend(host.database, SQLITE, host.store, host.reactor.seconds)
        self.tasks = backend.tasks
        self.runner = TaskRunner(backend, clock, clock.call_later)
        self.runner.start()
        handler = AdminHandler(
            backend, host.handler, self.runner, clock, knows_accounts=False
        )
        resource = JsonResource()
        admin = AdminHost(clock, 300, self._operators, handler)
        register_admin_servlets(admin, resource)
        self.site = Site(resource)

    def new_operator(self) -> User:
        """As `OperatorHost.new_operator`."""
        return self._operators.new_operator()

    def wait(self) -> Deferred[None]:
        """As `OperatorHost.wait`."""
        self._reactor.advance(0.1)
        return succeed(None)


class StubAdminAuth:
    """Knows some users as operators."""

    def __init__(self, auth: StubAuth) -> None:
        self._auth = auth
        self._operators: set[str] = set()

    def new_operator(self) -> User:
        """Return a new user, who is an operator."""
        user = self._auth.new_user()
        self._operators.add(user.user_id)
        return user

    def get_operator(self, request: Request) -> Deferred[str]:
        """As `AdminAuth.get_operator`."""

        def check(requester: Requester) -> str:
            if requester.user_id not in self._operators:
                raise ForbiddenError("No operator")
            return requester.user_id

        return self._auth.get_user_by_req(request).addCallback(check)


def read_answer(data: bytes, method: str) -> Answer:
    """Parse a complete HTTP answer."""
    head, _, rest = data.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    pairs = (line.partition(": ") for line in lines)
    headers = {name.lower(): value for name, _, value in pairs}
    if headers.get("transfer-encoding") == "chunked" and method != "HEAD":
        rest = read_chunks(rest)
    elif method != "HEAD" and "content-length" in headers:
        assert len(rest) == int(headers["content-length"])
    return Answer(int(status.split()[1]), headers, rest)


def read_chunks(data: bytes) -> bytes:
    """Return the content of a chunked body, which must end with the last chunk."""
    content = b""
    while True:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        if not length:
            assert data == b"\r\n"
            return content
        content += data[:length]
        assert data[length : length + 2] == b"\r\n"
        data = data[length + 2 :]

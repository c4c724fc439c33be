"""An HTTP client for servers under test, over real connections."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from io import BytesIO
from typing import Any

import treq
from twisted.internet import reactor
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.task import deferLater
from twisted.web.client import Agent, FileBodyProducer, HTTPConnectionPool
from twisted.web.http_headers import Headers
from twisted.web.iweb import IResponse

from .contract import Answer, User
from .secret_search import SECRET


class HttpClient:
    """A client of the server at an address."""

    def __init__(self, url: str, *, is_persistent: bool = True) -> None:
        """
        Args:
            is_persistent: whether connections are kept for further requests. Twisted
                silently resends a request whose kept connection fails.
        """
        self.url = url
        self._pool = HTTPConnectionPool(reactor, persistent=is_persistent)
        self._agent = Agent(reactor, pool=self._pool)

    @inlineCallbacks
    def request(
        self,
        method: str,
        path: str,
        *,
        token: str | None,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Generator[Deferred[Any], Any, Answer]:
        """Send a request and fire with the answer, as `Host.request` does.

        No error answer may hold a secret.
        """
        response: IResponse = yield self.open(
            method, path, token=token, body=body, headers=headers
        )
        content: bytes = yield treq.content(response)
        if response.code >= 400:
            assert not SECRET.search(content), content[:2000]
        names = response.headers.getAllRawHeaders()
        got = {name.decode().lower(): values[0].decode() for name, values in names}
        return Answer(response.code, got, content)

    def open(
        self,
        method: str,
        path: str,
        *,
        token: str | None,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Deferred[IResponse]:
        """Send a request and fire with the response before its body is read.

        The path is sent byte by byte as given; URLs of treq would normalise the path.
        """
        sent = Headers({name: [value] for name, value in (headers or {}).items()})
        if token is not None:
            sent.addRawHeader("Authorization", f"Bearer {token}")
        producer = FileBodyProducer(BytesIO(body)) if body is not None else None
        uri = (self.url + path).encode()
        return self._agent.request(method.encode(), uri, sent, producer)

    def close(self) -> Deferred[None]:
        """Close the idle connections of the pool, and fire when all are closed."""
        closed: Deferred[None] = self._pool.closeCachedConnections()
        return closed


class HttpHost(HttpClient):
    """A server under test at an address, with functions that create its users."""

    def __init__(
        self,
        url: str,
        new_user: Callable[[], User],
        new_guest: Callable[[], User],
    ) -> None:
        super().__init__(url)
        self.new_user = new_user
        self.new_guest = new_guest


class HttpOperatorHost(HttpClient):
    """The interface for operators of a server under test.

    Attributes:
        clients: the same server for clients.
    """

    def __init__(
        self, url: str, clients: HttpHost, new_operator: Callable[[], User]
    ) -> None:
        super().__init__(url)
        self.clients = clients
        self.new_operator = new_operator

    def wait(self) -> Deferred[None]:
        """As `OperatorHost.wait`."""
        return deferLater(reactor, 0.1)

    @inlineCallbacks
    def close(self) -> Generator[Deferred[Any], Any, None]:
        """Close the idle connections of both pools."""
        yield self.clients.close()
        yield super().close()

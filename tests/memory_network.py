"""A network in memory with a single site."""

from __future__ import annotations

from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.error import ConnectionRefusedError
from twisted.internet.interfaces import (
    IHostnameResolver,
    IReactorPluggableNameResolver,
)
from twisted.internet.testing import MemoryReactorClock
from twisted.test import iosim
from twisted.web.resource import Resource
from twisted.web.server import Site
from zope.interface import implementer


@implementer(IHostnameResolver)
class Resolver:
    """A resolver with the same address for every name."""

    def resolveHostName(
        self,
        resolutionReceiver: Any,
        hostName: str,
        portNumber: int = 0,
        addressTypes: Any = None,
        transportSemantics: str = "TCP",
    ) -> Any:
        """Resolve a name, as `IHostnameResolver.resolveHostName` does."""
        resolutionReceiver.resolutionBegan(None)
        resolutionReceiver.addressResolved(IPv4Address("TCP", "192.0.2.1", portNumber))
        resolutionReceiver.resolutionComplete()
        return resolutionReceiver


@implementer(IReactorPluggableNameResolver)
class MemoryNetwork(MemoryReactorClock):
    """A reactor whose connections all lead to the same site.

    Attributes:
        refusing: whether connections are refused.
    """

    def __init__(self, resource: Resource) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # `MemoryReactorClock` of older versions of Twisted has no resolver.
        self.nameResolver: Any = Resolver()
        self.site = Site(resource, reactor=self)
        self.refusing = False
        self._pumps: list[Any] = []

    def callFromThread(self, callable: Any, *args: Any, **kwargs: Any) -> None:
        """Call a function immediately; the tests have no other thread."""
        callable(*args, **kwargs)

    def connectTCP(
        self,
        host: Any,
        port: Any,
        factory: Any,
        timeout: Any = 30,
        bindAddress: Any = None,
    ) -> Any:
        """Connect to the site, with any host and port."""
        connect: Any = super().connectTCP
        connector = connect(host, port, factory, timeout, bindAddress)
        if self.refusing:
            factory.clientConnectionFailed(connector, ConnectionRefusedError())
            return connector
        server, client = self.site.buildProtocol(None), factory.buildProtocol(None)
        pipes = iosim.FakeTransport(server, True), iosim.FakeTransport(client, False)
        self._pumps.append(iosim.connect(server, pipes[0], client, pipes[1]))
        return connector

    @property
    def connections(self) -> int:
        """Number of open connections."""
        return sum(not pump.clientIO.disconnected for pump in self._pumps)

    def turn(self, seconds: float = 0) -> None:
        """Let time pass and deliver all bytes.

        The time stops at each due call: delayed calls run in order.
        """
        end = self.seconds() + seconds
        self._flow()
        while due := [
            c.getTime() for c in self.getDelayedCalls() if c.getTime() <= end
        ]:
            self.rightNow = max(min(due), self.seconds())
            self._flow()
        self.rightNow = end

    def _flow(self) -> None:
        """Deliver bytes until no connection has bytes left to deliver."""
        moved = True
        while moved:
            self.advance(0)
            moved = sum(pump.flush() for pump in self._pumps) > 0

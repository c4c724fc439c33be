"""Whether the service is well, for load balancers, and its metrics."""

import math
import time
from collections.abc import Callable

from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure
from twisted.web.http import Request
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET

from .. import metrics
from ..describe import error_line
from ..outages import Cause, Outages
from ..rest.resource import JsonResource, respond

#: Seconds in which the database or the homeserver has to answer.
TIMEOUT = 5
OK = "ok"
#: Seconds between two estimates of the number of keys. PostgreSQL's statistics change
#: only when its autovacuum has run, some minutes apart.
MEASURE_SECONDS = 300.0

SILENT = Cause("silent", "See its own log, and the network between")


class Probe:
    """Test that runs once at a time, and gives its result to all who wait for it."""

    def __init__(
        self,
        check: "Callable[[], Deferred[None]]",
        reactor: IReactorTime,
        outages: Outages,
    ) -> None:
        """
        Args:
            check: starts a test, which fires with None, or logs its failure and fails.
            outages: log for a test that has no result after `TIMEOUT` seconds.
        """
        self._check = check
        self._reactor = reactor
        self._outages = outages
        self._waiting: list[Deferred[str]] = []
        self._asked = False

    def ask(self) -> "Deferred[str]":
        """Fire within `TIMEOUT` seconds with `OK`, or with one line about the
        failure."""
        waiter: Deferred[str] = Deferred()
        self._waiting.append(waiter)
        if not self._asked:
            self._asked = True
            answer = self._check().addCallbacks(
                lambda _: OK, lambda failure: error_line(failure.value)
            )
            answer.addCallback(self._answer)
        return waiter.addTimeout(TIMEOUT, self._reactor).addErrback(
            self._give_up, waiter
        )

    def _answer(self, answer: str) -> None:
        self._asked = False
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            waiter.callback(answer)

    def _give_up(self, failure: Failure, waiter: "Deferred[str]") -> str:
        self._waiting.remove(waiter)
        answer = f"no answer in {TIMEOUT} seconds"
        self._outages.note_failure(SILENT, answer)
        return answer


class HealthResource(Resource):
    """``/health``: 200 while the process lives."""

    isLeaf = True

    def render_GET(self, request: Request) -> int:
        """Answer a request; `Resource` calls it."""
        respond(request, 200, {"status": OK})
        return NOT_DONE_YET


class ReadyResource(Resource):
    """``/ready``: 200 when requests would be answered, else 503, and what is wrong.

    What is wrong in detail is told to the log, not to everybody.
    """

    isLeaf = True

    def __init__(
        self, database: Probe, homeserver: Probe, is_draining: Callable[[], bool]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._probes = {"database": database, "homeserver": homeserver}
        self._is_draining = is_draining

    def render_GET(self, request: Request) -> int:
        """Answer a request; `Resource` calls it."""
        asked = [probe.ask() for probe in self._probes.values()]
        DeferredList(asked).addCallback(self._answer, request)
        return NOT_DONE_YET

    def _answer(self, answers: list[tuple[bool, str]], request: Request) -> None:
        parts = {
            name: OK if answer == OK else "unavailable"
            for name, (_, answer) in zip(self._probes, answers, strict=True)
        }
        parts["service"] = "stopping" if self._is_draining() else OK
        well = all(part == OK for part in parts.values())
        respond(request, 200 if well else 503, parts)


class MetricsResource(Resource):
    """``/metrics``: what is counted, in Prometheus' format."""

    isLeaf = True

    def __init__(self, count_keys: "Callable[[], Deferred[int]]") -> None:
        """
        Args:
            count_keys: fires with the number of keys in all backups. A scrape starts it
                if the last start is `MEASURE_SECONDS` ago, and doesn't wait for it.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._count_keys = count_keys
        self._measured = -math.inf

    def render_GET(self, request: Request) -> bytes:
        """Answer a request; `Resource` calls it."""
        now = time.monotonic()
        if now - self._measured >= MEASURE_SECONDS:
            self._measured = now
            # A failure shows in the metrics of the database and at the next test.
            self._count_keys().addCallbacks(metrics.stored_keys.set, lambda _: None)
        request.setHeader(b"Content-Type", CONTENT_TYPE_LATEST.encode())
        return generate_latest()


class Root(Resource):
    """The resources of the status, and one that answers for all other paths."""

    def __init__(self, ready: ReadyResource, others: JsonResource) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.putChild(b"health", HealthResource())  # type: ignore[no-untyped-call]
        self.putChild(b"ready", ready)
        self._others = others

    def getChild(self, path: bytes, request: Request) -> Resource:
        """As `Resource.getChild`."""
        return self._others

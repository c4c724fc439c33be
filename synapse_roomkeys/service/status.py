"""Resources for load balancers and monitoring: health, readiness and metrics."""

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

#: Timeout in seconds of a test of the database or the homeserver.
TIMEOUT = 5
OK = "ok"
#: Seconds between two estimates of the number of keys. PostgreSQL's statistics change
#: only after a run of autovacuum, every few minutes.
MEASURE_SECONDS = 300.0

#: Cause of a test without a result after `TIMEOUT`.
SILENT = Cause(
    "silent", "Read the server's own log, and check the network to the server"
)


class Probe:
    """A test with a single run at a time. All waiting requests share the result."""

    def __init__(
        self,
        check: "Callable[[], Deferred[None]]",
        reactor: IReactorTime,
        outages: Outages,
    ) -> None:
        """
        Args:
            check: starts a test. The Deferred fires with None, or fails after the test
                has logged the failure.
            outages: log for a test without a result after `TIMEOUT` seconds.
        """
        self._check = check
        self._reactor = reactor
        self._outages = outages
        self._waiting: list[Deferred[str]] = []
        self._is_running = False

    def ask(self) -> "Deferred[str]":
        """Fire within `TIMEOUT` seconds with `OK`, or with one line about the
        failure."""
        waiter: Deferred[str] = Deferred()
        self._waiting.append(waiter)
        if not self._is_running:
            self._is_running = True
            answer = self._check().addCallbacks(
                lambda _: OK, lambda failure: error_line(failure.value)
            )
            answer.addCallback(self._share)
        return waiter.addTimeout(TIMEOUT, self._reactor).addErrback(
            self._time_out, waiter
        )

    def _share(self, answer: str) -> None:
        self._is_running = False
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            waiter.callback(answer)

    def _time_out(self, failure: Failure, waiter: "Deferred[str]") -> str:
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
    """``/ready``: 200 if requests would be answered, else 503. The body has the state
    of each part.

    Details of a failure are logged, and left out of the response, because anybody can
    read the response.
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
        is_ready = all(part == OK for part in parts.values())
        respond(request, 200 if is_ready else 503, parts)


class MetricsResource(Resource):
    """``/metrics``: the metrics in Prometheus' text format."""

    isLeaf = True

    def __init__(self, count_keys: "Callable[[], Deferred[int]]") -> None:
        """
        Args:
            count_keys: fires with an estimate of the number of keys in all backups. A
                scrape calls this function if the last call was `MEASURE_SECONDS` ago,
                and doesn't wait for the result.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._count_keys = count_keys
        self._measured = -math.inf

    def render_GET(self, request: Request) -> bytes:
        """Answer a request; `Resource` calls it."""
        now = time.monotonic()
        if now - self._measured >= MEASURE_SECONDS:
            self._measured = now
            # The metrics of the database and the next readiness test show a failure.
            self._count_keys().addCallbacks(metrics.stored_keys.set, lambda _: None)
        request.setHeader(b"Content-Type", CONTENT_TYPE_LATEST.encode())
        return generate_latest()


class Root(Resource):
    """The root: ``/health``, ``/ready``, and a resource for all other paths."""

    def __init__(self, ready: ReadyResource, others: JsonResource) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.putChild(b"health", HealthResource())  # type: ignore[no-untyped-call]
        self.putChild(b"ready", ready)
        self._others = others

    def getChild(self, path: bytes, request: Request) -> Resource:
        """As `Resource.getChild`."""
        return self._others

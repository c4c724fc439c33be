"""Whether the service is well, for load balancers, and its metrics."""

import logging
from collections.abc import Callable

from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure
from twisted.web.http import Request
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET

from ..describe import error_line
from ..errors import UnavailableError
from ..rest.resource import JsonResource, respond

logger = logging.getLogger(__name__)

#: How long the database or the homeserver may take to answer, in seconds.
TIMEOUT = 5
OK = "ok"


class Probe:
    """Asks something whether it is well: once at a time, however many want to know."""

    def __init__(
        self, name: str, check: "Callable[[], Deferred[None]]", reactor: IReactorTime
    ) -> None:
        """
        Args:
            check: fires when it is well, or fails.
        """
        self._name = name
        self._check = check
        self._reactor = reactor
        self._waiting: list[Deferred[str]] = []
        self._asked = False

    def ask(self) -> "Deferred[str]":
        """Fires with `OK`, or with what is wrong in one line, in `TIMEOUT` seconds."""
        waiter: Deferred[str] = Deferred()
        self._waiting.append(waiter)
        if not self._asked:
            self._asked = True
            answer = self._check().addCallbacks(lambda _: OK, self._brief)
            answer.addCallback(self._answer)
        return waiter.addTimeout(TIMEOUT, self._reactor).addErrback(
            self._give_up, waiter
        )

    def _answer(self, answer: str) -> None:
        self._asked = False
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            waiter.callback(answer)

    def _brief(self, failure: Failure) -> str:
        """An exception's line for operators, which is logged."""
        line = error_line(failure.value)  # type: ignore[arg-type]
        # Whoever asks the homeserver has logged what is wrong with it.
        if not failure.check(UnavailableError):
            logger.warning("The %s is away: %s", self._name, line)
        return line

    def _give_up(self, failure: Failure, waiter: "Deferred[str]") -> str:
        self._waiting.remove(waiter)
        logger.warning("The %s hasn't answered for %d s", self._name, TIMEOUT)
        return f"no answer in {TIMEOUT} seconds"


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

    def render_GET(self, request: Request) -> bytes:
        """Answer a request; `Resource` calls it."""
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

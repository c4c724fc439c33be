"""Servlets: classes whose methods ``on_GET``, ``on_PUT``, ``on_POST`` and ``on_DELETE``
answer requests as JSON."""

import logging
import re
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol
from urllib.parse import unquote, unquote_to_bytes

from canonicaljson import encode_canonical_json
from twisted.internet.defer import Deferred, inlineCallbacks, maybeDeferred
from twisted.python.failure import Failure
from twisted.web.http import Request
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET

from .. import metrics
from ..errors import (
    InvalidParamError,
    MissingParamError,
    NotJsonError,
    RoomKeysError,
    UnrecognizedError,
)
from ..inline import Inline

logger = logging.getLogger(__name__)

#: Result of a servlet's method: a status and a JSON object, as a dictionary or as
#: encoded bytes; None if the method has sent the answer already.
Answer = tuple[int, dict[str, Any] | bytes] | None

METHODS = ("GET", "PUT", "POST", "DELETE")
#: Methods with their own label in metrics. Other methods share the label "other".
_MEASURED = (*METHODS, "HEAD", "OPTIONS")
#: Servlet label in metrics for a request without a servlet.
_NO_SERVLET = "none"

#: Headers of every response, from "Web Browser Clients" of the client-server API.
CORS_HEADERS = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Methods": "GET, HEAD, POST, PUT, DELETE, OPTIONS",
    "Access-Control-Allow-Headers": "X-Requested-With, Content-Type, Authorization",
}


class HttpServer(Protocol):
    """Server that servlets are registered with: Synapse's own, or a `JsonResource`."""

    def register_paths(
        self,
        method: str,
        path_patterns: "Iterable[re.Pattern[str]]",
        callback: Callable[..., Any],
        servlet_classname: str,
    ) -> None:
        """Register a callback that answers requests with the given method and a path
        that matches any of the patterns.

        The callback receives the request, and the pattern's named groups,
        percent-decoded, as keyword arguments. The callback returns a Deferred that
        fires with None after the request was answered.
        """


def client_patterns(path: str) -> "tuple[re.Pattern[str], ...]":
    """Path patterns of a client-server API endpoint, for the prefixes ``r0``, ``v3``
    and ``unstable``."""
    return (re.compile(f"^/_matrix/client/(?:r0|v3|unstable){path}$"),)


def set_headers(request: Request, content_type: bytes | None) -> None:
    """Set the CORS headers and, if there is a content type, the type and
    ``Cache-Control``."""
    for name, value in CORS_HEADERS.items():
        request.setHeader(name.encode(), value.encode())
    if content_type is not None:
        request.setHeader(b"Content-Type", content_type)
        request.setHeader(b"Cache-Control", b"no-cache, no-store, must-revalidate")


def respond(request: Request, code: int, body: dict[str, Any] | bytes) -> None:
    """Answer a request with a JSON object, unless the client has disconnected."""
    if request._disconnected:
        return
    content = body if isinstance(body, bytes) else encode_canonical_json(body)
    request.setResponseCode(code)
    set_headers(request, b"application/json")
    request.setHeader(b"Content-Length", b"%d" % len(content))
    request.write(content)
    request.finish()


def respond_error(request: Request, error: RoomKeysError) -> None:
    """Answer a request with an error."""
    for name, value in error.headers().items():
        request.setHeader(name.encode(), value.encode())
    respond(request, error.code, error.error_dict())


def respond_defect(request: Request, error: BaseException | None) -> None:
    """Log an unexpected exception with traceback, and answer 500 without details."""
    logger.error("Failed to answer a request", exc_info=error)
    body = {"errcode": "M_UNKNOWN", "error": "Internal server error"}
    respond(request, 500, body)


def notes_of(request: Request) -> dict[str, Any]:
    """Facts about a request for its log lines: a dictionary to read and to add to.

    Returns:
        ``user``, ``device`` and ``version``, and after an upload ``stored``,
        ``replaced`` and ``unchanged``, numbers of keys. Each entry is added when the
        value is known. The dictionary lives as long as the request.
    """
    notes: dict[str, Any] = vars(request).setdefault("_roomkeys_notes", {})
    return notes


def parse_string(request: Request, name: str) -> str:
    """Return the value of a query parameter. If the parameter is repeated, return the
    first value.

    Raises:
        MissingParamError: the query has no such parameter.
    """
    value = find_parameter(request, name)
    if value is None:
        raise MissingParamError(f"Missing query parameter {name}")
    return value


def find_parameter(request: Request, name: str) -> str | None:
    """Return the value of a query parameter, of a repeated one the first; None if the
    query has no such parameter."""
    values: list[bytes] = (request.args or {}).get(name.encode()) or []
    return values[0].decode("utf-8", "replace") if values else None


def read_body(request: Request) -> bytes:
    """Return the body of a request.

    Raises:
        NotJsonError: the client has disconnected.
    """
    content: Any = request.content
    if content.closed:
        # Twisted closes the body when the connection is lost. The client is gone and
        # doesn't receive this answer.
        raise NotJsonError("The client left before its body was read")
    return content.read()  # type: ignore[no-any-return]


#: A callback, and the name of its servlet.
_Route = tuple[Callable[..., Any], str]


class JsonResource(Resource):
    """Resource that answers requests with the callbacks registered for their paths.

    The patterns match a request's whole path, at any position of the resource in a
    site.
    """

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._routes: dict[re.Pattern[str], dict[str, _Route]] = {}

    def register_paths(
        self,
        method: str,
        path_patterns: "Iterable[re.Pattern[str]]",
        callback: Callable[..., Any],
        servlet_classname: str,
    ) -> None:
        """Register a callback, as `HttpServer.register_paths` does."""
        for pattern in path_patterns:
            route = callback, servlet_classname
            self._routes.setdefault(pattern, {})[method] = route

    def render(self, request: Request) -> int | bytes:
        """Answer a request. Called by Twisted."""
        if request.method == b"OPTIONS":
            _measure(request, _NO_SERVLET)
            request.setResponseCode(204)
            set_headers(request, None)
            return b""
        try:
            (callback, servlet), groups = self._find(request)
        except UnrecognizedError as error:
            _measure(request, _NO_SERVLET)
            respond_error(request, error)
            return NOT_DONE_YET
        _measure(request, servlet)
        arguments = {name: value and unquote(value) for name, value in groups.items()}
        done = maybeDeferred(callback, request, **arguments)
        done.addErrback(self._fail, request)
        return NOT_DONE_YET

    def _find(self, request: Request) -> "tuple[_Route, dict[str, Any]]":
        """Return the route of a request, and the named groups of the matched path.

        HEAD requests use the route for GET.

        Raises:
            UnrecognizedError: no pattern matches the path (404), or the path has no
                route for the method (405).
        """
        path = request.path.decode("latin-1")
        method = request.method.decode("latin-1").replace("HEAD", "GET")
        for pattern, callbacks in self._routes.items():
            match = pattern.match(path)
            if match:
                if method not in callbacks:
                    raise UnrecognizedError(405)
                return callbacks[method], match.groupdict()
        raise UnrecognizedError(404)

    def _fail(self, failure: Failure, request: Request) -> None:
        """Answer a request whose callback failed: with the host's `RoomKeysError`, or
        with 500 after a defect."""
        error = failure.value
        if isinstance(error, RoomKeysError):
            respond_error(request, error)
            return
        respond_defect(request, error)


class RestServlet(JsonResource):
    """Base class of servlets, with a Python method for each HTTP method of an endpoint.

    Subclasses have ``PATTERNS`` and any of ``on_GET``, ``on_PUT``, ``on_POST`` and
    ``on_DELETE``. These methods take the request and the pattern's named groups, and
    fire with an `Answer`. A servlet is also a resource that answers the servlet's own
    paths.
    """

    PATTERNS: "Iterable[re.Pattern[str]]"

    def __init__(self) -> None:
        super().__init__()
        self.register(self)

    def register(self, http_server: HttpServer) -> None:
        """Register the servlet's ``on_...`` methods with a server."""
        for method in METHODS:
            answer = getattr(self, f"on_{method}", None)
            if answer is not None:
                http_server.register_paths(
                    method,
                    self.PATTERNS,
                    _answering(answer),
                    type(self).__name__,
                )


def _answering(method: Callable[..., Any]) -> Callable[..., "Deferred[None]"]:
    """Return a callback that sends the result of a servlet's method as the response. If
    the method raises a `RoomKeysError`, the callback sends the error. The host answers
    any other error."""

    @inlineCallbacks
    def callback(request: Request, **groups: str | None) -> Inline[None]:
        try:
            _check_path(request)
            answer: Answer = yield method(request, **groups)
        except RoomKeysError as error:
            if not request._disconnected:
                note_refusal(request, error)
                respond_error(request, error)
            return
        if answer is not None:
            respond(request, *answer)

    return callback


def _check_path(request: Request) -> None:
    try:
        unquote_to_bytes(request.path).decode()
    except UnicodeDecodeError:
        raise InvalidParamError("The path is not UTF-8") from None


def _measure(request: Request, servlet: str) -> None:
    """Count a request in the metrics: as in flight until the response ends, then by
    servlet, method and status, with the response time in seconds."""
    method = request.method.decode("latin-1")
    if method not in _MEASURED:
        method = "other"
    in_flight = metrics.series(metrics.requests_in_flight, method)
    started = time.perf_counter()

    def count(status: str) -> None:
        in_flight.dec()
        metrics.series(metrics.requests, servlet, method, status).inc()
        seconds = time.perf_counter() - started
        metrics.series(metrics.request_seconds, servlet, method).observe(seconds)

    in_flight.inc()
    request.notifyFinish().addCallbacks(
        lambda _: count(str(request.code)), lambda _: count("dropped")
    )


def note_refusal(request: Request, error: RoomKeysError) -> None:
    """Count a refused request and log the refusal with the user. Some clients repeat a
    refused request for ever; the log line names their user.

    A GET with a 404 is logged at DEBUG, because clients without a backup send such a
    request at each start, and clients ask for single keys that aren't in the backup.
    """
    metrics.refused_requests.labels(error.errcode).inc()
    method = request.method.decode("latin-1")
    is_routine = error.code == 404 and method in ("GET", "HEAD")
    notes = notes_of(request)
    logger.log(
        logging.DEBUG if is_routine else logging.INFO,
        "Refused %s: user=%s device=%s: %d %s: %s",
        method,
        notes.get("user"),
        notes.get("device"),
        error.code,
        error.errcode,
        error.msg,
        extra={
            "fields": {
                "method": method,
                "status": error.code,
                "errcode": error.errcode,
                **notes,
            }
        },
    )

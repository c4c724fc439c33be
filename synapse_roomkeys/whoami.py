"""Who an access token belongs to, as the homeserver says.

It is asked with ``GET /account/whoami`` of the client-server API, "Account
management", where "Identity assertion" of the application service API lets a service
name the user, and the device, that it acts as.
"""

import hashlib
import logging
import re
from collections import OrderedDict
from collections.abc import Generator, Mapping
from typing import Annotated, Any, NoReturn, cast

import attrs
import msgspec
from treq.client import HTTPClient
from twisted.internet.defer import Deferred, DeferredSemaphore, inlineCallbacks
from twisted.internet.interfaces import IReactorTime, ITransport
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.web.client import Agent, HTTPConnectionPool, ResponseDone
from twisted.web.http import PotentialDataLoss, Request
from twisted.web.http_headers import Headers
from twisted.web.iweb import IResponse

from . import metrics
from .clock import Clock
from .describe import error_line
from .errors import TokenError, UnavailableError
from .types import Requester

logger = logging.getLogger(__name__)

#: At most as many requests are on their way to the homeserver at once. One takes
#: milliseconds there, so this is far more than it answers in parallel.
MAX_CONNECTIONS = 20
#: A real answer has some hundred bytes, that to ``/versions`` some thousand.
MAX_BODY_BYTES = 64 * 1024
#: Seconds between the first two tries while the homeserver is away; then doubled.
FIRST_DELAY = 0.1
#: What a client is told to wait when all tries have failed, in seconds.
RETRY_AFTER = 10
#: Statuses that say something of the user. Any other is a fault that may pass; above
#: all, a 404 must not reach clients, which turn their backup off then.
REFUSALS = (400, 401, 403)
#: The parameters with which an application service says whom it acts as.
MASKS = ("user_id", "device_id")

#: A token goes out in a header: visible ASCII, as in RFC 6750 and somewhat more.
_TOKEN = re.compile("[!-~]+")
_BEARER = re.compile("Bearer +([!-~]+)", re.IGNORECASE)


@attrs.frozen
class HomeserverOptions:
    """The homeserver that users are known by.

    Attributes:
        url: where its client-server API is, without ``/_matrix``.
        timeout_seconds: how long it may take to answer one request.
        retry_seconds: for how long it is tried again while it is away.
        cache_seconds: for how long a token that it knew is let in, at most, after it
            was revoked.
        refused_cache_seconds: for how long a token that it refused stays refused.
        cache_entries: how many tokens are remembered.
    """

    url: str
    timeout_seconds: int = 10
    retry_seconds: int = 5
    cache_seconds: int = 60
    refused_cache_seconds: int = 10
    cache_entries: int = 10000


class _WhoamiBody(msgspec.Struct):
    user_id: Annotated[str, msgspec.Meta(pattern="^@.*:.", max_length=255)]
    device_id: str | None = None
    is_guest: bool = False


class _ErrorBody(msgspec.Struct):
    errcode: Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9_.]{1,100}$")]
    soft_logout: bool | None = None


_decode_whoami = msgspec.json.Decoder(_WhoamiBody).decode
_decode_error = msgspec.json.Decoder(_ErrorBody).decode


@attrs.frozen
class _Refusal:
    """What `TokenError` is made of. An error that is kept would keep the requests
    that it was raised for."""

    code: int
    errcode: str
    msg: str
    soft_logout: bool | None = None


_Answer = Requester | _Refusal


@attrs.define
class _Question:
    """A request to the homeserver, and the others that wait for its answer.

    Attributes:
        answer: None while there is none, and when the homeserver is away.
    """

    answer: _Answer | None = None
    waiting: "list[Deferred[None]]" = attrs.field(factory=list)


class _UnusableAnswerError(Exception):
    """The homeserver gave no answer that is of use; the text says what instead."""


class WhoamiAuth:
    """The authentication of a service that isn't part of the homeserver."""

    def __init__(
        self, reactor: IReactorTime, clock: Clock, options: HomeserverOptions
    ) -> None:
        """
        Args:
            reactor: what connections are made with.
        """
        self._reactor = reactor
        self._clock = clock
        self._options = options
        self._api = options.url.rstrip("/") + "/_matrix/client"
        self._pool = HTTPConnectionPool(reactor)
        self._pool.maxPersistentPerHost = MAX_CONNECTIONS
        self._agent = Agent(reactor, pool=self._pool)
        self._connections = DeferredSemaphore(MAX_CONNECTIONS)
        #: When the homeserver was asked, and what it said, the oldest first.
        self._answers: OrderedDict[bytes, tuple[float, _Answer]] = OrderedDict()
        self._questions: dict[bytes, _Question] = {}

    @inlineCallbacks
    def get_user_by_req(
        self, request: Request
    ) -> "Generator[Deferred[Any], Any, Requester]":
        """As `synapse_roomkeys.rest.Auth.get_user_by_req`.

        Raises:
            TokenError: there is no token, or the homeserver refuses it.
            UnavailableError: the homeserver is away.
        """
        token = _access_token(request)
        masks = {name: _parameter(request, name) for name in MASKS}
        key = hashlib.sha256(repr((token, masks)).encode()).digest()
        answer = self._remembered(key)
        if answer is None:
            params = {name: value for name, value in masks.items() if value is not None}
            answer = yield self._ask_once(key, token, params)
        else:
            metrics.whoami_requests.labels("cached").inc()
        if answer is None:
            raise UnavailableError(RETRY_AFTER)
        if isinstance(answer, _Refusal):
            raise TokenError(*attrs.astuple(answer))
        return answer

    @inlineCallbacks
    def check(self) -> "Generator[Deferred[Any], Any, None]":
        """See whether the homeserver is there.

        Raises:
            UnavailableError: it isn't.
        """
        try:
            code, _ = yield self._clock.wait(self._get("/versions", Headers(), {}))
            if code != 200:
                raise _UnusableAnswerError(f"status {code}")
        except Exception as error:
            logger.warning("The homeserver is away: %s", _brief(error))
            raise UnavailableError(RETRY_AFTER) from None

    def close(self) -> "Deferred[None]":
        """Close the connections that wait for another request."""
        closed: Deferred[None] = self._pool.closeCachedConnections()
        return closed

    def _remembered(self, key: bytes) -> _Answer | None:
        """What the homeserver said lately."""
        if key not in self._answers:
            return None
        asked, answer = self._answers[key]
        known = isinstance(answer, Requester)
        options = self._options
        seconds = options.cache_seconds if known else options.refused_cache_seconds
        # The reactor's time may be set back.
        return answer if 0 <= self._reactor.seconds() - asked < seconds else None

    def _remember(self, key: bytes, asked: float, answer: _Answer) -> None:
        """Keep what the homeserver said, the oldest of too many aside."""
        self._answers[key] = asked, answer
        self._answers.move_to_end(key)
        if len(self._answers) > self._options.cache_entries:
            self._answers.popitem(last=False)

    @inlineCallbacks
    def _ask_once(
        self, key: bytes, token: str, params: Mapping[str, str]
    ) -> "Generator[Deferred[Any], Any, _Answer | None]":
        """Ask the homeserver, or wait for the answer if it is being asked already."""
        question = self._questions.get(key)
        if question is not None:
            metrics.whoami_requests.labels("cached").inc()
            turn: Deferred[None] = Deferred()
            question.waiting.append(turn)
            yield self._clock.wait(turn)
            return question.answer
        question = self._questions[key] = _Question()
        try:
            question.answer = yield self._ask(key, token, params)
        finally:
            del self._questions[key]
            for turn in question.waiting:
                self._clock.fire(turn)
        return question.answer

    @inlineCallbacks
    def _ask(
        self, key: bytes, token: str, params: Mapping[str, str]
    ) -> "Generator[Deferred[Any], Any, _Answer | None]":
        """Ask the homeserver, again and again while it is away, and remember."""
        headers = Headers({"Authorization": [f"Bearer {token}"]})
        end = self._reactor.seconds() + self._options.retry_seconds
        delay = FIRST_DELAY
        while True:
            asked = self._reactor.seconds()
            try:
                sent = self._get("/v3/account/whoami", headers, params)
                code, body = yield self._clock.wait(sent)
                answer = _read_answer(code, body)
                break
            # Connecting fails in more ways than can be named here.
            except Exception as error:
                metrics.whoami_requests.labels("failed").inc()
                left = end - self._reactor.seconds()
                if left <= 0:
                    logger.error("Failed to ask the homeserver: %s", _brief(error))
                    return None
                logger.warning(
                    "The homeserver is away, trying again: %s", _brief(error)
                )
            yield self._clock.sleep(min(delay, left))
            delay *= 2
        outcome = "answered" if isinstance(answer, Requester) else "refused"
        metrics.whoami_requests.labels(outcome).inc()
        self._remember(key, asked, answer)
        return answer

    def _get(
        self, path: str, headers: Headers, params: Mapping[str, str]
    ) -> "Deferred[tuple[int, bytes]]":
        """Send a request when there is a connection for it, and fire with the status
        and the body of the answer; all that within ``timeout_seconds``."""
        sent = self._connections.run(self._exchange, path, headers, params)
        seconds = self._options.timeout_seconds
        return sent.addTimeout(seconds, self._reactor, _note_timeout)

    @inlineCallbacks
    def _exchange(
        self, path: str, headers: Headers, params: Mapping[str, str]
    ) -> "Generator[Deferred[Any], Any, tuple[int, bytes]]":
        # A client of treq keeps cookies: one user's are not for the next.
        response: IResponse = yield HTTPClient(self._agent).get(
            self._api + path,
            headers=headers,
            params=dict(params),
            allow_redirects=False,
            unbuffered=True,
        )
        body = _Body()
        response.deliverBody(body)
        content: bytes = yield body.done
        return response.code, content


class _Body(Protocol):
    """Gathers the body of an answer.

    Attributes:
        done: fires with the body, or fails when it is cut off or too long. Cancelled,
            it closes the connection.
    """

    def __init__(self) -> None:
        self.done: Deferred[bytes] = Deferred(lambda _: self._hang_up())
        self._content = b""

    def dataReceived(self, data: bytes) -> None:
        """As `Protocol.dataReceived`."""
        if self.done.called:
            return
        self._content += data
        if len(self._content) > MAX_BODY_BYTES:
            self.done.errback(_UnusableAnswerError(f"over {MAX_BODY_BYTES} bytes"))
            self._hang_up()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """As `Protocol.connectionLost`."""
        if self.done.called:
            return
        # An answer without a length is cut off if it isn't JSON.
        if reason.check(ResponseDone, PotentialDataLoss):
            self.done.callback(self._content)
        else:
            self.done.errback(reason)

    def _hang_up(self) -> None:
        cast(ITransport, self.transport).loseConnection()


def _access_token(request: Request) -> str:
    """The token of the ``Authorization`` header, or of the query.

    Raises:
        TokenError: there is none.
    """
    header = request.getHeader(b"Authorization") or b""
    bearer = _BEARER.fullmatch(header.decode("latin-1"))
    if bearer:
        return bearer[1]
    token = _parameter(request, "access_token")
    if token is None or not _TOKEN.fullmatch(token):
        raise TokenError(401, "M_MISSING_TOKEN", "Missing access token")
    return token


def _parameter(request: Request, name: str) -> str | None:
    """The value of a query parameter, the first where there are several."""
    values = (request.args or {}).get(name.encode())
    return values[0].decode("utf-8", "replace") if values else None


def _read_answer(code: int, body: bytes) -> _Answer:
    """What the homeserver says of a token.

    Raises:
        _UnusableAnswerError: nothing, by its status.
        msgspec.MsgspecError: nothing, by its body.
    """
    if code == 200:
        found = _decode_whoami(body)
        if found.is_guest:
            return _Refusal(403, "M_GUEST_ACCESS_FORBIDDEN", "Guests have no backup")
        return Requester(found.user_id, found.device_id)
    if code in REFUSALS:
        error = _decode_error(body)
        msg = "The homeserver refuses the access token"
        return _Refusal(code, error.errcode, msg, error.soft_logout)
    raise _UnusableAnswerError(f"status {code}")


def _note_timeout(result: object, seconds: float) -> NoReturn:
    raise _UnusableAnswerError(f"nothing in {seconds} seconds")


def _brief(error: Exception) -> str:
    """An exception's kind and first line, which hold no header of a request."""
    return f"{type(error).__name__}: {error_line(error)}"

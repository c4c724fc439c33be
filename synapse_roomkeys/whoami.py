"""Authentication by the homeserver: whose an access token is.

It is asked with ``GET /account/whoami`` of the client-server API, "Account
management", where "Identity assertion" of the application service API lets a service
name the user, and the device, that it acts as.
"""

import hashlib
import logging
import re
from collections import OrderedDict
from collections.abc import Generator, Mapping
from ipaddress import ip_address
from typing import Annotated, Any, Literal

import attrs
import msgspec
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.interfaces import IReactorTime
from twisted.web.http import Request
from twisted.web.http_headers import Headers

from . import metrics
from .clock import Clock
from .errors import LimitExceededError, RoomKeysError, TokenError, UnavailableError
from .homeserver import (
    HomeserverClient,
    HomeserverOptions,
    Response,
    ThrottledError,
    UnusableResponseError,
)
from .types import Requester

logger = logging.getLogger(__name__)

WHOAMI = "/v3/account/whoami"
#: Seconds between the first two tries while the homeserver is away; then doubled.
FIRST_DELAY = 0.1
#: Seconds that a client is told to wait when all tries have failed.
RETRY_AFTER = 10
#: The parameters with which an application service says whom it acts as.
MASKS = ("user_id", "device_id")
#: Bytes of ``User-Agent`` that are passed on. A browser's has some hundred and fifty.
MAX_USER_AGENT_BYTES = 500

#: Statuses of a response that refuses the user, where its body is a Matrix error.
_REFUSALS = (400, 401, 403, 404)
#: Errcodes at which a client turns its backup off, whatever the status.
_FATAL_ERRCODES = ("M_NOT_FOUND", "M_WRONG_ROOM_KEYS_VERSION")
#: A token goes out in a header: visible ASCII, as in RFC 6750 and somewhat more.
_TOKEN = re.compile("[!-~]+")
_BEARER = re.compile("Bearer +([!-~]+)", re.IGNORECASE)
_CONTROLS = bytes([*range(32), 127])


class _WhoamiBody(msgspec.Struct):
    """Body of a 200. ``is_guest`` came with version 1.2 of the specification: servers
    leave it out, or send null or a number."""

    user_id: Annotated[str, msgspec.Meta(pattern="^@.*:.", max_length=255)]
    device_id: str | None = None
    is_guest: bool | Literal[0, 1] | None = None


class _ErrorBody(msgspec.Struct):
    errcode: Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9_.]{1,100}$")]
    soft_logout: bool | None = None


_decode_whoami = msgspec.json.Decoder(_WhoamiBody).decode
_decode_error = msgspec.json.Decoder(_ErrorBody).decode


@attrs.frozen
class _Refusal:
    """Arguments of a `TokenError`. An exception in memory would hold the requests that
    it was raised for, by its traceback."""

    code: int
    errcode: str
    msg: str
    soft_logout: bool | None = None

    def error(self) -> RoomKeysError:
        """A new error."""
        return TokenError(self.code, self.errcode, self.msg, self.soft_logout)


@attrs.frozen
class _Throttled:
    """The homeserver's pause is longer than a request may take."""

    retry_after: int

    def error(self) -> RoomKeysError:
        """A new error."""
        msg = "Too many requests to the homeserver"
        return LimitExceededError(msg, self.retry_after)


@attrs.frozen
class _Away:
    """The homeserver is away."""

    def error(self) -> RoomKeysError:
        """A new error."""
        return UnavailableError(RETRY_AFTER)


_Failure = _Refusal | _Throttled | _Away
_Answer = Requester | _Failure


@attrs.frozen
class _Claim:
    """What a request says of its user, and the homeserver is asked about.

    Attributes:
        masks: the user, and the device, that an application service acts as.
        client_host: IP address of the client, or None if it isn't known.
        user_agent: value of the client's ``User-Agent``, or None.
    """

    token: str
    masks: Mapping[str, str]
    client_host: str | None
    user_agent: bytes | None

    def key(self) -> bytes:
        """Hash of all that the answer depends on. The address is in it, so that the
        homeserver hears of each address that a token is used from."""
        parts = (self.token, sorted(self.masks.items()), self.client_host)
        return hashlib.sha256(repr(parts).encode()).digest()

    def headers(self) -> Headers:
        """Headers of the request to the homeserver."""
        headers = Headers({"Authorization": [f"Bearer {self.token}"]})
        if self.client_host is not None:
            headers.addRawHeader("X-Forwarded-For", self.client_host)
            # Synapse logs a warning where an address has none, and assumes this one.
            headers.addRawHeader("X-Forwarded-Proto", "https")
        if self.user_agent is not None:
            headers.addRawHeader(b"User-Agent", self.user_agent)
        return headers


@attrs.define
class _Question:
    """A request to the homeserver, and the others that wait for its answer."""

    answer: _Answer = attrs.field(factory=_Away)
    waiting: "list[Deferred[None]]" = attrs.field(factory=list)


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
        self._homeserver = HomeserverClient(reactor, clock, options)
        #: Times at which the homeserver was asked, and answers, the oldest first.
        self._answers: OrderedDict[bytes, tuple[float, _Answer]] = OrderedDict()
        self._questions: dict[bytes, _Question] = {}

    @inlineCallbacks
    def get_user_by_req(
        self, request: Request
    ) -> "Generator[Deferred[Any], Any, Requester]":
        """As `synapse_roomkeys.rest.Auth.get_user_by_req`.

        Raises:
            TokenError: there is no token, or the homeserver refuses it.
            LimitExceededError: the homeserver throttles.
            UnavailableError: the homeserver is away.
        """
        claim = _claim_of(request)
        key = claim.key()
        answer = self._remembered(key)
        if answer is None:
            answer = yield self._ask_once(key, claim)
        else:
            metrics.whoami_requests.labels("cached").inc()
        if isinstance(answer, Requester):
            return answer
        raise answer.error()

    @inlineCallbacks
    def check(self) -> "Generator[Deferred[Any], Any, None]":
        """See whether the homeserver is there. One that throttles is.

        Raises:
            UnavailableError: it isn't.
        """
        if self._homeserver.is_paused():
            return
        deadline = self._reactor.seconds() + self._options.retry_seconds
        try:
            sent = self._homeserver.get("/versions", Headers(), {}, deadline)
            response: Response = yield self._clock.wait(sent)
            if response.code != 200:
                raise UnusableResponseError(_describe(response, "/versions"))
        except ThrottledError:
            return
        except Exception as error:
            self._log(logging.WARNING, "The homeserver at %s is away: %s", error)
            raise UnavailableError(RETRY_AFTER) from None

    def close(self) -> "Deferred[None]":
        """Close the connections that are kept for another request."""
        return self._homeserver.close()

    def _remembered(self, key: bytes) -> _Answer | None:
        """The homeserver's answer, if it isn't too old."""
        if key not in self._answers:
            return None
        asked, answer = self._answers[key]
        known = isinstance(answer, Requester)
        options = self._options
        seconds = options.cache_seconds if known else options.refused_cache_seconds
        # The reactor's time may be set back.
        return answer if 0 <= self._reactor.seconds() - asked < seconds else None

    def _remember(self, key: bytes, asked: float, answer: _Answer) -> None:
        """Keep an answer. If there are too many, drop the oldest one."""
        self._answers[key] = asked, answer
        self._answers.move_to_end(key)
        if len(self._answers) > self._options.cache_entries:
            self._answers.popitem(last=False)

    @inlineCallbacks
    def _ask_once(
        self, key: bytes, claim: _Claim
    ) -> "Generator[Deferred[Any], Any, _Answer]":
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
            question.answer = yield self._ask(key, claim)
        finally:
            del self._questions[key]
            for turn in question.waiting:
                self._clock.fire(turn)
        return question.answer

    @inlineCallbacks
    def _ask(
        self, key: bytes, claim: _Claim
    ) -> "Generator[Deferred[Any], Any, _Answer]":
        """Ask the homeserver, again and again while it is away, and remember."""
        deadline = self._reactor.seconds() + self._options.retry_seconds
        delay = FIRST_DELAY
        while True:
            asked = self._reactor.seconds()
            try:
                sent = self._homeserver.get(
                    WHOAMI, claim.headers(), claim.masks, deadline
                )
                response: Response = yield self._clock.wait(sent)
                answer = _read_answer(response, self._options)
                break
            except ThrottledError as error:
                return _Throttled(error.retry_after)
            # Connecting fails in more ways than can be named here.
            except Exception as error:
                metrics.whoami_requests.labels("failed").inc()
                left = deadline - self._reactor.seconds()
                if left <= 0:
                    msg = "Failed to ask the homeserver at %s: %s"
                    self._log(logging.ERROR, msg, error)
                    return _Away()
                msg = "The homeserver at %s is away, trying again: %s"
                self._log(logging.WARNING, msg, error)
            yield self._clock.sleep(min(delay, left))
            delay *= 2
        outcome = "answered" if isinstance(answer, Requester) else "refused"
        metrics.whoami_requests.labels(outcome).inc()
        if _is_lasting(answer, claim):
            self._remember(key, asked, answer)
        return answer

    def _log(self, level: int, msg: str, error: Exception) -> None:
        """Log why the homeserver gives no answer, with its address. An exception's
        first line holds no header of a request."""
        brief = (str(error).splitlines() or [""])[0]
        if not isinstance(error, UnusableResponseError):
            brief = f"{type(error).__name__}: {brief}"
        logger.log(level, msg, self._options.url, brief)


def _claim_of(request: Request) -> _Claim:
    """The claim of a request.

    Raises:
        TokenError: it has no access token, or more than one.
    """
    token = _access_token(request)
    values = {name: _parameters(request, name) for name in MASKS}
    masks = {name: found[0] for name, found in values.items() if found}
    return _Claim(token, masks, _client_host(request), _user_agent(request))


def _access_token(request: Request) -> str:
    """The token of the ``Authorization`` header, or of the query. A second one, in
    either place, is refused as Synapse does it: a proxy may have looked at the other.

    Raises:
        TokenError: there is none, or more than one.
    """
    headers = request.requestHeaders.getRawHeaders(b"Authorization") or []
    parameters = _parameters(request, "access_token")
    if len(headers) > 1:
        raise _missing_token("Too many Authorization headers")
    if headers and parameters:
        raise _missing_token("Both an Authorization header and access_token")
    if len(parameters) > 1:
        raise _missing_token("Too many access_token parameters")
    if headers:
        bearer = _BEARER.fullmatch(headers[0].decode("latin-1"))
        if bearer is None:
            raise _missing_token("Invalid Authorization header")
        return bearer[1]
    if not parameters or not _TOKEN.fullmatch(parameters[0]):
        raise _missing_token("Missing access token")
    return parameters[0]


def _missing_token(msg: str) -> TokenError:
    return TokenError(401, "M_MISSING_TOKEN", msg)


def _parameters(request: Request, name: str) -> list[str]:
    """All values of a query parameter."""
    values = (request.args or {}).get(name.encode(), [])
    return [value.decode("utf-8", "replace") for value in values]


def _client_host(request: Request) -> str | None:
    """The client's IP address; one of IPv4 that came as IPv6's is written as IPv4's."""
    host = getattr(request.getClientAddress(), "host", None)
    if host is None:
        return None
    # The zone of a link-local address is a name on this machine.
    address = ip_address(host.partition("%")[0])
    return str(getattr(address, "ipv4_mapped", None) or address)


def _user_agent(request: Request) -> bytes | None:
    """The client's ``User-Agent``, the last where there are several, as Synapse has it:
    without control characters, and no longer than `MAX_USER_AGENT_BYTES`."""
    values = request.requestHeaders.getRawHeaders(b"User-Agent") or [b""]
    return values[-1].translate(None, _CONTROLS)[:MAX_USER_AGENT_BYTES] or None


def _read_answer(
    response: Response, options: HomeserverOptions
) -> Requester | _Refusal:
    """Read whose the token is, or why it is refused.

    Raises:
        UnusableResponseError: the response says neither.
    """
    try:
        if response.code == 200:
            return _read_user(_decode_whoami(response.body), options)
        if response.code in _REFUSALS:
            error = _decode_error(response.body)
            if response.code != 404 or error.errcode == "M_NOT_FOUND":
                return _read_refusal(response.code, error)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        pass
    raise UnusableResponseError(_describe(response, WHOAMI))


def _read_user(user: _WhoamiBody, options: HomeserverOptions) -> Requester | _Refusal:
    if user.is_guest and options.has_guests:
        return _Refusal(403, "M_GUEST_ACCESS_FORBIDDEN", "Guests have no backup")
    return Requester(user.user_id, user.device_id)


def _read_refusal(code: int, error: _ErrorBody) -> _Refusal:
    """Pass a refusal on, but for one that would have a client turn its backup off."""
    msg = "The homeserver refuses the access token"
    if error.errcode in _FATAL_ERRCODES:
        msg = "The homeserver knows no such user or device"
        return _Refusal(403, "M_FORBIDDEN", msg)
    return _Refusal(code, error.errcode, msg, error.soft_logout)


def _is_lasting(answer: Requester | _Refusal, claim: _Claim) -> bool:
    """Whether an answer stays true for the seconds that it may be remembered.

    A refused token stays refused: tokens are never issued twice. All other refusals
    (docs/service.rst has a table) end by an act of somebody who knows of them and tries
    again at once: the user is registered, unlocked or gets a password, the device is
    made.
    """
    if isinstance(answer, Requester):
        return True
    return (answer.code, answer.errcode) == (401, "M_UNKNOWN_TOKEN") and not claim.masks


def _describe(response: Response, path: str) -> str:
    """Describe a response that is of no use, and name the option to change where the
    address looks wrong."""
    code = response.code
    kind = response.header("Content-Type").partition(";")[0] or "no Content-Type"
    target = response.header("Location").partition("?")[0]
    if 300 <= code < 400 and target:
        return (
            f"status {code}, a redirect to {target[:200]}, which isn't followed: set"
            f" homeserver.url to {_base_of(target[:200], path)}"
        )
    try:
        kind = _decode_error(response.body).errcode
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return f"status {code} ({kind}), no answer of a Matrix homeserver"
    if code == 404:
        return f"status 404 ({kind}): homeserver.url has no client-server API"
    return f"status {code} ({kind})"


def _base_of(target: str, path: str) -> str:
    """The value of ``homeserver.url`` that leads to a redirect's target."""
    return target.removesuffix("/").removesuffix("/_matrix/client" + path)

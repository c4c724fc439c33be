"""Authentication by the homeserver: the user of an access token.

The request is ``GET /account/whoami`` of the client-server API ("Account management").
The query may have a ``user_id`` and a ``device_id`` by which an application service
masquerades as a user ("Identity assertion" in the application service API).
"""

from collections import OrderedDict
from typing import Annotated, Literal
from urllib.parse import quote

import attrs
import msgspec
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.interfaces import IReactorTime
from twisted.web.http import Request
from twisted.web.http_headers import Headers

from . import metrics
from .claims import Claim, claim_of
from .clock import Clock
from .describe import error_line
from .errors import (
    OUTAGE_RETRY_AFTER,
    LimitExceededError,
    RoomKeysError,
    TokenError,
    UnavailableError,
)
from .homeserver import (
    CLIENT_API,
    HomeserverClient,
    HomeserverOptions,
    Response,
    ThrottledError,
    UnusableResponseError,
)
from .inline import Inline
from .outages import Cause, Outages
from .types import Requester

#: Cause of a request that got no usable answer.
AWAY = Cause(
    "away",
    "Check that the homeserver runs, and that homeserver.url is the address of its"
    " client API",
)
# Prometheus computes a rate only for a series that begins at 0.
for _outcome in ("answered", "refused", "failed", "cached"):
    metrics.whoami_requests.labels(_outcome)

#: A token that no homeserver gives out.
_NOBODYS_TOKEN = "synapse_roomkeys_check"

WHOAMI = "/v3/account/whoami"
#: Path of an endpoint of Synapse's admin API ("Query User Account"), which answers only
#: administrators. Unlike "Get whether a user is a server administrator or not", Synapse
#: has the endpoint also in workers, and with the Matrix Authentication Service.
ACCOUNT = "/_synapse/admin/v2/users/{user_id}"
#: Seconds between the first two tries while the homeserver is away; doubled each time.
FIRST_DELAY = 0.1
#: Seconds for which a check waits for the end of a pause: less than the timeout of
#: ``/ready``, 5 seconds.
CHECK_SECONDS = 2
#: Statuses of a refusal. Its body is a Matrix error.
_REFUSALS = (400, 401, 403, 404)
#: Errcodes that make a client turn its backup off, whatever the status.
_FATAL_ERRCODES = ("M_NOT_FOUND", "M_WRONG_ROOM_KEYS_VERSION")


class _WhoamiBody(msgspec.Struct):
    """Body of a 200. ``is_guest`` is new in version 1.2 of the specification: servers
    may omit the member, or send null or a number."""

    user_id: Annotated[str, msgspec.Meta(pattern="^@.*:.", max_length=255)]
    device_id: str | None = None
    is_guest: bool | Literal[0, 1] | None = None


class _ErrorBody(msgspec.Struct):
    errcode: Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9_.]{1,100}$")]
    soft_logout: bool | None = None


class _AccountBody(msgspec.Struct):
    """Body of a 200 to `ACCOUNT`. Its member ``admin`` isn't read: with the Matrix
    Authentication Service, the token tells whether its user is an administrator."""

    name: str


_decode_account = msgspec.json.Decoder(_AccountBody).decode
_decode_whoami = msgspec.json.Decoder(_WhoamiBody).decode
_decode_error = msgspec.json.Decoder(_ErrorBody).decode


@attrs.frozen
class _Refusal:
    """Arguments of a `TokenError`. A remembered exception would keep requests alive by
    its traceback."""

    code: int
    errcode: str
    msg: str
    soft_logout: bool | None = None

    def error(self) -> RoomKeysError:
        """A new error."""
        return TokenError(self.code, self.errcode, self.msg, self.soft_logout)


@attrs.frozen
class _Throttled:
    """The request wasn't sent in time because of a 429."""

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
        return UnavailableError(OUTAGE_RETRY_AFTER)


_Failure = _Refusal | _Throttled | _Away
_Answer = Requester | _Failure


@attrs.define
class _Question:
    """A request to the homeserver, and the clients' requests that share the answer."""

    answer: _Answer = attrs.field(factory=_Away)
    waiting: "list[Deferred[None]]" = attrs.field(factory=list)


class WhoamiAuth:
    """The authentication of a service that isn't part of the homeserver.

    Attributes:
        outages: those of the homeserver.
    """

    def __init__(
        self, reactor: IReactorTime, clock: Clock, options: HomeserverOptions
    ) -> None:
        """
        Args:
            reactor: makes the connections.
        """
        self._reactor = reactor
        self._clock = clock
        self._options = options
        self.outages = Outages(f"Homeserver {options.url}", reactor.seconds)
        self._homeserver = HomeserverClient(reactor, clock, options)
        #: Times at which the homeserver was asked, and answers, the oldest first.
        self._answers: OrderedDict[bytes, tuple[float, _Answer]] = OrderedDict()
        self._questions: dict[bytes, _Question] = {}

    @inlineCallbacks
    def get_user_by_req(self, request: Request) -> Inline[Requester]:
        """As `synapse_roomkeys.rest.Auth.get_user_by_req`.

        Raises:
            TokenError: there is no token, or the homeserver refuses it.
            LimitExceededError: the homeserver throttles.
            UnavailableError: the homeserver is away.
        """
        requester: Requester = yield self.identify(claim_of(request))
        return requester

    @inlineCallbacks
    def identify(self, claim: Claim) -> Inline[Requester]:
        """Fire with the user and device of a claim.

        Raises:
            TokenError: the homeserver refuses the token.
            LimitExceededError: the homeserver throttles.
            UnavailableError: the homeserver is away.
        """
        key = claim.key()
        answer = self._remembered(key)
        if answer is None:
            answer = yield self._ask_once(key, claim)
        else:
            metrics.series(metrics.whoami_requests, "cached").inc()
        if isinstance(answer, Requester):
            return answer
        raise answer.error()

    @inlineCallbacks
    def is_admin(self, claim: Claim, user_id: str) -> Inline[bool]:
        """Fire with whether a user is an administrator of the homeserver, which is a
        Synapse.

        Args:
            claim: the user's own claim. A Synapse answers 403 to a user who is none.

        Raises:
            TokenError: the homeserver refuses the token. `identify` may still remember
                a token that is revoked.
            LimitExceededError: the homeserver throttles.
            UnavailableError: the homeserver is away, or is no Synapse.
        """
        deadline = self._reactor.seconds() + self._options.retry_seconds
        path = ACCOUNT.format(user_id=quote(user_id, safe=""))
        try:
            sent = self._homeserver.get(path, claim.headers(), {}, deadline)
            response: Response = yield self._clock.wait(sent)
            answer = _read_admin(response, user_id)
        except ThrottledError as error:
            raise _Throttled(error.retry_after).error() from None
        except Exception as error:
            self.outages.note_refusal(AWAY, f"{error_text(error)} (to {ACCOUNT})")
            raise UnavailableError(OUTAGE_RETRY_AFTER) from None
        self.outages.note_success()
        if isinstance(answer, _Refusal):
            raise answer.error()
        return answer

    @inlineCallbacks
    def check(self) -> Inline[None]:
        """Check that the homeserver answers. A 429 is an answer, too.

        Raises:
            UnavailableError: the homeserver doesn't answer, or not with a 200.
        """
        if self._homeserver.is_paused():
            return
        deadline = self._reactor.seconds() + CHECK_SECONDS
        try:
            yield self.check_versions(deadline)
        except ThrottledError:
            return
        except Exception as error:
            self.outages.note_failure(AWAY, f"{error_text(error)} (to /versions)")
            raise UnavailableError(OUTAGE_RETRY_AFTER) from None
        self.outages.note_success()

    @inlineCallbacks
    def check_versions(self, deadline: float) -> Inline[None]:
        """Ask the homeserver for its versions, which takes no token.

        Args:
            deadline: time of the reactor until which a 429 is waited for.

        Raises:
            UnusableResponseError: another status than 200.
            ThrottledError: the homeserver throttles.
            Exception: no connection.
        """
        path = CLIENT_API + "/versions"
        sent = self._homeserver.get(path, Headers(), {}, deadline)
        response: Response = yield self._clock.wait(sent)
        if response.code != 200:
            raise UnusableResponseError(describe_response(response, path))

    @inlineCallbacks
    def check_whoami(self, deadline: float) -> Inline[None]:
        """Ask for the user of an invented token. The specified answer is 401
        ``M_UNKNOWN_TOKEN``.

        Args:
            deadline: time of the reactor until which a 429 is waited for.

        Raises:
            UnusableResponseError: another answer.
            ThrottledError: the homeserver throttles.
            Exception: no connection.
        """
        claim = Claim(_NOBODYS_TOKEN, {}, None, None)
        sent = self._homeserver.get(CLIENT_API + WHOAMI, claim.headers(), {}, deadline)
        response: Response = yield self._clock.wait(sent)
        answer = _read_answer(response, self._options)
        if not isinstance(answer, _Refusal):
            raise UnusableResponseError("the homeserver accepts an invented token")
        if (answer.code, answer.errcode) != (401, "M_UNKNOWN_TOKEN"):
            raise UnusableResponseError(f"status {answer.code}, {answer.errcode}")

    def close(self) -> "Deferred[None]":
        """Close idle connections."""
        return self._homeserver.close()

    def _remembered(self, key: bytes) -> _Answer | None:
        """The remembered answer, or None if there is none or it is expired."""
        if key not in self._answers:
            return None
        asked, answer = self._answers[key]
        known = isinstance(answer, Requester)
        options = self._options
        seconds = options.cache_seconds if known else options.refused_cache_seconds
        # The reactor's time may be set back.
        return answer if 0 <= self._reactor.seconds() - asked < seconds else None

    def _remember(self, key: bytes, asked: float, answer: _Answer) -> None:
        """Remember an answer. Over ``cache_entries``, drop the oldest answer."""
        self._answers[key] = asked, answer
        self._answers.move_to_end(key)
        if len(self._answers) > self._options.cache_entries:
            self._answers.popitem(last=False)

    @inlineCallbacks
    def _ask_once(self, key: bytes, claim: Claim) -> Inline[_Answer]:
        """Send a request, or wait for the answer to an equal request under way.

        Args:
            key: hash of the claim.
        """
        question = self._questions.get(key)
        if question is not None:
            metrics.series(metrics.whoami_requests, "cached").inc()
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
    def _ask(self, key: bytes, claim: Claim) -> Inline[_Answer]:
        """Send a request, retry while the homeserver is away, and remember the
        answer."""
        deadline = self._reactor.seconds() + self._options.retry_seconds
        delay = FIRST_DELAY
        while True:
            asked = self._reactor.seconds()
            try:
                sent = self._homeserver.get(
                    CLIENT_API + WHOAMI, claim.headers(), claim.masks, deadline
                )
                response: Response = yield self._clock.wait(sent)
                answer = _read_answer(response, self._options)
                break
            except ThrottledError as error:
                return _Throttled(error.retry_after)
            # Twisted has no common base class for the errors of connections.
            except Exception as error:
                metrics.whoami_requests.labels("failed").inc()
                left = deadline - self._reactor.seconds()
                if left <= 0:
                    self.outages.note_refusal(AWAY, error_text(error))
                    return _Away()
                self.outages.note_failure(AWAY, error_text(error))
            yield self._clock.sleep(min(delay, left))
            delay *= 2
        self.outages.note_success()
        outcome = "answered" if isinstance(answer, Requester) else "refused"
        metrics.whoami_requests.labels(outcome).inc()
        if _is_lasting(answer, claim):
            self._remember(key, asked, answer)
        return answer


def error_text(error: Exception) -> str:
    """Describe a failed request to the homeserver in one line, without headers of the
    request."""
    text = error_line(error).rstrip(".")
    if isinstance(error, UnusableResponseError):
        return text
    return f"{type(error).__name__}: {text}"


def _read_answer(
    response: Response, options: HomeserverOptions
) -> Requester | _Refusal:
    """Read the user of the token, or the refusal, from a response to whoami.

    Raises:
        UnusableResponseError: the response has neither.
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
    raise UnusableResponseError(describe_response(response, CLIENT_API + WHOAMI))


def _read_admin(response: Response, user_id: str) -> bool | _Refusal:
    """Read whether a user is an administrator, or the refusal of the user's token, from
    a response to `ACCOUNT`.

    Raises:
        UnusableResponseError: the response has neither.
    """
    try:
        if response.code == 200 and _decode_account(response.body).name == user_id:
            return True
        if response.code in (401, 403):
            error = _decode_error(response.body)
            is_refused = response.code == 401
            return _read_refusal(response.code, error) if is_refused else False
    except (msgspec.MsgspecError, UnicodeDecodeError):
        pass
    path = ACCOUNT.format(user_id=quote(user_id, safe=""))
    raise UnusableResponseError(describe_response(response, path))


def _read_user(user: _WhoamiBody, options: HomeserverOptions) -> Requester | _Refusal:
    if user.is_guest and options.has_guests:
        return _Refusal(403, "M_GUEST_ACCESS_FORBIDDEN", "Guests have no backup")
    return Requester(user.user_id, user.device_id)


def _read_refusal(code: int, error: _ErrorBody) -> _Refusal:
    """Pass a refusal on. Replace an errcode that makes a client turn its backup off."""
    msg = "The homeserver refuses the access token"
    if error.errcode in _FATAL_ERRCODES:
        msg = "The homeserver knows no such user or device"
        return _Refusal(403, "M_FORBIDDEN", msg)
    return _Refusal(code, error.errcode, msg, error.soft_logout)


def _is_lasting(answer: Requester | _Refusal, claim: Claim) -> bool:
    """Whether an answer may be remembered (docs/service.rst has a table).

    An unknown token stays unknown, because tokens are never issued twice. Other
    refusals end by an action (registering or unlocking the user, creating the device),
    and the client repeats the request right after the action.
    """
    if isinstance(answer, Requester):
        return True
    return (answer.code, answer.errcode) == (401, "M_UNKNOWN_TOKEN") and not claim.masks


def describe_response(response: Response, path: str) -> str:
    """Describe an unusable response in one line. If the address of the homeserver looks
    wrong, name the option to change.

    Args:
        path: path of the request below the homeserver's address.
    """
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
        is_client = path.startswith(CLIENT_API)
        api = "client-server API" if is_client else "admin API of a Synapse"
        return f"status 404 ({kind}): homeserver.url has no {api}"
    return f"status {code} ({kind})"


def _base_of(target: str, path: str) -> str:
    """The value of ``homeserver.url`` for the target of a redirect."""
    return target.removesuffix("/").removesuffix(path)

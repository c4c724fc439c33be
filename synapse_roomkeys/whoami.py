"""Authentication by the homeserver: the user of an access token.

The request is ``GET /account/whoami`` of the client-server API ("Account management").
The query may have a ``user_id`` and a ``device_id`` by which an application service
masquerades as a user ("Identity assertion" in the application service API).
"""

from collections import OrderedDict
from urllib.parse import quote

import attrs
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
    UnavailableError,
)
from .homeserver import CLIENT_API, HomeserverClient, HomeserverOptions, Response
from .homeserver_answers import (
    ACCOUNT,
    WHOAMI,
    Refusal,
    describe_response,
    read_admin,
    read_answer,
)
from .inline import Inline
from .outages import Cause, Outages
from .request_queue import ThrottledError, UnusableResponseError
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

#: Seconds between the first two tries while the homeserver is away; doubled each time.
FIRST_DELAY = 0.1
#: Seconds for which a check waits for the end of a pause: less than the timeout of
#: ``/ready``, 5 seconds.
CHECK_SECONDS = 2


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


_Failure = Refusal | _Throttled | _Away
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
            answer = read_admin(response, user_id)
        except ThrottledError as error:
            raise _Throttled(error.retry_after).error() from None
        except Exception as error:
            self.outages.note_refusal(AWAY, f"{error_text(error)} (to {ACCOUNT})")
            raise UnavailableError(OUTAGE_RETRY_AFTER) from None
        self.outages.note_success()
        if isinstance(answer, Refusal):
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
        answer = read_answer(response, self._options)
        if not isinstance(answer, Refusal):
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
                answer = read_answer(response, self._options)
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


def _is_lasting(answer: Requester | Refusal, claim: Claim) -> bool:
    """Whether an answer may be remembered (docs/service.rst has a table).

    An unknown token stays unknown, because tokens are never issued twice. Other
    refusals end by an action (registering or unlocking the user, creating the device),
    and the client repeats the request right after the action.
    """
    if isinstance(answer, Requester):
        return True
    return (answer.code, answer.errcode) == (401, "M_UNKNOWN_TOKEN") and not claim.masks

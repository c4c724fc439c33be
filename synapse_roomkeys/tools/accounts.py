"""The accounts of a Synapse, for the command ``sweep``.

Users without an active account are erased: only Synapse's own answer counts. An answer
of a proxy, of another homeserver, or of a failing Synapse ends the command.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import msgspec
from twisted.internet.defer import CancelledError, inlineCallbacks
from twisted.internet.interfaces import IReactorTime
from twisted.web.http_headers import Headers

from ..clock import Clock
from ..homeserver import HomeserverClient, HomeserverOptions, Response
from ..homeserver_answers import describe_response
from ..inline import Inline
from ..request_queue import MAX_PAUSE, UnusableResponseError
from ..whoami import error_text
from .session import AWAY, USAGE, ToolError

#: Path of the accounts in Synapse's admin API ("User Admin API").
USERS = "/_synapse/admin/v2/users"


class _AccountBody(msgspec.Struct):
    """Body of a 200 to an account's path."""

    name: str
    deactivated: bool | Literal[0, 1]


class _AccountsBody(msgspec.Struct):
    """Body of a 200 to `USERS`."""

    users: list[_AccountBody]
    total: int


class _ErrorBody(msgspec.Struct):
    errcode: str


_decode_account = msgspec.json.Decoder(_AccountBody).decode
_decode_accounts = msgspec.json.Decoder(_AccountsBody).decode
_decode_error = msgspec.json.Decoder(_ErrorBody).decode


class Accounts:
    """The accounts of a Synapse, by the admin API.

    Requests are sent in turn, because the Synapse serves clients meanwhile.
    """

    def __init__(
        self,
        reactor: IReactorTime,
        clock: Clock,
        options: HomeserverOptions,
        token: str,
    ) -> None:
        """
        Args:
            reactor: makes the connections.
            options: address of the Synapse, and timeouts.
            token: access token of an administrator.
        """
        self._homeserver = HomeserverClient(reactor, clock, options)
        self._reactor = reactor
        self._url = options.url
        self._headers = Headers({"Authorization": [f"Bearer {token}"]})

    @inlineCallbacks
    def check(self) -> Inline[None]:
        """Ask for the list of accounts: only a Synapse has the list.

        A server without this API may answer 404 ``M_NOT_FOUND`` for each account. The
        answer of a Synapse for an unknown account is the same.

        Raises:
            ToolError: the homeserver refuses the token, is away, or is no Synapse.
        """
        response: Response = yield self._get(USERS, {"limit": "1"})
        if not lists_accounts(response):
            raise self._unusable(describe_response(response, USERS))

    @inlineCallbacks
    def find_gone(self, user_ids: Sequence[str]) -> Inline[frozenset[str]]:
        """Fire with the deactivated and the unknown users among some users.

        Raises:
            ToolError: the homeserver refuses the token, is away, or gives an unusable
                answer.
        """
        gone = set()
        for user_id in user_ids:
            path = f"{USERS}/{quote(user_id, safe='')}"
            response: Response = yield self._get(path, {})
            try:
                if is_gone(user_id, response):
                    gone.add(user_id)
            except UnusableResponseError as error:
                raise self._unusable(f"{error} (for {user_id})") from None
        return frozenset(gone)

    @inlineCallbacks
    def _get(self, path: str, params: Mapping[str, str]) -> Inline[Response]:
        """Fire with an answer other than 401 and 403.

        Raises:
            ToolError: the homeserver refuses the token, or is away.
        """
        deadline = self._reactor.seconds() + MAX_PAUSE
        try:
            response: Response = yield self._homeserver.get(
                path, self._headers, params, deadline
            )
        except CancelledError:
            raise
        # Twisted has no common base class for the errors of connections.
        except Exception as error:
            raise self._unusable(error_text(error)) from None
        if response.code in (401, 403):
            raise ToolError(
                f"Homeserver {self._url}: {describe_response(response, path)}: give the"
                " access token of an administrator, and set homeserver.url to Synapse's"
                " own address",
                USAGE,
            )
        return response

    def _unusable(self, text: str) -> ToolError:
        return ToolError(f"Homeserver {self._url}: {text}: nobody else is erased", AWAY)


def lists_accounts(response: Response) -> bool:
    """Whether a response to `USERS` is a Synapse's list of accounts."""
    try:
        return response.code == 200 and _decode_accounts(response.body).total > 0
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return False


def is_gone(user_id: str, response: Response) -> bool:
    """Whether an account is deactivated or unknown, by the response for the account.

    Raises:
        UnusableResponseError: the response is another than these of a Synapse: 200
            with the account, or 404 ``M_NOT_FOUND``.
    """
    try:
        if response.code == 200:
            account = _decode_account(response.body)
            if account.name == user_id:
                return bool(account.deactivated)
        if response.code == 404:
            # M_UNRECOGNIZED is the answer to an unknown path.
            is_unknown = _decode_error(response.body).errcode == "M_NOT_FOUND"
            if is_unknown:
                return True
    except (msgspec.MsgspecError, UnicodeDecodeError):
        pass
    raise UnusableResponseError(describe_response(response, USERS))


def read_token(path: Path) -> str:
    """Return the access token in a file, without a line break at the end.

    Raises:
        ToolError: the file can't be read, or has other text. The error leaves the
            content of the file out.
    """
    try:
        token = path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise ToolError(f"{path}: {error.strerror}", USAGE) from None
    except ValueError:
        token = ""
    if not token or not token.isprintable() or " " in token:
        raise ToolError(f"{path}: there must be an access token, and no more", USAGE)
    return token

"""Authentication of operators at the service: by a token from a file, or as an
administrator of a Synapse."""

import hmac
from pathlib import Path

import attrs
from twisted.internet.defer import inlineCallbacks
from twisted.web.http import Request

from ..claims import claim_of
from ..config import OptionError
from ..errors import ForbiddenError, TokenError
from ..inline import Inline
from ..types import Requester
from ..whoami import WhoamiAuth
from .config import AdminConfig

#: Minimum characters of the token: 16 random bytes in hexadecimal digits.
_MIN_TOKEN = 32
#: The name of an operator with the token, for the record.
TOKEN_OPERATOR = "admin.token_path"


class ServiceAdminAuth:
    """The authentication of operators.

    Each request of a Synapse's administrator asks the Synapse again, so a right that is
    withdrawn ends immediately.
    """

    def __init__(self, auth: WhoamiAuth, config: AdminConfig) -> None:
        """
        Raises:
            OptionError: the file of the token can't be read, or its token is too short.
        """
        self._auth = auth
        self._asks_synapse = config.synapse_admins
        self._token: bytes | None = None
        if config.token_path is not None:
            self._token = read_token(Path(config.token_path)).encode()

    @inlineCallbacks
    def get_operator(self, request: Request) -> Inline[str]:
        """As `synapse_roomkeys.rest.AdminAuth.get_operator`.

        Raises:
            TokenError: there is no token, or it is unknown.
            ForbiddenError: the token's user is no administrator.
            LimitExceededError: the homeserver throttles.
            UnavailableError: the homeserver is away.
        """
        # An application service can't act as another user here.
        claim = attrs.evolve(claim_of(request), masks={})
        if self._token is not None and hmac.compare_digest(
            claim.token.encode(), self._token
        ):
            return TOKEN_OPERATOR
        if not self._asks_synapse:
            raise TokenError(401, "M_UNKNOWN_TOKEN", "Unknown access token")
        requester: Requester = yield self._auth.identify(claim)
        if not (yield self._auth.is_admin(claim, requester.user_id)):
            raise ForbiddenError("You are not a server admin")
        return requester.user_id


def read_token(path: Path) -> str:
    """Return the token in a file, without the line break at its end.

    Raises:
        OptionError: the file can't be read, or the token is too short or has other
            characters than visible ASCII.
    """
    name = "admin.token_path"
    try:
        token = path.read_text(encoding="ascii").strip()
    except OSError as error:
        msg = f"its file can't be read: {error.strerror}"
        raise OptionError(name, msg) from None
    except ValueError:
        raise OptionError(name, "its file isn't text in ASCII") from None
    if len(token) < _MIN_TOKEN or not token.isprintable() or " " in token:
        raise OptionError(
            name,
            f"its file must have a token of {_MIN_TOKEN} characters or more, without"
            " spaces, such as openssl rand -hex 32 prints",
        )
    return token

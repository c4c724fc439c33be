"""Authentication by Synapse, of users and of operators."""

from typing import Any

from twisted.internet.defer import ensureDeferred, inlineCallbacks
from twisted.web.http import Request

from .errors import ForbiddenError
from .inline import Inline
from .types import Requester


class SynapseAuth:
    """Synapse's own authentication, with the interface that the servlets need."""

    def __init__(self, auth: Any) -> None:
        self._auth = auth

    @inlineCallbacks
    def get_user_by_req(self, request: Request) -> Inline[Requester]:
        """As `synapse_roomkeys.rest.Auth.get_user_by_req`, with Synapse's errors."""
        requester = yield ensureDeferred(
            self._auth.get_user_by_req(request, allow_guest=False)
        )
        return Requester(requester.user.to_string(), requester.device_id)


class SynapseAdminAuth:
    """Synapse's own authentication of its administrators."""

    def __init__(self, auth: Any) -> None:
        self._auth = auth

    @inlineCallbacks
    def get_operator(self, request: Request) -> Inline[str]:
        """As `synapse_roomkeys.rest.AdminAuth.get_operator`, with Synapse's errors.

        Raises:
            ForbiddenError: the user is no administrator.
        """
        requester = yield ensureDeferred(self._auth.get_user_by_req(request))
        # Not ModuleApi.is_user_admin: with the Matrix Authentication Service, the token
        # tells whether its user is an administrator.
        if not (yield ensureDeferred(self._auth.is_server_admin(requester))):
            raise ForbiddenError("You are not a server admin")
        return str(requester.user.to_string())

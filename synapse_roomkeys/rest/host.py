"""Interfaces between the servlets and their host."""

from typing import Protocol

import attrs
from twisted.internet.defer import Deferred
from twisted.web.http import Request

from ..admin.handler import AdminHandler
from ..clock import Clock
from ..handler import E2eRoomKeysHandler
from ..types import Limits, Requester


class Auth(Protocol):
    """The host's authentication."""

    def get_user_by_req(self, request: Request) -> "Deferred[Requester]":
        """Fire with the user and device of a request.

        Without a valid token, or for a guest, the Deferred fails with the error that
        the host sends as the response.
        """


@attrs.frozen
class HomeServer:
    """The host of the servlets: a Synapse with the module, or the service.

    Attributes:
        clock: the host's time.
        limits: sizes and numbers above which a request is refused.
        stalled_download_seconds: seconds without any read by the client after which
            a download is dropped.
        auth: the host's authentication.
        handler: the operations of the API.
    """

    clock: Clock
    limits: Limits
    stalled_download_seconds: float
    auth: Auth
    handler: E2eRoomKeysHandler

    def get_auth(self) -> Auth:
        """The host's authentication."""
        return self.auth

    def get_e2e_room_keys_handler(self) -> E2eRoomKeysHandler:
        """The operations of the API."""
        return self.handler


class AdminAuth(Protocol):
    """The host's authentication of operators."""

    def get_operator(self, request: Request) -> "Deferred[str]":
        """Fire with the operator's name for the record.

        Without a valid token, or if the token's user is no operator, the Deferred fails
        with the error that the host sends as the response.
        """


@attrs.frozen
class AdminHost:
    """The host of the servlets.

    Attributes:
        clock: the host's time.
        stalled_download_seconds: seconds without any read by the client after which
            an export is dropped.
        auth: the host's authentication of operators.
        handler: the operations of the interface.
    """

    clock: Clock
    stalled_download_seconds: float
    auth: AdminAuth
    handler: AdminHandler

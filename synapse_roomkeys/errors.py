"""Exceptions that are answered to the client as Matrix errors.

Statuses and error codes follow the Matrix client-server API, sections "Standard error
response" and "Server-side key backups".
"""

from typing import Any

#: ``Retry-After`` in seconds while other requests have to end first: the user's other
#: requests, or the requests of a process that is stopping or has reached its maximum
#: number of connections.
BUSY_RETRY_AFTER = 5
#: ``Retry-After`` in seconds during an outage of the database, of the homeserver, or of
#: the directory for temporary files.
OUTAGE_RETRY_AFTER = 10


class RoomKeysError(Exception):
    """Base class of faults that are answered with a status, an errcode and a message.

    Attributes:
        code: the HTTP status of the answer.
        errcode: the Matrix error code.
        msg: a sentence for client developers, with the action to take. The sentence
            never contains a token, ``session_data`` or ``auth_data``.
    """

    code = 400
    errcode = "M_UNKNOWN"

    def __init__(self, msg: str) -> None:
        super().__init__(msg)
        self.msg = msg

    def error_dict(self) -> dict[str, Any]:
        """The JSON body of the answer."""
        return {"errcode": self.errcode, "error": self.msg}

    def headers(self) -> dict[str, str]:
        """Response headers to add to the headers of every answer."""
        return {}


class NotJsonError(RoomKeysError):
    """The body is not JSON."""

    errcode = "M_NOT_JSON"


class BadJsonError(RoomKeysError):
    """The body is JSON, but not in the form required by the endpoint."""

    errcode = "M_BAD_JSON"


class InvalidParamError(RoomKeysError):
    """A parameter or an id has an invalid value."""

    errcode = "M_INVALID_PARAM"


class MissingParamError(RoomKeysError):
    """A parameter required by the endpoint is missing."""

    errcode = "M_MISSING_PARAM"


class TokenError(RoomKeysError):
    """The request has no access token, or the token's user is refused."""

    def __init__(
        self, code: int, errcode: str, msg: str, soft_logout: bool | None = None
    ) -> None:
        """
        Args:
            soft_logout: whether the client may keep its data and log in again, or None
                if the homeserver's answer has no such member.
        """
        super().__init__(msg)
        self.code = code
        self.errcode = errcode
        self.soft_logout = soft_logout

    def error_dict(self) -> dict[str, Any]:
        soft = {} if self.soft_logout is None else {"soft_logout": self.soft_logout}
        return {**super().error_dict(), **soft}


class ForbiddenError(RoomKeysError):
    """The requester may not do this, or not without a further word."""

    code = 403
    errcode = "M_FORBIDDEN"


class NoVersionToDeleteError(RoomKeysError):
    """``DELETE /room_keys/version`` without a version: status 400, as in Synapse."""

    errcode = "M_NOT_FOUND"

    def __init__(self) -> None:
        super().__init__("No version specified to delete")


class UnrecognizedError(RoomKeysError):
    """The path has no endpoint (404), or the endpoint lacks the method (405)."""

    errcode = "M_UNRECOGNIZED"

    def __init__(self, code: int) -> None:
        super().__init__("Unrecognized request")
        self.code = code


class NotFoundError(RoomKeysError):
    """The backup, version or key doesn't exist.

    Clients turn their backup off after this error. A temporary fault must therefore
    never be answered with this error.
    """

    code = 404
    errcode = "M_NOT_FOUND"


def unknown_version() -> NotFoundError:
    """Error for a version that doesn't exist. Clients compare the message word for
    word: never change the text."""
    return NotFoundError("Unknown backup version")


def no_room_keys() -> NotFoundError:
    """Error for a key that doesn't exist. Clients compare the message word for
    word: never change the text."""
    return NotFoundError("No room_keys found")


class RoomKeysVersionError(RoomKeysError):
    """Upload to a version that exists, but isn't the current version."""

    code = 403
    errcode = "M_WRONG_ROOM_KEYS_VERSION"

    def __init__(self, current_version: str) -> None:
        super().__init__("Wrong room_keys version")
        self.current_version = current_version

    def error_dict(self) -> dict[str, Any]:
        return {**super().error_dict(), "current_version": self.current_version}


class TooLargeError(RoomKeysError):
    """The body or a ``session_data`` is larger than the limit."""

    code = 413
    errcode = "M_TOO_LARGE"


class UserLimitError(RoomKeysError):
    """The user's backups have reached the maximum size set by the operator.

    Status and members follow ``M_USER_LIMIT_EXCEEDED`` in the specification ("Common
    error codes", from MSC4335).
    """

    code = 403
    errcode = "M_USER_LIMIT_EXCEEDED"
    #: URL of a page with more information, for clients to show to the user.
    info_uri = (
        "https://spec.matrix.org/latest/client-server-api/#server-side-key-backups"
    )

    def error_dict(self) -> dict[str, Any]:
        return {**super().error_dict(), "info_uri": self.info_uri}


class DamagedVersionError(RoomKeysError):
    """The ``auth_data`` in the database isn't JSON.

    The status is 500. After a 404, clients would turn their backup off. A 503 would
    promise that the fault is temporary. After a 500, clients leave the backup unchanged
    and retry at their next start.
    """

    code = 500

    def __init__(self) -> None:
        super().__init__(
            "The auth_data of this backup version is damaged on the server: delete the"
            " version and make another one, or ask the server's administrator"
        )


class LimitExceededError(RoomKeysError):
    """Too many requests are waiting already, in this process or at the homeserver."""

    code = 429
    errcode = "M_LIMIT_EXCEEDED"

    def __init__(self, msg: str, retry_after: int) -> None:
        """
        Args:
            retry_after: seconds after which the client may try again.
        """
        super().__init__(msg)
        self.retry_after = retry_after

    def error_dict(self) -> dict[str, Any]:
        return {**super().error_dict(), "retry_after_ms": self.retry_after * 1000}

    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(self.retry_after)}


class UnavailableError(RoomKeysError):
    """The database or the homeserver is unavailable, also after some seconds of
    retries."""

    code = 503

    def __init__(self, retry_after: int) -> None:
        """
        Args:
            retry_after: seconds after which the client may try again.
        """
        super().__init__("The key backup is unavailable for the moment")
        self.retry_after = retry_after

    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(self.retry_after)}


class OutageError(UnavailableError):
    """The database is unavailable, or a lock is held that the user's other writes need
    too."""

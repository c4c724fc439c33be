"""What can go wrong, as the Matrix error a client is shown.

The statuses and error codes are those of the Matrix client-server API,
"Standard error response" and "Server-side key backups".
"""

from typing import Any

#: ``Retry-After`` in seconds while other requests have to end first: the user's own, or
#: those of a process that stops or has as many connections as it may.
BUSY_RETRY_AFTER = 5
#: ``Retry-After`` in seconds during an outage: of the database, of the homeserver, or
#: of the directory for temporary files.
OUTAGE_RETRY_AFTER = 10


class RoomKeysError(Exception):
    """A fault that has an answer of its own: a status, an errcode and a message.

    Attributes:
        code: the HTTP status of the answer.
        errcode: the Matrix error code.
        msg: a sentence that a client developer can act on. It never holds a
            token, ``session_data`` or ``auth_data``.
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
        """The headers that the answer has besides the usual ones."""
        return {}


class NotJsonError(RoomKeysError):
    """The body is not JSON."""

    errcode = "M_NOT_JSON"


class BadJsonError(RoomKeysError):
    """The body is JSON, but not what the endpoint takes."""

    errcode = "M_BAD_JSON"


class InvalidParamError(RoomKeysError):
    """A parameter, or an id, has a value that it can't have."""

    errcode = "M_INVALID_PARAM"


class MissingParamError(RoomKeysError):
    """A parameter that the endpoint needs is not there."""

    errcode = "M_MISSING_PARAM"


class TokenError(RoomKeysError):
    """The request has no access token, or one whose user isn't let in."""

    def __init__(
        self, code: int, errcode: str, msg: str, soft_logout: bool | None = None
    ) -> None:
        """
        Args:
            soft_logout: whether the client may keep its data and log in again, where
                the homeserver says it.
        """
        super().__init__(msg)
        self.code = code
        self.errcode = errcode
        self.soft_logout = soft_logout

    def error_dict(self) -> dict[str, Any]:
        soft = {} if self.soft_logout is None else {"soft_logout": self.soft_logout}
        return {**super().error_dict(), **soft}


class NoVersionToDeleteError(RoomKeysError):
    """``DELETE /room_keys/version`` without a version, a 400 as the original's."""

    errcode = "M_NOT_FOUND"

    def __init__(self) -> None:
        super().__init__("No version specified to delete")


class UnrecognizedError(RoomKeysError):
    """No endpoint has this path (404), or this method on it (405)."""

    errcode = "M_UNRECOGNIZED"

    def __init__(self, code: int) -> None:
        super().__init__("Unrecognized request")
        self.code = code


class NotFoundError(RoomKeysError):
    """There is no such backup, version or key.

    Clients turn their backup off when they read it, so a passing fault is never
    answered with it.
    """

    code = 404
    errcode = "M_NOT_FOUND"


def unknown_version() -> NotFoundError:
    """No such version of the backup; clients compare the text word for word."""
    return NotFoundError("Unknown backup version")


def no_room_keys() -> NotFoundError:
    """No such key in the backup; clients compare the text word for word."""
    return NotFoundError("No room_keys found")


class RoomKeysVersionError(RoomKeysError):
    """An upload to a version that exists, but isn't the current one."""

    code = 403
    errcode = "M_WRONG_ROOM_KEYS_VERSION"

    def __init__(self, current_version: str) -> None:
        super().__init__("Wrong room_keys version")
        self.current_version = current_version

    def error_dict(self) -> dict[str, Any]:
        return {**super().error_dict(), "current_version": self.current_version}


class TooLargeError(RoomKeysError):
    """The body, or one ``session_data``, is over its limit."""

    code = 413
    errcode = "M_TOO_LARGE"


class UserLimitError(RoomKeysError):
    """The user's backups are as large as the operator lets them become.

    The status and the members are those of ``M_USER_LIMIT_EXCEEDED`` in the
    specification ("Common error codes", from MSC4335).
    """

    code = 403
    errcode = "M_USER_LIMIT_EXCEEDED"
    #: Where a client can send its user to read on.
    info_uri = (
        "https://spec.matrix.org/latest/client-server-api/#server-side-key-backups"
    )

    def error_dict(self) -> dict[str, Any]:
        return {**super().error_dict(), "info_uri": self.info_uri}


class DamagedVersionError(RoomKeysError):
    """The database holds an ``auth_data`` that isn't JSON.

    A 404 would have clients turn their backup off, and a 503 would promise that it
    passes. Clients leave the backup alone at a 500, and ask again at their next start.
    """

    code = 500

    def __init__(self) -> None:
        super().__init__(
            "The auth_data of this backup version is damaged on the server: delete the"
            " version and make another one, or ask the server's administrator"
        )


class LimitExceededError(RoomKeysError):
    """Too many requests are waiting already, here or at the homeserver."""

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
    """The database or the homeserver is away, after some seconds of trying."""

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
    """The database is away, or holds a lock that the user's other writes need too."""

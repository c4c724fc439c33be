"""The three servlets of server-side key backup.

The Matrix client-server API, "Server-side key backups", defines the requests and
responses of each endpoint. Every request is authenticated first; guests are refused.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.web.http import Request

from ..encoding import BackupEncoder, encode_backup_info, encode_key
from ..errors import (
    MissingParamError,
    NoVersionToDeleteError,
    no_room_keys,
)
from ..identifiers import check_id
from ..inline import Inline
from ..pages import KeyPages
from ..types import (
    BackupInfo,
    BackupState,
    Limits,
    Requester,
    RoomKey,
    UploadResult,
)
from ..wire import (
    parse_new_version,
    parse_upload,
    parse_version_info,
)
from .host import HomeServer
from .resource import (
    Answer,
    HttpServer,
    RestServlet,
    client_patterns,
    notes_of,
    parse_string,
    read_body,
    set_headers,
)
from .streaming import PacedWriter, stream, write_pages

Answering = Inline[Answer]


class UserServlet(RestServlet):
    """Base class of servlets that authenticate a request and call the handler."""

    def __init__(self, hs: HomeServer) -> None:
        super().__init__()
        self.hs = hs
        self.auth = hs.get_auth()
        self.e2e_room_keys_handler = hs.get_e2e_room_keys_handler()

    def authenticate(self, request: Request) -> "Deferred[Requester]":
        """Fire with the requester, as `Auth.get_user_by_req` does, and note user and
        device for the request's log lines."""
        return self.auth.get_user_by_req(request).addCallback(_note_user, request)


class RoomKeysServlet(UserServlet):
    """``/room_keys/keys``: upload, download and delete keys.

    The path selects the whole backup, a room, or a single session.
    """

    PATTERNS = client_patterns(
        "/room_keys/keys(?:/(?P<room_id>[^/]+)(?:/(?P<session_id>[^/]+))?)?"
    )

    @inlineCallbacks
    def on_PUT(
        self, request: Request, room_id: str | None, session_id: str | None
    ) -> Answering:
        """Merge keys into the backup. Answer with the backup's etag and count."""
        requester: Requester = yield self.authenticate(request)
        check_ids(room_id, session_id)
        version = _version_of(request)
        keys = _keys(request, room_id, session_id, self.hs.limits)
        result: UploadResult = yield self.e2e_room_keys_handler.upload_room_keys(
            requester.user_id, version, keys, requester.device_id
        )
        notes_of(request).update(
            stored=result.stored,
            replaced=len(result.replaced),
            unchanged=result.unchanged,
        )
        return 200, _state_dict(result.state)

    @inlineCallbacks
    def on_GET(
        self, request: Request, room_id: str | None, session_id: str | None
    ) -> Answering:
        """Answer with keys. A missing key is answered with 404, a room without keys
        with an empty object of sessions."""
        requester: Requester = yield self.authenticate(request)
        check_ids(room_id, session_id)
        version = _version_of(request)
        handler = self.e2e_room_keys_handler
        if room_id is not None and session_id is not None:
            key: RoomKey | None = yield handler.get_room_key(
                requester.user_id, version, room_id, session_id
            )
            if key is None:
                raise no_room_keys()
            return 200, encode_key(key)
        pages: KeyPages = yield handler.get_room_keys(
            requester.user_id, version, room_id
        )
        try:
            set_headers(request, b"application/json")
            if request.method != b"HEAD":
                writer = PacedWriter(
                    request,
                    self.hs.clock,
                    self.hs.stalled_download_seconds,
                    pages.idle,
                )
                encoder = BackupEncoder(with_rooms=room_id is None)
                yield stream(writer, partial(write_pages, writer, pages, encoder))
            elif not request._disconnected:
                request.finish()
        finally:
            yield pages.close()
        return None

    @inlineCallbacks
    def on_DELETE(
        self, request: Request, room_id: str | None, session_id: str | None
    ) -> Answering:
        """Delete keys. Answer with the backup's etag and count."""
        requester: Requester = yield self.authenticate(request)
        check_ids(room_id, session_id)
        version = _version_of(request)
        state: BackupState = yield self.e2e_room_keys_handler.delete_room_keys(
            requester.user_id, version, room_id, session_id, requester.device_id
        )
        return 200, _state_dict(state)


class RoomKeysNewVersionServlet(UserServlet):
    """``POST /room_keys/version``: create a version and make it the current version."""

    PATTERNS = client_patterns("/room_keys/version")

    @inlineCallbacks
    def on_POST(self, request: Request) -> Answering:
        """Create a version. Answer with the version's number, as a string."""
        requester: Requester = yield self.authenticate(request)
        info = parse_new_version(read_body(request), self.hs.limits)
        version: str = yield self.e2e_room_keys_handler.create_version(
            requester.user_id, info, requester.device_id
        )
        notes_of(request)["version"] = version
        return 200, {"version": version}


class RoomKeysVersionServlet(UserServlet):
    """``/room_keys/version[/{version}]``: the current version, or the named version.

    The first pattern must be equal to the pattern of `RoomKeysNewVersionServlet`.
    Servers use the first pattern that matches a path, even if the pattern has no
    callback for the request's method.
    """

    PATTERNS = (
        *RoomKeysNewVersionServlet.PATTERNS,
        *client_patterns("/room_keys/version/(?P<version>[^/]+)"),
    )

    @inlineCallbacks
    def on_GET(self, request: Request, version: str | None = None) -> Answering:
        """Answer with a version's algorithm, auth_data, count, etag and version."""
        requester: Requester = yield self.authenticate(request)
        info: BackupInfo = yield self.e2e_room_keys_handler.get_version_info(
            requester.user_id, version
        )
        return 200, encode_backup_info(info)

    @inlineCallbacks
    def on_PUT(self, request: Request, version: str | None = None) -> Answering:
        """Change a version's auth_data."""
        requester: Requester = yield self.authenticate(request)
        if version is None:
            raise MissingParamError("No version specified to update")
        info = parse_version_info(read_body(request), self.hs.limits)
        yield self.e2e_room_keys_handler.update_version(
            requester.user_id, version, info, requester.device_id
        )
        return 200, {}

    @inlineCallbacks
    def on_DELETE(self, request: Request, version: str | None = None) -> Answering:
        """Delete a version and the version's keys."""
        requester: Requester = yield self.authenticate(request)
        if version is None:
            raise NoVersionToDeleteError
        yield self.e2e_room_keys_handler.delete_version(
            requester.user_id, version, requester.device_id
        )
        return 200, {}


def _note_user(requester: Requester, request: Request) -> Requester:
    notes_of(request).update(user=requester.user_id, device=requester.device_id)
    return requester


def check_ids(room_id: str | None, session_id: str | None) -> None:
    """Refuse a request whose path contains an invalid room or session id.

    Raises:
        BadJsonError: an id contains NUL or a lone surrogate.
        InvalidParamError: an id is empty or longer than 255 bytes.
    """
    if room_id is not None:
        check_id("Room", room_id)
    if session_id is not None:
        check_id("Session", session_id)


def _version_of(request: Request) -> str:
    """Return the ``version`` parameter of the query, and note the version for the
    request's log lines.

    Raises:
        MissingParamError: the query has no ``version``.
    """
    version = parse_string(request, "version")
    notes_of(request)["version"] = version
    return version


def _keys(
    request: Request, room_id: str | None, session_id: str | None, limits: Limits
) -> Iterator[RoomKey]:
    """Yield the keys of an upload. The body is read when the first key is taken, not
    earlier: until then a large body stays in Twisted's temporary file, not in
    memory."""
    yield from parse_upload(read_body(request), room_id, session_id, limits)


def _state_dict(state: BackupState) -> dict[str, Any]:
    return {"etag": str(state.etag), "count": state.count}


def register_servlets(hs: HomeServer, http_server: HttpServer) -> None:
    """Register the three servlets with a server."""
    RoomKeysServlet(hs).register(http_server)
    RoomKeysVersionServlet(hs).register(http_server)
    RoomKeysNewVersionServlet(hs).register(http_server)

"""The three servlets of server-side key backup.

What each endpoint takes and answers is written in the Matrix client-server API,
"Server-side key backups". Every request is authenticated first; guests are refused.
"""

from collections.abc import Iterator
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.web.http import Request

from ..errors import (
    MissingParamError,
    NotJsonError,
    NoVersionToDeleteError,
    no_room_keys,
)
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
    BackupEncoder,
    check_id,
    encode_backup_info,
    encode_key,
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
    set_headers,
)
from .streaming import PacedWriter, stream_pages

Answering = Inline[Answer]


class UserServlet(RestServlet):
    """A servlet that authenticates its requests and passes them to the handler."""

    def __init__(self, hs: HomeServer) -> None:
        super().__init__()
        self.hs = hs
        self.auth = hs.get_auth()
        self.e2e_room_keys_handler = hs.get_e2e_room_keys_handler()

    def authenticate(self, request: Request) -> "Deferred[Requester]":
        """As `Auth.get_user_by_req`. Note user and device for the request's log
        lines."""
        return self.auth.get_user_by_req(request).addCallback(_note_user, request)


class RoomKeysServlet(UserServlet):
    """``/room_keys/keys``: upload, download and delete keys.

    Of the whole backup, of a room, or of one session, as the path says.
    """

    PATTERNS = client_patterns(
        "/room_keys/keys(?:/(?P<room_id>[^/]+)(?:/(?P<session_id>[^/]+))?)?"
    )

    @inlineCallbacks
    def on_PUT(
        self, request: Request, room_id: str | None, session_id: str | None
    ) -> Answering:
        """Merge keys into the backup; answers its etag and count."""
        requester: Requester = yield self.authenticate(request)
        check_ids(room_id, session_id)
        version = _version_of(request)
        keys = _keys(request, room_id, session_id, self.hs.limits)
        result: UploadResult = yield self.e2e_room_keys_handler.upload_room_keys(
            requester.user_id, version, keys, requester.device_id
        )
        notes_of(request).update(
            stored=result.stored, replaced=len(result.replaced), unchanged=result.kept
        )
        return 200, _state_dict(result.state)

    @inlineCallbacks
    def on_GET(
        self, request: Request, room_id: str | None, session_id: str | None
    ) -> Answering:
        """Answer keys; one that isn't there is a 404, a room without any is empty."""
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
                yield stream_pages(writer, pages, encoder)
            elif not request._disconnected:
                request.finish()
        finally:
            yield pages.close()
        return None

    @inlineCallbacks
    def on_DELETE(
        self, request: Request, room_id: str | None, session_id: str | None
    ) -> Answering:
        """Delete keys; answers the backup's etag and count."""
        requester: Requester = yield self.authenticate(request)
        check_ids(room_id, session_id)
        version = _version_of(request)
        state: BackupState = yield self.e2e_room_keys_handler.delete_room_keys(
            *(requester.user_id, version, room_id, session_id, requester.device_id)
        )
        return 200, _state_dict(state)


class RoomKeysNewVersionServlet(UserServlet):
    """``POST /room_keys/version``: make a version, the current one from now on."""

    PATTERNS = client_patterns("/room_keys/version")

    @inlineCallbacks
    def on_POST(self, request: Request) -> Answering:
        """Make a version; answers its number, as a string."""
        requester: Requester = yield self.authenticate(request)
        info = parse_new_version(_body(request), self.hs.limits)
        version: str = yield self.e2e_room_keys_handler.create_version(
            requester.user_id, info, requester.device_id
        )
        notes_of(request)["version"] = version
        return 200, {"version": version}


class RoomKeysVersionServlet(UserServlet):
    """``/room_keys/version[/{version}]``: the current version, or the one named.

    The first pattern is that of `RoomKeysNewVersionServlet`, word for word: servers
    take the first pattern that matches a path, whatever methods it has.
    """

    PATTERNS = (
        *RoomKeysNewVersionServlet.PATTERNS,
        *client_patterns("/room_keys/version/(?P<version>[^/]+)"),
    )

    @inlineCallbacks
    def on_GET(self, request: Request, version: str | None = None) -> Answering:
        """Answer a version: algorithm, auth_data, count, etag and version."""
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
        info = parse_version_info(_body(request), self.hs.limits)
        yield self.e2e_room_keys_handler.update_version(
            requester.user_id, version, info
        )
        return 200, {}

    @inlineCallbacks
    def on_DELETE(self, request: Request, version: str | None = None) -> Answering:
        """Delete a version and its keys."""
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
    """Refuse a path with an id in it that no room or session has."""
    if room_id is not None:
        check_id("Room", room_id)
    if session_id is not None:
        check_id("Session", session_id)


def _version_of(request: Request) -> str:
    """The version that the query names.

    Raises:
        MissingParamError: it names none.
    """
    version = parse_string(request, "version")
    notes_of(request)["version"] = version
    return version


def _body(request: Request) -> bytes:
    content: Any = request.content
    if content.closed:
        # Twisted closes it when the connection is lost: nobody gets this answer.
        raise NotJsonError("The client left before its body was read")
    return content.read()  # type: ignore[no-any-return]


def _keys(
    request: Request, room_id: str | None, session_id: str | None, limits: Limits
) -> Iterator[RoomKey]:
    """Those of an upload. Its body isn't read before the first of them is taken: until
    then Twisted has a large one in a temporary file."""
    yield from parse_upload(_body(request), room_id, session_id, limits)


def _state_dict(state: BackupState) -> dict[str, Any]:
    return {"etag": str(state.etag), "count": state.count}


def register_servlets(hs: HomeServer, http_server: HttpServer) -> None:
    """Register the three servlets with a server."""
    RoomKeysServlet(hs).register(http_server)
    RoomKeysVersionServlet(hs).register(http_server)
    RoomKeysNewVersionServlet(hs).register(http_server)

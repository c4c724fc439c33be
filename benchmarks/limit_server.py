"""The physical limit: a bare Twisted site that runs one SQL statement per request.

No request is validated and no user is authenticated: the bearer token is the user id,
and the header ``Statement`` names the statement. Script arguments are the port and a
JSON file with psycopg2's connection arguments.
"""

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psycopg2
from twisted.internet import reactor
from twisted.internet.interfaces import IReactorThreads
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure
from twisted.web.http import Request as HttpRequest
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request, Site

_THREADS = 20
# COPY writes a line at a time. Each write to the client is a call in the reactor's
# thread, so lines are collected until they have this size.
_MIN_WRITE_BYTES = 1 << 18

_INSERT = """
INSERT INTO e2e_room_keys
    (user_id, version, room_id, session_id, first_message_index, forwarded_count,
     is_verified, session_data)
SELECT %s, %s, * FROM unnest(
    %s::text[], %s::text[], %s::integer[], %s::integer[], %s::boolean[], %s::text[])
"""
_UPDATE = """
UPDATE e2e_room_keys AS stored
SET first_message_index = given.first_message_index,
    forwarded_count = given.forwarded_count,
    is_verified = given.is_verified,
    session_data = given.session_data
FROM unnest(
    %s::text[], %s::text[], %s::integer[], %s::integer[], %s::boolean[], %s::text[]
) AS given (room_id, session_id, first_message_index, forwarded_count, is_verified,
    session_data)
WHERE user_id = %s AND version = %s
    AND stored.room_id = given.room_id AND stored.session_id = given.session_id
"""
_COMPARE = """
SELECT room_id, session_id, first_message_index, forwarded_count, is_verified
FROM unnest(%s::text[], %s::text[]) AS given (room_id, session_id)
JOIN e2e_room_keys USING (room_id, session_id)
WHERE user_id = %s AND version = %s
"""
_INSERT_ONE = """
INSERT INTO e2e_room_keys
    (user_id, version, room_id, session_id, first_message_index, forwarded_count,
     is_verified, session_data)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s)
"""
_KEY = """
SELECT first_message_index, forwarded_count, is_verified, session_data
FROM e2e_room_keys
WHERE user_id = %s AND version = %s AND room_id = %s AND session_id = %s
"""
_VERSION = """
SELECT algorithm, auth_data, version, etag
FROM e2e_room_keys_versions WHERE user_id = %s ORDER BY version DESC LIMIT 1
"""
_DELETE = "DELETE FROM e2e_room_keys WHERE user_id = %s AND version = %s"
_UPLOAD_RESPONSE = b'{"etag":"2","count":1}'


class _Key(msgspec.Struct):
    """An uploaded key; session_data stays undecoded."""

    first_message_index: int
    forwarded_count: int
    is_verified: bool
    session_data: msgspec.Raw


class _Room(msgspec.Struct):
    """The keys of one room by session id."""

    sessions: dict[str, _Key]


class _Upload(msgspec.Struct):
    """The body of an upload: rooms by room id."""

    rooms: dict[str, _Room]


_decode_upload = msgspec.json.Decoder(_Upload).decode
_decode_key = msgspec.json.Decoder(_Key).decode


class _Columns(NamedTuple):
    """The keys of an upload as a list per column, in the order of the statements."""

    room_id: list[str]
    session_id: list[str]
    first_message_index: list[int]
    forwarded_count: list[int]
    is_verified: list[bool]
    session_data: list[str]


def _columns(content: bytes) -> _Columns:
    """Decode an upload and transpose it into a list per column."""
    columns = _Columns([], [], [], [], [], [])
    for room_id, room in _decode_upload(content).rooms.items():
        for session_id, key in room.sessions.items():
            columns.room_id.append(room_id)
            columns.session_id.append(session_id)
            columns.first_message_index.append(key.first_message_index)
            columns.forwarded_count.append(key.forwarded_count)
            columns.is_verified.append(key.is_verified)
            columns.session_data.append(bytes(key.session_data).decode())
    return columns


class _Job:
    """Statement and parameters of a request; the methods run in a database thread."""

    def __init__(self, request: Request) -> None:
        """Read user, path, version and body of the request in the reactor's thread."""
        self.request = request
        authorization = request.getHeader("Authorization") or ""
        self.user_id = authorization.partition(" ")[2]
        self.path = [segment.decode() for segment in request.postpath or ()]
        versions = (request.args or {}).get(b"version")
        self.version = int(versions[0] if versions else b"1")
        self.content: bytes = request.content.read() if request.content else b""

    def insert(self, cursor: Any) -> bytes:
        """Insert new keys."""
        cursor.execute(_INSERT, (self.user_id, self.version, *_columns(self.content)))
        return _UPLOAD_RESPONSE

    def update(self, cursor: Any) -> bytes:
        """Update existing keys."""
        cursor.execute(_UPDATE, (*_columns(self.content), self.user_id, self.version))
        return _UPLOAD_RESPONSE

    def compare(self, cursor: Any) -> bytes:
        """Read the stored keys that an upload of equal keys is compared with."""
        columns = _columns(self.content)
        cursor.execute(
            _COMPARE,
            (columns.room_id, columns.session_id, self.user_id, self.version),
        )
        cursor.fetchall()
        return _UPLOAD_RESPONSE

    def insert_one(self, cursor: Any) -> bytes:
        """Insert a new key."""
        key = _decode_key(self.content)
        values = (key.first_message_index, key.forwarded_count, key.is_verified)
        data = bytes(key.session_data).decode()
        where = (self.user_id, self.version, *self.path[-2:])
        cursor.execute(_INSERT_ONE, (*where, *values, data))
        return _UPLOAD_RESPONSE

    def key(self, cursor: Any) -> bytes:
        """Return a key as JSON."""
        cursor.execute(_KEY, (self.user_id, self.version, *self.path[-2:]))
        index, forwarded, verified, data = cursor.fetchone()
        return (
            f'{{"first_message_index":{index},"forwarded_count":{forwarded},'
            f'"is_verified":{"true" if verified else "false"},"session_data":{data}}}'
        ).encode()

    def newest_version(self, cursor: Any) -> bytes:
        """Return the description of the newest version as JSON."""
        cursor.execute(_VERSION, (self.user_id,))
        algorithm, auth_data, version, etag = cursor.fetchone()
        return (
            f'{{"algorithm":"{algorithm}","auth_data":{auth_data},"count":1,'
            f'"etag":"{etag}","version":"{version}"}}'
        ).encode()

    def delete(self, cursor: Any) -> bytes:
        """Delete the keys of a backup."""
        cursor.execute(_DELETE, (self.user_id, int(self.path[-1])))
        return b"{}"

    def whole(self, cursor: Any) -> bytes:
        """Stream a whole backup that is stored as finished JSON."""
        return self._stream_table(cursor, "benchmark.backup")

    def room(self, cursor: Any) -> bytes:
        """Stream a room that is stored as finished JSON."""
        return self._stream_table(cursor, "benchmark.room")

    def _stream_table(self, cursor: Any, table: str) -> bytes:
        """Copy a table to the client while PostgreSQL reads it."""
        sink = _CopyToClient(self.request)
        cursor.copy_expert(f"COPY {table} TO STDOUT", sink)
        sink.flush()
        return b""


_STATEMENTS: dict[str, Callable[[_Job, Any], bytes]] = {
    "insert": _Job.insert,
    "update": _Job.update,
    "compare": _Job.compare,
    "insert-one": _Job.insert_one,
    "key": _Job.key,
    "version": _Job.newest_version,
    "delete": _Job.delete,
    "whole": _Job.whole,
    "room": _Job.room,
}


class _CopyToClient:
    """File-like target for COPY that sends its data to the client."""

    def __init__(self, request: Request) -> None:
        """Begin with an empty buffer."""
        self._request = request
        self._pieces: list[bytes] = []
        self._size = 0

    def write(self, data: bytes) -> None:
        """Buffer data, and flush a full buffer."""
        self._pieces.append(data)
        self._size += len(data)
        if self._size >= _MIN_WRITE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Have the reactor's thread write the buffer to the client."""
        piece = b"".join(self._pieces)
        self._pieces.clear()
        self._size = 0
        IReactorThreads(reactor).callFromThread(self._request.write, piece)


class _LimitResource(Resource):
    """Resource that answers every path."""

    isLeaf = True

    def __init__(self, arguments: dict[str, Any]) -> None:
        """Store the connection arguments; each thread connects once, on first use."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._arguments = arguments
        self._local = threading.local()

    def render(self, request: HttpRequest) -> int:
        """Run the statement in a thread, then send the response."""
        assert isinstance(request, Request)
        statement = _STATEMENTS[request.getHeader("Statement") or ""]
        done = deferToThread(self._run, statement, _Job(request))
        done.addCallbacks(self._finish, self._fail, (request,), {}, (request,), {})
        return NOT_DONE_YET

    def _run(self, statement: Callable[[_Job, Any], bytes], job: _Job) -> bytes:
        """Run the statement on this thread's connection and return the response body.

        The body is empty if the statement has streamed the response already.
        """
        if not hasattr(self._local, "cursor"):
            connection = psycopg2.connect(**self._arguments)
            connection.autocommit = True
            self._local.cursor = connection.cursor()
        return statement(job, self._local.cursor)

    @staticmethod
    def _finish(answer: bytes, request: Request) -> None:
        """Send a body that isn't empty, and finish the request."""
        if answer:
            request.setHeader("Content-Length", str(len(answer)))
            request.write(answer)
        request.finish()

    @staticmethod
    def _fail(failure: Failure, request: Request) -> None:
        """Respond with 500 and the traceback."""
        request.setResponseCode(500)
        request.write(failure.getTraceback().encode())
        request.finish()


def main(port: int, arguments: dict[str, Any]) -> None:
    """Serve until killed."""
    host: Any = reactor
    host.suggestThreadPoolSize(_THREADS)
    host.listenTCP(port, Site(_LimitResource(arguments)), interface="127.0.0.1")
    host.run()


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))

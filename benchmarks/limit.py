"""The physical limit: a bare site that runs one statement a request.

It checks nothing and knows no users: the bearer token is the user's id, and the
header ``Work`` names the statement. Run as a script with the port and a file that
says how to connect to the database.
"""

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
_PIECE_BYTES = 1 << 18

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
_DONE = b'{"etag":"2","count":1}'


class _Key(msgspec.Struct):
    """A key as uploaded, its data left as it is."""

    first_message_index: int
    forwarded_count: int
    is_verified: bool
    session_data: msgspec.Raw


class _Room(msgspec.Struct):
    """The keys of one room."""

    sessions: dict[str, _Key]


class _Upload(msgspec.Struct):
    """A whole upload."""

    rooms: dict[str, _Room]


_decode_upload = msgspec.json.Decoder(_Upload).decode
_decode_key = msgspec.json.Decoder(_Key).decode
_Columns = tuple[
    list[str], list[str], list[int], list[int], list[bool], list[str]
]  # room, session, index, forwarded, verified, data


def _columns(content: bytes) -> _Columns:
    """Turn an upload into one list for each column."""
    columns: _Columns = ([], [], [], [], [], [])
    for room_id, room in _decode_upload(content).rooms.items():
        for session_id, key in room.sessions.items():
            columns[0].append(room_id)
            columns[1].append(session_id)
            columns[2].append(key.first_message_index)
            columns[3].append(key.forwarded_count)
            columns[4].append(key.is_verified)
            columns[5].append(bytes(key.session_data).decode())
    return columns


class _Job:
    """One request's work, done in a thread."""

    def __init__(self, request: Request) -> None:
        """Read the request off before leaving the reactor's thread."""
        self.request = request
        authorization = request.getHeader("Authorization") or ""
        self.user_id = authorization.partition(" ")[2]
        self.path = [segment.decode() for segment in request.postpath or ()]
        versions = (request.args or {}).get(b"version")
        self.version = int(versions[0] if versions else b"1")
        self.content: bytes = request.content.read() if request.content else b""

    def insert(self, cursor: Any) -> bytes:
        """Store new keys."""
        cursor.execute(_INSERT, (self.user_id, self.version, *_columns(self.content)))
        return _DONE

    def update(self, cursor: Any) -> bytes:
        """Replace keys."""
        cursor.execute(_UPDATE, (*_columns(self.content), self.user_id, self.version))
        return _DONE

    def compare(self, cursor: Any) -> bytes:
        """Read what is needed to find that all keys are there."""
        rooms, sessions, *_ = _columns(self.content)
        cursor.execute(_COMPARE, (rooms, sessions, self.user_id, self.version))
        cursor.fetchall()
        return _DONE

    def insert_one(self, cursor: Any) -> bytes:
        """Store one new key."""
        key = _decode_key(self.content)
        values = (key.first_message_index, key.forwarded_count, key.is_verified)
        data = bytes(key.session_data).decode()
        where = (self.user_id, self.version, *self.path[-2:])
        cursor.execute(_INSERT_ONE, (*where, *values, data))
        return _DONE

    def key(self, cursor: Any) -> bytes:
        """Read one key."""
        cursor.execute(_KEY, (self.user_id, self.version, *self.path[-2:]))
        index, forwarded, verified, data = cursor.fetchone()
        return (
            f'{{"first_message_index":{index},"forwarded_count":{forwarded},'
            f'"is_verified":{"true" if verified else "false"},"session_data":{data}}}'
        ).encode()

    def backup(self, cursor: Any) -> bytes:
        """Read the newest backup's description."""
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
        """Pass on a whole backup that is stored ready to be read out."""
        return self._copy(cursor, "benchmark.backup")

    def room(self, cursor: Any) -> bytes:
        """Pass on a room that is stored ready to be read out."""
        return self._copy(cursor, "benchmark.room")

    def _copy(self, cursor: Any, table: str) -> bytes:
        """Pass on a table while it is read."""
        sink = _Sink(self.request)
        cursor.copy_expert(f"COPY {table} TO STDOUT", sink)
        sink.flush()
        return b""


_WORK: dict[str, Callable[[_Job, Any], bytes]] = {
    "insert": _Job.insert,
    "update": _Job.update,
    "compare": _Job.compare,
    "insert-one": _Job.insert_one,
    "key": _Job.key,
    "version": _Job.backup,
    "delete": _Job.delete,
    "whole": _Job.whole,
    "room": _Job.room,
}


class _Sink:
    """A file that COPY writes into and that the client reads out of."""

    def __init__(self, request: Request) -> None:
        """Begin with nothing."""
        self._request = request
        self._pieces: list[bytes] = []
        self._size = 0

    def write(self, data: bytes) -> None:
        """Take in a line, and send what is long enough."""
        self._pieces.append(data)
        self._size += len(data)
        if self._size >= _PIECE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Hand over to the reactor's thread what has been gathered."""
        piece = b"".join(self._pieces)
        self._pieces.clear()
        self._size = 0
        IReactorThreads(reactor).callFromThread(self._request.write, piece)


class _Bare(Resource):
    """Every path there is."""

    isLeaf = True

    def __init__(self, arguments: dict[str, Any]) -> None:
        """Keep how to connect; each thread does so once."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._arguments = arguments
        self._local = threading.local()

    def render(self, request: HttpRequest) -> int:
        """Do the work in a thread and answer."""
        assert isinstance(request, Request)
        work = _WORK[request.getHeader("Work") or ""]
        done = deferToThread(self._run, work, _Job(request))
        done.addCallbacks(self._finish, self._fail, (request,), {}, (request,), {})
        return NOT_DONE_YET

    def _run(self, work: Callable[[_Job, Any], bytes], job: _Job) -> bytes:
        """Run the statement on this thread's connection."""
        if not hasattr(self._local, "cursor"):
            connection = psycopg2.connect(**self._arguments)
            connection.autocommit = True
            self._local.cursor = connection.cursor()
        return work(job, self._local.cursor)

    @staticmethod
    def _finish(answer: bytes, request: Request) -> None:
        """Send what is not sent yet."""
        if answer:
            request.setHeader("Content-Length", str(len(answer)))
            request.write(answer)
        request.finish()

    @staticmethod
    def _fail(failure: Failure, request: Request) -> None:
        """Tell what went wrong."""
        request.setResponseCode(500)
        request.write(failure.getTraceback().encode())
        request.finish()


def main(port: int, arguments: dict[str, Any]) -> None:
    """Serve until killed."""
    host: Any = reactor
    host.suggestThreadPoolSize(_THREADS)
    host.listenTCP(port, Site(_Bare(arguments)), interface="127.0.0.1")
    host.run()


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))

"""JSON of answers: keys, versions and downloads as bytes."""

import json

import msgspec

from .types import BackupInfo, KeyPage, RoomKey

_encode_string = msgspec.json.Encoder().encode
_json_decoder = json.JSONDecoder()


def encode_key(key: RoomKey) -> bytes:
    """Encode a key as the specification's ``KeyBackupData``. NULL becomes 0 or false.

    ``session_data`` isn't decoded: an old row may hold JSON that the strict decoder
    refuses.
    """
    return (
        b'{"first_message_index":%d,"forwarded_count":%d,"is_verified":%b,'
        b'"session_data":%b}'
    ) % (
        key.metadata.first_message_index or 0,
        key.metadata.forwarded_count or 0,
        b"true" if key.metadata.is_verified else b"false",
        key.session_data.encode(),
    )


def encode_backup_info(info: BackupInfo) -> bytes:
    """Encode a version of a backup, with ``etag`` and ``version`` as strings.

    ``info.auth_data`` must be JSON.
    """
    return b'{"algorithm":%b,"auth_data":%b,"count":%d,"etag":"%d","version":"%d"}' % (
        _encode_string(info.algorithm),
        info.auth_data.encode(),
        info.count,
        info.etag,
        info.version,
    )


def session_id_of(member: str) -> str:
    """Return the session id of a key in the form of a JSON object's member."""
    session_id: str
    session_id, _ = _json_decoder.raw_decode(member)
    return session_id


def split_head(head: str) -> tuple[str, str]:
    """Return the session id of a key's head (see `KeyPage`) as a JSON string, and the
    fields after the id without the opening brace."""
    _, end = _json_decoder.raw_decode(head)
    return head[:end], head[end + len(":{") :]


class BackupEncoder:
    """Encoder of a download: keys, ordered by room, become one JSON object.

    The object is the concatenation of the chunks of `encode` and of `finish`.
    """

    def __init__(self, with_rooms: bool) -> None:
        """
        Args:
            with_rooms: True for a whole backup, an object with ``rooms``; False for
                a room, an object with ``sessions``.
        """
        self._with_rooms = with_rooms
        self._room_id: str | None = None
        self._opened = False

    def encode(self, page: KeyPage) -> bytes:
        """Encode keys as the next chunk. The first chunk is never empty."""
        texts: list[str] = []
        if not self._opened:
            self._opened = True
            texts.append('{"rooms":{' if self._with_rooms else '{"sessions":{')
        for room_id, head, data in page.rows:
            start = "," if room_id == self._room_id else self._open(room_id)
            texts += (start, head, data, "}")
        # One character outside ASCII makes the joined text up to four times as large,
        # so callers pass a few keys at a time. Encoding each key by itself takes three
        # times as long.
        return "".join(texts).encode()

    def _open(self, room_id: str) -> str:
        """Return the text between the last key and the first key of a room."""
        first = self._room_id is None
        self._room_id = room_id
        if not self._with_rooms:
            return ""
        end = "" if first else "}},"
        return f'{end}{json.dumps(room_id)}:{{"sessions":{{'

    def finish(self) -> bytes:
        """Return the last chunk."""
        if self._with_rooms and self._room_id is not None:
            return b"}}}}"
        return b"}}"

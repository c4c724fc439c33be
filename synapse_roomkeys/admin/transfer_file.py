"""The format of ``export`` and ``import``: lines of JSON.

Each line is a JSON object with a ``type``: a ``header``; for each version,
in the order of numbers, a ``version`` and then a ``key`` for each key; and an ``end``
with the SHA-256 of all bytes before it.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from functools import partial
from typing import Any, BinaryIO

import attrs
import msgspec

from ..encoding import split_head
from ..errors import RoomKeysError
from ..identifiers import parse_version
from ..storage import VersionFacts
from ..types import BackupInfo, KeyPage, Limits, RoomKey
from ..wire import parse_upload

_FORMAT = "synapse-roomkeys export"
_FORMAT_NUMBER = 1
#: Maximum bytes of a key in a file. A real key has about 1 KiB. Synapse accepts no
#: request of 16 MiB with its default limits, so no stored key is larger.
MAX_KEY = 16 << 20
#: Maximum bytes of the first line of an export. A body of GET /keys may be one line.
_MAX_HEADER = 1 << 16
#: Number of keys between two yields of a check.
STEP = 1000
#: The rules of an upload, without the operator's limits.
_RULES = Limits(max_body_bytes=MAX_KEY, max_session_data_bytes=MAX_KEY)

_ETAG = re.compile("[0-9]{1,18}")
_LINE_BREAKS = str.maketrans("\r\n", "  ")


class FileError(Exception):
    """The file can't be imported. The text says why, without the name of the file."""


class _Header(msgspec.Struct, tag="header"):
    format: str
    format_number: int
    user: str
    exported_ms: int


class _Version(msgspec.Struct, tag="version"):
    version: str
    algorithm: str
    auth_data: msgspec.Raw
    etag: str
    state: str
    count: int


class _Key(msgspec.Struct, tag="key", gc=False):
    version: str
    room_id: str
    session_id: str


class _End(msgspec.Struct, tag="end"):
    versions: int
    keys: int
    sha256: str


_decode_line = msgspec.json.Decoder(_Header | _Version | _Key | _End).decode
_decode_header = msgspec.json.Decoder(_Header).decode


class LinesEncoder:
    """Encoder of an export, which is the concatenation of the chunks of `start`, of
    `begin`, `encode` and `finish` for each version, and of `end`."""

    def __init__(self, user_id: str) -> None:
        self._user_id = user_id
        self._digest = hashlib.sha256()
        self._version = self._versions = self._keys = 0

    def start(self, now_ms: int) -> bytes:
        """Return the first line.

        Args:
            now_ms: Unix time in milliseconds.
        """
        header = _Header(_FORMAT, _FORMAT_NUMBER, self._user_id, now_ms)
        return self._add(_line(header))

    def begin(self, version: VersionFacts) -> bytes:
        """Return the line of a version, whose ``auth_data`` must be JSON."""
        self._version = version.version
        self._versions += 1
        entry = _Version(
            version=str(version.version),
            algorithm=version.algorithm or "",
            auth_data=msgspec.Raw(_one_line(version.auth_data or "").encode()),
            etag=str(version.etag),
            state=version.state,
            count=version.keys,
        )
        return self._add(_line(entry))

    def encode(self, page: KeyPage) -> bytes:
        """Return the lines of keys of the version, whose data must be JSON."""
        start = f'{{"type":"key","version":"{self._version}","room_id":'
        texts: list[str] = []
        for room_id, head, data in page.rows:
            session_id, fields = split_head(head)
            ids = f'{json.dumps(room_id)},"session_id":{session_id},'
            texts += (start, ids, fields, _one_line(data), "}\n")
        self._keys += len(page.rows)
        return self._add("".join(texts).encode())

    def finish(self) -> bytes:
        """Return nothing: a version has no last line."""
        return b""

    def end(self) -> bytes:
        """Return the last line."""
        digest = self._digest.hexdigest()
        return _line(_End(self._versions, self._keys, digest))

    def _add(self, data: bytes) -> bytes:
        self._digest.update(data)
        return data


def _line(entry: msgspec.Struct) -> bytes:
    return msgspec.json.encode(entry) + b"\n"


def _one_line(text: str) -> str:
    """Return a JSON text with spaces instead of line breaks. JSON has line breaks only
    between tokens, so the value is the same."""
    if "\n" in text or "\r" in text:
        return text.translate(_LINE_BREAKS)
    return text


@attrs.define
class FileVersion:
    """A version in a file.

    Attributes:
        info: the version; None in a body of GET /keys, which doesn't name the version.
        start: offset of the first key in the file, in bytes.
        line: number of the version's line, from 1 on.
        keys: number of keys.
    """

    info: BackupInfo | None
    start: int
    line: int
    keys: int = 0


@attrs.frozen
class FileKey:
    """A key in a file.

    Attributes:
        text: JSON of an object with the fields of the key.
    """

    room_id: str
    session_id: str
    text: bytes

    def parse(self) -> RoomKey:
        """Return the key.

        Raises:
            RoomKeysError: the key breaks a rule of uploads. The message names the
                session and the rule.
        """
        [key] = parse_upload(self.text, self.room_id, self.session_id, _RULES)
        return key


class LinesFile:
    """An export.

    Attributes:
        user_id: the user whose backups were exported.
        versions: the versions in the order of numbers, once the file is checked.
    """

    def __init__(self, stream: BinaryIO) -> None:
        """
        Raises:
            ValueError: the file has no header.
            FileError: another version of the program wrote the file.
        """
        try:
            header = _decode_header(stream.readline(_MAX_HEADER))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError from error
        if header.format != _FORMAT or header.format_number != _FORMAT_NUMBER:
            raise FileError(
                f"its format is {header.format!r} number {header.format_number}, which"
                " another version of synapse-roomkeys reads"
            )
        self.user_id: str | None = header.user
        self.versions: list[FileVersion] = []
        self._stream = stream

    def check(self) -> Iterator[int]:
        """Read the file. Yield `STEP` after each `STEP` keys.

        Raises:
            FileError: the file is cut or altered.
        """
        self._stream.seek(0)
        digest = hashlib.sha256()
        keys = 0
        lines = iter(partial(self._stream.readline, MAX_KEY), b"")
        for number, line in enumerate(lines, 1):
            entry = _parse_line(line, number)
            if isinstance(entry, _End):
                if entry != _End(len(self.versions), keys, digest.hexdigest()):
                    raise FileError("its last line tells of other lines: it is altered")
                if self._stream.read(1):
                    raise FileError("it has bytes after its last line: it is altered")
                return
            digest.update(line)
            if isinstance(entry, _Version):
                self._begin_version(entry, number)
            elif isinstance(entry, _Key):
                self._count_key(entry, number)
                keys += 1
                if keys % STEP == 0:
                    yield STEP
        raise FileError("its last line is missing: it is cut")

    def _begin_version(self, entry: _Version, number: int) -> None:
        try:
            version = parse_version(entry.version)
        except RoomKeysError:
            raise _not_a_line(number) from None
        is_later = not self.versions or version > _number(self.versions[-1])
        is_etag = _ETAG.fullmatch(entry.etag) is not None
        if not (is_later and is_etag) or "\0" in entry.algorithm:
            raise _not_a_line(number)
        info = BackupInfo(
            version=version,
            algorithm=entry.algorithm,
            auth_data=bytes(entry.auth_data).decode(),
            etag=int(entry.etag),
            count=entry.count,
        )
        self.versions.append(FileVersion(info, self._stream.tell(), number))

    def _count_key(self, entry: _Key, number: int) -> None:
        if not self.versions or entry.version != str(_number(self.versions[-1])):
            raise _not_a_line(number)
        self.versions[-1].keys += 1

    def read_keys(self, version: FileVersion) -> Iterator[FileKey]:
        """Yield the keys of a version, after the check.

        Raises:
            FileError: the file has changed since the check.
        """
        self._stream.seek(version.start)
        for number in range(version.line + 1, version.line + 1 + version.keys):
            line = self._stream.readline(MAX_KEY)
            entry = _parse_line(line, number)
            if not isinstance(entry, _Key):
                raise _not_a_line(number)
            yield FileKey(entry.room_id, entry.session_id, line)


def _number(version: FileVersion) -> int:
    assert version.info is not None
    return version.info.version


def _parse_line(line: bytes, number: int) -> Any:
    """Return the entry of a line.

    Raises:
        FileError: the line is cut or altered.
    """
    if not line.endswith(b"\n"):
        raise FileError(f"line {number} has no end: the file is cut")
    try:
        return _decode_line(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise _not_a_line(number) from None


def _not_a_line(number: int) -> FileError:
    return FileError(f"line {number} is no line of an export here: the file is altered")

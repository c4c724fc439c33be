"""The body of GET /keys as a file of ``import``, read in bounded memory."""

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import TextIO

from ..admin.transfer_file import MAX_KEY, STEP, FileError, FileKey, FileVersion

#: Characters that are read at a time.
_CHUNK = 1 << 16

_decode = json.JSONDecoder().raw_decode


class BodyFile:
    """A body of GET /keys: ``{"rooms": {...}}``, with the keys of one version.

    Attributes:
        user_id: None: the body names no user.
        versions: one version without a number, once the file is checked.
    """

    def __init__(self, stream: TextIO) -> None:
        self.user_id: str | None = None
        self.versions: list[FileVersion] = []
        self._stream = stream

    def check(self) -> Iterator[int]:
        """Read the file. Yield `STEP` after each `STEP` keys.

        Raises:
            FileError: the file is cut, or no body of GET /keys.
        """
        version = FileVersion(None, 0, 1)
        for _ in self.read_keys(version):
            version.keys += 1
            if version.keys % STEP == 0:
                yield STEP
        self.versions.append(version)

    def read_keys(self, version: FileVersion) -> Iterator[FileKey]:
        """Yield the keys.

        Raises:
            FileError: as in `check`.
        """
        self._stream.seek(version.start)
        scanner = _Scanner(self._stream)
        for name in scanner.members():
            scanner.require(name == "rooms")
            for room_id in scanner.members():
                for member in scanner.members():
                    scanner.require(member == "sessions")
                    for session_id in scanner.members():
                        yield FileKey(room_id, session_id, scanner.take_value())
        scanner.require(scanner.has_read and not scanner.peek())


class _Scanner:
    """A reader of JSON objects, with one member's value in memory.

    Attributes:
        has_read: Whether the name of a member was read.
    """

    def __init__(self, stream: TextIO) -> None:
        self.has_read = False
        self._stream = stream
        self._text = ""
        self._at = 0

    def require(self, is_expected: bool) -> None:
        """
        Raises:
            FileError: `is_expected` is False.
        """
        if is_expected:
            return
        if self.has_read:
            raise FileError("it is no body of GET /keys, or is cut or altered")
        raise FileError(
            "it is neither a file of synapse-roomkeys export nor a body of GET /keys"
        )

    def peek(self) -> str:
        """Return the next character that isn't white space; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text) or not self._fill():
                return self._text[self._at : self._at + 1]

    def members(self) -> Iterator[str]:
        """Yield the name of each member of an object. The caller takes the value."""
        self._skip("{")
        if self.peek() != "}":
            while True:
                self.require(self.peek() == '"')
                name = json.loads(self.take_value())
                self._skip(":")
                self.has_read = True
                yield name
                if self.peek() == "}":
                    break
                self._skip(",")
        self._skip("}")

    def take_value(self) -> bytes:
        """Take the next value; return its text."""
        self.require(self.peek() in ('"', "{"))
        while True:
            try:
                _, end = _decode(self._text, self._at)
                break
            except (ValueError, RecursionError):
                is_small = len(self._text) - self._at < MAX_KEY
                self.require(is_small and self._fill())
        text, self._at = self._text[self._at : end], end
        return text.encode()

    def _skip(self, char: str) -> None:
        self.require(self.peek() == char)
        self._at += 1

    def _fill(self) -> bool:
        """Double the buffered text at least, so that `take_value` decodes a long value
        a few times only. Return False at the end, or if the bytes aren't UTF-8."""
        left = self._text[self._at :]
        read = ""
        with suppress(UnicodeDecodeError):
            read = self._stream.read(max(_CHUNK, len(left)))
        self._text, self._at = left + read, 0
        return bool(read)

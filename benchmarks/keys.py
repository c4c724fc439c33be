"""Backed up keys of the sizes and shapes that real clients upload."""

import base64
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter

import attrs

BATCH = 200
BIG_ROOM_PERCENT = 12
_ROOMS = 400
_CIPHERTEXT_BYTES = 585
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@attrs.frozen
class Key:
    """One session's key, its data as JSON text."""

    room_id: str
    session_id: str
    first_message_index: int
    forwarded_count: int
    is_verified: bool
    session_data: str

    def json(self) -> str:
        """Write the key as clients upload it and servers hand it out."""
        verified = "true" if self.is_verified else "false"
        return (
            f'{{"first_message_index":{self.first_message_index},'
            f'"forwarded_count":{self.forwarded_count},'
            f'"is_verified":{verified},"session_data":{self.session_data}}}'
        )

    def better(self) -> "Key":
        """Return a key for the same session that reaches further back."""
        return attrs.evolve(self, first_message_index=0)


class KeySource:
    """An endless supply of distinct keys, the same ones for the same seed."""

    def __init__(self, seed: int = 20_26) -> None:
        """Name the rooms; the first is the big one, the others get ever smaller."""
        self._random = random.Random(seed)
        self._rooms = [self._room() for _ in range(_ROOMS)]
        weights = (1 / rank for rank in range(1, _ROOMS))
        self._weights = list(itertools.accumulate(weights))
        self._position = 0

    @property
    def big_room(self) -> str:
        """Name the room that has 12 of every 100 keys."""
        return self._rooms[0]

    def take(self, count: int) -> list[Key]:
        """Return the next keys."""
        return [self._key() for _ in range(count)]

    def batches(self, count: int, size: int = BATCH) -> Iterator[list[Key]]:
        """Return so many lots of new keys."""
        return (self.take(size) for _ in range(count))

    def _room(self) -> str:
        """Make up the id of a room."""
        name = "".join(self._random.choices(_LETTERS, k=18))
        return f"!{name}:test.example"

    def _key(self) -> Key:
        """Make up the next key; its position alone tells if it is the big room's."""
        room = self._rooms[0]
        if self._position % 25 not in (0, 8, 16):
            (room,) = self._random.choices(
                self._rooms[1:], cum_weights=self._weights, k=1
            )
        self._position += 1
        return Key(
            room_id=room,
            session_id=self._base64(32),
            first_message_index=self._random.randrange(1, 200),
            forwarded_count=0,
            is_verified=self._random.random() < 0.5,
            session_data=(
                f'{{"ephemeral":"{self._base64(32)}",'
                f'"ciphertext":"{self._base64(_CIPHERTEXT_BYTES)}",'
                f'"mac":"{self._base64(8)}"}}'
            ),
        )

    def _base64(self, size: int) -> str:
        """Encode random bytes as clients do, without padding."""
        return base64.b64encode(self._random.randbytes(size)).decode().rstrip("=")


def by_room(keys: Iterable[Key]) -> dict[str, list[Key]]:
    """Sort keys by the room that they belong to."""
    ordered = sorted(keys, key=attrgetter("room_id"))
    grouped = itertools.groupby(ordered, key=attrgetter("room_id"))
    return {room: list(group) for room, group in grouped}


def backup_lines(keys: Iterable[Key]) -> Iterator[str]:
    """Write a whole backup as JSON, in many pieces."""
    yield '{"rooms":{'
    separator = ""
    for room, members in by_room(keys).items():
        yield f'{separator}"{room}":{{"sessions":{{'
        yield from session_lines(members)
        yield "}}"
        separator = ","
    yield "}}"


def session_lines(keys: Sequence[Key]) -> Iterator[str]:
    """Write the sessions of one room as JSON, one key a piece."""
    last = len(keys) - 1
    for index, key in enumerate(keys):
        end = "" if index == last else ","
        yield f'"{key.session_id}":{key.json()}{end}'


def body(keys: Iterable[Key]) -> bytes:
    """Write an upload of keys."""
    return "".join(backup_lines(keys)).encode()

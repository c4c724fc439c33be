"""Test keys with the sizes and shapes of real clients' uploads."""

import base64
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter

import attrs

# Keys in an upload of many.
BATCH = 200
_ROOM_COUNT = 400
_CIPHERTEXT_BYTES = 585
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@attrs.frozen
class Key:
    """The key of a session; session_data is JSON text."""

    room_id: str
    session_id: str
    first_message_index: int
    forwarded_count: int
    is_verified: bool
    session_data: str

    def to_json(self) -> str:
        """Return the key as JSON, as clients upload it and servers return it."""
        verified = "true" if self.is_verified else "false"
        return (
            f'{{"first_message_index":{self.first_message_index},'
            f'"forwarded_count":{self.forwarded_count},'
            f'"is_verified":{verified},"session_data":{self.session_data}}}'
        )

    def better(self) -> "Key":
        """Return a better key for the same session: its first message index is 0."""
        return attrs.evolve(self, first_message_index=0)


class KeySource:
    """Endless generator of distinct keys, reproducible by its seed."""

    def __init__(self, seed: int = 20_26) -> None:
        """Choose the room ids: a big room, then rooms of decreasing size."""
        self._random = random.Random(seed)
        self._rooms = [self._random_room_id() for _ in range(_ROOM_COUNT)]
        weights = (1 / rank for rank in range(1, _ROOM_COUNT))
        self._weights = list(itertools.accumulate(weights))
        self._position = 0

    @property
    def big_room(self) -> str:
        """Return the id of the room that holds 12 % of the keys."""
        return self._rooms[0]

    def next_keys(self, count: int) -> list[Key]:
        """Return the next keys."""
        return [self._random_key() for _ in range(count)]

    def batches(self, count: int, size: int = BATCH) -> Iterator[list[Key]]:
        """Return an iterator over batches of new keys."""
        return (self.next_keys(size) for _ in range(count))

    def _random_room_id(self) -> str:
        """Return a new random room id."""
        name = "".join(self._random.choices(_LETTERS, k=18))
        return f"!{name}:test.example"

    def _random_key(self) -> Key:
        """Return the next key.

        Three of every 25 positions belong to the big room, for every seed.
        """
        room = self._rooms[0]
        if self._position % 25 not in (0, 8, 16):
            (room,) = self._random.choices(
                self._rooms[1:], cum_weights=self._weights, k=1
            )
        self._position += 1
        return Key(
            room_id=room,
            session_id=self._random_base64(32),
            first_message_index=self._random.randrange(1, 200),
            forwarded_count=0,
            is_verified=self._random.random() < 0.5,
            session_data=(
                f'{{"ephemeral":"{self._random_base64(32)}",'
                f'"ciphertext":"{self._random_base64(_CIPHERTEXT_BYTES)}",'
                f'"mac":"{self._random_base64(8)}"}}'
            ),
        )

    def _random_base64(self, size: int) -> str:
        """Return random bytes in base64 without padding, as clients encode them."""
        return base64.b64encode(self._random.randbytes(size)).decode().rstrip("=")


def by_room(keys: Iterable[Key]) -> dict[str, list[Key]]:
    """Group keys by room id."""
    ordered = sorted(keys, key=attrgetter("room_id"))
    grouped = itertools.groupby(ordered, key=attrgetter("room_id"))
    return {room: list(group) for room, group in grouped}


def backup_json_pieces(keys: Iterable[Key]) -> Iterator[str]:
    """Serialise a whole backup as JSON, in many pieces."""
    yield '{"rooms":{'
    separator = ""
    for room, room_keys in by_room(keys).items():
        yield f'{separator}"{room}":{{"sessions":{{'
        yield from session_json_pieces(room_keys)
        yield "}}"
        separator = ","
    yield "}}"


def session_json_pieces(keys: Sequence[Key]) -> Iterator[str]:
    """Serialise the members of a room's ``sessions`` as JSON, a piece a key."""
    last = len(keys) - 1
    for index, key in enumerate(keys):
        end = "" if index == last else ","
        yield f'"{key.session_id}":{key.to_json()}{end}'


def upload_body(keys: Iterable[Key]) -> bytes:
    """Serialise keys as the body of an upload."""
    return "".join(backup_json_pieces(keys)).encode()

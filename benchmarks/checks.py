"""Makes sure, outside what is timed, that the servers do the work that is timed."""

import json
from collections.abc import Sequence

from .backups import Backups
from .keys import Key, by_room


def check_count(backups: Backups, count: int) -> None:
    """Stop unless all keys are there."""
    for name, backup in backups.items():
        database = backup.subject.database
        _same(name, database.count(backup.account.user_id, backup.version), count)


def check_key(backups: Backups, key: Key) -> None:
    """Stop unless a key is handed out as it was put in."""
    for name, backup in backups.items():
        _same(name, backup.fetch(backup.get_key(key)), _decoded(key))


def check_downloads(backups: Backups, keys: Sequence[Key], room_id: str) -> None:
    """Stop unless one key, a room and everything are handed out as they were put in."""
    check_key(backups, keys[0])
    expected = {
        room: {"sessions": {key.session_id: _decoded(key) for key in members}}
        for room, members in by_room(keys).items()
    }
    for name, backup in backups.items():
        _same(name, backup.fetch(backup.get_room(room_id)), expected[room_id])
        _same(name, backup.fetch(backup.get_whole()), {"rooms": expected})


def _decoded(key: Key) -> object:
    """Return a key as it is to come back."""
    return json.loads(key.json())


def _same(name: str, got: object, expected: object) -> None:
    """Stop if a server has something else than was stored."""
    if got != expected:
        raise AssertionError(f"{name} has something else than was stored")

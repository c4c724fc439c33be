"""Checks, outside the timed sections, that every server did the measured work."""

import json
from collections.abc import Sequence

from .backups import Backups
from .keys import Key, by_room


def check_key_count(backups: Backups, count: int) -> None:
    """Raise AssertionError unless each backup has so many keys in the database."""
    for name, backup in backups.items():
        database = backup.server.database
        _check_equal(
            name, database.count_keys(backup.account.user_id, backup.version), count
        )


def check_key(backups: Backups, key: Key) -> None:
    """Raise AssertionError unless each server returns a key as it was uploaded."""
    for name, backup in backups.items():
        _check_equal(name, backup.fetch(backup.get_key(key)), _expected_key(key))


def check_downloads(backups: Backups, keys: Sequence[Key], room_id: str) -> None:
    """Raise AssertionError unless each server returns the stored keys unchanged.

    Downloads of the first key, of a room and of the whole backup are checked.
    """
    check_key(backups, keys[0])
    expected = {
        room: {"sessions": {key.session_id: _expected_key(key) for key in members}}
        for room, members in by_room(keys).items()
    }
    for name, backup in backups.items():
        _check_equal(name, backup.fetch(backup.get_room(room_id)), expected[room_id])
        _check_equal(name, backup.fetch(backup.get_whole()), {"rooms": expected})


def _expected_key(key: Key) -> object:
    """Return the decoded JSON of a key, as a download must return it."""
    return json.loads(key.to_json())


def _check_equal(name: str, got: object, expected: object) -> None:
    """Raise AssertionError with the server's name if two values differ."""
    if got != expected:
        raise AssertionError(f"{name} differs from the uploaded keys")

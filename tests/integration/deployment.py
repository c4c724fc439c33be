"""Homeservers that the tests run with the plugin and without, and their backups.

"Built-in" is Synapse without the plugin, with Synapse's own endpoints.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs
import psycopg2

from ..backup_client import Api
from ..contract.base import (
    ALGORITHM,
    NO_VERSION,
    Rooms,
    accepted,
    key,
    keys_path,
    refused,
    same,
    tally,
    version_path,
)
from ..servers import Synapse, User

ROOM = "!old/room+:test.example"
OTHER_ROOM = "!newer_room_without_a_server"
SESSION = "a/b+c/d+e"
HIGHEST = 2**31 - 1
#: A value of each JSON type, for fields that the server must not interpret.
OPAQUE = {
    "string": "text",
    "object": {"ephemeral": "a/b+", "unknown": [1, None, {"": True}]},
    "array": [[], {}, "", 0],
    "number": -1.5e300,
    "integer": 2**53 + 1,
    "boolean": False,
    "text": 'é € 🔑 \u0000 \u2028 \\ " \n',
    "NUL": {"\u0000": "\u0000"},
}

_numbers = count()
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@attrs.frozen
class Deployment:
    """The directory and database of one homeserver.

    Attributes:
        directory: the directory of configuration, log and SQLite file.
        database: psycopg2's arguments, or None for the SQLite file.
    """

    directory: Path
    database: Mapping[str, Any] | None

    @contextmanager
    def serve(
        self, *, plugin: bool, options: Mapping[str, Any] = _NOTHING
    ) -> Iterator[Synapse]:
        """Run Synapse for the context, and check that the log has no errors afterwards.

        Args:
            plugin: whether Synapse loads the plugin.
            options: the plugin's options.
        """
        for name in ("homeserver.log", "output.txt"):
            (self.directory / name).unlink(missing_ok=True)
        server = Synapse(
            self.directory,
            database=self.database,
            module_config=options if plugin else None,
        )
        with server:
            assert ("synapse_roomkeys" in server.log()) is plugin
            yield server
        check_log(server)

    def sql(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Run one statement in a connection of its own and commit.

        Returns:
            The rows, or an empty list for a statement without a result.
        """
        connection: Any
        if self.database is None:
            connection = sqlite3.connect(self.directory / "homeserver.db")
        else:
            connection = psycopg2.connect(**self.database)
            statement = statement.replace("?", "%s")
        with closing(connection), closing(connection.cursor()) as cursor:
            cursor.execute(statement, parameters)
            rows = cursor.fetchall() if cursor.description else []
            connection.commit()
        return rows

    def check_count(self, user: User, api: Api, version: str) -> None:
        """Check that the reported count and the cached count equal the number of rows.

        Args:
            user: the owner of the backup.
            api: the user's client.
            version: the version of the backup.
        """
        where = (user.user_id, int(version))
        ((rows,),) = self.sql(
            "SELECT COUNT(*) FROM e2e_room_keys WHERE user_id = ? AND version = ?",
            *where,
        )
        etag, counted = api.tally(version)
        assert counted == rows
        cached = self.sql(
            "SELECT etag, key_count FROM roomkeys_counts"
            " WHERE user_id = ? AND version = ?",
            *where,
        )
        assert cached == [(etag, counted)]


def check_log(server: Synapse) -> None:
    """Check that a server's log has no traceback, error or log context warning.

    The plugin's line about a key with invalid session_data is the exception, because
    the tests store such keys.
    """
    lines = server.log().splitlines()
    marks = ("Traceback", " ERROR ", " CRITICAL ", "context")
    allowed = "Left out a key: its session_data isn't JSON"
    found = [line for line in lines if any(mark in line for mark in marks)]
    assert [line for line in found if allowed not in line] == []


def client(server: Synapse, user: User) -> Api:
    """Return a client of a user at a server."""
    return Api(server.url, user.access_token)


def new_user(server: Synapse) -> User:
    """Register a user with a new name."""
    return server.register(f"adopted{next(_numbers)}")


def answers(api: Api, version: str, rooms: Rooms) -> dict[str, Any]:
    """Return all answers about a backup, by path: the version, all keys, rooms,
    sessions."""
    paths = [version_path(version), keys_path(version)]
    paths += [keys_path(version, room) for room in rooms]
    paths += [keys_path(version, room, s) for room in rooms for s in rooms[room]]
    return {path: accepted(api.get(path), path) for path in paths}


def check_unknown(api: Api, version: str, text: str = NO_VERSION) -> None:
    """Check that each GET request for a version is answered 404.

    Args:
        api: the client.
        version: the version.
        text: the expected error text for the version itself, which is different in
            Synapse's own endpoint.
    """
    answer = api.get(version_path(version))
    refused(answer, 404, "M_NOT_FOUND", error=text, row="version")
    for ids in ((), (ROOM,), (ROOM, SESSION)):
        path = keys_path(version, *ids)
        refused(api.get(path), 404, "M_NOT_FOUND", error=NO_VERSION, row=path)


def make_rooms(mark: str) -> Rooms:
    """Build keys in three rooms, one room with session_data of each JSON type."""
    awkward = {f"{name}/+=": key(2, 1, True, data) for name, data in OPAQUE.items()}
    plain = {SESSION: key(3, 4, False, mark), "é🔑": key(HIGHEST, HIGHEST, True, mark)}
    return {ROOM: awkward | plain, OTHER_ROOM: plain, "!third:test.example": plain}


@attrs.frozen
class Owner:
    """A user with a backup.

    Attributes:
        user: the user.
        version: the version of the backup.
        rooms: the keys that were uploaded.
    """

    user: User
    version: str
    rooms: Rooms


def back_up(server: Synapse, user: User, rooms: Rooms, auth_data: Any) -> Owner:
    """Create a backup with the given keys through the running server's endpoints."""
    api = client(server, user)
    version = api.create_version(auth_data)
    api.upload(version, rooms)
    return Owner(user, version, rooms)


def change(api: Api, version: str, rows: int, etag: int) -> None:
    """Do each kind of write to a backup made of `make_rooms`.

    Three keys are deleted and one is added, with a check of etag and count after each
    write.

    Args:
        api: the owner's client.
        version: the version of the backup.
        rows: the number of keys before.
        etag: the etag before.
    """
    path = keys_path(version, ROOM, SESSION)
    assert tally(api.put(path, key(0, 0, True, "better"))) == (etag + 1, rows)
    assert api.upload(version, {"!new": {SESSION: key()}}) == (etag + 2, rows + 1)
    answer = api.delete(keys_path(version, ROOM, "string/+="))
    assert tally(answer) == (etag + 3, rows)
    answer = api.delete(keys_path(version, OTHER_ROOM))
    assert tally(answer) == (etag + 4, rows - 2)
    body = {"algorithm": ALGORITHM, "auth_data": OPAQUE | {"updated": True}}
    same(accepted(api.put(version_path(version), body)), {})
    same(api.info(version)["auth_data"], body["auth_data"])

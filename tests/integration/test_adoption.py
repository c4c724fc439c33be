"""Backups in a homeserver before, with and after the plugin.

"Built-in" is Synapse without the plugin, with Synapse's own endpoints.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs
import psycopg2
import pytest

from ..backup_client import Api
from ..contract.base import (
    ALGORITHM,
    NO_KEY,
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
LONG_ID = "x" * 1000
HIGHEST = 2**31 - 1
#: The worst valid key by the specification's order.
WORST_KEY = key(HIGHEST, HIGHEST, False, {"the": "worst"})

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


# Rows that no well-behaved client uploads


@attrs.frozen
class BadRow:
    """A row with values that an upload through the plugin can't contain.

    Attributes:
        uploaded: the key as uploaded to Synapse's own endpoint.
        served: the key as the plugin returns the row, or None if hidden.
        change: the SET clause of an UPDATE that follows the upload, or None.
    """

    uploaded: dict[str, Any]
    served: dict[str, Any] | None
    change: str | None = None


BAD_ROWS = {
    "no_index": BadRow(key(None), key(0)),
    "no_forwarded": BadRow(key(5, None), key(5, 0)),
    "no_verified": BadRow(key(5), key(5), "is_verified = NULL"),
    "no_index_but_verified": BadRow(key(None, 0, True), key(0, 0, True)),
    "nothing": BadRow(key(None, None), key(), "is_verified = NULL"),
    "no_data": BadRow(key(0, 0, True, None), None),
    "no_data_nor_index": BadRow(key(None, None, True, None), None),
    "no_json": BadRow(key(0, 0, True), None, "session_data = 'not json'"),
    "no_json_alone": BadRow(
        key(0, 0, True), None, """session_data = '1},"x":{"y":2'"""
    ),
}
SQLITE_BAD_ROWS = {
    "text": BadRow(key("abc"), key(0)),
    "text_forwarded": BadRow(key(1, "abc"), key(1, 0)),
    "fraction": BadRow(key(1.5), key(0)),
    "huge": BadRow(key(2**40), key(2**40)),
    "blob": BadRow(key(1), key(0), "first_message_index = x'00ff'"),
}
#: Number of backups with bad rows, one for each test that changes such a backup.
BAD_BACKUPS = 5
GOOD_ROWS = {"before": key(1, 2, True), "zz_after": key(3, 4, False, {"a": None})}


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


@attrs.frozen
class Adopted:
    """A homeserver that was used without the plugin and now runs with the plugin.

    Attributes:
        deployment: the directory and database.
        server: the running Synapse with the plugin.
        owner: a user with a current backup that both implementations read alike.
        older: an older backup of the same user, with a string as auth_data.
        expected: the built-in endpoints' answers about these two backups, by version.
        deleted: a deleted version of the same user.
        large: a backup of several pages.
        long: a backup with ids that are now refused in uploads.
        bad_rows: the bad rows in each backup of `bad_backups`, by session id.
        bad_backups: backups with bad rows; each test takes another backup.
    """

    deployment: Deployment
    server: Synapse
    owner: Owner
    older: Owner
    expected: dict[str, dict[str, Any]]
    deleted: str
    large: Owner
    long: Owner
    bad_rows: dict[str, BadRow]
    bad_backups: Iterator[Owner]

    def api(self, owner: Owner) -> Api:
        """Return the client of a backup's owner."""
        return client(self.server, owner.user)

    def check_count(self, owner: Owner) -> None:
        """Check the reported and the cached count of a backup against its rows."""
        self.deployment.check_count(owner.user, self.api(owner), owner.version)


def back_up(server: Synapse, user: User, rooms: Rooms, auth_data: Any) -> Owner:
    """Create a backup with the given keys through the running server's endpoints."""
    api = client(server, user)
    version = api.create_version(auth_data)
    api.upload(version, rooms)
    return Owner(user, version, rooms)


def back_up_bad_rows(server: Synapse, bad_rows: Mapping[str, BadRow]) -> Owner:
    """Create a backup of good rows, and of bad rows as far as uploads allow."""
    uploaded = {name: row.uploaded for name, row in bad_rows.items()}
    rooms = {ROOM: GOOD_ROWS | uploaded, OTHER_ROOM: GOOD_ROWS}
    return back_up(server, new_user(server), rooms, {})


def write_invalid_values(
    deployment: Deployment, bad_backups: list[Owner], bad_rows: Mapping[str, BadRow]
) -> None:
    """Write the values that no upload allows, straight to the database.

    The changes of `bad_rows` apply to all users. The etags of `bad_backups` become
    NULL.
    """
    for name, row in bad_rows.items():
        if row.change is not None:
            statement = f"UPDATE e2e_room_keys SET {row.change} WHERE session_id = ?"
            deployment.sql(statement, name)
    for bad_backup in bad_backups:
        statement = "UPDATE e2e_room_keys_versions SET etag = NULL WHERE user_id = ?"
        deployment.sql(statement, bad_backup.user.user_id)


def back_up_many(server: Synapse) -> Owner:
    """Create a backup with 1,103 keys in a room, few in 200 rooms, and unusual ids."""
    ids = [f"{number}/+=" for number in range(1100)]
    few = {"": key(1), LONG_ID: key(2), "\U0001f511": key(3)}
    rooms: Rooms = {f"!{number}": few for number in range(200)}
    rooms |= {"!0": dict.fromkeys(ids, key()) | few, "": few}
    return back_up(server, new_user(server), rooms, {})


def back_up_long_ids(server: Synapse) -> Owner:
    """Create a backup with empty ids and ids of 1,000 characters."""
    ids = {"": key(1), LONG_ID: key(2), "short": key(3)}
    rooms: Rooms = {ROOM: ids, LONG_ID: ids, "": ids}
    return back_up(server, new_user(server), rooms, {})


@pytest.fixture(scope="module")
def new_deployment(
    database: Callable[[], Mapping[str, Any] | None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[], Deployment]:
    """Function that creates the directory and database of a new homeserver."""
    return lambda: Deployment(tmp_path_factory.mktemp("deployment"), database())


@pytest.fixture(scope="module")
def adopted_server(
    new_deployment: Callable[[], Deployment], engine: str
) -> Iterator[Adopted]:
    """A homeserver that was used without the plugin and now runs with the plugin."""
    deployment = new_deployment()
    bad_rows = BAD_ROWS | (SQLITE_BAD_ROWS if engine == "sqlite" else {})
    with deployment.serve(plugin=False) as builtin:
        user = new_user(builtin)
        older = back_up(builtin, user, make_rooms("older"), "text é")
        deleted = back_up(builtin, user, make_rooms("deleted"), {}).version
        accepted(client(builtin, user).delete(version_path(deleted)))
        owner = back_up(builtin, user, make_rooms("newer"), OPAQUE)
        expected = {
            backup.version: answers(client(builtin, user), backup.version, backup.rooms)
            for backup in (older, owner)
        }
        large, long = back_up_many(builtin), back_up_long_ids(builtin)
        bad_backups = [back_up_bad_rows(builtin, bad_rows) for _ in range(BAD_BACKUPS)]
    write_invalid_values(deployment, bad_backups, bad_rows)
    with deployment.serve(plugin=True) as server:
        yield Adopted(
            deployment=deployment,
            server=server,
            owner=owner,
            older=older,
            expected=expected,
            deleted=deleted,
            large=large,
            long=long,
            bad_rows=bad_rows,
            bad_backups=iter(bad_backups),
        )


@pytest.fixture
def adopted(adopted_server: Adopted) -> Iterator[Adopted]:
    """The homeserver of `adopted_server`; the log is checked after each test."""
    yield adopted_server
    check_log(adopted_server.server)


def test_builtin_backups_are_served(adopted: Adopted) -> None:
    """The plugin answers each read of a built-in backup as Synapse did, with the same
    count."""
    for owner in (adopted.owner, adopted.older):
        api = adopted.api(owner)
        expected = adopted.expected[owner.version]
        same(answers(api, owner.version, owner.rooms), expected)
        adopted.check_count(owner)
    assert adopted.api(adopted.owner).info()["version"] == adopted.owner.version


def test_versions_deleted_without_the_plugin_are_unknown(adopted: Adopted) -> None:
    """A version deleted without the plugin is unknown; deleting the version again
    succeeds."""
    api = adopted.api(adopted.owner)
    check_unknown(api, adopted.deleted)
    same(accepted(api.delete(version_path(adopted.deleted))), {})
    check_unknown(api, adopted.deleted)


def test_an_older_builtin_version_is_not_current(adopted: Adopted) -> None:
    """An upload to an older built-in version is refused and names the current
    version."""
    answer = adopted.api(adopted.older).put(
        keys_path(adopted.older.version), {"rooms": {}}
    )
    body = refused(answer, 403, "M_WRONG_ROOM_KEYS_VERSION")
    assert body["current_version"] == adopted.owner.version


def served_keys(adopted: Adopted, owner: Owner) -> Rooms:
    """Return the keys served by the plugin for a backup with bad rows."""
    served = {name: row.served for name, row in adopted.bad_rows.items() if row.served}
    return {ROOM: GOOD_ROWS | served, OTHER_ROOM: GOOD_ROWS}


def test_bad_rows_are_served(adopted: Adopted) -> None:
    """Numbers that are NULL or invalid read as 0, booleans that are NULL read as false.

    The whole backup, the room and the session have the same keys. A key is left out if
    session_data is null or invalid JSON. Each download of a key with invalid JSON logs
    a line.
    """
    owner = next(adopted.bad_backups)
    api = adopted.api(owner)
    want = served_keys(adopted, owner)
    same(api.download(owner.version), want)
    for room, sessions in want.items():
        answer = api.get(keys_path(owner.version, room))
        same(accepted(answer), {"sessions": sessions})
    for name in owner.rooms[ROOM]:
        answer = api.get(keys_path(owner.version, ROOM, name))
        if name in want[ROOM]:
            same(accepted(answer), want[ROOM][name], name)
        else:
            refused(answer, 404, "M_NOT_FOUND", error=NO_KEY, row=name)
    for name in ("no_json", "no_json_alone"):
        line = (
            f"Left out a key: its session_data isn't JSON: user={owner.user.user_id}"
            f' version={owner.version} room="{ROOM}" session="{name}"'
        )
        assert adopted.server.log().count(line) == 3
    adopted.check_count(owner)


def test_a_null_etag_reads_as_zero(adopted: Adopted) -> None:
    """A NULL etag reads as 0, becomes 1 at the first change, and the count is exact."""
    owner = next(adopted.bad_backups)
    api = adopted.api(owner)
    rows = len(owner.rooms[ROOM]) + len(owner.rooms[OTHER_ROOM])
    assert [api.tally(owner.version) for _ in range(2)] == [(0, rows)] * 2
    assert api.upload(owner.version, {ROOM: GOOD_ROWS}) == (0, rows)
    assert api.upload(owner.version, {ROOM: {"new": key()}}) == (1, rows + 1)
    adopted.check_count(owner)


def test_any_valid_key_replaces_a_bad_row(adopted: Adopted) -> None:
    """The worst valid key replaces a bad row, and the stored key is valid from then
    on."""
    owner = next(adopted.bad_backups)
    api = adopted.api(owner)
    etag, rows = api.tally(owner.version)
    for number, name in enumerate(adopted.bad_rows, 1):
        path = keys_path(owner.version, ROOM, name)
        for _ in range(2):
            assert tally(api.put(path, WORST_KEY), name) == (etag + number, rows), name
        same(accepted(api.get(path)), WORST_KEY, name)
    adopted.check_count(owner)


def test_one_upload_replaces_all_bad_rows(adopted: Adopted) -> None:
    """One upload with a valid key for each bad row replaces all bad rows."""
    owner = next(adopted.bad_backups)
    api = adopted.api(owner)
    _, rows = api.tally(owner.version)
    good = {name: key(0, 0, True, "good") for name in adopted.bad_rows}
    kept = {name: key(9, 9, False, "not kept") for name in GOOD_ROWS}
    assert api.upload(owner.version, {ROOM: kept | good}) == (1, rows)
    same(api.download(owner.version)[ROOM], GOOD_ROWS | good)
    adopted.check_count(owner)


def test_bad_rows_can_be_deleted(adopted: Adopted) -> None:
    """Bad rows can be deleted like any key, including rows hidden from downloads."""
    owner = next(adopted.bad_backups)
    api = adopted.api(owner)
    etag, rows = api.tally(owner.version)
    for number, name in enumerate(adopted.bad_rows, 1):
        answer = api.delete(keys_path(owner.version, ROOM, name))
        assert tally(answer, name) == (etag + number, rows - number)
    same(api.download(owner.version), {ROOM: GOOD_ROWS, OTHER_ROOM: GOOD_ROWS})
    adopted.check_count(owner)


def test_a_large_builtin_backup_is_served(adopted: Adopted) -> None:
    """A built-in backup of several pages downloads completely, unusual ids included."""
    owner = adopted.large
    same(adopted.api(owner).download(owner.version), owner.rooms)
    adopted.check_count(owner)


def test_long_and_empty_ids_are_served_and_deleted(adopted: Adopted) -> None:
    """Old rows with ids that uploads now refuse are downloaded and counted.

    Such rows are deleted with their room or with the whole backup, because their own
    paths are refused.
    """
    owner = adopted.long
    api = adopted.api(owner)
    assert api.tally(owner.version) == (1, 9)
    same(api.download(owner.version), owner.rooms)
    answer = api.get(keys_path(owner.version, ROOM))
    same(accepted(answer), {"sessions": owner.rooms[ROOM]})
    adopted.check_count(owner)
    for path in (
        keys_path(owner.version, LONG_ID),
        keys_path(owner.version, ROOM, LONG_ID),
    ):
        refused(api.get(path), 400, "M_INVALID_PARAM", row=path[:20])
    refused(api.get(keys_path(owner.version, ROOM, "")), 404, "M_UNRECOGNIZED")
    new = {ROOM: {"short": key(2), "new": key()}}
    assert api.upload(owner.version, new) == (2, 10)
    assert tally(api.delete(keys_path(owner.version, ROOM))) == (3, 6)
    assert tally(api.delete(keys_path(owner.version))) == (4, 0)
    adopted.check_count(owner)


def test_builtin_backups_accept_writes(
    new_deployment: Callable[[], Deployment],
) -> None:
    """A built-in backup accepts uploads, updates and deletions, and a new version
    follows."""
    deployment = new_deployment()
    with deployment.serve(plugin=False) as builtin:
        owner = back_up(builtin, new_user(builtin), make_rooms("builtin"), "text")
    with deployment.serve(plugin=True) as server:
        api = client(server, owner.user)
        etag, rows = api.tally(owner.version)
        change(api, owner.version, rows, etag)
        deployment.check_count(owner.user, api, owner.version)
        old = api.download(owner.version)
        version = api.create_version()
        assert int(version) > int(owner.version)
        assert api.info()["version"] == version
        same(api.download(owner.version), old)
        accepted(api.delete(version_path(version)))
        assert api.info()["version"] == owner.version


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


# Removal and return of the plugin


@attrs.frozen
class Written:
    """A user's backups, written with the plugin before the plugin was removed.

    Attributes:
        user: the user.
        before: keys and the plugin's answers, by version, for each version not deleted.
        older: the older version.
        current: the current version.
        deleted: the newest version, since deleted.
    """

    user: User
    before: dict[str, tuple[Rooms, dict[str, Any]]]
    older: str
    current: str
    deleted: str


def test_the_plugin_can_be_removed_and_added_again(
    new_deployment: Callable[[], Deployment],
) -> None:
    """Synapse without the plugin serves and continues backups made with the plugin.

    Afterwards the plugin serves and continues the built-in writes, with exact counts.
    """
    deployment = new_deployment()
    with deployment.serve(plugin=True) as server:
        written = write_with_plugin(deployment, server)
    with deployment.serve(plugin=False) as builtin:
        check_without_plugin(client(builtin, written.user), written)
        new_version = write_without_plugin(client(builtin, written.user), written)
        expected = all_answers(
            client(builtin, written.user), written.current, new_version
        )
    with deployment.serve(plugin=True) as server:
        api = client(server, written.user)
        same(all_answers(api, written.current, new_version), expected)
        check_unknown(api, written.deleted)
        check_unknown(api, written.older)
        continue_with_plugin(deployment, api, written, new_version)


def write_with_plugin(deployment: Deployment, server: Synapse) -> Written:
    """Create three versions with each kind of content, and delete the last."""
    user = new_user(server)
    api = client(server, user)
    older = api.create_version("text é")
    etag, rows = api.upload(older, make_rooms("older"))
    change(api, older, rows, etag)
    current = api.create_version(OPAQUE)
    api.upload(current, make_rooms("current"))
    deleted = api.create_version()
    api.upload(deleted, make_rooms("deleted"))
    accepted(api.delete(version_path(deleted)))
    before: dict[str, tuple[Rooms, dict[str, Any]]] = {}
    for version in (older, current):
        rooms = api.download(version)
        before[version] = rooms, answers(api, version, rooms)
        deployment.check_count(user, api, version)
    return Written(user, before, older, current, deleted)


def check_without_plugin(api: Api, written: Written) -> None:
    """Check that Synapse's own endpoints answer as the plugin did."""
    for version, (rooms, expected) in written.before.items():
        same(answers(api, version, rooms), expected)
    assert api.info()["version"] == written.current
    check_unknown(api, written.deleted, "No backup found")


def write_without_plugin(api: Api, written: Written) -> str:
    """Change the current version without the plugin, and return a newer version."""
    etag, rows = api.tally(written.current)
    new = {"!by_builtin": {SESSION: key(1), "two": key(2)}}
    assert api.upload(written.current, new) == (etag + 1, rows + 2)
    better = key(0, 0, True, {"by": "builtin"})
    answer = api.put(keys_path(written.current, ROOM, SESSION), better)
    assert tally(answer) == (etag + 2, rows + 2)
    answer = api.delete(keys_path(written.current, OTHER_ROOM, SESSION))
    assert tally(answer) == (etag + 3, rows + 1)
    body = {"algorithm": ALGORITHM, "auth_data": {"updated by": "builtin"}}
    same(accepted(api.put(version_path(written.current), body)), {})
    assert api.tally(written.current) == (etag + 3, rows + 1)
    accepted(api.delete(version_path(written.older)))
    version = api.create_version("made by builtin")
    assert int(version) > int(written.deleted)
    assert api.upload(version, make_rooms("by builtin")) == (1, rows)
    return version


def all_answers(api: Api, *versions: str) -> list[Any]:
    """Return the answers about some versions, and about the current version."""
    found: list[Any] = [api.info()]
    for version in versions:
        rooms = api.download(version)
        found.append(answers(api, version, rooms))
    return found


def continue_with_plugin(
    deployment: Deployment, api: Api, written: Written, version: str
) -> None:
    """Check that counts are exact after writes without the plugin, and after the
    next."""
    for known in (written.current, version):
        deployment.check_count(written.user, api, known)
    etag, rows = api.tally(version)
    change(api, version, rows, etag)
    deployment.check_count(written.user, api, version)
    answer = api.put(keys_path(written.current), {"rooms": {}})
    body = refused(answer, 403, "M_WRONG_ROOM_KEYS_VERSION")
    assert body["current_version"] == version
    assert int(api.create_version()) > int(version)


def test_the_first_write_with_the_plugin_recounts(
    new_deployment: Callable[[], Deployment],
) -> None:
    """After built-in writes, the first write with the plugin reports an exact count.

    The first write is an upload or a deletion, with or without a change.
    """
    deployment = new_deployment()
    with deployment.serve(plugin=True) as server:
        users = [new_user(server) for _ in range(4)]
        owners = [back_up(server, user, make_rooms("plugin"), {}) for user in users]
    with deployment.serve(plugin=False) as builtin:
        for owner in owners:
            api = client(builtin, owner.user)
            state = api.upload(owner.version, {"!by_builtin": {"1": key(), "2": key()}})
    etag, rows = state
    with deployment.serve(plugin=True) as server:
        writes = (
            ("PUT", keys_path("%", "!new", "3"), key(), (etag + 1, rows + 1)),
            ("PUT", keys_path("%", "!by_builtin", "1"), key(1), (etag, rows)),
            ("DELETE", keys_path("%", "!by_builtin"), None, (etag + 1, rows - 2)),
            ("DELETE", keys_path("%", "!none"), None, (etag, rows)),
        )
        for owner, (method, path, body, want) in zip(owners, writes, strict=True):
            api = client(server, owner.user)
            path = path.replace("%25", owner.version)
            assert tally(api.request(method, path, body)) == want
            deployment.check_count(owner.user, api, owner.version)


def test_kept_versions_stay_hidden_without_the_plugin(
    new_deployment: Callable[[], Deployment],
) -> None:
    """Synapse's own endpoints show no key of a deleted version that is kept, and leave
    the key, the replaced keys and the record to the plugin that is loaded again."""
    deployment = new_deployment()
    kept = ("e2e_room_keys", "roomkeys_deleted", "roomkeys_replaced")
    options = {"deleted_versions_days": 3}
    with deployment.serve(plugin=True, options=options) as server:
        user = new_user(server)
        owner = back_up(server, user, {ROOM: {SESSION: key(1)}}, {"kept": True})
        api = client(server, user)
        api.upload(owner.version, {ROOM: {SESSION: key(2, verified=True)}})
        accepted(api.delete(version_path(owner.version)))
        newer = api.create_version()
    with deployment.serve(plugin=False) as builtin:
        api = client(builtin, user)
        check_unknown(api, owner.version, "No backup found")
        same(api.download(newer), {})
        assert api.upload(newer, {ROOM: {SESSION: key(3)}}) == (1, 1)
        same(api.download(newer), {ROOM: {SESSION: key(3)}})
    where = "WHERE user_id = ? AND version = ?"
    for table in kept:
        rows = deployment.sql(
            f"SELECT 1 FROM {table} {where}", user.user_id, int(owner.version)
        )
        assert len(rows) == 1, table
    with deployment.serve(plugin=True) as server:
        check_unknown(client(server, user), owner.version)
        for table in kept:
            statement = f"SELECT 1 FROM {table} {where}"
            wait_until_empty(deployment, statement, user.user_id, int(owner.version))
        same(client(server, user).download(newer), {ROOM: {SESSION: key(3)}})
    acts = deployment.sql("SELECT act FROM roomkeys_changes ORDER BY changed_ms")
    made = ["create_version", "upload", "upload", "delete_version", "create_version"]
    assert [act for (act,) in acts] == made


def wait_until_empty(deployment: Deployment, query: str, *parameters: Any) -> None:
    """Wait until a query returns no row; fail after 30 s."""
    end = time.monotonic() + 30
    while deployment.sql(query, *parameters):
        assert time.monotonic() < end, query
        time.sleep(0.1)

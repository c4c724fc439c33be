"""Backups of Synapse's own endpoints, served by the plugin that is then loaded.

"Built-in" is Synapse without the plugin, with Synapse's own endpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import pytest

from ..backup_client import Api
from ..contract.base import (
    NO_KEY,
    Rooms,
    accepted,
    key,
    keys_path,
    refused,
    same,
    tally,
    version_path,
)
from ..servers import Synapse
from .deployment import (
    HIGHEST,
    OPAQUE,
    OTHER_ROOM,
    ROOM,
    Deployment,
    Owner,
    answers,
    back_up,
    change,
    check_log,
    check_unknown,
    client,
    make_rooms,
    new_user,
)

LONG_ID = "x" * 1000
#: The worst valid key by the specification's order.
WORST_KEY = key(HIGHEST, HIGHEST, False, {"the": "worst"})

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
class Adopted:
    """A homeserver that was used without the plugin and now runs with the plugin.

    Attributes:
        deployment: the directory and database.
        server: the running Synapse with the plugin.
        owner: a user with a current backup that both implementations read alike.
        older: an older backup of the same user, with a string as auth_data.
        expected: the built-in endpoints' answers about these two backups, by version.
        deleted: a deleted version of the same user.
        writable: a backup that is only used by the test of all kinds of writes.
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
    writable: Owner
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
        writable = back_up(builtin, new_user(builtin), make_rooms("builtin"), "text")
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
            writable=writable,
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


def test_builtin_backups_accept_writes(adopted: Adopted) -> None:
    """A built-in backup accepts uploads, updates and deletions, and a new version
    follows."""
    owner = adopted.writable
    api = adopted.api(owner)
    etag, rows = api.tally(owner.version)
    change(api, owner.version, rows, etag)
    adopted.check_count(owner)
    old = api.download(owner.version)
    version = api.create_version()
    assert int(version) > int(owner.version)
    assert api.info()["version"] == version
    same(api.download(owner.version), old)
    accepted(api.delete(version_path(version)))
    assert api.info()["version"] == owner.version

"""Backups in a homeserver from which the plugin is removed and to which it returns.

"Built-in" is Synapse without the plugin, with Synapse's own endpoints.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest

from ..backup_client import Api
from ..contract.base import (
    ALGORITHM,
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
from .deployment import (
    OPAQUE,
    OTHER_ROOM,
    ROOM,
    SESSION,
    Deployment,
    Owner,
    answers,
    back_up,
    change,
    check_unknown,
    client,
    make_rooms,
    new_user,
)


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


@attrs.frozen
class Returned:
    """A homeserver that ran with the plugin, then without, and now with the plugin.

    Attributes:
        deployment: the directory and database.
        server: the running Synapse with the plugin.
        written: backups from before the removal, changed by built-in writes.
        new_version: the version that `written`'s user created meanwhile.
        expected: the built-in answers about `written`'s current version and about
            `new_version`.
        owners: four backups from before the removal, each with a built-in upload.
        state: the etag and the count of each of these backups after the upload.
    """

    deployment: Deployment
    server: Synapse
    written: Written
    new_version: str
    expected: list[Any]
    owners: list[Owner]
    state: tuple[int, int]


@pytest.fixture(scope="module")
def returned(new_deployment: Callable[[], Deployment]) -> Iterator[Returned]:
    """A homeserver that ran with the plugin, then without, and now with the plugin."""
    deployment = new_deployment()
    with deployment.serve(plugin=True) as server:
        written = write_with_plugin(deployment, server)
        users = [new_user(server) for _ in range(4)]
        owners = [back_up(server, user, make_rooms("plugin"), {}) for user in users]
    with deployment.serve(plugin=False) as builtin:
        api = client(builtin, written.user)
        check_without_plugin(api, written)
        new_version = write_without_plugin(api, written)
        expected = all_answers(api, written.current, new_version)
        new = {"!by_builtin": {"1": key(), "2": key()}}
        [state] = {
            client(builtin, owner.user).upload(owner.version, new) for owner in owners
        }
    with deployment.serve(plugin=True) as server:
        yield Returned(
            deployment, server, written, new_version, expected, owners, state
        )


def test_the_plugin_can_be_removed_and_added_again(returned: Returned) -> None:
    """Synapse without the plugin serves and continues backups made with the plugin.

    Afterwards the plugin serves and continues the built-in writes, with exact counts.
    """
    written, version = returned.written, returned.new_version
    api = client(returned.server, written.user)
    same(all_answers(api, written.current, version), returned.expected)
    check_unknown(api, written.deleted)
    check_unknown(api, written.older)
    continue_with_plugin(returned.deployment, api, written, version)


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


def test_the_first_write_with_the_plugin_recounts(returned: Returned) -> None:
    """After built-in writes, the first write with the plugin reports an exact count.

    The first write is an upload or a deletion, with or without a change.
    """
    etag, rows = returned.state
    writes = (
        ("PUT", keys_path("%", "!new", "3"), key(), (etag + 1, rows + 1)),
        ("PUT", keys_path("%", "!by_builtin", "1"), key(1), (etag, rows)),
        ("DELETE", keys_path("%", "!by_builtin"), None, (etag + 1, rows - 2)),
        ("DELETE", keys_path("%", "!none"), None, (etag, rows)),
    )
    for owner, (method, path, body, want) in zip(returned.owners, writes, strict=True):
        api = client(returned.server, owner.user)
        path = path.replace("%25", owner.version)
        assert tally(api.request(method, path, body)) == want
        returned.deployment.check_count(owner.user, api, owner.version)


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
    # A sweeper that was stopped in a pass keeps its lease for up to a minute.
    deployment.sql("UPDATE roomkeys_leases SET until_ms = 0")
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

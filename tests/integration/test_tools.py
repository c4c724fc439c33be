"""The operator's commands, run as processes while a server serves."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import socket
import sqlite3
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from itertools import count
from pathlib import Path
from typing import Any

import attrs
import pytest

from synapse_roomkeys.storage import SQLITE, upgrade_tables

from ..backup_client import Api
from ..contract import User
from ..contract.base import Rooms, accepted, key, keys_path, refused, version_path
from ..servers import Synapse, accounts
from ..servers.config import REGISTRATION_SECRET
from ..servers.fake_homeserver import Homeserver
from ..servers.service import Service, _environment
from ..tool import Tool

MODULE = {"deleted_versions_days": 3}
SECRET = "the_data_of_a_key"
PUBLIC_KEY = "an/unpadded+base64/key"
HOUR_MS = 3_600_000

_numbers = count()


@attrs.frozen
class Place:
    """A running server, and the tool on its database.

    Attributes:
        new_user: creates a user.
        is_synapse: whether the server is a Synapse.
    """

    tool: Tool
    url: str
    new_user: Callable[[], User]
    is_synapse: bool

    def api(self, user: User) -> Api:
        """Return a client of a user."""
        return Api(self.url, user.access_token)


@pytest.fixture(scope="module")
def place(
    engine: str,
    database: Callable[[], Mapping[str, Any] | None],
    homeserver: Homeserver,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Place]:
    """The service on SQLite, and a Synapse with the plugin on PostgreSQL."""
    directory = tmp_path_factory.mktemp("tools")
    arguments = database()
    with ExitStack() as stack:
        if engine == "sqlite":
            service = Service(
                directory,
                homeserver.url,
                database=arguments,
                settings={"retention": MODULE},
            )
            stack.enter_context(service)
            where = ("--config", "roomkeys.yaml")
            tool = Tool(directory, where, arguments or directory / "roomkeys.db")
            yield Place(tool, service.url, homeserver.new_user, False)
        else:
            synapse = Synapse(directory, database=arguments, module_config=MODULE)
            stack.enter_context(synapse)
            yield synapse_place(synapse, directory, arguments)


def synapse_place(
    synapse: Synapse, directory: Path, arguments: Mapping[str, Any] | None
) -> Place:
    """Return a Synapse with the tool on its database."""
    where = ("--synapse", "homeserver.yaml")
    tool = Tool(directory, where, arguments or directory / "homeserver.db")

    def new_user() -> User:
        user = synapse.register(f"tools{next(_numbers)}")
        return User(user.user_id, user.access_token)

    return Place(tool, synapse.url, new_user, True)


def back_up(api: Api, keys: int, **fields: Any) -> str:
    """Create a version with some keys in two rooms, and return its number."""
    version = api.create_version({"public_key": PUBLIC_KEY, **fields})
    sessions = {f"s{number}": key(3, data=SECRET) for number in range(keys)}
    half = keys // 2
    rooms: Rooms = {
        "!one": dict(list(sessions.items())[:half]),
        "!two": dict(list(sessions.items())[half:]),
    }
    api.upload(version, rooms)
    return version


def test_stats_are_the_sums_of_the_tables(place: Place) -> None:
    """Users, versions, keys and bytes agree with the rows, and the largest backup is
    named first."""
    user = place.new_user()
    back_up(place.api(user), 40)
    [sums] = place.tool.run("stats", "--json", "--top", "1").rows()
    [(keys, users)] = place.tool.sql(
        "SELECT COUNT(*), COUNT(DISTINCT user_id) FROM e2e_room_keys"
    )
    assert sum(sums["keys"].values()) == keys
    assert sums["users"] >= users
    [(size,)] = place.tool.sql("SELECT SUM(LENGTH(session_data)) FROM e2e_room_keys")
    assert sums["bytes"] == size
    assert sums["largest"][0]["user"] == user.user_id
    assert sums["growth"]["1d"]["stored"] >= 40
    text = place.tool.run("stats").out
    assert f"Stored keys: {keys:,}, " in text
    assert f"  {user.user_id}" in text


def test_users_are_listed_in_order(place: Place) -> None:
    """The largest users come first, pages continue after a user, and filters leave
    users out."""
    sizes: dict[str, int] = {}
    users = [place.new_user() for _ in range(3)]
    for number, user in enumerate(users, 1):
        back_up(place.api(user), 50 * number)
        sizes[user.user_id] = 50 * number
    back_up(place.api(users[0]), 50)
    sizes[users[0].user_id] += 50
    rows = place.tool.run("users", "--json", "--order", "keys", "--limit", "2").rows()
    assert [row["keys"] for row in rows] == [150, 100]
    names = [row["user"] for row in place.tool.run("users", "--json").rows()]
    assert set(sizes) <= set(names)
    after = place.tool.run("users", "--json", "--from", names[0]).rows()
    assert [row["user"] for row in after] == names[1:]
    superseded = place.tool.run("users", "--json", "--superseded").rows()
    assert users[0].user_id in {row["user"] for row in superseded}
    assert users[1].user_id not in {row["user"] for row in superseded}
    many = place.tool.run("users", "--json", "--min-keys", "120").rows()
    assert {row["user"] for row in many} == {users[2].user_id}


def test_show_describes_each_version(place: Place) -> None:
    """A version's public parts, counts, times and state are shown, and no key's
    data."""
    user = place.new_user()
    signatures = {user.user_id: {"ed25519:DEVICE": "signature"}}
    first = back_up(place.api(user), 10, signatures=signatures)
    second = back_up(place.api(user), 4)
    accepted(place.api(user).delete(version_path(second)))
    shown = place.tool.run("show", user.user_id, "--rooms", "--json")
    assert SECRET not in shown.out
    old, deleted = shown.rows()
    assert (old["version"], old["state"], old["keys"]) == (first, "current", 10)
    assert old["public_key"] == PUBLIC_KEY
    assert old["signed_by"] == ["ed25519:DEVICE"]
    assert old["rooms"] == {"!one": 5, "!two": 5}
    assert abs(old["last_upload_ms"] / 1000 - time.time()) < 60
    assert (deleted["version"], deleted["state"]) == (second, "deleted")
    assert deleted["deleted_ms"] is not None
    text = place.tool.run("show", user.user_id).out
    assert f"Version {first}: current" in text
    assert SECRET not in text


def test_audit_tells_who_did_what(place: Place) -> None:
    """Changes come in their order with device and numbers, and a session's changes and
    first readable message can be asked for."""
    user = place.new_user()
    api = place.api(user)
    version = back_up(api, 6)
    api.upload(version, {"!one": {"s1": key(9, verified=True, data=SECRET)}})
    accepted(api.delete(keys_path(version, "!two")))
    accepted(api.delete(version_path(version)))
    rows = place.tool.run("audit", user.user_id, "--json").rows()
    acts = [(row["act"], row["stored"], row["replaced"]) for row in rows]
    assert acts == [
        ("create_version", 0, 0),
        ("upload", 6, 0),
        ("upload", 0, 1),
        ("delete_keys", 0, 0),
        ("delete_version", 0, 0),
    ]
    assert all(row["device_id"] for row in rows)
    assert rows[2]["sessions"] == {"!one": {"replaced": ["s1"]}}
    place.tool.run("restore", user.user_id, version)
    session = ("--room", "!one", "--session", "s1")
    text = place.tool.run("audit", user.user_id, *session).out
    assert "replaced 1 key" in text and "deleted the version" in text
    assert "gave the deleted version back" in text
    assert "Uploads that replaced a key: 1" in text
    assert "decrypts the session's messages from index 9 on" in text
    other = place.tool.run("audit", user.user_id, "--room", "!none", "--json").rows()
    assert "upload" not in {row["act"] for row in other}
    future = place.tool.run("audit", user.user_id, "--since", "2100-01-01").out
    assert future == "No change is recorded in this time\n"


def test_a_deleted_version_is_given_back(place: Place) -> None:
    """A dry run changes nothing; then clients see the version and its keys again."""
    user = place.new_user()
    api = place.api(user)
    version = back_up(api, 8)
    rooms = api.download(version)
    accepted(api.delete(version_path(version)))
    [row] = place.tool.run(
        "restore", user.user_id, version, "--dry-run", "--json"
    ).rows()
    assert (row["restored_keys"], row["is_current"]) == (8, True)
    refused(api.get("/version"), 404, "M_NOT_FOUND")
    done = place.tool.run("restore", user.user_id, version, "--operator", "eve")
    assert done.code == 0, done
    assert api.info()["version"] == version
    assert api.download(version) == rooms
    last = place.tool.run("audit", user.user_id, "--json").rows()[-1]
    assert (last["act"], last["operator"]) == ("restore_version", "eve")
    again = place.tool.run("restore", user.user_id, version)
    assert again.code == 1 and "isn't kept" in again.err


def test_replaced_keys_are_given_back(place: Place) -> None:
    """Replaced keys come back in their state before a time."""
    user = place.new_user()
    api = place.api(user)
    version = back_up(api, 4)
    rooms = api.download(version)
    worse = {name: key(9, verified=True) for name in rooms["!one"]}
    api.upload(version, {"!one": worse})
    arguments = ("restore", user.user_id, version, "--before", "1h", "--force")
    assert "2 keys" in place.tool.run(*arguments, "--dry-run").out
    assert api.download(version)["!one"] == worse
    one = place.tool.run(*arguments, "--room", "!one", "--session", "s0", "--json")
    assert one.rows()[0]["restored_keys"] == 1
    assert place.tool.run(*arguments).code == 0
    assert api.download(version) == rooms
    unforced = place.tool.run("restore", user.user_id, version, "--force")
    assert unforced.code == 2 and "need --before" in unforced.err


def test_a_purge_deletes_superseded_versions(place: Place) -> None:
    """A superseded version without a change since the time goes, with its keys; the
    current version stays."""
    user = place.new_user()
    api = place.api(user)
    old, new = back_up(api, 300), back_up(api, 5)
    day = 24 * HOUR_MS
    place.tool.sql(
        "UPDATE roomkeys_changes SET changed_ms = changed_ms - ? WHERE user_id = ?",
        *(100 * day, user.user_id),
    )
    purge = ("purge", "--superseded-older-than", "90d")
    asked = place.tool.run(*purge)
    assert asked.code == 2 and "--yes" in asked.err
    rows = place.tool.run(*purge, "--dry-run", "--json").rows()
    mine = [row for row in rows if row["user"] == user.user_id]
    assert mine == [
        {"user": user.user_id, "version": old, "state": "superseded", "keys": 300}
    ]
    assert api.info(old)["count"] == 300
    assert place.tool.run(*purge, "--yes").code == 0
    refused(api.get(version_path(old)), 404, "M_NOT_FOUND")
    where = "WHERE user_id = ? AND version = ?"
    left = f"SELECT COUNT(*) FROM e2e_room_keys {where}"
    assert place.tool.sql(left, user.user_id, int(old)) == [(0,)]
    assert api.info()["version"] == new and api.info()["count"] == 5


def test_a_purge_deletes_what_clients_deleted(place: Place) -> None:
    """Deleted versions that are kept, and keys of no version, go at once; keys of
    others stay."""
    user = place.new_user()
    api = place.api(user)
    kept, deleted, orphaned = (back_up(api, 250) for _ in range(3))
    accepted(api.delete(version_path(deleted)))
    where = "WHERE user_id = ? AND version = ?"
    for table in ("e2e_room_keys_versions", "roomkeys_counts"):
        place.tool.sql(f"DELETE FROM {table} {where}", user.user_id, int(orphaned))
    count_keys = f"SELECT COUNT(*) FROM e2e_room_keys {where}"
    for kind, version in (("--orphans", orphaned), ("--deleted", deleted)):
        assert place.tool.sql(count_keys, user.user_id, int(version)) == [(250,)]
        assert place.tool.run("purge", kind, "--yes").code == 0
        assert place.tool.sql(count_keys, user.user_id, int(version)) == [(0,)]
    queued = f"SELECT COUNT(*) FROM roomkeys_deleted {where}"
    assert place.tool.sql(queued, user.user_id, int(deleted)) == [(0,)]
    assert api.info()["version"] == kept and api.info()["count"] == 250


def test_a_purge_shortens_the_record(place: Place) -> None:
    """Recorded changes older than some days go, newer changes stay."""
    user = place.new_user()
    back_up(place.api(user), 3)
    place.tool.sql(
        "UPDATE roomkeys_changes SET changed_ms = 1000 WHERE user_id = ? AND act = ?",
        *(user.user_id, "create_version"),
    )
    purge = ("purge", "--record-older-than", "28d")
    [found] = place.tool.run(*purge, "--dry-run", "--json").rows()
    old = "SELECT COUNT(*) FROM roomkeys_changes WHERE changed_ms < ?"
    [(number,)] = place.tool.sql(old, found["before_ms"])
    assert found["changes"] == number >= 1
    assert place.tool.run(*purge, "--yes").code == 0
    rows = place.tool.run("audit", user.user_id, "--json").rows()
    assert [row["act"] for row in rows] == ["upload"]


#: Tables with rows of a user that an erasure deletes.
PERSONAL = (
    "e2e_room_keys",
    "e2e_room_keys_versions",
    "roomkeys_changes",
    "roomkeys_counts",
    "roomkeys_deleted",
    "roomkeys_replaced",
)


def personal_rows(place: Place, user: User) -> dict[str, int]:
    """Return the number of a user's rows in each table."""
    found = {}
    for table in PERSONAL:
        statement = f"SELECT COUNT(*) FROM {table} WHERE user_id = ?"
        ((found[table],),) = place.tool.sql(statement, user.user_id)
    return found


def test_an_erasure_leaves_no_row(place: Place) -> None:
    """An active user is refused without the option; the receipt has the number of rows
    of each table; other users stay; the next version has a new number."""
    user, other = place.new_user(), place.new_user()
    api = place.api(user)
    for _ in range(2):
        version = back_up(api, 120)
        api.upload(version, {"!one": {"s1": key(9, verified=True)}})
    accepted(api.delete(version_path(version)))
    kept = back_up(place.api(other), 5)
    rows = personal_rows(place, user)
    assert all(rows.values()), rows
    active = place.tool.run("erase", user.user_id, "--yes")
    assert active.code == 2 and "--even-if-active" in active.err
    asked = place.tool.run("erase", user.user_id, "--even-if-active")
    assert asked.code == 2 and "--yes" in asked.err
    arguments = ("erase", user.user_id, "--even-if-active", "--json")
    [would] = place.tool.run(*arguments, "--dry-run").rows()
    assert would["rows"] == rows == personal_rows(place, user)
    [receipt] = place.tool.run(*arguments, "--yes").rows()
    assert receipt["rows"] == rows
    assert not any(personal_rows(place, user).values())
    refused(api.get("/version"), 404, "M_NOT_FOUND")
    assert int(api.create_version()) > int(version)
    assert place.api(other).tally(kept) == (1, 5)


def test_an_erasure_finds_what_is_left(place: Place) -> None:
    """A user with a record alone is erased: the homeserver may have deleted the
    versions and keys."""
    user = place.new_user()
    back_up(place.api(user), 2)
    for table in ("e2e_room_keys", "e2e_room_keys_versions"):
        place.tool.sql(f"DELETE FROM {table} WHERE user_id = ?", user.user_id)
    arguments = ("erase", user.user_id, "--even-if-active", "--yes", "--json")
    [receipt] = place.tool.run(*arguments).rows()
    assert receipt["rows"]["roomkeys_changes"] == 2
    assert not any(personal_rows(place, user).values())


def test_a_sweep_erases_users_who_are_gone(place: Place) -> None:
    """Deactivated users in a Synapse's database, or the users of a file, are erased.
    Other users stay."""
    user, other = place.new_user(), place.new_user()
    for one in (user, other):
        back_up(place.api(one), 5)
    names = place.tool.directory / "gone.txt"
    names.write_text(f"{user.user_id}\n\n@nobody:test.example\n")
    gone = ["--users", str(names)]
    deactivated = place.tool.run("sweep", "--deactivated", "--dry-run", "--json")
    if place.is_synapse:
        assert deactivated.rows() == []
        place.tool.sql("UPDATE users SET deactivated = 1 WHERE name = ?", user.user_id)
        gone = ["--deactivated"]
    else:
        assert deactivated.code == 2 and "--users" in deactivated.err
    [would] = place.tool.run("sweep", *gone, "--dry-run", "--json").rows()
    assert would["user"] == user.user_id and would["rows"]["e2e_room_keys"] == 5
    [receipt] = place.tool.run("sweep", *gone, "--yes", "--json").rows()
    assert receipt["rows"] == would["rows"]
    assert not any(personal_rows(place, user).values())
    assert personal_rows(place, other)["e2e_room_keys"] == 5


def leave_the_record(place: Place, left: str) -> User:
    """Create a user with a backup, and delete all rows but those of one table."""
    user = place.new_user()
    api = place.api(user)
    version = back_up(api, 4)
    api.upload(version, {"!one": {"s1": key(9, verified=True)}})
    accepted(api.delete(version_path(version)))
    for table in PERSONAL:
        if table != left:
            place.tool.sql(f"DELETE FROM {table} WHERE user_id = ?", user.user_id)
    return user


def test_a_sweep_erases_a_record_that_is_left(place: Place) -> None:
    """A user who is gone is erased if one of the plugin's tables alone has a row. A
    file of users leaves other users alone."""
    users = {
        table: leave_the_record(place, table)
        for table in ("roomkeys_changes", "roomkeys_replaced", "roomkeys_deleted")
    }
    other = leave_the_record(place, "roomkeys_changes")
    gone = {user.user_id for user in users.values()}
    path = place.tool.directory / "left.txt"
    path.write_text("".join(f"{user_id}\n" for user_id in gone))
    by_file = ("sweep", "--users", str(path), "--json")
    rows = place.tool.run(*by_file, "--dry-run").rows()
    assert {row["user"] for row in rows} == gone
    for table, user in users.items():
        [found] = [row["rows"] for row in rows if row["user"] == user.user_id]
        assert [name for name, number in found.items() if number] == [table]
    receipts = place.tool.run(*by_file, "--yes").rows()
    assert [row["rows"] for row in receipts] == [row["rows"] for row in rows]
    for user in users.values():
        assert not any(personal_rows(place, user).values())
    assert personal_rows(place, other)["roomkeys_changes"]
    if place.is_synapse:
        deactivate = "UPDATE users SET deactivated = 1 WHERE name = ?"
        place.tool.sql(deactivate, other.user_id)
        done = place.tool.run("sweep", "--deactivated", "--yes", "--json")
        assert [row["user"] for row in done.rows()] == [other.user_id]
        assert not any(personal_rows(place, other).values())


def test_wrong_names_are_one_clear_line(place: Place) -> None:
    """A wrong user, version, option or file is a single line with the next step."""
    user = place.new_user()
    back_up(place.api(user), 1)
    for arguments, code, text in (
        (("show", "@none:test.example"), 1, "has no backup here"),
        (("audit", "@none:test.example"), 1, "no backup and no record"),
        (("restore", user.user_id, "7"), 1, "isn't kept"),
        (("purge", "--record-older-than", "5h"), 2, "isn't a number of days"),
        (("sweep", "--users", "missing.txt", "--yes"), 2, "missing.txt"),
    ):
        done = place.tool.run(*arguments)
        assert done.code == code, (arguments, done)
        assert text in done.err.splitlines()[-1], (arguments, done)
        assert not done.out


def test_an_interrupted_purge_is_continued(place: Place) -> None:
    """Ctrl-C ends a command at once with 130; the same command deletes the rest. On a
    terminal the command shows its progress."""
    user = place.new_user()
    version = back_up(place.api(user), 3000)
    place.tool.sql("DELETE FROM e2e_room_keys_versions WHERE user_id = ?", user.user_id)
    master, slave = pty.openpty()
    size = struct.pack("HHHH", 24, 80, 0, 0)
    fcntl.ioctl(slave, termios.TIOCSWINSZ, size)
    process = subprocess.Popen(
        place.tool.arguments("purge", "--orphans", "--yes", "--rate", "200"),
        cwd=place.tool.directory,
        env=_environment(),
        stdout=subprocess.DEVNULL,
        stderr=slave,
    )
    os.close(slave)
    shown = b""
    while b" keys/s" not in shown:
        shown += os.read(master, 4096)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    os.close(master)
    count_keys = "SELECT COUNT(*) FROM e2e_room_keys WHERE user_id = ? AND version = ?"
    ids = (user.user_id, int(version))
    [(left,)] = place.tool.sql(count_keys, *ids)
    assert 0 < left < 3000
    assert place.tool.run("purge", "--orphans", "--yes").code == 0
    assert place.tool.sql(count_keys, *ids) == [(0,)]


@pytest.fixture(scope="module")
def stock(
    database: Callable[[], Mapping[str, Any] | None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Place]:
    """A Synapse that never loaded the plugin, on each engine."""
    directory = tmp_path_factory.mktemp("stock")
    arguments = database()
    with Synapse(directory, database=arguments, module_config=None) as synapse:
        yield synapse_place(synapse, directory, arguments)


def test_a_database_without_the_plugin(stock: Place) -> None:
    """Every command works on a Synapse that never loaded the plugin, and creates no
    table there."""
    user = stock.new_user()
    api = stock.api(user)
    version = back_up(api, 20)
    deleted = back_up(api, 5)
    accepted(api.delete(version_path(deleted)))
    [sums] = stock.tool.run("stats", "--json").rows()
    assert sums["keys"] == {"current": 20, "deleted": 0}
    [row] = stock.tool.run("users", "--json").rows()
    assert (row["user"], row["keys"]) == (user.user_id, 20)
    shown = stock.tool.run("show", user.user_id, "--json").rows()
    assert [one["state"] for one in shown] == ["current", "deleted"]
    assert stock.tool.run("audit", user.user_id).code == 0
    assert stock.tool.run("restore", user.user_id, deleted).code == 1
    assert stock.tool.run("purge", "--deleted", "--yes").code == 0
    assert api.info()["version"] == version
    [receipt] = stock.tool.run(
        "erase", user.user_id, "--even-if-active", "--yes", "--json"
    ).rows()
    assert receipt["rows"]["e2e_room_keys"] == 20
    names = {
        "sqlite": "SELECT name FROM sqlite_master WHERE name LIKE 'roomkeys%'",
        "postgres": "SELECT tablename FROM pg_tables WHERE tablename LIKE 'roomkeys%%'",
    }
    engine = "sqlite" if isinstance(stock.tool.database, Path) else "postgres"
    assert stock.tool.sql(names[engine]) == []


def test_a_database_that_is_away_or_wrong(tmp_path: Path) -> None:
    """A server that doesn't answer is exit status 3, a missing file or a file without
    the tables is 2, each with a single line."""
    config = tmp_path / "roomkeys.yaml"
    tool = Tool(tmp_path, ("--config", "roomkeys.yaml"), tmp_path / "roomkeys.db")
    away = "{name: psycopg2, args: {host: 127.0.0.1, port: 1, password: hidden}}"
    file = f"{{name: sqlite3, args: {{database: {tmp_path}/roomkeys.db}}}}"
    for database, code, text in (
        (away, 3, "127.0.0.1:1: connection to server"),
        (file, 2, "there is no such file"),
    ):
        config.write_text(f"database: {database}")
        done = tool.run("stats")
        assert (done.code, done.out) == (code, ""), done
        [line] = done.err.splitlines()
        assert text in line and "hidden" not in line
    (tmp_path / "roomkeys.db").touch()
    done = tool.run("stats")
    assert done.code == 2 and "there is no table e2e_room_keys" in done.err


def test_a_sweep_asks_the_homeserver(stock: Place, tmp_path: Path) -> None:
    """For the service, deactivated and unknown users of a Synapse are erased. Without
    the Synapse's answer, no user is erased."""
    url = stock.url
    admin = accounts.register(
        url, REGISTRATION_SECRET, f"a{next(_numbers)}", admin=True
    )
    active, gone, absent = (stock.new_user() for _ in range(3))
    tool = Tool(tmp_path, ("--config", "roomkeys.yaml"), tmp_path / "roomkeys.db")
    token = tmp_path / "token"
    sweep = ("sweep", "--deactivated", "--admin-token-file", str(token))
    with Service(tmp_path, url) as service:
        for user in (active, gone, absent):
            back_up(Api(service.url, user.access_token), 5)
    accounts.deactivate(url, admin, gone.user_id)
    unknown = absent.user_id.replace("@", "@no/")
    for table in ("e2e_room_keys", "e2e_room_keys_versions", "roomkeys_changes"):
        rename = f"UPDATE {table} SET user_id = ? WHERE user_id = ?"
        tool.sql(rename, unknown, absent.user_id)
    config = (tmp_path / "roomkeys.yaml").read_text()
    unserved = config.replace(url, f"{url}/_matrix")
    for content, secret, code, text in (
        (config, active.access_token, 2, "status 403 (M_FORBIDDEN)"),
        (unserved, admin.access_token, 3, "status 404 (M_UNRECOGNIZED)"),
    ):
        (tmp_path / "roomkeys.yaml").write_text(content)
        token.write_text(secret)
        done = tool.run(*sweep, "--yes")
        assert (done.code, done.out) == (code, ""), done
        [line] = done.err.splitlines()
        assert text in line and secret not in line, done
    (tmp_path / "roomkeys.yaml").write_text(config)
    receipts = tool.run(*sweep, "--yes", "--json").rows()
    assert [one["user"] for one in receipts] == sorted([gone.user_id, unknown])
    assert {one["rows"]["e2e_room_keys"] for one in receipts} == {5}
    left = tool.sql("SELECT DISTINCT user_id FROM e2e_room_keys")
    assert left == [(active.user_id,)]


def test_an_interrupted_request_to_the_homeserver(tmp_path: Path) -> None:
    """Ctrl-C while the homeserver is silent ends a sweep at once with 130."""
    connection = sqlite3.connect(tmp_path / "roomkeys.db")
    with closing(connection), closing(connection.cursor()) as cursor:
        upgrade_tables(cursor, SQLITE, True)
        connection.commit()
    (tmp_path / "token").write_text("token")
    tool = Tool(tmp_path, ("--config", "roomkeys.yaml"), tmp_path / "roomkeys.db")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        database = f"{{name: sqlite3, args: {{database: {tmp_path}/roomkeys.db}}}}"
        (tmp_path / "roomkeys.yaml").write_text(
            f"homeserver: {{url: '{url}'}}\ndatabase: {database}"
        )
        process = subprocess.Popen(
            tool.arguments(
                "sweep", "--deactivated", "--admin-token-file", "token", "--yes"
            ),
            cwd=tmp_path,
            env=_environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        silent.settimeout(20)
        connected, _ = silent.accept()
        with connected:
            # The request has come.
            assert connected.recv(10)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=8)
    assert process.returncode == 130, err
    assert err.splitlines() == [
        "synapse-roomkeys: interrupted: run the same command again to go on"
    ]

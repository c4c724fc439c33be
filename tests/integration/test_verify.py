"""The operator's command ``verify``, run as a process on rows with faults."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import attrs
import psycopg2
import pytest

from ..backup_client import Api
from ..contract.base import Rooms, key
from ..servers import PostgresServer
from ..servers.fake_homeserver import Homeserver
from ..servers.service import Service, _environment
from ..tool import Tool
from .deployment import ROOM, Deployment, back_up, new_user

SECRET = "the_data_of_a_key"
PUBLIC_KEY = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo"
LONG = "x" * 300


@attrs.frozen
class Fault:
    """A fault of a stored key, and the finding about it.

    Attributes:
        uploaded: the key as a stock Synapse accepts it.
        finding: kind, words, whether clients can use it, and whether it survives
            synapse_port_db.
        change: the SET clause of an UPDATE that follows the upload, or None.
        room: room id of the upload.
    """

    uploaded: dict[str, Any]
    finding: tuple[str, str, bool, bool]
    change: str | None = None
    room: str = ROOM


NULL_READS_AS = "is NULL, which reads as {} and is harmless"
#: By session id, the faults that both engines can store.
FAULTS = {
    "no_index": Fault(
        key(None, data=SECRET),
        ("null", f"first_message_index {NULL_READS_AS.format(0)}", True, True),
    ),
    "no_forwarded": Fault(
        key(5, None), ("null", f"forwarded_count {NULL_READS_AS.format(0)}", True, True)
    ),
    "no_verified": Fault(
        key(5),
        ("null", f"is_verified {NULL_READS_AS.format('false')}", True, True),
        "is_verified = NULL",
    ),
    "negative": Fault(
        key(-1),
        ("out_of_range", "first_message_index is -1, which reads as 0", True, True),
    ),
    "no_data": Fault(
        key(0, data=None), ("json_null", "session_data is JSON null", False, True)
    ),
    "no_json": Fault(
        key(0),
        ("not_json", "session_data isn't JSON", False, True),
        f"session_data = '{SECRET}'",
    ),
    "": Fault(key(0), ("bad_length", "session id is empty", True, True)),
    LONG: Fault(
        key(0),
        ("bad_length", "session id has 300 bytes, more than 255", True, True),
    ),
    "in_no_room": Fault(
        key(0), ("bad_length", "room id is empty", True, True), room=""
    ),
}
#: The faults that SQLite alone can store.
SQLITE_FAULTS = {
    "text": Fault(
        key("abc"),
        ("wrong_type", "first_message_index is text, which reads as 0", True, False),
    ),
    "fraction": Fault(
        key(0, 1.5),
        ("wrong_type", "forwarded_count is 1.5, which reads as 0", True, False),
    ),
    "blob": Fault(
        key(1),
        ("wrong_type", "first_message_index is a BLOB, which reads as 0", True, False),
        "first_message_index = x'00ff'",
    ),
    "no_boolean": Fault(
        key(1), ("wrong_type", "is_verified is 7, not a boolean", True, True),
        "is_verified = 7",
    ),
    "high": Fault(
        key(0, 2**31),
        ("out_of_range", "forwarded_count is 2147483648, above 2^31 - 1", True, False),
    ),
    "huge": Fault(
        key(2**60),
        (
            "out_of_range",
            f"first_message_index is {2**60}, above 2^53 - 1, which reads as 0",
            True,
            False,
        ),
    ),
    "nul\0": Fault(key(1), ("nul", "session id holds a NUL", True, False)),
    "data_blob": Fault(
        key(1),
        ("wrong_type", "session_data is a BLOB", True, False),
        "session_data = x'227822'",
    ),
    "broken": Fault(
        key(1),
        (
            "not_utf8",
            "session_data isn't UTF-8, so the server leaves the key out of downloads",
            False,
            False,
        ),
        "session_data = CAST(x'22ff22' AS TEXT)",
    ),
    "broken_room": Fault(
        key(1),
        (
            "not_utf8",
            "room id isn't UTF-8, so the server leaves the key out of downloads",
            False,
            False,
        ),
        "room_id = CAST(x'ff' AS TEXT)",
    ),
}  # fmt: skip


def test_faults_of_a_stock_synapse_are_found(
    new_deployment: Callable[[], Deployment], engine: str
) -> None:
    """Each fault that Synapse's own endpoints accept, or that SQL can write, has a line
    with the key's ids. Keys without a fault have no line."""
    deployment = new_deployment()
    database = deployment.database or deployment.directory / "homeserver.db"
    where = ("--synapse", "homeserver.yaml")
    tool = Tool(deployment.directory, where, database)
    faults = FAULTS | (SQLITE_FAULTS if engine == "sqlite" else {})
    with deployment.serve(plugin=False) as builtin:
        auth_data = {"public_key": PUBLIC_KEY}
        good = back_up(builtin, new_user(builtin), {ROOM: {"s": key(1)}}, auth_data)
        rooms: Rooms = {}
        for name, fault in faults.items():
            rooms.setdefault(fault.room, {})[name] = fault.uploaded
        bad = back_up(builtin, new_user(builtin), rooms, auth_data)
        clean = tool.run("verify", good.user.user_id)
        for name, fault in faults.items():
            if fault.change is not None:
                change = f"UPDATE e2e_room_keys SET {fault.change} WHERE session_id = ?"
                tool.sql(change, name)
        done = tool.run("verify", "--json")
        text = tool.run("verify", bad.user.user_id)
    assert (clean.code, clean.out) == (0, "0 findings in 1 version, 1 key\n")
    assert done.code == 1 and SECRET not in done.out
    *lines, sums = attrs.evolve(done, code=0).rows()
    mine = [line for line in lines if line["user"] == bad.user.user_id]
    assert {line["version"] for line in mine} == {bad.version}
    found = {line["session"]: line for line in mine}
    assert len(found) == len(mine)
    expected = {
        name: (kind, problem, usable, survives if engine == "sqlite" else None)
        for name, fault in faults.items()
        for kind, problem, usable, survives in [fault.finding]
    }
    fields = ("kind", "problem", "usable", "survives_port")
    assert {n: tuple(line[f] for f in fields) for n, line in found.items()} == expected
    assert sums["findings"] == len(lines) == len(faults)
    assert (sums["versions"], sums["keys"]) == (2, len(faults) + 1)
    place = f'user {bad.user.user_id}, version {bad.version}, room "{ROOM}"'
    line = f"""{place}, session "no_json": session_data isn't JSON (clients can't"""
    assert f"{line} use it)\n" in text.out and SECRET not in text.out
    if engine == "sqlite":
        assert "clients can use it; synapse_port_db leaves the row out" in text.out
        assert "clients can't use it; synapse_port_db stops at the row" in text.out


@pytest.fixture(scope="module")
def service(
    database: Callable[[], Mapping[str, Any] | None],
    homeserver: Homeserver,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Service, Tool]]:
    """A running service, and the operator's commands on the service's database."""
    directory, arguments = tmp_path_factory.mktemp("verify"), database()
    with Service(directory, homeserver.url, database=arguments) as server:
        where = ("--config", "roomkeys.yaml")
        yield server, Tool(directory, where, arguments or directory / "roomkeys.db")


def new_backup(service: Service, homeserver: Homeserver) -> tuple[Api, str, str]:
    """Return a client, the user id, and the version of a new backup of two keys."""
    user = homeserver.new_user()
    api = Api(service.url, user.access_token)
    version = api.create_version({"public_key": PUBLIC_KEY})
    api.upload(version, {ROOM: {"a": key(1), "b": key(2)}})
    return api, user.user_id, version


WHERE = "WHERE user_id = ? AND version = ?"


def test_wrong_counts_are_fixed(
    service: tuple[Service, Tool], homeserver: Homeserver
) -> None:
    """A wrong cached count is deleted while the server runs, and the server recounts. A
    dry run deletes nothing, and a second run has no finding."""
    server, tool = service
    api, user_id, version = new_backup(server, homeserver)
    ids = user_id, int(version)
    tool.sql(f"UPDATE roomkeys_counts SET key_count = 7, key_bytes = 1 {WHERE}", *ids)
    assert api.info()["count"] == 7
    [[size]] = tool.sql(
        f"SELECT SUM(LENGTH(session_data)) FROM e2e_room_keys {WHERE}", *ids
    )
    words = f"7 keys are cached, 2 stored; 1 bytes are cached, {size} stored"
    dry = tool.run("verify", user_id, "--fix", "counts", "--dry-run")
    assert dry.code == 1 and f"{words} (clients can use it; would be fixed)" in dry.out
    done = tool.run("verify", "--fix", "counts", "--json")
    line, sums = done.rows()
    assert (line["problem"], line["kind"], line["fixed"]) == (
        words,
        "wrong_count",
        True,
    )
    assert (line["version"], line["room"], sums["left"]) == (version, None, 0)
    assert api.info()["count"] == 2
    assert api.upload(version, {ROOM: {"c": key(3)}})[1] == 3
    assert tool.run("verify", user_id).code == 0


def test_keys_of_no_version_are_deleted(
    service: tuple[Service, Tool], homeserver: Homeserver
) -> None:
    """Keys of a version without a row are one finding, and are deleted on request. Keys
    of a deleted version outside the sweeper's queue are another finding."""
    server, tool = service
    api, user_id, version = new_backup(server, homeserver)
    old = api.create_version({"public_key": PUBLIC_KEY})
    api.upload(old, {ROOM: {"c": key(1)}})
    tool.sql(f"DELETE FROM e2e_room_keys_versions {WHERE}", user_id, int(version))
    tool.sql(
        f"UPDATE e2e_room_keys_versions SET deleted = 1 {WHERE}", user_id, int(old)
    )
    fix = ("verify", user_id, "--fix", "orphans")
    asked = tool.run(*fix)
    assert asked.code == 2 and "--yes" in asked.err
    dry = tool.run(*fix, "--dry-run", "--json")
    unqueued, orphans, sums = attrs.evolve(dry, code=0).rows()
    assert dry.code == 1 and sums["left"] == 2
    assert orphans["problem"] == "2 keys of a version that has no row"
    assert (orphans["version"], orphans["kind"]) == (version, "orphans")
    assert (unqueued["version"], unqueued["kind"]) == (old, "unqueued")
    assert unqueued["problem"].startswith("1 key of a deleted version that isn't")
    assert not orphans["usable"] and not unqueued["usable"]
    rows = f"SELECT COUNT(*) FROM e2e_room_keys {WHERE}"
    assert tool.sql(rows, user_id, int(version)) == [(2,)]
    done = tool.run(*fix, "--yes")
    assert done.code == 1 and "(clients can't use it; fixed)" in done.out
    assert tool.sql(rows, user_id, int(version)) == [(0,)]
    tool.sql(f"DELETE FROM e2e_room_keys {WHERE}", user_id, int(old))
    again = tool.run("verify", user_id)
    assert (again.code, again.out) == (0, "0 findings in 1 version, 0 keys\n")
    new = api.create_version({"public_key": PUBLIC_KEY})
    assert api.upload(new, {ROOM: {"d": key(1)}}) == (1, 1)


#: By the SET clause of an UPDATE of a version's row, the finding: kind, first words,
#: use by clients.
VERSION_FAULTS = {
    "etag = NULL": ("null", "etag is NULL, which reads as 0 and is harmless", True),
    "etag = -5": ("negative_etag", "etag is -5, so the server may refuse", True),
    "auth_data = '[]'": ("auth_data", "auth_data isn't a JSON object", False),
    "auth_data = 'x'": ("auth_data", "auth_data isn't a JSON object", False),
    "auth_data = '{}'": ("public_key", "auth_data has no public_key", False),
    f"""auth_data = '{{"public_key":"{PUBLIC_KEY[1:]}"}}'""": (
        *("public_key", "public_key isn't unpadded base64 of 32 bytes", False),
    ),
    f"""auth_data = '{{"public_key":"{PUBLIC_KEY}="}}'""": (
        *("public_key", "public_key isn't unpadded base64 of 32 bytes", True),
    ),
}


def test_faults_of_versions_are_found(
    service: tuple[Service, Tool], homeserver: Homeserver
) -> None:
    """A fault of a version's row is one line, without ids of a key."""
    server, tool = service
    expected = {}
    for change, finding in VERSION_FAULTS.items():
        _, user_id, version = new_backup(server, homeserver)
        expected[user_id, version] = finding
        statement = f"UPDATE e2e_room_keys_versions SET {change} {WHERE}"
        tool.sql(statement, user_id, int(version))
    done = tool.run("verify", "--json")
    *lines, sums = attrs.evolve(done, code=0).rows()
    assert done.code == 1 and sums["left"] == len(lines) == len(expected)
    for line in lines:
        kind, words, usable = expected.pop((line["user"], line["version"]))
        assert (line["kind"], line["usable"]) == (kind, usable)
        assert line["problem"].startswith(words)
        assert (line["room"], line["session"], line["survives_port"]) == (None,) * 3


def test_an_unknown_user_is_refused(service: tuple[Service, Tool]) -> None:
    """A user without a backup is an error, not a healthy user."""
    done = service[1].run("verify", "@nobody:test.example")
    assert done.code == 1 and "@nobody:test.example has no backup here" in done.err


#: Number of keys of a large backup, and bytes of each key's data.
MANY, LENGTH = 50_000, 900
#: Maximum memory for the large backup above the memory for two keys, in bytes. A page
#: of 400 keys has 0.4 MB; all keys have 45 MB.
GROWTH = 20_000_000
INSERT_MANY = f"""
    INSERT INTO e2e_room_keys
    WITH RECURSIVE s (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < {MANY})
    SELECT ?, '!r' || (n / 2000), 's' || n, ?, 0, 0, NULL, ? FROM s"""


def peak_memory(tool: Tool, user_id: str) -> int:
    """Verify a user, and return the largest resident memory of the process in bytes."""
    arguments = tool.arguments("verify", user_id)
    with subprocess.Popen(
        arguments, cwd=tool.directory, env=_environment(), stdout=subprocess.DEVNULL
    ) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode in (0, 1)
    return 1024 * usage.ru_maxrss


def test_memory_is_bounded(
    service: tuple[Service, Tool], homeserver: Homeserver
) -> None:
    """50,000 keys, each with a finding, are read a page at a time."""
    server, tool = service
    _, small, _ = new_backup(server, homeserver)
    _, large, version = new_backup(server, homeserver)
    data = f'"{"x" * LENGTH}"'
    tool.sql(INSERT_MANY, large, int(version), data)
    assert peak_memory(tool, large) - peak_memory(tool, small) < GROWTH


def test_text_that_isnt_utf8_is_read_from_postgresql(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    """A database of the encoding SQL_ASCII can hold text that isn't UTF-8; pages go on
    after such ids."""
    arguments = postgres.create_database("SQL_ASCII")
    schema = resources.files("synapse_roomkeys.storage") / "schema/001_backups.sql"
    connection = psycopg2.connect(**arguments)
    with connection, connection.cursor() as cursor:
        cursor.execute(schema.read_text())
        cursor.execute("""
            INSERT INTO e2e_room_keys
            SELECT '@a:x', E'!\\377', n, 1, 0, 0, false, '{}'
            FROM generate_series(1, 900) AS n""")
    connection.close()
    config = json.dumps({"database": {"name": "psycopg2", "args": arguments}})
    (tmp_path / "homeserver.yaml").write_text(config)
    tool = Tool(tmp_path, ("--synapse", "homeserver.yaml"), arguments)
    *lines, sums = attrs.evolve(tool.run("verify", "--json"), code=0).rows()
    assert (sums["findings"], sums["keys"]) == (901, 900)
    assert sums["kinds"] == {"not_utf8": 900, "orphans": 1}
    assert {line["room"] for line in lines} == {"!\\xff", None}

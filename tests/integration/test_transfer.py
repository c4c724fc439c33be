"""Backups exported to a file and imported again, by the commands as processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from synapse_roomkeys.admin.transfer_file import LinesEncoder

from ..backup_client import Api, back_up, restored
from ..contract.base import Rooms, accepted, key, keys_path, wrapped
from ..servers import PostgresServer, Synapse, User
from ..servers.service import Service, _environment
from ..tool import DEADLINE, Done, Tool
from ..unit.test_tools import facts
from .deployment import OPAQUE, make_rooms
from .test_crypto import Device, decrypted, new_device, private_key, send_messages

THIRD = "!third:test.example"
PLACES = ("service", "synapse")
TABLES = ("e2e_room_keys", "e2e_room_keys_versions")
#: A version for a file.
FACTS = facts(1, "current")
#: Number of keys of an import that is interrupted: about 20 transactions.
INTERRUPTED = 10_000
#: Number of keys of a large backup, and KiB by which the memory of a command may grow:
#: the keys alone have 45 MiB. 20 MiB leave room for a few batches of 0.5 MiB each.
MANY = 50_000
MEMORY = 20 * 1024
#: Runs a command, and prints the peak of the process's memory in KiB.
MEASURED = """
import re, sys
from pathlib import Path
from synapse_roomkeys.service.cli import main
code = main(sys.argv[1:])
status = Path("/proc/self/status").read_text()
print(code, re.search(r"VmHWM:\\s*(\\d+) kB", status)[1])
"""


@attrs.frozen
class Place:
    """A running server, and the tool on the server's database."""

    tool: Tool
    url: str
    synapse: Synapse

    def api(self, user: User) -> Api:
        """Return a client of a user."""
        return Api(self.url, user.access_token)

    def new_user(self) -> User:
        """Create a user, whom all places know."""
        return self.synapse.register(f"transfer{time.monotonic_ns()}")

    def export(self, user: User, *arguments: str) -> Path:
        """Export a user's backups to a new file."""
        path = self.tool.directory / f"{time.monotonic_ns()}.jsonl"
        done = self.tool.run("export", user.user_id, "-o", str(path), *arguments)
        assert done.code == 0, done
        return path

    def erase(self, user: User) -> None:
        """Erase a user's backups."""
        done = self.tool.run("erase", user.user_id, "--even-if-active", "--yes")
        assert done.code == 0, done

    def rows(self, user: User) -> list[list[tuple[Any, ...]]]:
        """Return the stored texts of a user's versions and keys."""
        return [
            self.tool.sql(
                f"SELECT {columns} FROM {table} WHERE user_id = ? ORDER BY {columns}",
                user.user_id,
            )
            for table, columns in (
                (TABLES[0], "version, room_id, session_id, session_data"),
                (TABLES[1], "version, algorithm, auth_data, deleted"),
            )
        ]


@pytest.fixture(scope="module")
def places(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Place]]:
    """A Synapse with the plugin on PostgreSQL, and the service on SQLite for the same
    users."""
    arguments = postgres.create_database()
    one, two = (tmp_path_factory.mktemp(name) for name in PLACES)
    with Synapse(two, database=arguments) as synapse, Service(one, synapse.url) as own:
        tool = Tool(two, ("--synapse", "homeserver.yaml"), arguments)
        own_tool = Tool(one, ("--config", "roomkeys.yaml"), one / "roomkeys.db")
        yield {
            "service": Place(own_tool, own.url, synapse),
            "synapse": Place(tool, synapse.url, synapse),
        }


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, places: dict[str, Place]) -> Place:
    """Each server."""
    return places[request.param]


def fill(api: Api) -> dict[str, Rooms]:
    """Create two versions; return their keys, in the order of the versions."""
    found = {}
    for mark in ("old", "new"):
        rooms = make_rooms(mark)
        version = api.create_version({**OPAQUE, "mark": mark})
        api.upload(version, rooms)
        found[version] = rooms
    return found


def actions(done: Done) -> list[tuple[Any, ...]]:
    """Return the action and the numbers of keys of each imported version."""
    names = ("action", "stored", "replaced", "unchanged", "left_out")
    rows = [json.loads(line) for line in done.out.splitlines()]
    return [tuple(row[name] for name in names) for row in rows]


def test_an_erased_user_comes_back(place: Place) -> None:
    """Export, erasure and import restore number, auth_data and keys of each version; a
    second import changes nothing."""
    user = place.new_user()
    api = place.api(user)
    backups = fill(api)
    number = sum(map(len, next(iter(backups.values())).values()))
    before = place.rows(user)
    path = place.export(user, "--operator", "mallory")
    assert path.stat().st_mode & 0o777 == 0o600
    acts = (
        "SELECT DISTINCT act, operator FROM roomkeys_changes WHERE user_id = ?"
        " AND operator IS NOT NULL ORDER BY act"
    )
    assert place.tool.sql(acts, user.user_id) == [("export", "mallory")]
    place.erase(user)
    dry = place.tool.run("import", str(path), "--dry-run", "--json")
    created = [("created", number, 0, 0, 0)] * 2
    assert (dry.code, actions(dry)) == (0, created)
    assert place.rows(user) == [[], []]
    done = place.tool.run("import", str(path), "--json", "--operator", "eve")
    assert (done.code, actions(done)) == (0, created)
    assert place.rows(user) == before
    for version, rooms in backups.items():
        assert api.download(version) == rooms
    assert api.info()["version"] == max(backups)
    assert api.tally(max(backups)) == (2, number)
    by_eve = [("create_version", "eve"), ("upload", "eve")]
    assert place.tool.sql(acts, user.user_id) == by_eve
    again = place.tool.run("import", str(path), "--json")
    unchanged = (0, 0, number, 0)
    assert actions(again) == [("compared", *unchanged), ("merged", *unchanged)]
    assert (again.code, place.rows(user)) == (0, before)
    assert int(api.create_version()) > int(max(backups))


@pytest.mark.parametrize("source", PLACES)
def test_a_user_moves(places: dict[str, Place], source: str) -> None:
    """The keys are the same on another server and engine."""
    one = places[source]
    [other] = [place for name, place in places.items() if name != source]
    user = one.new_user()
    backups = fill(one.api(user))
    path = one.export(user)
    assert other.tool.run("import", str(path)).code == 0
    assert other.rows(user) == one.rows(user)
    for version, rooms in backups.items():
        assert other.api(user).download(version) == rooms


def test_a_body_goes_into_the_current_version(places: dict[str, Place]) -> None:
    """A plain export is what a client downloads, and another user's current version
    takes its keys."""
    one, other = places["synapse"], places["service"]
    user, guest = one.new_user(), one.new_user()
    backups = fill(one.api(user))
    old = min(backups)
    path = one.export(user, "--plain", "--version", old)
    download = accepted(one.api(user).get(keys_path(old)))
    assert json.loads(path.read_bytes()) == download
    version = other.api(guest).create_version()
    done = other.tool.run("import", str(path), "--user", guest.user_id)
    assert done.code == 0
    assert other.api(guest).download(version) == backups[old]


def test_a_client_reads_its_messages_again(places: dict[str, Place]) -> None:
    """A new device with the recovery key decrypts every message after export, erasure
    and import."""
    place = places["synapse"]
    device = new_device(place.synapse, place.url)
    private = private_key()
    version = device.create_backup(private)
    room_id = device.create_room()
    senders = [device.sender(room_id) for _ in range(3)]
    sessions = [sender.session() for sender in senders]
    texts = [text for sender in senders for text in send_messages(device, sender)]
    back_up(device.api, version, sessions)
    path = place.export(device.user)
    place.erase(device.user)
    assert place.tool.run("import", str(path)).code == 0
    second = Device(place.synapse, place.synapse.login(device.user), place.url)
    found = restored(second.api.download(version), private)
    assert decrypted(second, room_id, found) == (sorted(texts), 0)


def test_what_is_refused_writes_nothing(places: dict[str, Place]) -> None:
    """A cut file, and an unknown user or file, are one clear line, and leave the
    database unchanged."""
    own, synapse = places["service"], places["synapse"]
    user = own.new_user()
    encoder = LinesEncoder(user.user_id)
    cut = encoder.start(1) + encoder.begin(FACTS)
    for place in places.values():
        (place.tool.directory / "cut").write_bytes(cut)
        (place.tool.directory / "body").write_text('{"rooms":{}}')
    stranger = "@none:test.example"
    for place, command, code, text in (
        (own, ("import", "cut"), 2, "is cut; nothing was imported"),
        (own, ("import", "missing"), 2, "there is no such file"),
        (own, ("import", "body"), 2, "add --user"),
        (own, ("import", "body", "--user", user.user_id), 1, "has no version that"),
        (synapse, ("import", "body", "--user", stranger), 1, "is no active account"),
        (own, ("export", user.user_id, "-o", "none"), 1, "has no backup here"),
    ):
        done = place.tool.run(*command)
        assert (done.code, done.out) == (code, ""), done
        [line] = done.err.splitlines()
        assert text in line, line
    assert own.rows(user) == [[], []]
    assert not (own.tool.directory / "none").exists()


def test_what_the_user_has_meanwhile_stays(places: dict[str, Place]) -> None:
    """The current version takes absent keys and keeps better keys; a superseded version
    takes no key, and the exit status is 1."""
    place = places["synapse"]
    user = place.new_user()
    api = place.api(user)
    old, new = fill(api)
    path = place.export(user)
    room = next(iter(api.download(new)))
    better: Rooms = {room: {"é🔑": key(0, 0, True, "better")}}
    api.upload(new, better)
    for version in (old, new):
        accepted(api.delete(keys_path(version, THIRD)))
    done = place.tool.run("import", str(path), "--json")
    assert (done.code, actions(done)) == (
        1,
        [("compared", 0, 0, 12, 2), ("merged", 2, 0, 12, 0)],
    )
    assert f"version {new} is the current one" in done.err
    assert api.download(new)[room]["é🔑"] == better[room]["é🔑"]
    assert THIRD not in api.download(old)


def test_a_damaged_key_is_left_out(places: dict[str, Place]) -> None:
    """A row that isn't JSON is reported and left out, and the others are exported."""
    place = places["service"]
    user = place.new_user()
    backups = fill(place.api(user))
    place.tool.sql(
        "UPDATE e2e_room_keys SET session_data = 'broken' WHERE user_id = ?"
        " AND version = ? AND session_id = 'string/+='",
        *(user.user_id, int(max(backups))),
    )
    for arguments in (("--plain",), ()):
        done = place.tool.run("export", user.user_id, *arguments)
        assert done.code == 1 and "broken" not in done.out
        assert "a key of version" in done.err and "string/+=" in done.err
    last = json.loads(done.out.splitlines()[-1])
    assert (last["versions"], last["keys"]) == (2, 27)


def test_a_key_that_is_not_utf8_is_left_out(places: dict[str, Place]) -> None:
    """In an SQLite file, a key with data or a room id that isn't UTF-8 is reported and
    left out. The server sends the others, as the export has them."""
    place = places["service"]
    user = place.new_user()
    api = place.api(user)
    version = api.create_version()
    rooms: Rooms = {"!a": {"good": key(), "data": key()}, "!b": {"id": key()}}
    api.upload(version, rooms)
    for change, session in (
        ("session_data = CAST(x'22ff22' AS TEXT)", "data"),
        ("room_id = CAST(x'ff' AS TEXT)", "id"),
    ):
        place.tool.sql(
            f"UPDATE e2e_room_keys SET {change} WHERE user_id = ? AND session_id = ?",
            *(user.user_id, session),
        )
    done = place.tool.run("export", user.user_id, "--plain")
    assert done.code == 1 and "2 keys left out" in done.err
    assert r'room "\udcff", session "id"' in done.err
    left = {"!a": {"good": key()}}
    assert json.loads(done.out) == wrapped(left)
    assert api.download(version) == left
    assert api.upload(version, {"!a": {"data": key(9)}}) == (2, 3)
    assert api.download(version)["!a"]["data"] == key(9)


def add_many(place: Place, user: User, number: int) -> None:
    """Add a version with many keys of 900 bytes, past the server."""
    version = int(place.api(user).create_version())
    place.tool.sql(
        f"""
        WITH RECURSIVE s(i) AS (
            SELECT 1 UNION ALL SELECT i + 1 FROM s WHERE i < {number})
        INSERT INTO e2e_room_keys (user_id, version, room_id, session_id,
            first_message_index, forwarded_count, is_verified, session_data)
        SELECT ?, {version}, '!r' || (i / 1000), 's' || i, i, 0, TRUE,
            '"{"0" * 900}"' FROM s""",
        user.user_id,
    )


@pytest.mark.parametrize(
    ("name", "number"), [("service", signal.SIGKILL), ("synapse", signal.SIGINT)]
)
def test_an_interrupted_import_is_continued(
    places: dict[str, Place], name: str, number: int
) -> None:
    """An interrupted process leaves whole batches; the same command imports the
    rest."""
    place = places[name]
    user = place.new_user()
    add_many(place, user, INTERRUPTED)
    before = place.rows(user)
    path = place.export(user)
    place.erase(user)
    process = subprocess.Popen(
        place.tool.arguments("import", str(path)),
        cwd=place.tool.directory,
        env=_environment(),
        stderr=subprocess.PIPE,
    )
    count = "SELECT COUNT(*) FROM e2e_room_keys WHERE user_id = ?"
    while place.tool.sql(count, user.user_id) == [(0,)]:
        assert process.poll() is None
    process.send_signal(number)
    process.communicate(timeout=DEADLINE)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    [(stored,)] = place.tool.sql(count, user.user_id)
    assert 0 < stored < INTERRUPTED
    done = place.tool.run("import", str(path), "--json")
    assert actions(done) == [("merged", INTERRUPTED - stored, 0, stored, 0)]
    assert place.rows(user) == before


def peak(place: Place, *command: str) -> int:
    """Run a command that succeeds; return the peak of its memory in KiB."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *command, *place.tool.where],
        cwd=place.tool.directory,
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    code, kib = done.stdout.splitlines()[-1].split()
    assert code == "0", done
    return int(kib)


def test_a_large_backup_in_little_memory(
    places: dict[str, Place], tmp_path: Path
) -> None:
    """Neither an export nor an import holds a backup of 50,000 keys in memory."""
    path = str(tmp_path / "backup")
    one, other = places["synapse"], places["service"]
    small, large = one.new_user(), one.new_user()
    fill(one.api(small))
    add_many(one, large, MANY)
    least = [
        peak(one, "export", small.user_id, "-o", path),
        peak(other, "import", path),
    ]
    lines = [
        peak(one, "export", large.user_id, "-o", path),
        peak(other, "import", path),
    ]
    other.api(large).create_version()
    plain = [
        peak(one, "export", large.user_id, "-o", path, "--plain"),
        peak(other, "import", path, "--user", large.user_id),
    ]
    for peaks in (lines, plain):
        growth = [most - base for most, base in zip(peaks, least, strict=True)]
        assert max(growth) < MEMORY, (least, lines, plain)

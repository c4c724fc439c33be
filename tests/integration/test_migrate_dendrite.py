"""Backups copied out of a Dendrite's database, by the command as an operator runs it.

The tables are those of Dendrite 0.10.4 and later. Its own code leaves the odd rows:
keys of deleted versions, an empty ``auth_data`` after an upload without keys, an empty
etag before the first upload, and an empty ``session_data``.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import attrs
import pytest
from twisted.internet.defer import Deferred, inlineCallbacks

from synapse_roomkeys.service.config import DatabaseConfig
from synapse_roomkeys.service.migration import (
    DENDRITE,
    Keep,
    MigrateError,
    Options,
    Result,
)

from ..contract import Client
from ..contract.base import key
from ..servers.service import Service
from ..sites import Backend, OwnSite
from .places import NewPlace, Place
from .test_migrate import (
    ENGINES,
    KEYS,
    ODD,
    ROOM,
    VERSIONS,
    keys_of,
    run,
)

Steps = Generator[Deferred[Any], Any, None]

ALICE, BOB, CAROL = (f"@{name}:dendrite.example" for name in ("alice", "bob", "carol"))
AUTH_DATA = '{"public_key": "é \\u0000 %s ?"}'
#: Dendrite's tables. The engines differ in the number of a version, and in the names of
#: the indexes.
VERSION_NUMBER = {
    "sqlite3": "INTEGER PRIMARY KEY AUTOINCREMENT",
    "psycopg2": "BIGINT DEFAULT nextval('userapi_key_backup_versions_seq')",
}
TABLES = """
    CREATE TABLE userapi_key_backup_versions (
        user_id TEXT NOT NULL, version {version}, algorithm TEXT NOT NULL,
        auth_data TEXT NOT NULL, etag TEXT NOT NULL,
        deleted SMALLINT DEFAULT 0 NOT NULL);
    CREATE UNIQUE INDEX userapi_key_backup_versions_idx
        ON userapi_key_backup_versions (user_id, version);
    CREATE TABLE userapi_key_backups (
        user_id TEXT NOT NULL, room_id TEXT NOT NULL, session_id TEXT NOT NULL,
        version TEXT NOT NULL, first_message_index INTEGER {numbers},
        forwarded_count INTEGER {numbers}, is_verified BOOLEAN {numbers},
        session_data TEXT NOT NULL);
    CREATE UNIQUE INDEX userapi_key_backups_idx
        ON userapi_key_backups (user_id, room_id, session_id, version);
    CREATE INDEX userapi_key_backups_versions_idx
        ON userapi_key_backups (user_id, version)"""
ADD_VERSION = """
    INSERT INTO userapi_key_backup_versions
        (user_id, version, algorithm, auth_data, etag, deleted)
    VALUES (?, ?, ?, ?, ?, ?)"""
ADD_KEY = """
    INSERT INTO userapi_key_backups (user_id, version, room_id, session_id,
        first_message_index, forwarded_count, is_verified, session_data)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?)"""
SET = "UPDATE userapi_key_backup_versions SET {} WHERE version = ?"
ALL = (
    "SELECT * FROM userapi_key_backup_versions ORDER BY version",
    "SELECT * FROM userapi_key_backups ORDER BY 1, 2, 3, 4",
)
#: Rows of keys, as the service's table has them; Dendrite's has the version as a text.
LIVING = [
    *keys_of(ALICE, 2, 1203),
    *keys_of(CAROL, 5, 10),
    (CAROL, 5, ROOM, "nulls", None, None, None, "{}"),
    (CAROL, 5, ROOM, "empty", 0, 0, False, ""),
    (CAROL, 5, ROOM, "not JSON", 0, 0, True, ODD),
    (CAROL, 5, "", "x" * 2000, 2**31 - 1, 0, True, "null"),
]
DELETED = list(keys_of(ALICE, 7, 5))
UNUSABLE = [*keys_of(BOB, 3, 4), *keys_of(CAROL, 8, 2)]
#: Keys whose version belongs to another user, doesn't exist or isn't a number.
STRAYS = [
    (ALICE, version, ROOM, "stray", 0, 0, True, "{}")
    for version in ("5", "77", "one", "02", " 2", "2.0", "-1", "")
]


@attrs.frozen
class Dendrite:
    """A Dendrite's database and a service's, with the command between them."""

    directory: Path
    source: Place
    target: Place

    def add_keys(self, *rows: tuple[Any, ...]) -> None:
        self.source.run(ADD_KEY, *((row[0], str(row[1]), *row[2:]) for row in rows))

    def migrate(self, *arguments: str) -> tuple[int, list[str]]:
        """Run the command; return the exit code and the lines of its output."""
        (self.directory / "dendrite.yaml").write_text(json.dumps(self._configuration))
        common = ("--config", "roomkeys.yaml", "--from-dendrite", "dendrite.yaml")
        command = Service(
            self.directory,
            "http://127.0.0.1:1",
            settings={"database": attrs.asdict(self.target.config)},
            arguments=("migrate", *common, *arguments),
        )
        code, output = command.run_to_end()
        return code, output.splitlines()

    def run(self, options: Options | None = None) -> tuple[Result, str]:
        """Run a migration without the command; return the result and the lines."""
        chosen = Options() if options is None else options
        return run(self.source, self.target, attrs.evolve(chosen, layout=DENDRITE))

    @property
    def _configuration(self) -> Any:
        """The content of dendrite.yaml: SQLite is named in the component's section,
        and PostgreSQL in the global section."""
        args = self.source.config.args
        if self.source.config.name == "sqlite3":
            text = f"file:{args['database']}?mode=rwc"
            return {"user_api": {"account_database": {"connection_string": text}}}
        text = (
            f"postgresql://{args['user']}:{args['password']}@{args['host']}"
            f":{args['port']}/{args['dbname']}?sslmode=disable"
        )
        component = {"account_database": {"connection_string": ""}}
        database = {"connection_string": text, "max_open_conns": 90}
        return {"global": {"database": database}, "user_api": component}


def make_dendrites_tables(place: Place, numbers: str = "NOT NULL") -> Place:
    """Create Dendrite's tables.

    Args:
        numbers: the constraint of the three columns that Synapse allows to be NULL.
    """
    version = VERSION_NUMBER[place.config.name]
    if place.config.name == "psycopg2":
        place.run("CREATE SEQUENCE userapi_key_backup_versions_seq")
    for statement in TABLES.format(version=version, numbers=numbers).split(";"):
        place.run(statement)
    return place


def new_source(directory: Path, new_place: NewPlace, engine: str) -> Place:
    """Create a database without tables, whose path needs no escapes in a URI."""
    if engine == "sqlite":
        path = str(directory / "userapi accounts.db")
        return Place(DatabaseConfig("sqlite3", {"database": path}))
    return new_place(engine)


def new_dendrite(
    directory: Path, new_place: NewPlace, engines: tuple[str, str]
) -> Dendrite:
    """Create a filled source and an empty target."""
    source = new_source(directory, new_place, engines[0])
    make_dendrites_tables(source, "/* may be NULL */")
    found = Dendrite(directory, source, new_place(engines[1]))
    source.run(
        ADD_VERSION,
        (ALICE, 1, "old", AUTH_DATA, "12", 0),
        (ALICE, 2, "algorithm", AUTH_DATA, "7", 0),
        (BOB, 3, "algorithm", "", "4", 0),
        (BOB, 4, "algorithm", "", "", 1),
        (CAROL, 5, "algorithm", '"text"', "", 0),
        (CAROL, 6, "algorithm", "null", "1", 0),
        (ALICE, 7, "algorithm", AUTH_DATA, "5", 1),
        (CAROL, 8, "algorithm", '{"a": ', "two", 0),
        (CAROL, 9, "algorithm", "{}", "two", 0),
        (CAROL, 10, "algorithm", "{}", "9" * 30, 0),
    )
    found.add_keys(*LIVING, *DELETED, *UNUSABLE, *STRAYS)
    return found


#: The versions in the service's database after a run.
COPIED = [
    (ALICE, 1, "old", AUTH_DATA, 0, 12),
    (ALICE, 2, "algorithm", AUTH_DATA, 0, 7),
    (ALICE, 7, "algorithm", "{}", 1, 5),
    (BOB, 4, "algorithm", "{}", 1, 0),
    (CAROL, 5, "algorithm", '"text"', 0, 0),
    (CAROL, 9, "algorithm", "{}", 0, 0),
    (CAROL, 10, "algorithm", "{}", 0, 0),
]
LEFT_OUT = [
    f"{BOB} version 3: its auth_data is empty, null or no JSON (4 keys): not copied",
    f"{CAROL} version 6: its auth_data is empty, null or no JSON (0 keys): not copied",
    f"{CAROL} version 8: its auth_data is empty, null or no JSON (2 keys): not copied",
]
REMARKS = [
    "3 backups not copied: the source has lost their auth_data, and no client can use"
    " them there. Unless the target has an earlier copy, ask their users to set up a"
    " new backup",
    "13 keys not copied: of deleted backups, or of none",
]


@pytest.fixture(params=[ENGINES, ENGINES[::-1]], ids="-to-".join)
def dendrite(
    request: pytest.FixtureRequest, new_place: NewPlace, tmp_path: Path
) -> Dendrite:
    """A filled source and an empty target, of two engines."""
    return new_dendrite(tmp_path, new_place, request.param)


def test_living_backups_are_copied(dendrite: Dendrite) -> None:
    """The target holds each usable version, and the keys of living versions alone; the
    rest is counted or named. The source stays unchanged, and a second run has nothing
    to do."""
    source, target = dendrite.source, dendrite.target
    before = source.tables, [source.run(statement) for statement in ALL]
    code, lines = dendrite.migrate()
    assert code == 0, lines
    assert lines[0].startswith("From source, ") and lines[1].startswith("to target, ")
    assert sorted(lines[2:5]) == LEFT_OUT
    assert lines[5:] == [
        "7 backups copied, 0 merged, 0 unchanged; 1217 keys written, 0 deleted",
        *REMARKS,
        "DONE: compared 7 backups, 1217 keys: equal",
    ]
    assert target.run(VERSIONS) == COPIED
    assert set(target.run(KEYS)) == set(LIVING)
    code, lines = dendrite.migrate()
    assert code == 0 and sorted(lines[2:5]) == LEFT_OUT
    assert lines[5:] == [
        "0 backups copied, 0 merged, 7 unchanged; 0 keys written, 0 deleted",
        *REMARKS,
        "DONE: compared 7 backups, 1217 keys: equal",
    ]
    assert (source.tables, [source.run(statement) for statement in ALL]) == before


def test_changes_at_the_source_follow(dendrite: Dendrite) -> None:
    """A later run copies new and replaced keys, a deletion with its keys, and a backup
    whose auth_data was repaired. A copied backup whose auth_data was lost since stays
    as it was copied."""
    source, target = dendrite.source, dendrite.target
    dendrite.run()
    new = (ALICE, 2, ROOM, "new", 0, 0, True, "{}")
    dendrite.add_keys(new)
    source.run(
        "UPDATE userapi_key_backups SET first_message_index = 99"
        " WHERE session_id = 'b0' AND user_id = ? AND version = '2'",
        (ALICE,),
    )
    source.run(SET.format("etag = '8'"), (2,))
    source.run(SET.format("auth_data = '[]'"), (3,))
    source.run(SET.format("deleted = 1"), (5,))
    source.run(SET.format("auth_data = ''"), (9,))
    result, told = dendrite.run()
    assert result == Result(
        copied=3,
        unchanged=4,
        written=6,
        deleted=14,
        checked=7,
        checked_keys=1208,
        unusable=3,
        left_keys=27,
    )
    assert f"{CAROL} version 9: its auth_data is empty" in told
    versions = {row[1]: row for row in target.run(VERSIONS)}
    assert versions == {
        **{row[1]: row for row in COPIED},
        2: (ALICE, 2, "algorithm", AUTH_DATA, 0, 8),
        3: (BOB, 3, "algorithm", "[]", 0, 4),
        5: (CAROL, 5, "algorithm", "{}", 1, 0),
    }
    keys = set(target.run(KEYS))
    assert new in keys and keys >= set(keys_of(BOB, 3, 4))
    assert not any(user == CAROL for user, *_ in keys)
    assert [row[4] for row in keys if row[:2] == (ALICE, 2) and row[3] == "b0"] == [99]


def test_the_operators_choices(dendrite: Dendrite) -> None:
    """A dry run writes nothing; users are named by their Matrix ids; a change at the
    service is kept until the operator decides."""
    source, target = dendrite.source, dendrite.target
    result, told = dendrite.run(Options(dry_run=True))
    assert (result.copied, result.written, result.unusable) == (7, 0, 3)
    assert f"{ALICE} version 2: is to be copied: would be copied (1203 keys)" in told
    if target.config.name == "sqlite3":
        assert not Path(target.config.args["database"]).exists()
    else:
        assert target.tables == set()
    result, told = dendrite.run(Options(users=(ALICE, "alice")))
    assert result.missing_users == ("alice",)
    assert (result.copied, result.unusable, result.left_keys, told) == (3, 0, 13, "")
    assert {user for user, *_ in target.run(VERSIONS)} == {ALICE}
    target.run("DELETE FROM e2e_room_keys WHERE session_id = 'b0' AND version = 2")
    target.run("UPDATE e2e_room_keys_versions SET etag = 8 WHERE version = 2")
    dendrite.add_keys((ALICE, 2, ROOM, "new", 0, 0, True, "{}"))
    source.run(SET.format("etag = '9'"), (2,))
    result, _ = dendrite.run()
    assert (result.undecided, result.copied, result.is_done) == (1, 4, False)
    result, _ = dendrite.run(Options(keep=Keep.BETTER))
    assert (result.joined, result.written, result.is_done) == (1, 2, True)
    where = "WHERE user_id = ? AND version = 2 AND session_id IN ('b0', 'new')"
    found = target.run(
        f"SELECT session_id FROM e2e_room_keys {where} ORDER BY 1", (ALICE,)
    )
    assert found == [("b0",), ("new",)]


def test_a_version_without_a_number(new_place: NewPlace, tmp_path: Path) -> None:
    """PostgreSQL's column of version numbers allows NULL: such a row is counted as left
    out, and the others are copied."""
    dendrite = new_dendrite(tmp_path, new_place, ENGINES[::-1])
    dendrite.source.run(ADD_VERSION, (ALICE, None, "algorithm", "{}", "1", 0))
    result, _ = dendrite.run()
    assert (result.lost_versions, result.is_done) == (1, True)
    assert dendrite.target.run(VERSIONS) == COPIED


def test_one_database_of_postgresql(new_place: NewPlace, tmp_path: Path) -> None:
    """Dendrite and the service may share a database, in which their tables have other
    names."""
    place = make_dendrites_tables(new_place("postgres"))
    place.run(ADD_VERSION, (ALICE, 1, "algorithm", "{}", "3", 0))
    place.run(ADD_KEY, *((u, str(v), *rest) for u, v, *rest in keys_of(ALICE, 1, 9)))
    dendrite = Dendrite(tmp_path, place, place)
    for unchanged in (0, 1):
        result, _ = dendrite.run()
        assert result.is_done and result.unchanged == unchanged
    assert set(place.run(KEYS)) == set(keys_of(ALICE, 1, 9))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_database_without_dendrites_tables(
    engine: str, new_place: NewPlace, tmp_path: Path
) -> None:
    """The error names the missing tables. The target stays unchanged."""
    source, target = new_source(tmp_path, new_place, engine), new_place("sqlite")
    source.run("CREATE TABLE account_e2e_room_keys (user_id TEXT)")
    missing = "no table userapi_key_backups or userapi_key_backup_versions"
    with pytest.raises(MigrateError, match=missing) as found:
        Dendrite(tmp_path, source, target).run()
    assert found.value.exit_code == 2
    assert not Path(target.config.args["database"]).exists()


@inlineCallbacks
def test_a_client_goes_on(dendrite: Dendrite) -> Steps:
    """A client reads the newest living backup with auth_data, without the sessions
    whose data isn't JSON, and replaces such a session."""
    target = dendrite.target
    arguments = {n: v for n, v in target.config.args.items() if n[:3] != "cp_"}
    is_postgres = target.config.name == "psycopg2"
    path = Path(target.config.args.get("database", ""))
    site = OwnSite(Backend("target", arguments if is_postgres else None, path))
    yield site.start()
    client = Client(site.host, site.host.new_user())
    user = client.user.user_id
    dendrite.source.run(
        ADD_VERSION,
        (user, 20, "algorithm", '{"a": "é"}', "", 0),
        (user, 21, "algorithm", "", "1", 0),
        (user, 22, "algorithm", "{}", "1", 1),
    )
    dendrite.add_keys(
        (user, 20, ROOM, "good", 1, 0, True, '{"b": "🔑"}'),
        (user, 20, ROOM, "empty", 0, 0, True, ""),
        (user, 21, ROOM, "good", 0, 0, True, "{}"),
    )
    assert dendrite.run()[0].is_done
    info = yield client.info()
    assert (info["version"], info["auth_data"]) == ("20", {"a": "é"})
    rooms = yield client.download("20")
    assert rooms == {ROOM: {"good": key(1, 0, True, {"b": "🔑"})}}
    yield client.upload("20", {ROOM: {"empty": key(5)}})
    rooms = yield client.download("20")
    assert rooms[ROOM]["empty"] == key(5)
    newer: str = yield client.create_version()
    assert int(newer) > 22
    yield site.stop()

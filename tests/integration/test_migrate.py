"""Migration of backups from a Synapse's database, between any two engines."""

from __future__ import annotations

import io
import json
import secrets
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

import attrs
import pytest
from twisted.internet.defer import Deferred, inlineCallbacks

from synapse_roomkeys.service.config import DatabaseConfig
from synapse_roomkeys.service.migration import (
    Keep,
    MigrateError,
    Options,
    Progress,
    Result,
    migrate,
)

from ..backup_client import Api
from ..contract import Client
from ..contract.base import key
from ..servers import Synapse
from ..sites import Backend, OwnSite
from .places import NewPlace, Place

Steps = Generator[Deferred[Any], Any, None]

ALICE, BOB, CAROL = (f"@{name}:test.example" for name in ("alice", "bob", "carol"))
ROOM = "!room/with+:test.example"
ENGINES = ("sqlite", "postgres")
KEY_COLUMNS = """user_id, version, room_id, session_id, first_message_index,
    forwarded_count, is_verified, session_data"""
KEYS = f"SELECT {KEY_COLUMNS} FROM e2e_room_keys ORDER BY 1, 2, 3, 4"
VERSIONS = """
    SELECT user_id, version, algorithm, auth_data, deleted, COALESCE(etag, 0)
    FROM e2e_room_keys_versions ORDER BY 1, 2"""
ADD_KEY = f"INSERT INTO e2e_room_keys ({KEY_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
ADD_VERSION = "INSERT INTO e2e_room_keys_versions VALUES (?, ?, ?, ?, ?, ?)"
#: A text that stays unchanged in any encoding.
ODD = '"\\\\ \\t \\u0000 é 🔑 \u2028 \t\r\n %s ? {}"'
#: JSON with odd characters.
DATA = json.dumps({"é": "🔑 \\ \t \0 \u2028 %s ? {}"}, ensure_ascii=False)


def make_synapses_tables(place: Place) -> Place:
    """Create Synapse's two tables, without the plugin's tables."""
    file = resources.files("synapse_roomkeys.storage") / "schema" / "001_backups.sql"
    lines = [line for line in file.read_text().splitlines() if line[:2] != "--"]
    for statement in "\n".join(lines).split(";")[:-1]:
        place.run(statement)
    return place


@pytest.fixture(params=list(product(ENGINES, ENGINES)), ids="-to-".join)
def pair(request: pytest.FixtureRequest, new_place: NewPlace) -> tuple[Place, Place]:
    """A filled source and an empty target, of each engine."""
    source, target = request.param
    place = make_synapses_tables(new_place(source))
    fill(place)
    return place, new_place(target)


@pytest.fixture(params=[ENGINES, ENGINES[::-1]], ids="-to-".join)
def mixed(request: pytest.FixtureRequest, new_place: NewPlace) -> tuple[Place, Place]:
    """A filled source and an empty target, of two engines."""
    source, target = request.param
    place = make_synapses_tables(new_place(source))
    fill(place)
    return place, new_place(target)


@pytest.fixture(params=ENGINES)
def target(request: pytest.FixtureRequest, new_place: NewPlace) -> Place:
    """An empty target of each engine."""
    return new_place(request.param)


def keys_of(user: str, version: int, number: int) -> Iterator[tuple[Any, ...]]:
    """Rows of keys, with ids that each locale orders in another way."""
    for i in range(number):
        room = f"!{'aA_é'[i % 4]}{i % 7}:x"
        session = f"{'bB/+日🔑'[i % 6]}{i}"
        yield user, version, room, session, i, i % 3, bool(i % 2), f'"{i}"'


def fill(source: Place) -> None:
    """Add the backups of a homeserver after some years."""
    source.run(
        ADD_VERSION,
        (ALICE, 1, "old", "{}", 1, None),
        (ALICE, 2, "algorithm", ODD, 0, 7),
        (ALICE, 1700000000, "algorithm", '{"a": 1}', 0, 3),
        (BOB, 1, "algorithm", "{}", 0, None),
        (CAROL, 5, "algorithm", "{}", 1, 9),
    )
    source.run(
        ADD_KEY,
        *keys_of(ALICE, 2, 1203),
        *keys_of(ALICE, 1700000000, 40),
        (BOB, 1, ROOM, "null", None, None, None, "null"),
        (BOB, 1, ROOM, ODD, 2**31 - 1, 0, True, ODD),
        (BOB, 1, "", "x" * 5000, 0, 0, False, "{}"),
    )


def run(
    source: Place, target: Place, options: Options | None = None
) -> tuple[Result, str]:
    """Run a migration; return the result, and the lines after the two about the
    sides."""
    told = io.StringIO()
    result = migrate(source.config, target.config, Progress(told), options)
    return result, told.getvalue().split("\n", 2)[2]


def same(source: Place, target: Place) -> bool:
    """Whether both databases have equal backups."""
    return all(source.run(rows) == target.run(rows) for rows in (VERSIONS, KEYS))


def add_keys(source: Place, user: str, version: int, *rows: tuple[Any, ...]) -> None:
    """Upload keys, as a homeserver does: the etag moves."""
    source.run(ADD_KEY, *((user, version, *row) for row in rows))
    move(source, user, version)


def move(place: Place, user: str, version: int) -> None:
    place.run(
        "UPDATE e2e_room_keys_versions SET etag = COALESCE(etag, 0) + 1"
        " WHERE user_id = ? AND version = ?",
        (user, version),
    )


def test_all_of_it_is_copied(pair: tuple[Place, Place]) -> None:
    """The target's backups become equal to the source's, the source stays unchanged,
    and a second run copies no backup."""
    source, target = pair
    before = source.run(VERSIONS), source.run(KEYS)
    result, told = run(source, target)
    assert same(source, target) and len(target.run(KEYS)) == 1246
    assert result == Result(copied=5, written=1246, checked=5, checked_keys=1246)
    assert result.is_done and told == ""
    assert result.lines()[-1] == "DONE: compared 5 backups, 1246 keys: equal"
    again, _ = run(source, target)
    assert again == Result(unchanged=5, checked=5, checked_keys=1246)
    assert (source.run(VERSIONS), source.run(KEYS)) == before
    assert source.tables == {"e2e_room_keys", "e2e_room_keys_versions"}


def test_what_changed_follows(pair: tuple[Place, Place]) -> None:
    """A later run copies only the changes since the last run."""
    source, target = pair
    run(source, target)
    ids = ((ROOM, "new"), ("", "!"), ("🔑", "!"))
    add_keys(source, ALICE, 2, *((*both, 1, 2, True, "{}") for both in ids))
    move(source, BOB, 1)
    source.run(
        "UPDATE e2e_room_keys SET session_data = '5' WHERE user_id = ? AND version = ?"
        " AND session_id IN ('b0', '🔑1199')",
        (ALICE, 2),
    )
    source.run(
        "DELETE FROM e2e_room_keys WHERE user_id = ? AND version = ?"
        " AND session_id IN ('B1', '日4', 'b6')",
        (ALICE, 2),
    )
    result, _ = run(source, target)
    assert same(source, target)
    assert result == Result(
        copied=2, unchanged=3, written=5, deleted=3, checked=5, checked_keys=1246
    )


def test_versions_that_come_and_go(pair: tuple[Place, Place]) -> None:
    """A later run copies new users and versions, a deletion, a change of auth_data, and
    the purge of a room, which moves no etag."""
    source, target = pair
    run(source, target)
    served = (ALICE, 1700000000, 3, 40, 99)
    target.run(
        "INSERT INTO roomkeys_counts (user_id, version, etag, key_count, counted_ts)"
        " VALUES (?, ?, ?, ?, ?)",
        served,
    )
    source.run(
        ADD_VERSION, (ALICE, 1700000001, "a", "{}", 0, 0), ("@n:x", 1, "a", "{}", 0, 1)
    )
    source.run(ADD_KEY, *keys_of("@n:x", 1, 10))
    source.run("DELETE FROM e2e_room_keys WHERE room_id = '!a0:x'")
    source.run("DELETE FROM e2e_room_keys WHERE user_id = ?", (BOB,))
    source.run(
        "UPDATE e2e_room_keys_versions SET deleted = 1 WHERE user_id = ?", (BOB,)
    )
    source.run(
        "UPDATE e2e_room_keys_versions SET auth_data = '[]' WHERE user_id = ?", (CAROL,)
    )
    result, _ = run(source, target)
    assert same(source, target)
    assert (result.copied, result.unchanged, result.is_done) == (6, 1, True)
    assert target.run("SELECT * FROM roomkeys_counts") == []


def test_others_at_the_target_stay(pair: tuple[Place, Place]) -> None:
    """Users and versions of the target alone stay unchanged."""
    source, target = pair
    run(source, target)
    rows = ("@own:x", 1, "a", "{}", 0, 4), (ALICE, 1800000000, "a", "{}", 0, 4)
    target.run(ADD_VERSION, *rows)
    target.run(ADD_KEY, *keys_of("@own:x", 1, 9), *keys_of(ALICE, 1800000000, 9))
    before = target.run(VERSIONS), target.run(KEYS)
    result, _ = run(source, target)
    assert result.is_done and result.unchanged == 5
    assert (target.run(VERSIONS), target.run(KEYS)) == before


def serve_upload(target: Place) -> None:
    add_keys(target, ALICE, 2, ("!served", "served", 0, 0, False, "{}"))


def serve_deletion(target: Place) -> None:
    target.run("DELETE FROM e2e_room_keys WHERE user_id = ? AND version = 2", (ALICE,))
    target.run(
        "UPDATE e2e_room_keys_versions SET deleted = 1"
        " WHERE user_id = ? AND version = 2",
        (ALICE,),
    )


def serve_auth_data(target: Place) -> None:
    target.run(
        "UPDATE e2e_room_keys_versions SET auth_data = '7'"
        " WHERE user_id = ? AND version = 2",
        (ALICE,),
    )


@pytest.mark.parametrize("serve", [serve_upload, serve_deletion, serve_auth_data])
@pytest.mark.parametrize("moves", [0, 1, 2])
def test_what_the_target_served_stays(
    pair: tuple[Place, Place], serve: Callable[[Place], None], moves: int
) -> None:
    """A backup that the service has changed isn't overwritten, even if the source has
    changed as often. Other backups are copied, and the result isn't done."""
    source, target = pair
    run(source, target)
    serve(target)
    for _ in range(moves):
        add_keys(source, ALICE, 2, ("!s", f"{secrets.token_hex(4)}", 0, 0, False, "{}"))
    add_keys(source, BOB, 1, (ROOM, "new", 0, 0, False, "{}"))
    where = f"WHERE user_id = '{ALICE}' AND version = 2 ORDER"
    own = [statement.replace("ORDER", where) for statement in (VERSIONS, KEYS)]
    before = [target.run(statement) for statement in own]
    result, told = run(source, target)
    assert [target.run(statement) for statement in own] == before
    assert (result.undecided, result.copied, result.unchanged) == (1, 1, 3)
    assert not result.is_done and result.differing == 0
    changed = "on both sides" if moves else "at the target"
    assert told == (
        f"{ALICE} version 2: has changed {changed} since it was copied: left as the"
        " target has it until you decide\n"
    )


@pytest.mark.parametrize("keep", list(Keep))
def test_what_the_operator_keeps(mixed: tuple[Place, Place], keep: Keep) -> None:
    """After changes on both sides, ``--keep`` decides: the keys of either side, or the
    better keys of both with an etag above both and no cached count. A later run with
    the same choice changes no backup."""
    source, target = mixed
    run(source, target)
    both = ("!both", "better", 5, 0, False, "{}"), ("!both", "worse", 5, 0, False, "{}")
    for place, index in ((source, 3), (target, 7)):
        rows = [(*row[:2], index, *row[3:]) for row in both]
        own = ("!own", f"{index}", 0, 0, False, "{}")
        add_keys(place, ALICE, 2, *rows, own)
    verify = "UPDATE e2e_room_keys SET is_verified = (1 = 1) WHERE session_id = ?"
    target.run(verify, ("better",))
    move(target, ALICE, 2)
    target.run(
        "INSERT INTO roomkeys_counts (user_id, version, etag, key_count, counted_ts)"
        " VALUES (?, 2, 9, 99, 99)",
        (ALICE,),
    )
    before = target.run(VERSIONS), target.run(KEYS)
    options = Options(keep=keep)
    result, _ = run(source, target, options)
    assert result.is_done
    where = f"WHERE user_id = '{ALICE}' AND version = 2"
    found = target.run(
        "SELECT session_id, first_message_index, is_verified"
        f" FROM e2e_room_keys {where} AND room_id IN ('!both', '!own') ORDER BY 1"
    )
    keys = {(name, index, bool(verified)) for name, index, verified in found}
    ((etag,),) = target.run(f"SELECT etag FROM e2e_room_keys_versions {where}")
    counts = target.run("SELECT key_count FROM roomkeys_counts")
    if keep is Keep.TARGET:
        assert (target.run(VERSIONS), target.run(KEYS)) == before
        assert (result.kept, counts) == (1, [(99,)])
    elif keep is Keep.SOURCE:
        assert same(source, target) and (result.copied, counts) == (1, [])
    else:
        assert keys == {
            *(("3", 0, False), ("7", 0, False)),
            *(("better", 7, True), ("worse", 3, False)),
        }
        # Both sides had 7; the source has 8, the target 9.
        assert (result.joined, counts, etag) == (1, [], 10)
    before = target.run(VERSIONS), target.run(KEYS)
    again, _ = run(source, target, options)
    assert again.is_done and (again.copied, again.joined, again.written) == (0, 0, 0)
    assert (target.run(VERSIONS), target.run(KEYS)) == before


def test_a_key_that_was_replaced_without_an_etag(pair: tuple[Place, Place]) -> None:
    """A later run copies a replaced key although etag and number of keys are the same.
    A key replaced at the target isn't overwritten."""
    source, target = pair
    run(source, target)
    replace = (
        "UPDATE e2e_room_keys SET session_data = '{\"other\": 1}'"
        " WHERE user_id = ? AND version = 2 AND session_id = 'b0'"
    )
    source.run(replace, (ALICE,))
    result, _ = run(source, target)
    assert (result.copied, result.written, result.unchanged) == (1, 1, 4)
    assert result.is_done and same(source, target)
    target.run(replace.replace("other", "another"), (ALICE,))
    result, told = run(source, target)
    assert (result.undecided, result.unchanged) == (1, 4)
    assert "changed at the target" in told


def test_an_erased_user_stays_erased(mixed: tuple[Place, Place]) -> None:
    """Backups that were deleted at the target after their copy come back only with
    ``--keep source`` and the user's name."""
    source, target = mixed
    run(source, target)
    for table in ("e2e_room_keys", "e2e_room_keys_versions"):
        target.run(f"DELETE FROM {table} WHERE user_id = ?", (ALICE,))
    move(source, ALICE, 2)
    for options in (Options(), Options(keep=Keep.SOURCE), Options(users=(ALICE,))):
        result, told = run(source, target, options)
        assert result.is_done and (result.erased, result.copied) == (3, 0)
        assert told.count("was deleted at the target") == 3
    assert not any(user == ALICE for user, *_ in target.run(VERSIONS))
    result, _ = run(source, target, Options(keep=Keep.SOURCE, users=(ALICE,)))
    assert (result.copied, result.erased) == (3, 0) and same(source, target)


def test_one_user(mixed: tuple[Place, Place]) -> None:
    """Only named users are copied. The result lists names without a backup."""
    source, target = mixed
    result, _ = run(source, target, Options(users=(BOB, CAROL)))
    assert (result.copied, result.is_done) == (2, True)
    assert {user for user, *_ in target.run(VERSIONS)} == {BOB, CAROL}
    result, _ = run(source, target, Options(users=("@bbo:test.example",)))
    assert result.missing_users == ("@bbo:test.example",) and not result.is_done


def test_a_dry_run(mixed: tuple[Place, Place]) -> None:
    """A dry run creates no row, table or file, and reports the work of a run."""
    source, target = mixed
    result, told = run(source, target, Options(dry_run=True))
    assert (result.copied, result.written, result.is_done) == (5, 0, True)
    assert f"{ALICE} version 2: is to be copied: would be copied (1203 keys)" in told
    if target.config.name == "sqlite3":
        assert not Path(target.config.args["database"]).exists()
    else:
        assert target.tables == set()
    run(source, target)
    add_keys(source, BOB, 1, (ROOM, "new", 0, 0, False, "{}"))
    for place in (source, target):
        add_keys(place, ALICE, 2, ("!", place.config.name * 2, 0, 0, False, "{}"))
        add_keys(place, ALICE, 2, ("!", f"{id(place)}", 0, 0, False, "{}"))
    before = target.run(VERSIONS), target.run(KEYS)
    result, told = run(source, target, Options(dry_run=True))
    assert (result.copied, result.undecided, result.is_done) == (1, 1, False)
    result, told = run(source, target, Options(dry_run=True, keep=Keep.BETTER))
    assert (result.copied, result.joined, result.is_done) == (1, 1, True)
    assert "would be merged" in told
    assert (target.run(VERSIONS), target.run(KEYS)) == before


def test_the_way_back(mixed: tuple[Place, Place]) -> None:
    """Changes of the service alone are copied back without ``--keep``. A backup with
    changes on both sides needs a decision, after which both sides are equal."""
    source, target = mixed
    run(source, target)
    serve_upload(target)
    serve_deletion(target)
    target.run(ADD_VERSION, ("@new:x", 9, "a", "{}", 0, 1))
    for place in (source, target):
        move(place, BOB, 1)
    add_keys(target, BOB, 1, (ROOM, "new", 0, 0, False, "{}"))
    back = Options(make_tables=False)
    result, told = run(target, source, back)
    assert (result.copied, result.undecided, result.unchanged) == (2, 1, 3)
    assert told.startswith(f"{BOB} version 1: has changed on both sides")
    result, _ = run(target, source, attrs.evolve(back, keep=Keep.SOURCE))
    assert result.is_done and result.copied == 1 and same(source, target)
    assert source.tables == {
        *("e2e_room_keys", "e2e_room_keys_versions", "roomkeys_migrated"),
    }


@pytest.mark.parametrize("engine", ENGINES)
def test_one_database_is_no_pair(
    new_place: NewPlace, engine: str, tmp_path: Path
) -> None:
    """A database isn't copied into itself, even by another name."""
    place = make_synapses_tables(new_place(engine))
    fill(place)
    before = place.run(VERSIONS), place.tables
    args = dict(place.config.args)
    if engine == "sqlite":
        other = tmp_path / "link.db"
        other.symlink_to(args["database"])
        args["database"] = str(other)
    else:
        assert args["host"] == "127.0.0.1"
        args["host"] = "localhost"
    same_place = Place(DatabaseConfig(place.config.name, args))
    for options in (Options(), Options(dry_run=True)):
        with pytest.raises(MigrateError, match="same tables") as found:
            run(place, same_place, options)
        assert found.value.exit_code == 2
    assert (place.run(VERSIONS), place.tables) == before


def test_one_database_with_two_schemas(new_place: NewPlace) -> None:
    """Two schemas of one database are two sides."""
    source = make_synapses_tables(new_place("postgres"))
    fill(source)
    source.run("CREATE SCHEMA own")
    args = {**source.config.args, "options": "-c search_path=own"}
    target = Place(DatabaseConfig("psycopg2", args))
    result, _ = run(source, target)
    assert result.is_done and same(source, target)


def test_two_at_once(mixed: tuple[Place, Place]) -> None:
    """A run fails immediately while another run writes to the same target, and succeeds
    after the end of the other run."""
    source, target = mixed

    class Nested(Progress):
        """Starts another run in the middle of a run."""

        def begin(self, keys: int) -> None:
            with pytest.raises(MigrateError, match="another migration") as found:
                run(source, target)
            assert found.value.exit_code == 1
            super().begin(keys)

    result = migrate(source.config, target.config, Nested(io.StringIO()))
    assert result.is_done and same(source, target)
    assert run(source, target)[0].unchanged == 5


def test_the_sides_are_told_first(mixed: tuple[Place, Place]) -> None:
    """The first two lines name source and target, without a password."""
    source, target = mixed
    told = io.StringIO()
    migrate(source.config, target.config, Progress(told))
    first, second = told.getvalue().splitlines()[:2]
    for line, role, place in (
        (first, "From source", source),
        (second, "to target", target),
    ):
        args = place.config.args
        if place.config.name == "sqlite3":
            assert line == f"{role}, SQLite file {args['database']}"
        else:
            assert line == (
                f"{role}, PostgreSQL database {args['dbname']} on {args['host']},"
                f" port {args['port']}"
            )
            assert args["password"] not in line


def test_a_dsn_is_never_shown(new_place: NewPlace, target: Place) -> None:
    """The error for a malformed dsn, or for a password with special characters, shows
    no part of the dsn."""
    source = make_synapses_tables(new_place("sqlite"))
    for dsn in (
        "host=127.0.0.1 password=my s3cret pass",
        "postgresql://user:my@s3cret@127.0.0.1:1/db",
        "host=127.0.0.1 port=1 password=s3cret",
    ):
        wrong = Place(DatabaseConfig("psycopg2", {"dsn": dsn}))
        for sides in ((wrong, target), (source, wrong)):
            with pytest.raises(MigrateError) as found:
                run(*sides)
            assert "s3cret" not in str(found.value)
            assert "PostgreSQL as database.args.dsn says: " in str(found.value)


@pytest.mark.parametrize("role", ["source", "target"])
def test_a_database_that_is_away(
    new_place: NewPlace, role: str, tmp_path: Path
) -> None:
    """The error names the side with its address or file. The exit code 3 means that
    another try may succeed."""
    place = make_synapses_tables(new_place("sqlite"))
    for config, address in (
        (
            DatabaseConfig("psycopg2", {"host": "127.0.0.1", "port": 1, "dbname": "d"}),
            "PostgreSQL on 127.0.0.1, port 1",
        ),
        (
            DatabaseConfig("sqlite3", {"database": f"{tmp_path}/none/x.db"}),
            f"SQLite file {tmp_path}/none/x.db",
        ),
    ):
        away = Place(config)
        sides = (away, place) if role == "source" else (place, away)
        with pytest.raises(MigrateError) as found:
            run(*sides)
        assert str(found.value).startswith(f"{role}, {address}: ")
        assert found.value.exit_code == 3


class Meddling(Progress):
    """Changes the target after the first version, like an upload to the service."""

    target: Place

    def begin(self, keys: int) -> None:
        super().begin(keys)
        self.was_served = False

    def advance(self, keys: int) -> None:
        if not self.was_served:
            self.was_served = True
            serve_upload(self.target)


def test_what_is_served_meanwhile_stays(pair: tuple[Place, Place]) -> None:
    """A version isn't overwritten if the service changes it between comparison and
    copy."""
    source, target = pair
    run(source, target)
    move(source, ALICE, 2)
    told = io.StringIO()
    progress = Meddling(told)
    progress.target = target
    result = migrate(source.config, target.config, progress)
    assert (result.undecided, result.unchanged, result.is_done) == (1, 4, False)
    assert "on both sides" in told.getvalue()
    assert target.run("SELECT 1 FROM e2e_room_keys WHERE session_id = 'served'")


def test_what_is_there_already(pair: tuple[Place, Place]) -> None:
    """Versions at the target that no migration has copied there aren't overwritten."""
    source, target = pair
    make_synapses_tables(target)
    fill(target)
    result, _ = run(source, target)
    assert result.is_done and result.unchanged == 5
    move(source, ALICE, 2)
    result, told = run(source, target)
    assert (result.undecided, result.unchanged, result.is_done) == (1, 4, False)
    assert "was never copied there" in told


def test_rows_that_no_database_should_hold(new_place: NewPlace, target: Place) -> None:
    """Rows that the target can't hold are left out and counted, and all other rows are
    copied. A second run has the same result."""
    source = make_synapses_tables(new_place("sqlite"))
    fill(source)
    incompressible = secrets.token_hex(10000)
    source.run(
        ADD_VERSION,
        ("@m:x", 1, "a", "{}", 0, "text"),
        ("@\0:x", 1, "a", "{}", 0, 1),
        ("@n:x", "one", "a", "{}", 0, 1),
        ("@o:x", 1, "a", b"\xff", 0, 1),
    )
    source.run(
        ADD_KEY,
        ("@m:x", 1, "r", "1", 2**31, -(2**40), 2, "{}"),
        ("@m:x", 1, "r", "2", "text", 1.5, "yes", "{}"),
        ("@m:x", 1, "r", "\0", 0, 0, 0, "{}"),
        ("@m:x", 1, "r", "3", 0, 0, 0, '"\0"'),
        ("@m:x", 1, "r", incompressible, 0, 0, 0, "{}"),
        ("@m:x", 1, b"blob", "4", 0, 0, 0, "{}"),
        ("@m:x", 1, "r", "5", 0, 0, 0, b"blob"),
        ("@\0:x", 1, "r", "1", 0, 0, 0, "{}"),
        *keys_of("@m:x", 1, 700),
    )
    source.run(
        "UPDATE e2e_room_keys SET session_data = CAST(X'22FF22' AS TEXT)"
        " WHERE user_id = '@m:x' AND session_id = 'b0'"
    )
    for _ in range(2):
        result, told = run(source, target)
        assert result.is_done
        held = target.run(
            "SELECT session_id, first_message_index, forwarded_count, is_verified"
            " FROM e2e_room_keys WHERE user_id = '@m:x' AND session_id IN ('1', '2')"
            " ORDER BY 1"
        )
        if target.config.name == "sqlite3":
            assert (result.lost_versions, result.lost_keys, result.mended) == (2, 3, 0)
            assert held == [("1", 2**31, -(2**40), 2), ("2", "text", 1.5, "yes")]
        else:
            assert (result.lost_versions, result.lost_keys) == (3, 6)
            assert held == [("1", None, None, True), ("2", None, None, None)]
        assert "@m:x version 1:" in told
    assert result.checked == (7 if target.config.name == "sqlite3" else 6)
    others = KEYS.replace("ORDER", "WHERE user_id LIKE '%.example' ORDER")
    assert len(source.run(others)) == 1246
    assert source.run(others) == target.run(others)


FAIL = {
    "sqlite3": """
        CREATE TRIGGER fail BEFORE INSERT ON e2e_room_keys
        WHEN NEW.session_id = '🔑1199' BEGIN SELECT RAISE(ABORT, 'failed'); END""",
    "psycopg2": """
        CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE 'failed'; END $$;
        CREATE TRIGGER fail BEFORE INSERT ON e2e_room_keys
        FOR EACH ROW WHEN (NEW.session_id = '🔑1199') EXECUTE FUNCTION fail()""",
}


def test_a_run_that_ends_early(pair: tuple[Place, Place]) -> None:
    """A failed run leaves no incomplete version. The next run copies the rest."""
    source, target = pair
    empty = make_synapses_tables(target)
    empty.run(FAIL[target.config.name])
    with pytest.raises(MigrateError, match="failed"):
        run(source, target)
    where = f"FROM e2e_room_keys{{}} WHERE user_id = '{ALICE}' AND version = 2"
    for table in ("", "_versions"):
        assert target.run("SELECT 1 " + where.format(table)) == []
    drop = " ON e2e_room_keys" if target.config.name == "psycopg2" else ""
    target.run(f"DROP TRIGGER fail{drop}")
    result, _ = run(source, target)
    assert result.is_done and same(source, target)


def test_databases_that_are_not_as_expected(new_place: NewPlace, target: Place) -> None:
    """The error for an unsuitable database is one line with the reason."""
    source = new_place("sqlite")
    with pytest.raises(MigrateError, match="unable to open"):
        run(source, target)
    assert not Path(source.config.args["database"]).exists()
    source.run("CREATE TABLE other (one INT)")
    with pytest.raises(MigrateError, match="e2e_room_keys"):
        run(source, target)
    run(make_synapses_tables(source), target)
    target.run("UPDATE roomkeys_schema SET number = 1000")
    with pytest.raises(MigrateError, match="1000"):
        run(source, target)


PROGRAM = """
import re, sys
from pathlib import Path
from synapse_roomkeys.service.config import DatabaseConfig
from synapse_roomkeys.service.migration import migrate
from synapse_roomkeys.service.migration import Progress
small, large, target = map(eval, sys.argv[1:])
peaks = []
for source in (small, large):
    result = migrate(source, target, Progress(sys.stderr))
    status = Path("/proc/self/status").read_text()
    peaks.append(int(re.search(r"VmHWM:\\s*(\\d+) kB", status)[1]))
print(result.written, result.is_done, peaks[1] - peaks[0])
"""
MANY = 50_000
ADD_MANY = {
    "sqlite3": f"""
        WITH RECURSIVE s(i) AS (
            SELECT 1 UNION ALL SELECT i + 1 FROM s WHERE i < {MANY})
        INSERT INTO e2e_room_keys ({KEY_COLUMNS})
        SELECT ?, 1, '!r' || i % 50, 's' || i, i, 0, TRUE,
            '"' || hex(zeroblob(450)) || '"' FROM s""",
    "psycopg2": f"""
        INSERT INTO e2e_room_keys ({KEY_COLUMNS})
        SELECT ?, 1, '!r' || i % 50, 's' || i, i, 0, TRUE,
            '"' || repeat('0', 900) || '"' FROM generate_series(1, {MANY}) AS i""",
}
#: Limit of the additional memory, in KiB. The keys have 45 MiB, the caches of SQLite
#: and libpq a few MiB.
MEMORY = 20 * 1024


@pytest.mark.parametrize("engines", [ENGINES, ENGINES[::-1]], ids="-to-".join)
def test_a_large_backup_in_little_memory(
    new_place: NewPlace, engines: tuple[str, str]
) -> None:
    """The memory doesn't grow with the size of a backup, neither in a first copy nor in
    a comparison."""
    small, large = (make_synapses_tables(new_place(engines[0])) for _ in range(2))
    target = new_place(engines[1])
    small.run(ADD_VERSION, (BOB, 1, "a", "{}", 0, 1))
    small.run(ADD_KEY, *keys_of(BOB, 1, 2000))
    large.run(ADD_VERSION, (ALICE, 1, "a", "{}", 0, 1))
    large.run(ADD_MANY[large.config.name], (ALICE,))
    for written in (MANY, 1):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM]
            + [described(place) for place in (small, large, target)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        keys, equal, kib = done.stdout.split()
        assert (int(keys), equal) == (written, "True")
        assert int(kib) < MEMORY
        add_keys(large, ALICE, 1, ("!new", f"{written}", 0, 0, False, "{}"))


def described(place: Place) -> str:
    return f"DatabaseConfig({place.config.name!r}, {dict(place.config.args)!r})"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_running_synapse(
    engine: str, new_place: NewPlace, target: Place, tmp_path: Path
) -> None:
    """Uploads and deletions through Synapse's built-in endpoints, before and between
    the runs, are at the target after the last run."""
    arguments = None
    directory = tmp_path / "synapse"
    if engine == "postgres":
        arguments = dict(new_place(engine).config.args)
    with Synapse(directory, database=arguments, module_config=None) as server:
        database = server.shared_config()["database"]
        source = Place(DatabaseConfig(database["name"], database["args"]))
        users = [server.register(name) for name in ("one", "two")]
        apis = [Api(server.url, user.access_token) for user in users]
        gone = apis[0].create_version()
        apis[0].upload(gone, {"!gone": {"s": key()}})
        versions = [api.create_version() for api in apis]
        for api, version in zip(apis, versions, strict=True):
            api.upload(version, {f"!{i}": {f"s{i}": key(i)} for i in range(150)})
        result, _ = run(source, target)
        assert result.is_done and same(source, target)
        apis[0].delete(f"/version/{gone}")
        apis[1].delete(f"/keys/!3?version={versions[1]}")
        apis[1].upload(versions[1], {"!more": {"s": key(3, 2, True)}})
        result, _ = run(source, target)
        assert (result.copied, result.is_done) == (2, True)
        assert same(source, target)


@inlineCallbacks
def test_the_service_goes_on_with_it(pair: tuple[Place, Place]) -> Steps:
    """Clients of a running service download copied backups and add keys to them, also
    between two runs."""
    source, target = pair
    path = Path(target.config.args.get("database", ""))
    arguments = {n: v for n, v in target.config.args.items() if n[:3] != "cp_"}
    postgres = target.config.name == "psycopg2"
    site = OwnSite(Backend("target", arguments if postgres else None, path))
    yield site.start()
    client = Client(site.host, site.host.new_user())
    user = client.user.user_id
    source.run(ADD_VERSION, (user, 3, "a", "{}", 1, 1), (user, 4, "a", "[]", 0, None))
    source.run(ADD_KEY, *keys_of(user, 4, 1500), (user, 4, ROOM, "s", 0, 0, True, DATA))
    assert run(source, target)[0].is_done
    rooms = yield client.download("4")
    assert rooms[ROOM] == {"s": key(0, 0, True, json.loads(DATA))}
    assert (yield client.tally("4")) == (0, 1501)
    source.run(
        "DELETE FROM e2e_room_keys WHERE user_id = ? AND room_id = ?", (user, ROOM)
    )
    assert run(source, target)[0].is_done
    assert (yield client.tally("4")) == (0, 1500)
    yield client.upload("4", {ROOM: {"later": key()}})
    assert (yield client.tally("4")) == (1, 1501)
    result, _ = run(source, target)
    assert (result.undecided, result.is_done) == (1, False)
    assert (yield client.tally("4")) == (1, 1501)
    newer: str = yield client.create_version()
    assert int(newer) > 4
    yield site.stop()

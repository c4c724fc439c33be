"""A real store beside the model, taken through the same steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from unittest import mock

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from twisted.internet.defer import Deferred, execute
from twisted.python.failure import Failure

from synapse_roomkeys.encoding import encode_key
from synapse_roomkeys.errors import RoomKeysError
from synapse_roomkeys.storage import (
    SQLITE,
    EndToEndRoomKeyStore,
    Engine,
    Transaction,
    postgres,
    upgrade_tables,
)
from synapse_roomkeys.storage import rows as storage_rows
from synapse_roomkeys.storage.versions import Deletion
from synapse_roomkeys.types import (
    Actor,
    BackupState,
    KeyMetadata,
    KeyPage,
    Limits,
    Position,
    Retention,
    RoomKey,
)

from ..contract.base import ALGORITHM, NO_VERSION, same
from ..memory import ImmediateDatabase, TriesOnce
from .model import COUNT_LIFETIME, Backup, Ids, Key, Keys, User, Version

T = TypeVar("T")

USERS = ("@a:h", "@b:h")
ROOMS = ("!a:h", '!b"\\{,}:日')
SESSIONS = ("s", "S/+==", "s'\"\\")
ACTOR = Actor("DEVICE")
_BEGIN = 1_795_421_234.5

users = st.sampled_from(USERS)
#: How many versions back; more than there are is one that never was.
ages = st.sampled_from((0, 0, 0, 0, 0, 0, 1, 9))
scopes = st.one_of(
    st.just((None, None)),
    st.tuples(st.sampled_from(ROOMS), st.none()),
    st.tuples(st.sampled_from(ROOMS), st.sampled_from(SESSIONS)),
    st.tuples(st.sampled_from(ROOMS), st.sampled_from(SESSIONS)),
)
ids = st.tuples(st.sampled_from(ROOMS), st.sampled_from(SESSIONS))
data = st.sampled_from(('"x"', '"\\u0000"', '{"b": [1, null, {}], "a": 1.5}', "0"))
small = st.integers(0, 2)
good_keys = st.builds(Key, st.booleans(), small, small, data)
bad_keys = st.builds(
    Key,
    st.none() | st.booleans(),
    st.none() | st.integers(-1, 2),
    st.none() | st.integers(-1, 2),
    data | st.sampled_from(("null", "not json", '1},"x":{"y":2')),
)
uploads = st.dictionaries(ids, good_keys, max_size=len(ROOMS) * len(SESSIONS))
auth_data = st.sampled_from(('"old"', '{"public_key": "é"}', "1"))
algorithms = st.sampled_from((ALGORITHM, ALGORITHM, "another"))

UNKNOWN_VERSION = (404, {"errcode": "M_NOT_FOUND", "error": NO_VERSION})


class BlockingPostgres(TriesOnce):
    """A PostgreSQL database that has done everything when it returns."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        import psycopg2

        self.connection = psycopg2.connect(**arguments)
        self.run("upgrade", upgrade_tables, postgres(), True)

    def run(
        self, desc: str, function: Callable[..., T], *args: Any, **kwargs: Any
    ) -> Deferred[T]:
        """As `Database.run`, at once."""
        return execute(self._run, function, *args, **kwargs)

    def _run(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        with self.connection, self.connection.cursor() as cursor:
            return function(postgres().prepare(cursor), *args, **kwargs)


def result_of(deferred: Deferred[T]) -> T:
    """What a Deferred has fired with; its exception is raised."""
    results: list[Any] = []
    deferred.addBoth(results.append)
    (result,) = results
    if isinstance(result, Failure):
        result.raiseException()
    value: T = result
    return value


def room_key(ids: Ids, key: Key) -> RoomKey:
    """A good key as the store takes it."""
    metadata = KeyMetadata(key.index, key.forwarded, key.verified)
    return RoomKey(*ids, metadata, key.data)


def members_of(page: KeyPage) -> list[tuple[Ids, Any]]:
    """The keys of a page as JSON values."""
    rows = [row for row in page.rows if is_readable(row[2])]
    found = [
        ((room_id, session_id), value)
        for room_id, head, data in rows
        for session_id, value in json.loads(f"{{{head}{data}}}}}").items()
    ]
    assert len(dict(found)) == len(rows), found
    return found


def is_readable(data: str) -> bool:
    """Whether the data of a row is JSON: a download leaves other rows out."""
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


def shown(keys: Mapping[Ids, Any]) -> list[Any]:
    """Keys as a list that can be JSON."""
    return [[*i, keys[i]] for i in sorted(keys)]


class BackupMachine(RuleBasedStateMachine):
    """Two users of one store, and what the contract says that they see.

    Attributes:
        states: how many states all machines have been in, their first ones included.
    """

    states = 0

    def __init__(self, database: ImmediateDatabase | BlockingPostgres) -> None:
        super().__init__()
        self.now = _BEGIN
        self.users = {user_id: User() for user_id in USERS}
        self.database = database
        self.engine: Engine = (
            SQLITE if isinstance(database, ImmediateDatabase) else postgres()
        )
        self.store = EndToEndRoomKeyStore(
            database, self.engine, lambda: self.now, Limits(), Retention()
        )
        for table in (
            *("e2e_room_keys", "e2e_room_keys_versions"),
            *("roomkeys_counts", "roomkeys_numbers", "roomkeys_deleted"),
        ):
            self.sql(f"DELETE FROM {table}")

    def sql(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Run a statement past the store, with ``?`` for its parameters.

        Returns:
            The rows, if the statement returns some.
        """
        named = statement
        for i in range(len(parameters)):
            named = named.replace("?", f":value{'abcdefghij'[i]}", 1)
        values = {f"value{'abcdefghij'[i]}": v for i, v in enumerate(parameters)}

        def run(txn: Transaction) -> list[tuple[Any, ...]]:
            txn.execute(named, values)
            return txn.fetchall() if txn.description else []

        return result_of(self.database.run("past the store", run))

    def number_of(self, user_id: str, age: int) -> int:
        """Return the number of a user's last version, an earlier one, or none."""
        numbers = sorted(self.users[user_id].versions, reverse=True)
        return numbers[age] if age < len(numbers) else 7 + age

    def version_of(self, user_id: str, number: int) -> Version | None:
        """What the model has of a version; None if it is not there."""
        return self.users[user_id].versions.get(number)

    def check_refused(self, call: Callable[[], Deferred[Any]], *want: Any) -> None:
        """A call fails with this status, and this errcode or body."""
        try:
            result = result_of(call())
        except RoomKeysError as error:
            got = (error.code, error.error_dict())
            assert got == want or (error.code, error.errcode) == want, (got, want)
        else:
            raise AssertionError(f"{result} where {want} is due")

    def check_state(self, version: Version, state: BackupState) -> None:
        """An answer tells the etag and a count that may be."""
        assert state.etag == version.backup.etag
        counts = version.counts(self.now)
        assert state.count in counts, f"{state.count} is not in {counts}"

    @initialize()
    def begin(self) -> None:
        """Each user has a backup."""
        for user_id in USERS:
            self.create(user_id, ALGORITHM, "{}")

    def create(self, user_id: str, algorithm: str, auth_data: str) -> None:
        """A new version has a number that no other ever had, and is current."""
        user = self.users[user_id]
        last = max(user.issued, default=0)
        number = result_of(
            self.store.create_version(user_id, algorithm, auth_data, ACTOR)
        )
        assert number == max(last + 1, int(self.now))
        user.issued.add(number)
        user.versions[number] = Version(algorithm, auth_data)

    @rule(user_id=users, age=ages, keys=uploads)
    def upload(self, user_id: str, age: int, keys: Keys) -> None:
        """The better key stays, and the etag moves once if any does."""
        number = self.number_of(user_id, age)
        version = self.version_of(user_id, number)
        current = self.users[user_id].current

        def call() -> Deferred[Any]:
            sent = [room_key(*item) for item in keys.items()]
            return self.store.upload_keys(user_id, number, sent, ACTOR)

        if version is None:
            self.check_refused(call, *UNKNOWN_VERSION)
            return
        if number != current:
            body = {"errcode": "M_WRONG_ROOM_KEYS_VERSION"}
            body |= {"error": "Wrong room_keys version"}
            self.check_refused(call, 403, {**body, "current_version": str(current)})
            return
        before = version.backup
        version.backup = before.uploaded(keys)
        result = result_of(call())
        self.check_state(version, result.state)
        kept = sum(version.backup.keys[i] is before.keys.get(i) for i in keys)
        new = len(version.backup.keys) - len(before.keys)
        told = (result.stored, len(result.replaced), result.unchanged)
        assert told == (new, len(keys) - new - kept, kept)

    @rule(user_id=users, keys=uploads)
    def upload_more(self, user_id: str, keys: Keys) -> None:
        """What clients do most often."""
        self.upload(user_id, 0, keys)

    @rule(
        user_id=users,
        age=ages,
        scope=scopes,
        size=st.sampled_from((2, 3, 5, 500)),
        length=st.sampled_from((1, 500, 1 << 20)),
        turn=st.sampled_from((1, 2, 10)),
    )
    def download(
        self,
        user_id: str,
        age: int,
        scope: tuple[Any, Any],
        size: int,
        length: int,
        turn: int,
    ) -> None:
        """Every key comes once, whatever the size of the pages in keys and characters,
        and however many of them are fetched at a time."""
        number = self.number_of(user_id, age)
        version = self.version_of(user_id, number)
        with mock.patch.multiple(storage_rows, PAGE_KEYS=size, PAGE_SIZE=length):
            if version is None:
                self.check_refused(
                    lambda: execute(self.members, user_id, number, scope, size, turn),
                    *UNKNOWN_VERSION,
                )
                return
            members = self.members(user_id, number, scope, size, turn)
        want = {
            i: key.json()
            for i, key in version.backup.selected(*scope).items()
            if key.is_shown()
        }
        assert len(members) == len(want)
        same(shown(dict(members)), shown(want))

    def members(
        self, user_id: str, number: int, scope: tuple[Any, Any], size: int, turn: int
    ) -> list[tuple[Ids, Any]]:
        """The keys of a download."""
        room_id, session_id = scope
        if session_id is not None:
            key = result_of(self.store.get_key(user_id, number, room_id, session_id))
            if key is None:
                return []
            return [((room_id, session_id), json.loads(encode_key(key)))]
        members: list[tuple[Ids, Any]] = []
        after: Position | None = None
        while True:
            pages: list[KeyPage] = []

            def take(page: KeyPage, pages: list[KeyPage] = pages) -> bool:
                pages.append(page)
                return page.last is not None and len(pages) < turn

            result_of(self.store.get_pages(user_id, number, room_id, after, take))
            assert 1 <= len(pages) <= turn
            for page in pages:
                found = members_of(page)
                assert len(found) <= size
                characters = sum(len(head) + len(data) for _, head, data in page.rows)
                assert len(found) <= 1 or characters <= storage_rows.PAGE_SIZE
                members += found
                if page.last is None:
                    assert page is pages[-1]
                    return members
                last = page.last.room_id, page.last.session_id
                assert last == found[-1][0]
                assert after is None or last != (after.room_id, after.session_id)
                after = page.last

    @rule(
        user_id=users,
        age=ages,
        algorithm=algorithms,
        what=st.sampled_from(("create", "delete", "reset", "deactivate")),
    )
    def change_versions(
        self, user_id: str, age: int, algorithm: str, what: str
    ) -> None:
        """One rule for what puts an end to a backup, so that some grow."""
        if what == "create":
            self.create(user_id, algorithm, '"new"')
        elif what == "delete":
            self.delete_version(user_id, age)
        elif what == "reset":
            self.reset(user_id)
        else:
            self.deactivate(user_id)

    @rule(
        room_id=st.sampled_from(ROOMS),
        what=st.sampled_from(("purge", "purge", "etags", "cache")),
        seconds=st.sampled_from((0, 0, COUNT_LIFETIME + 1)),
    )
    def write_past_the_store(self, room_id: str, what: str, seconds: int) -> None:
        """One rule for what others do to all backups, just now or an hour ago."""
        if what == "purge":
            self.purge(room_id)
        elif what == "etags":
            self.take_etags_away()
        else:
            self.drop_cache()
        self.now += seconds

    @rule(user_id=users, age=ages, scope=scopes)
    def delete_keys(self, user_id: str, age: int, scope: tuple[Any, Any]) -> None:
        """The etag moves if a key goes."""
        number = self.number_of(user_id, age)
        version = self.version_of(user_id, number)

        def call() -> Deferred[Deletion]:
            return self.store.delete_keys(user_id, number, *scope, ACTOR)

        if version is None:
            self.check_refused(call, *UNKNOWN_VERSION)
            return
        before = version.backup
        version.backup = before.without(*scope)
        done = result_of(call())
        assert done.is_complete
        self.check_state(version, done.state)
        assert done.deleted == len(before.keys) - len(version.backup.keys)

    def delete_version(self, user_id: str, age: int) -> None:
        """The keys go with it; to delete it again is no error."""
        number = self.number_of(user_id, age)
        versions = self.users[user_id].versions

        def call() -> Deferred[bool]:
            return self.store.delete_version(user_id, number, ACTOR)

        if number not in versions:
            self.check_refused(call, *UNKNOWN_VERSION)
            return
        assert result_of(call()) == (versions[number] is not None)
        versions[number] = None

    def reset(self, user_id: str) -> None:
        """A client deletes what is current until nothing is, and begins anew."""
        user = self.users[user_id]
        while info := result_of(self.store.get_info(user_id, None)):
            assert info.version == user.current
            deleted = self.store.delete_version(user_id, info.version, ACTOR)
            assert result_of(deleted)
            user.versions[info.version] = None
        assert user.current is None
        self.create(user_id, ALGORITHM, "{}")

    @rule(user_id=users, age=ages, algorithm=algorithms, auth_data=auth_data)
    def update(self, user_id: str, age: int, algorithm: str, auth_data: str) -> None:
        """Only ``auth_data`` changes."""
        number = self.number_of(user_id, age)
        version = self.version_of(user_id, number)

        def call() -> Deferred[None]:
            return self.store.update_version(
                user_id, number, algorithm, auth_data, ACTOR
            )

        if version is None:
            self.check_refused(call, *UNKNOWN_VERSION)
        elif algorithm != version.algorithm:
            self.check_refused(call, 400, "M_INVALID_PARAM")
        else:
            result_of(call())
            version.auth_data = auth_data

    @rule(user_id=users, age=st.none() | ages)
    def look(self, user_id: str, age: int | None) -> None:
        """A version, or the current one, is told as it is."""
        number = None if age is None else self.number_of(user_id, age)
        info = result_of(self.store.get_info(user_id, number))
        if number is None:
            number = self.users[user_id].current
        version = None if number is None else self.version_of(user_id, number)
        if version is None or info is None:
            assert version is None
            assert info is None
            return
        told = (info.version, info.algorithm, info.auth_data)
        assert told == (number, version.algorithm, version.auth_data)
        self.check_state(version, BackupState(info.etag, info.count))

    def deactivate(self, user_id: str) -> None:
        """The homeserver deletes all that it has of a user, and so does the store, but
        for the last number. The user is back at once."""
        for table in ("e2e_room_keys", "e2e_room_keys_versions"):
            self.sql(f"DELETE FROM {table} WHERE user_id = ?", user_id)
        result_of(self.store.forget_user(user_id))
        counts = "SELECT COUNT(*) FROM roomkeys_counts WHERE user_id = ?"
        assert self.sql(counts, user_id) == [(0,)]
        self.users[user_id].versions.clear()

    def purge(self, room_id: str) -> None:
        """Synapse purges a room: from everyone's backup, and no etag moves."""
        self.sql("DELETE FROM e2e_room_keys WHERE room_id = ?", room_id)
        for version in self.versions().values():
            keys = version.backup.without(room_id, None).keys
            gone = len(version.backup.keys) - len(keys)
            version.purged.append((int(self.now), gone))
            version.backup = Backup(version.backup.etag, keys)

    @rule(user_id=users, age=ages, ids=ids, key=bad_keys)
    def put_old_row(self, user_id: str, age: int, ids: Ids, key: Key) -> None:
        """Synapse's own endpoints store what the plugin would not."""
        number = self.number_of(user_id, age)
        version = self.version_of(user_id, number)
        if version is None:
            return
        where = "WHERE user_id = ? AND version = ?"
        self.sql(
            f"DELETE FROM e2e_room_keys {where} AND room_id = ? AND session_id = ?",
            *(user_id, number, *ids),
        )
        self.sql(
            "INSERT INTO e2e_room_keys (user_id, version, room_id, session_id,"
            " first_message_index, forwarded_count, is_verified, session_data)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            *(user_id, number, *ids),
            *(key.index, key.forwarded, key.verified, key.data),
        )
        self.sql(
            f"UPDATE e2e_room_keys_versions SET etag = COALESCE(etag, 0) + 1 {where}",
            *(user_id, number),
        )
        keys = {**version.backup.keys, ids: key}
        version.backup = Backup(version.backup.etag + 1, keys)

    def take_etags_away(self) -> None:
        """Synapse's own endpoints leave the etag NULL until the first upload."""
        self.sql("UPDATE e2e_room_keys_versions SET etag = NULL WHERE etag = 0")

    def drop_cache(self) -> None:
        """Nothing is lost with the plugin's own rows."""
        self.sql("DELETE FROM roomkeys_counts")

    @rule(seconds=st.sampled_from((0.5, 1, 100, 1800, COUNT_LIFETIME + 1)))
    def wait(self, seconds: float) -> None:
        """Time goes by."""
        self.now += seconds

    def versions(self) -> dict[tuple[str, int], Version]:
        """All versions that aren't deleted, by user and number."""
        return {
            (user_id, number): version
            for user_id, user in self.users.items()
            for number, version in user.versions.items()
            if version
        }

    @invariant()
    def the_tables_are_those_of_the_model(self) -> None:
        """What is stored is what the model holds, and no more."""
        type(self).states += 1
        rows = self.sql(
            "SELECT user_id, version, room_id, session_id, is_verified,"
            " first_message_index, forwarded_count, session_data FROM e2e_room_keys"
        )
        stored = {
            row[:4]: Key(None if row[4] is None else bool(row[4]), *row[5:])
            for row in rows
        }
        assert stored == {
            (*who, *ids): key
            for who, version in self.versions().items()
            for ids, key in version.backup.keys.items()
        }
        rows = self.sql(
            "SELECT user_id, version, algorithm, auth_data, COALESCE(etag, 0)"
            " FROM e2e_room_keys_versions WHERE deleted = 0"
        )
        assert sorted(rows) == sorted(
            (*who, version.algorithm, version.auth_data, version.backup.etag)
            for who, version in self.versions().items()
        )

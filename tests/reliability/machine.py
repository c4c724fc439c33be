"""A real store beside the model, taken through the same steps."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    Sweeps,
    Transaction,
    postgres,
    upgrade_tables,
)
from synapse_roomkeys.storage import rows as storage_rows
from synapse_roomkeys.storage.statements import ALL_TABLES
from synapse_roomkeys.storage.versions import Deletion as DeletedKeys
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
from .model import (
    COUNT_LIFETIME,
    MOVING,
    Backup,
    Change,
    Deletion,
    Ids,
    Key,
    Keys,
    Replaced,
    User,
    Version,
)

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

#: Options of the record and of undo, few days each, so that the days pass in a run.
retentions = st.sampled_from(
    (
        *[Retention(3, "lossy", 2, 0)] * 2,
        *[Retention(3, "all", 2, 1)] * 4,
        Retention(3, "off", 2, 1),
        Retention(3, "all", 0, 1),
        Retention(0, "lossy", 2, 1),
    )
)


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


def key_of(row: Sequence[Any]) -> Key:
    """Return a stored key from its columns, is_verified first."""
    return Key(None if row[0] is None else bool(row[0]), *row[1:])


def sessions_of(
    stored: Iterable[Ids], replaced: Iterable[Ids]
) -> frozenset[tuple[str, str, str]]:
    """Return the sessions of a change as `Change.sessions`."""
    found = [("stored", *i) for i in stored] + [("replaced", *i) for i in replaced]
    return frozenset(found)


def check_rows(name: str, found: Iterable[Any], expected: Iterable[Any]) -> None:
    """Check that a table has the expected rows, each as often as expected.

    Raises:
        AssertionError: names the table, the missing rows and the unexpected ones.
    """
    rows, due = Counter(found), Counter(expected)
    if rows != due:
        missing, extra = list(due - rows), list(rows - due)
        raise AssertionError(f"{name}: missing {missing}, unexpected {extra}")


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
        self.open_store(Retention())
        for table in ALL_TABLES:
            if table != "roomkeys_schema":
                self.sql(f"DELETE FROM {table}")

    def open_store(self, retention: Retention) -> None:
        """Begin to use the database with these options."""
        self.retention = retention
        self.store = EndToEndRoomKeyStore(
            self.database, self.engine, lambda: self.now, Limits(), retention
        )
        self.sweeps = Sweeps(self.database, self.engine, lambda: self.now, retention)

    @property
    def now_ms(self) -> int:
        """The time in Unix milliseconds."""
        return int(1000 * self.now)

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
        """Return the model of a version; None if it is deleted or never existed."""
        version = self.users[user_id].versions.get(number)
        return None if version is None or version.deletion else version

    def note(self, user_id: str, number: int, act: str, **details: Any) -> None:
        """Add a change by the device to the model's record, if the record is on.

        Args:
            details: other fields of `Change`.
        """
        if self.retention.record_days:
            version = self.users[user_id].versions[number]
            etag = version.backup.etag
            details = {"device_id": ACTOR.device_id, **details}
            version.changes.append(
                Change(user_id, number, etag, self.now_ms, act, **details)
            )
        elif act in MOVING:
            version = self.users[user_id].versions[number]
            version.unrecorded = version.backup.etag

    def keep(self, version: Version, before: Backup, replaced: Iterable[Ids]) -> None:
        """Add replaced keys to the kept keys of the model, as the options say."""
        how = self.retention.keep_replaced
        if not self.retention.replaced_keys_days or how == "off":
            return
        for i in replaced:
            old, new = before.keys[i], version.backup.keys[i]
            if how == "all" or new.reads_less_than(old):
                row = Replaced(i, self.now_ms, version.backup.etag, old)
                version.replaced.append(row)

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
        """The etag of an answer is the model's, and the count is a possible one."""
        etag = version.backup.etag
        assert state.etag == etag, f"etag: {state.etag}, not {etag}"
        counts = version.counts(self.now)
        assert state.count in counts, f"{state.count} is not in {counts}"

    @initialize(retention=retentions)
    def begin(self, retention: Retention) -> None:
        """Each user has a backup."""
        self.open_store(retention)
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
        self.note(user_id, number, "create_version")

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
        new = [i for i in keys if i not in before.keys]
        unchanged = [i for i in keys if version.backup.keys[i] is before.keys.get(i)]
        replaced = keys.keys() - {*new, *unchanged}
        told = (result.stored, len(result.replaced), result.unchanged)
        due = (len(new), len(replaced), len(unchanged))
        assert told == due, f"upload: {told}, not {due}"
        if version.backup is before:
            return
        self.keep(version, before, replaced)
        self.note(
            user_id,
            number,
            "upload",
            stored=len(new),
            replaced=len(replaced),
            unchanged=len(unchanged),
            sessions=sessions_of(new, replaced),
        )

    @rule(user_id=users, keys=uploads)
    def upload_more(self, user_id: str, keys: Keys) -> None:
        """Upload to the current version, as clients do most often."""
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
        assert len(members) == len(want), f"download: {len(members)}, not {len(want)}"
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
                if is_readable(page.rows[-1][2]):
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
            self.delete_version(user_id, self.number_of(user_id, age))
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

        def call() -> Deferred[DeletedKeys]:
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
        if done.deleted:
            self.note(user_id, number, "delete_keys", deleted=done.deleted)

    def delete_version(self, user_id: str, number: int) -> None:
        """The keys wait for the sweeper; to delete a version again is no error."""
        version = self.users[user_id].versions.get(number)

        def call() -> Deferred[bool]:
            return self.store.delete_version(user_id, number, ACTOR)

        if version is None:
            self.check_refused(call, *UNKNOWN_VERSION)
            return
        assert result_of(call()) == (version.deletion is None)
        self.note_deletion(user_id, number)

    def note_deletion(self, user_id: str, number: int) -> None:
        """Delete a version in the model, and check the number of keys in the record.

        A second deletion queues the version again, whose auth_data is gone by then.
        """
        version = self.users[user_id].versions[number]
        if version.deletion is not None:
            if not version.deletion.is_queued:
                version.deletion = Deletion(self.now_ms, is_started=True)
            return
        version.deletion = Deletion(self.now_ms)
        if not self.retention.record_days:
            return
        ((deleted,),) = self.sql(
            "SELECT deleted FROM roomkeys_changes WHERE act = 'delete_version'"
            " AND user_id = ? AND version = ? AND etag = ?",
            *(user_id, number, version.backup.etag),
        )
        possible = {None, *version.counts(self.now, math.inf)}
        assert deleted in possible, f"record: {deleted} keys deleted, not {possible}"
        self.note(user_id, number, "delete_version", deleted=deleted)

    def reset(self, user_id: str) -> None:
        """A client deletes what is current until nothing is, and begins anew."""
        user = self.users[user_id]
        while info := result_of(self.store.get_info(user_id, None)):
            assert info.version == user.current
            deleted = self.store.delete_version(user_id, info.version, ACTOR)
            assert result_of(deleted)
            self.note_deletion(user_id, info.version)
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
            self.note(user_id, number, "update_version")

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
        """The homeserver deletes the user's rows, and so does the store, but for the
        last number. The user is back at once."""
        for table in ("e2e_room_keys", "e2e_room_keys_versions"):
            self.sql(f"DELETE FROM {table} WHERE user_id = ?", user_id)
        result_of(self.store.forget_user(user_id))
        for table in ("counts", "changes", "replaced", "deleted"):
            count = f"SELECT COUNT(*) FROM roomkeys_{table} WHERE user_id = ?"
            ((rows,),) = self.sql(count, user_id)
            assert rows == 0, f"{rows} rows of the user in {table}"
        self.users[user_id].versions.clear()

    def purge(self, room_id: str) -> None:
        """Synapse purges a room: from everyone's backup, and no etag moves."""
        self.sql("DELETE FROM e2e_room_keys WHERE room_id = ?", room_id)
        for _, version in self.versions():
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
        version.unrecorded = version.backup.etag

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

    def versions(self) -> list[tuple[tuple[str, int], Version]]:
        """Return all versions with user and number, deleted ones included."""
        return [
            ((user_id, number), version)
            for user_id, user in self.users.items()
            for number, version in user.versions.items()
        ]

    @invariant()
    def the_tables_are_those_of_the_model(self) -> None:
        """The homeserver's tables hold the rows of the model, and no others."""
        type(self).states += 1
        rows = self.sql(
            "SELECT user_id, version, room_id, session_id, is_verified,"
            " first_message_index, forwarded_count, session_data FROM e2e_room_keys"
        )
        stored = {(row[:4], key_of(row[4:])) for row in rows}
        check_rows(
            "keys",
            stored,
            [
                ((*who, *ids), key)
                for who, version in self.versions()
                for ids, key in version.backup.keys.items()
            ],
        )
        rows = self.sql(
            "SELECT user_id, version, algorithm, auth_data, COALESCE(etag, 0), deleted"
            " FROM e2e_room_keys_versions"
        )
        check_rows(
            "versions",
            rows,
            [
                (
                    *who,
                    version.algorithm,
                    "{}" if version.deletion else version.auth_data,
                    version.backup.etag,
                    int(version.deletion is not None),
                )
                for who, version in self.versions()
            ],
        )

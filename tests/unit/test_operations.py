"""The operations on a database in memory: what they cost, cache, log and tolerate."""

import logging
import sqlite3
from typing import Any

from twisted.internet.defer import Deferred, fail
from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys import metrics
from synapse_roomkeys.clock import Clock
from synapse_roomkeys.errors import NotFoundError, OutageError, UnavailableError
from synapse_roomkeys.identifiers import quote_for_log
from synapse_roomkeys.outages import Outages
from synapse_roomkeys.service.logs import MAX_LINE, JsonFormatter, TextFormatter
from synapse_roomkeys.storage import (
    FIRST_KEYS,
    PAGE_KEYS,
    SQLITE,
    Database,
    Erasure,
    Place,
    RetryingDatabase,
    sqlite_statements,
    statements,
)
from synapse_roomkeys.storage.erasure import Batch
from synapse_roomkeys.storage.sqlite_statements import DELETED_AT_ONCE
from synapse_roomkeys.types import (
    BackupId,
    BackupState,
    KeyMetadata,
    KeyPage,
    RoomKey,
)
from synapse_roomkeys.wire import VersionInfo

from ..contract import Client
from ..contract.base import (
    ALGORITHM,
    NO_VERSION,
    Rooms,
    key,
    keys_path,
    version_path,
    wrapped,
)
from ..memory import FakeReactor, ImmediateDatabase, MemoryHost

COUNT = "SELECT COUNT(*)"
#: The deletions of SQLite, before a test makes them smaller.
_DELETIONS = (
    sqlite_statements.DELETE_SOME_KEYS,
    sqlite_statements.DELETE_SOME_ROOM_KEYS,
)


class Operations(SynchronousTestCase):
    """One user with an empty backup."""

    def setUp(self) -> None:
        self.host = MemoryHost()
        self.client = Client(self.host, self.host.new_user())
        self.version = self.successResultOf(self.client.create_version())

    def upload(self, rooms: Rooms) -> tuple[int, int]:
        """Upload keys; the etag and the count afterwards."""
        return self.successResultOf(self.client.upload(self.version, rooms))

    def info(self) -> dict[str, Any]:
        """What the server says of the backup."""
        return self.successResultOf(self.client.info())

    def run_sql(self, statement: str, *parameters: Any) -> None:
        """Write past the plugin, as a homeserver may."""
        with self.host.database.connection as connection:
            connection.execute(statement, parameters)

    def statements_of(self, rooms: Rooms) -> list[str]:
        """The statements of an upload, those that frame transactions apart."""
        self.host.database.statements.clear()
        self.upload(rooms)
        framing = ("BEGIN", "COMMIT", "--")
        return [s for s in self.host.database.statements if not s.startswith(framing)]


class CostTests(Operations):
    """What an operation asks of the database."""

    def test_an_upload_is_five_statements_whatever_it_holds(self) -> None:
        """Look up, move the etag, write, keep the count, record; none counts keys."""
        self.upload({"!a": {"first": key()}})
        for number in (1, 1000):
            rooms = {"!b": {f"{number}.{i}": key(index=9) for i in range(number)}}
            better = {"!b": {f"{number}.{i}": key(index=1) for i in range(number)}}
            for upload in (rooms, better):
                statements = self.statements_of(upload)
                self.assertEqual(len(statements), 5, statements)
                self.assertNotIn(COUNT, "".join(statements))

    def test_a_large_upload_is_written_in_parts(self) -> None:
        """Of half a MiB and a little, and all of them are there."""
        rooms: Rooms = {"!b": {str(i): key(data="x" * 60_000) for i in range(20)}}
        statements = self.statements_of(rooms)
        self.assertEqual(len([s for s in statements if "INSERT INTO e2e" in s]), 3)
        downloaded = self.successResultOf(self.client.download(self.version))
        self.assertEqual(downloaded, rooms)
        self.assertEqual(self.info()["count"], 20)

    def test_an_upload_that_changes_nothing_writes_nothing(self) -> None:
        """Equal keys cost one look, and no lock."""
        rooms: Rooms = {"!a": {str(i): key() for i in range(100)}}
        self.upload(rooms)
        statements = self.statements_of(rooms)
        self.assertEqual(len(statements), 1, statements)

    def test_a_version_is_one_statement(self) -> None:
        """While the count is cached, nothing is counted for it."""
        self.upload({"!a": {"s": key()}})
        self.host.database.statements.clear()
        self.info()
        self.assertEqual(len(self.host.database.statements), 1)


class CountTests(Operations):
    """The cached count."""

    def setUp(self) -> None:
        super().setUp()
        self.upload({"!a": {str(i): key() for i in range(10)}})

    def purge(self) -> None:
        """Delete a key past the plugin, without moving the etag."""
        self.run_sql("DELETE FROM e2e_room_keys WHERE session_id = '7'")

    def test_a_purge_shows_within_the_hour(self) -> None:
        """A count is believed for an hour and then made anew, read or upload."""
        self.purge()
        self.host.reactor.advance(3600)
        self.assertEqual(self.info()["count"], 10)
        self.host.reactor.advance(1)
        self.assertEqual(self.info()["count"], 9)

    def test_an_upload_counts_anew_after_an_hour_too(self) -> None:
        """The answer to an upload is as exact as that of a read."""
        self.purge()
        self.host.reactor.advance(3601)
        self.assertEqual(self.upload({"!a": {"new": key()}})[1], 10)

    def test_uploads_do_not_prolong_a_count(self) -> None:
        """The hour begins when the keys were counted, however often they change."""
        self.purge()
        for number in range(4):
            self.host.reactor.advance(1000)
            count = self.upload({"!a": {f"new{number}": key()}})[1]
        self.assertEqual(count, 9 + 4)

    def test_a_count_of_another_etag_is_not_believed(self) -> None:
        """What stock Synapse uploads, while the plugin is out, is counted."""
        self.purge()
        self.run_sql("UPDATE e2e_room_keys_versions SET etag = etag + 1")
        self.assertEqual(self.info()["count"], 9)

    def test_a_count_of_the_future_is_not_believed(self) -> None:
        """A clock that was set back doesn't make a count last."""
        self.purge()
        self.run_sql("UPDATE roomkeys_counts SET counted_ts = counted_ts + 1000000")
        self.assertEqual(self.info()["count"], 9)

    def test_the_cache_may_be_dropped(self) -> None:
        """Nothing is lost with the plugin's own rows."""
        self.run_sql("DELETE FROM roomkeys_counts")
        self.assertEqual(self.upload({"!b": {"s": key()}}), (2, 11))
        self.assertEqual(self.info()["count"], 11)

    def test_deletions_keep_the_count(self) -> None:
        """A deletion needs no counting either, and a deleted version leaves no row."""
        self.host.database.statements.clear()
        path = keys_path(self.version, "!a", "3")
        answer = self.successResultOf(self.client.delete(path))
        self.assertEqual(answer.json, {"etag": "2", "count": 9})
        self.assertNotIn(COUNT, "".join(self.host.database.statements))
        self.successResultOf(self.client.delete(f"/version/{self.version}"))
        rows = self.host.database.connection.execute("SELECT * FROM roomkeys_counts")
        self.assertEqual(rows.fetchall(), [])

    def test_a_forgotten_user_has_no_rows(self) -> None:
        """Only the user's own rows go, and the backup stays as it was."""
        other = Client(self.host, self.host.new_user())
        version = self.successResultOf(other.create_version())
        self.successResultOf(other.upload(version, {"!a": {"s": key()}}))
        self.successResultOf(self.host.store.forget_user(self.client.user.user_id))
        rows = self.host.database.connection.execute(
            "SELECT user_id, key_count FROM roomkeys_counts"
        )
        self.assertEqual(rows.fetchall(), [(other.user.user_id, 1)])
        self.assertEqual(self.info()["count"], 10)


class OldRowTests(Operations):
    """Rows that were let in before anybody checked them."""

    def put_row(self, session: str, fields: tuple[Any, Any, Any], data: str) -> None:
        """Write a row past the plugin."""
        self.run_sql(
            "INSERT INTO e2e_room_keys VALUES (?, '!a', ?, ?, ?, ?, ?, ?)",
            *(self.client.user.user_id, session, int(self.version), *fields, data),
        )

    def download(self) -> Any:
        """All the keys of the backup."""
        return self.successResultOf(self.client.download(self.version))

    def test_a_null_reads_as_nothing(self) -> None:
        """NULLs, and on SQLite values of another type, come out as 0 and false."""
        rows = {"n": (None, None, None), "t": ("abc", 1.5, None), "": (3, 2, True)}
        for session, fields in rows.items():
            self.put_row(session, fields, '{"a": 1}')
        nothing = key(data={"a": 1})
        self.assertEqual(
            self.download(),
            {"!a": {"n": nothing, "t": nothing, "": key(3, 2, True, {"a": 1})}},
        )

    def test_what_no_client_could_upload_comes_back(self) -> None:
        """Whatever JSON an old row holds is handed out as it is, alone and with all."""
        odd = {"s": '"\\ud800"', "n": "[" * 5000 + "]" * 5000, "e": "1e999"}
        for session, data in odd.items():
            self.put_row(session, (0, 0, True), data)
            path = keys_path(self.version, "!a", session)
            answer = self.successResultOf(self.client.get(path))
            self.assertEqual(answer.status, 200)
            self.assertIn(data.encode(), answer.body)
        answer = self.successResultOf(self.client.get(keys_path(self.version)))
        for data in odd.values():
            self.assertIn(data.encode(), answer.body)

    def test_a_null_session_is_not_there(self) -> None:
        """Session data of JSON null is not handed out, and any key takes its place."""
        self.put_row("s", (0, 0, True), "null")
        self.assertEqual(self.download(), {})
        path = keys_path(self.version, "!a", "s")
        answer = self.successResultOf(self.client.get(path))
        self.assertEqual(answer.json["error"], "No room_keys found")
        self.upload({"!a": {"s": key(9, 9, False)}})
        self.assertEqual(self.download(), {"!a": {"s": key(9, 9, False)}})

    def test_any_key_takes_the_place_of_a_bad_row(self) -> None:
        """The worst good key is better than a row with a NULL."""
        for session, fields in {
            "index": (None, 0, True),
            "count": (0, None, True),
            "verified": (0, 0, None),
        }.items():
            self.put_row(session, fields, '"old"')
            self.upload({"!a": {session: key(9, 9, False, "new")}})
            self.assertEqual(self.download()["!a"][session]["session_data"], "new")

    def assert_left_out(self, broken: dict[str, str]) -> None:
        """Rows with such data are in no download, each is logged once a download, and
        a good key takes their place."""
        self.upload({"!a": {"good": key()}})
        for session, data in broken.items():
            self.put_row(session, (0, 0, True), data)
        said = [
            "ERROR:synapse_roomkeys.storage.downloads:Left out a key: its session_data"
            f" isn't JSON: user={self.client.user.user_id} version={self.version}"
            f' room="!a" session="{session}"'
            for session in sorted(broken)
        ]
        before = metrics.broken_rows._value.get()
        for ids in ((), ("!a",)):
            with self.assertLogs("synapse_roomkeys", "ERROR") as logged:
                path = keys_path(self.version, *ids)
                answer = self.successResultOf(self.client.get(path))
            self.assertEqual(logged.output, said)
            sessions = (answer.json if ids else answer.json["rooms"]["!a"])["sessions"]
            self.assertEqual(sessions, {"good": key()})
        for session in broken:
            with self.assertLogs("synapse_roomkeys", "ERROR"):
                path = keys_path(self.version, "!a", session)
                answer = self.successResultOf(self.client.get(path))
            self.assertEqual(answer.json["error"], "No room_keys found")
        after = metrics.broken_rows._value.get()
        self.assertEqual(after - before, 3 * len(broken))
        self.upload({"!a": {session: key(9, 9, False) for session in broken}})
        self.assertEqual(len(self.download()["!a"]), 1 + len(broken))

    def test_a_row_that_is_not_json_is_left_out(self) -> None:
        """A download leaves out a key whose session_data isn't JSON."""
        self.assert_left_out(
            {"a": "not json", "b": '{"cut": "o', "c": "", "z": 'SECRET"}}'}
        )

    def test_rows_that_are_json_only_together_are_left_out(self) -> None:
        """session_data that is JSON only beside another key's data is left out."""
        self.assert_left_out(
            {"a": '1},"x":{"y":2', "b": '"begun', "c": 'ended"', "d": "1,2"}
        )

    def test_a_broken_row_on_each_page(self) -> None:
        """A download with a broken row on each page has all other keys."""
        self.upload({"!a": {f"{i:04}": key() for i in range(3 * PAGE_KEYS)}})
        broken = [f"{i:04}" for i in (0, FIRST_KEYS - 1, FIRST_KEYS, 3 * PAGE_KEYS - 1)]
        for session in broken:
            self.run_sql(
                "UPDATE e2e_room_keys SET session_data = '{' WHERE session_id = ?",
                session,
            )
        with self.assertLogs("synapse_roomkeys", "ERROR") as logged:
            sessions = self.download()["!a"]
        self.assertEqual(len(logged.output), len(broken))
        self.assertEqual(len(sessions), 3 * PAGE_KEYS - len(broken))

    def test_text_that_is_not_utf8_is_left_out(self) -> None:
        """A download leaves out and logs a key with text that isn't UTF-8 or with an id
        that is a BLOB, even as the last key of a page. Others are downloaded, counted
        and uploaded."""
        first = {f"{n:03}": key() for n in range(FIRST_KEYS - 1)}
        rooms: Rooms = {"!a": first, "!b": {"good": key(), "data": key()}}
        self.upload(rooms)
        self.upload({room: {"last": key()} for room in ("!c", "\N{SNOWMAN}")})
        for ids in (
            "'!a', CAST(x'ff' AS TEXT)",
            "'!b', x'41'",
            "CAST(x'ff' AS TEXT), 's'",
            "x'41', 's'",
        ):
            self.run_sql(
                "INSERT INTO e2e_room_keys SELECT user_id, "
                f"{ids}, version, 0, 0, 1, session_data FROM e2e_room_keys"
                " WHERE session_id = 'good'"
            )
        broken = "UPDATE e2e_room_keys SET session_data = CAST(x'22ff22' AS TEXT)"
        self.run_sql(f"{broken} WHERE session_id = 'data'")
        del rooms["!b"]["data"]
        rooms |= {"!c": {"last": key()}, "\N{SNOWMAN}": {"last": key()}}
        with self.assertLogs("synapse_roomkeys", "ERROR") as logged:
            self.assertEqual(self.download(), rooms)
        left_out = [line for line in logged.output if "Left out a key" in line]
        self.assertEqual(len(left_out), 3)
        for room_id in ("!a", "!b"):
            with self.assertLogs("synapse_roomkeys", "ERROR"):
                path = keys_path(self.version, room_id)
                answer = self.successResultOf(self.client.get(path))
            self.assertEqual(answer.json["sessions"], rooms[room_id])
        with self.assertLogs("synapse_roomkeys", "ERROR"):
            path = keys_path(self.version, "!b", "data")
            answer = self.successResultOf(self.client.get(path))
        self.assertEqual(answer.json["error"], "No room_keys found")
        self.run_sql("DELETE FROM roomkeys_counts")
        self.assertEqual(self.info()["count"], FIRST_KEYS + 7)
        self.upload({"!b": {"data": key(9, 9, False)}})
        rooms["!b"]["data"] = key(9, 9, False)
        with self.assertLogs("synapse_roomkeys", "ERROR"):
            self.assertEqual(self.download(), rooms)

    def test_a_version_that_is_not_json(self) -> None:
        """``auth_data`` that isn't JSON is a 500 with a line that names the version: at
        a 404 clients turn the backup off. It can be written anew, and deleted."""
        self.run_sql("UPDATE e2e_room_keys_versions SET auth_data = 'SECRET'")
        for path in ("/version", f"/version/{self.version}"):
            with self.assertLogs("synapse_roomkeys", "ERROR") as logged:
                asked = self.host.request(
                    *("GET", f"/_matrix/client/v3/room_keys{path}"),
                    token=self.client.user.access_token,
                )
                answer = self.successResultOf(asked)
            self.assertEqual(
                (answer.status, answer.json["errcode"]), (500, "M_UNKNOWN")
            )
            who = f"user={self.client.user.user_id} version={self.version}"
            self.assertIn(who, logged.output[0])
            self.assertNotIn("SECRET", "".join(logged.output) + str(answer.body))
        self.assertEqual(self.upload({"!a": {"s": key()}}), (1, 1))
        body = {"algorithm": ALGORITHM, "auth_data": {}}
        path = f"/version/{self.version}"
        self.assertEqual(self.successResultOf(self.client.put(path, body)).status, 200)
        self.assertEqual(self.info()["auth_data"], {})

    def test_an_etag_of_null_is_0(self) -> None:
        """A version that nothing was uploaded to yet has one all the same."""
        self.run_sql("UPDATE e2e_room_keys_versions SET etag = NULL")
        self.assertEqual(self.info()["etag"], "0")
        self.assertEqual(self.upload({"!a": {"s": key()}}), (1, 1))


class DownloadTests(Operations):
    """What happens between two pages of one transaction."""

    def test_a_version_that_another_process_deletes(self) -> None:
        """It isn't taken for one with fewer keys."""
        self.upload({"!a": {f"{i}": key() for i in range(2 * PAGE_KEYS)}})
        pages: list[KeyPage] = []

        def take(page: KeyPage) -> bool:
            pages.append(page)
            self.host.database.connection.execute(
                "UPDATE e2e_room_keys_versions SET deleted = 1"
            )
            return True

        user_id, version = self.client.user.user_id, int(self.version)
        read = self.host.store.get_pages(user_id, version, None, None, take)
        self.failureResultOf(read, NotFoundError)
        self.assertEqual(len(pages), 1)


class DeletionTests(Operations):
    """Deletions on SQLite, which are done in several transactions."""

    def setUp(self) -> None:
        super().setUp()
        rooms = {room: {f"{i}": key() for i in range(10)} for room in ("!a", "!b")}
        self.upload(rooms)
        for name in ("DELETE_SOME_KEYS", "DELETE_SOME_ROOM_KEYS"):
            statement = getattr(sqlite_statements, name)
            fewer = statement.replace("LIMIT 2000", "LIMIT 4")
            self.assertNotEqual(fewer, statement)
            self.patch(sqlite_statements, name, fewer)
        self.patch(sqlite_statements, "DELETED_AT_ONCE", 4)

    def keys(self) -> int:
        """How many keys the database holds."""
        connection = self.host.database.connection
        ((count,),) = connection.execute(f"{COUNT} FROM e2e_room_keys")
        number: int = count
        return number

    def test_no_transaction_deletes_more_than_its_share(self) -> None:
        """The statements have a bound that a second is far above."""
        self.assertLessEqual(DELETED_AT_ONCE, 2000)
        for statement in _DELETIONS:
            self.assertIn(f"LIMIT {DELETED_AT_ONCE})", statement)

    def test_a_room_is_deleted_in_parts(self) -> None:
        """Etag and count are right after each transaction."""
        user_id = self.client.user.user_id
        deleted = self.host.handler.delete_room_keys(user_id, self.version, "!a")
        told = [self.info()]
        while not deleted.called:
            self.host.reactor.advance(0.1)
            told.append(self.info())
        tallies = [(info["etag"], info["count"]) for info in told]
        self.assertEqual(tallies, [("2", 16), ("3", 12), ("4", 10)])
        self.assertEqual(self.successResultOf(deleted), BackupState(4, 10))


class NumberTests(Operations):
    """The numbers of versions, which never come twice for a user."""

    def erase(self, *tables: str) -> None:
        """Delete a user's rows as a homeserver or an operator does."""
        for table in tables:
            self.run_sql(
                f"DELETE FROM {table} WHERE user_id = ?", self.client.user.user_id
            )

    def create(self) -> int:
        """The number of a new version."""
        return int(self.successResultOf(self.client.create_version()))

    def test_numbers_ahead_of_the_clock(self) -> None:
        """A user who makes 300 versions in a second and is erased gets a new one."""
        for _ in range(300):
            number = self.create()
            self.successResultOf(self.client.delete(f"/version/{number}"))
        self.erase("e2e_room_keys", "e2e_room_keys_versions", "roomkeys_counts")
        self.assertEqual(self.create(), number + 1)

    def test_a_number_of_stock(self) -> None:
        """A version that Synapse's own endpoints made counts, also when Synapse deletes
        it before it tells the plugin that the user is deactivated."""
        number = int(self.version) + 1000
        self.run_sql(
            "INSERT INTO e2e_room_keys_versions VALUES (?, ?, 'm', '{}', 0, NULL)",
            *(self.client.user.user_id, number),
        )
        self.assertEqual(self.info()["version"], str(number))
        self.erase("e2e_room_keys_versions")
        forgotten = self.host.store.forget_user(self.client.user.user_id)
        self.successResultOf(forgotten)
        self.assertEqual(self.create(), number + 1)

    def test_an_operators_erasure(self) -> None:
        """The transactions of ``synapse-roomkeys erase`` leave the user id and one
        number."""
        self.upload({"!a": {"s": key()}})
        user_id, number = self.client.user.user_id, int(self.version)
        self.run_sql("DELETE FROM roomkeys_numbers")
        erasure = Erasure(self.host.database, SQLITE)
        self.successResultOf(erasure.mark_deleted(user_id))
        batch = erasure.delete_batch(BackupId(user_id, number), Place(), None)
        self.assertEqual(self.successResultOf(batch), Batch(1, None))
        rows = self.successResultOf(erasure.delete_rows(user_id))
        self.assertEqual(rows["e2e_room_keys_versions"], 1)
        self.assert_only_a_number_is_left()

    def test_what_is_left_of_a_user(self) -> None:
        """After an erasure, one row is left, with the user id and one number."""
        self.upload({"!a": {"s": key()}})
        self.erase("e2e_room_keys", "e2e_room_keys_versions")
        user_id = self.client.user.user_id
        self.successResultOf(self.host.store.forget_user(user_id))
        self.assert_only_a_number_is_left()

    def assert_only_a_number_is_left(self) -> None:
        """No table but one has a row of the user."""
        user_id = self.client.user.user_id
        connection = self.host.database.connection
        tables = connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table'"
        ).fetchall()
        rows = {
            table: connection.execute(f"SELECT * FROM {table}").fetchall()
            for (table,) in tables
            if table != "roomkeys_schema"
        }
        kept = {table: found for table, found in rows.items() if found}
        self.assertEqual(kept, {"roomkeys_numbers": [(user_id, int(self.version))]})


class LogTests(Operations):
    """The lines that are left, and what never is in them."""

    def test_what_is_logged(self) -> None:
        """One line each for a new version, a replaced key, a deletion, and the end."""
        client = Client(self.host, self.host.new_user())
        with self.assertLogs("synapse_roomkeys", "DEBUG") as logged:
            version = self.successResultOf(client.create_version("AUTH-DATA"))
            for index in (2, 1):
                rooms = {"!a\n": {"s": key(index, 0, True, "SESSION-DATA")}}
                self.successResultOf(client.upload(version, rooms))
            self.successResultOf(client.delete(keys_path(version, "!a\n")))
            self.successResultOf(client.delete(f"/version/{version}"))
        who = f"user={client.user.user_id} device=DEVICE version={version}"
        self.assertEqual(
            [line.split(":", 2)[2] for line in logged.output],
            [
                f"Created version: {who}",
                "Replaced keys (first_message_index/forwarded_count/is_verified):"
                f' {who} room="!a\\n" session="s" old=2/0/True new=1/0/True',
                f'Deleted keys: {who} room="!a\\n" session=null count=1',
                f"Deleted version: {who}",
            ],
        )

    def test_a_line_has_several_replaced_keys(self) -> None:
        """Each stands after its room, and no line is longer than a log allows."""
        ids = [("!a:b.c", f"s{i}") for i in range(20)]
        ids += [(f"!r{i // 2}:b.c", f"t{i}") for i in range(20)]
        ids += [("!" + "é" * 127, "ü" * 127), ('"\n', "\\")]
        old: Rooms = {room_id: {} for room_id, _ in ids}
        new: Rooms = {room_id: {} for room_id, _ in ids}
        for room_id, session_id in ids:
            old[room_id][session_id] = key(2)
            new[room_id][session_id] = key(1)
        self.upload(old)
        with self.assertLogs("synapse_roomkeys", "INFO") as logged:
            self.upload(new)
        self.assertLess(len(logged.records), 10)
        found = []
        for line in self.whole_lines(logged.records):
            _, *in_rooms = line.split(" room=")
            for in_room in in_rooms:
                room, *sessions = in_room.split(" session=")
                found += [(room, session.split(" old=")[0]) for session in sessions]
                for session in sessions:
                    self.assertTrue(session.endswith(" old=2/0/False new=1/0/False"))
        self.assertEqual(found, [tuple(map(quote_for_log, pair)) for pair in ids])

    def test_long_names_leave_room_for_fewer_keys(self) -> None:
        """Of a user and a device that take a third of a line or half of it."""
        lengths = []
        for user_id, device_id in (
            ("@u:b.c", "D"),
            (f"@{'u' * 249}:b.c", "D" * 255),
            (f"@{'é' * 100}:b.c", '"' * 100),
        ):
            handler = self.host.handler
            version = self.successResultOf(
                handler.create_version(user_id, VersionInfo("a", "{}", None))
            )
            with self.assertLogs("synapse_roomkeys", "INFO") as logged:
                for index in (2, 1):
                    keys = [
                        RoomKey("!r", f"{i}", KeyMetadata(index, 0, False), "1")
                        for i in range(60)
                    ]
                    self.successResultOf(
                        handler.upload_room_keys(user_id, version, keys, device_id)
                    )
            lines = self.whole_lines(logged.records)
            self.assertEqual("".join(lines).count(" old=2/0/False"), 60)
            lengths.append(len(lines))
        self.assertLess(lengths[0], lengths[1])
        self.assertLess(lengths[0], lengths[2])

    def whole_lines(self, records: list[logging.LogRecord]) -> list[str]:
        """The messages of lines, none of which the service cuts."""
        for record in records:
            for formatter in (TextFormatter(), JsonFormatter()):
                line = formatter.format(record)
                self.assertLessEqual(len(line), MAX_LINE)
                self.assertNotRegex(line, r"\.\.\.($|\", )")
        return [record.getMessage() for record in records]

    def test_a_refusal_is_logged(self) -> None:
        """A client may send the same for ever, so the operator sees whose it is, and
        why."""
        path = keys_path(self.version, "!a", "s")
        with self.assertLogs("synapse_roomkeys", "INFO") as logged:
            self.successResultOf(self.client.put(path, key(index=-1, data="DATA")))
        self.assertEqual(len(logged.output), 1)
        who = f"user={self.client.user.user_id} device=DEVICE"
        why = "400 M_BAD_JSON: first_message"
        self.assertIn(f"Refused PUT: {who}: {why}", logged.output[0])
        self.assertNotIn("DATA", logged.output[0])

    def test_an_unknown_version_is_logged(self) -> None:
        """An upload's 404 turns the client's backup off. A GET's is ordinary: clients
        without a backup send one at each start."""
        who = f"user={self.client.user.user_id} device=DEVICE"
        why = f"404 M_NOT_FOUND: {NO_VERSION}"
        with self.assertLogs("synapse_roomkeys", "INFO") as logged:
            self.successResultOf(self.client.put(keys_path("1"), wrapped({})))
            self.successResultOf(self.client.delete(keys_path("1")))
            self.successResultOf(self.client.get(keys_path("1")))
        self.assertEqual(
            [record.getMessage() for record in logged.records],
            [f"Refused PUT: {who}: {why}", f"Refused DELETE: {who}: {why}"],
        )
        with self.assertLogs("synapse_roomkeys", "DEBUG") as logged:
            self.successResultOf(self.client.get(version_path("1")))
        self.assertIn(f"Refused GET: {who}: 404", logged.output[-1])


class Interrupted:
    """A transaction in which a version is deleted just before its keys are counted."""

    def __init__(self, txn: Any, version: str) -> None:
        self._txn = txn
        self._version = version

    def execute(self, statement: str, parameters: Any = ()) -> None:
        """Run a statement, after the deletion where it counts."""
        if statement == statements.FIND_COUNT:
            delete = "UPDATE e2e_room_keys_versions SET deleted = 1 WHERE version = ?"
            self._txn.execute(delete, (int(self._version),))
        self._txn.execute(statement, parameters)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._txn, name)


class RaceTests(Operations):
    """What happens between two transactions of a request."""

    def test_the_current_version_is_deleted_while_it_is_counted(self) -> None:
        """An older version is current then, if there is one: the answer is about it."""
        newer = self.successResultOf(self.client.create_version())
        run = self.host.database.run
        doomed = newer

        def interrupted(desc: str, function: Any, *args: Any) -> Any:
            def delete_first(txn: Any, *args: Any) -> Any:
                return function(Interrupted(txn, doomed), *args)

            return run(desc, delete_first, *args)

        self.patch(self.host.database, "run", interrupted)
        self.run_sql("DELETE FROM roomkeys_counts")
        self.assertEqual(self.info()["version"], self.version)
        self.run_sql("DELETE FROM roomkeys_counts")
        doomed = self.version
        answer = self.successResultOf(self.client.get("/version"))
        self.assertEqual(answer.status, 404)
        self.assertEqual(answer.json["error"], "No backup found")

    def test_a_kept_key_that_goes_while_keys_are_counted(self) -> None:
        """An upload that keeps what is there, and finds it gone when it has counted,
        looks again: its 200 says that the key is there."""
        keys = {"!a": {"1": key()}}
        self.upload(keys)
        self.run_sql("DELETE FROM roomkeys_counts")
        uploads = self.host.store._uploads
        find = uploads.find

        def interrupted(txn: Any, *args: Any) -> Any:
            found = find(txn, *args)
            self.patch(uploads, "find", find)
            txn.execute("DELETE FROM e2e_room_keys")
            txn.execute("UPDATE e2e_room_keys_versions SET etag = etag + 1")
            return found

        self.patch(uploads, "find", interrupted)
        self.assertEqual(self.upload(keys), (3, 1))


class Away:
    """A database that is away for a number of tries."""

    def __init__(self, tries: int, error: str) -> None:
        self.connections = 1
        self.tries = tries
        self.error = sqlite3.OperationalError(f"{error}\nwith secrets")
        self.database = ImmediateDatabase()

    def run(self, desc: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        """As `Database.run`."""
        if self.tries:
            self.tries -= 1
            return fail(self.error)
        return self.database.run(desc, function, *args, **kwargs)


def retrying(database: Database, reactor: FakeReactor) -> RetryingDatabase:
    """A `RetryingDatabase` over another."""
    return RetryingDatabase(database, SQLITE, Clock(reactor), Outages("Database"))


class RetryTests(SynchronousTestCase):
    """`RetryingDatabase`."""

    def run_away(
        self, tries: int, error: str = "database is locked"
    ) -> tuple[FakeReactor, "Deferred[int]"]:
        """Use a database that is away for a number of tries."""
        reactor = FakeReactor()
        database = retrying(Away(tries, error), reactor)
        return reactor, database.run("test", lambda txn: 7)

    def test_it_comes_back(self) -> None:
        """A database that is away for a moment costs a moment."""
        with self.assertLogs("synapse_roomkeys", "WARNING") as logged:
            reactor, done = self.run_away(3)
            self.assertNoResult(done)
            reactor.pump([0.5] * 10)
        self.assertEqual(self.successResultOf(done), 7)
        self.assertNotIn("secrets", "".join(logged.output))

    def test_it_stays_away(self) -> None:
        """After some seconds it is 503, with the time to come again."""
        with self.assertLogs("synapse_roomkeys", "WARNING"):
            reactor, done = self.run_away(100)
            reactor.pump([0.5] * 20)
        error = self.failureResultOf(done, OutageError).value
        self.assertEqual(error.code, 503)
        self.assertGreater(int(error.headers()["Retry-After"]), 0)

    def test_what_others_may_still_have(self) -> None:
        """A full disk can't take more, and gives what it has."""
        with self.assertLogs("synapse_roomkeys", "WARNING"):
            reactor, done = self.run_away(100, "database or disk is full")
            reactor.pump([0.5] * 20)
        error = self.failureResultOf(done, UnavailableError).value
        self.assertNotIsInstance(error, OutageError)

    def test_an_attempt_is_made_once(self) -> None:
        """An optional transaction is tried once. Its failure is no error."""
        reactor = FakeReactor()
        with self.assertLogs("synapse_roomkeys", "WARNING") as logged:
            away = Away(1, "attempt to write a readonly database")
            database = retrying(away, reactor)
            self.assertIsNone(
                self.successResultOf(database.attempt("keep", lambda txn: 7))
            )
        (line,) = logged.output
        self.assertIn("fails (read_only), ", line)
        self.assertIn("(in keep)", line)
        defect = database.attempt("keep", lambda txn: 1 // 0)
        self.failureResultOf(defect, ZeroDivisionError)

    def test_a_defect_is_not_tried_again(self) -> None:
        """What trying again can't help fails at once."""
        database = retrying(ImmediateDatabase(), FakeReactor())
        self.failureResultOf(
            database.run("test", lambda txn: 1 // 0), ZeroDivisionError
        )

    def test_a_client_is_told_to_come_again(self) -> None:
        """The 503 reaches the client with its Retry-After."""
        host = MemoryHost()
        host.database.fault = UnavailableError(3)
        token = host.new_user().access_token
        answer = self.successResultOf(
            host.request("GET", "/_matrix/client/v3/room_keys/version", token=token)
        )
        self.assertEqual((answer.status, answer.headers["retry-after"]), (503, "3"))

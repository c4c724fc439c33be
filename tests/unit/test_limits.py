"""Limits of the keys, bytes and versions of a user's backups."""

import json
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys.storage import measuring
from synapse_roomkeys.types import BackupId, Limits

from ..contract import Answer, User
from ..memory import MemoryHost

KEYS = "/_matrix/client/v3/room_keys/keys"
VERSION = "/_matrix/client/v3/room_keys/version"
ALGORITHM = "m.megolm_backup.v1.curve25519-aes-sha2"
#: The bytes that ``auth_data`` of each version has.
AUTH_DATA_SIZE = 2


class Device:
    """A client that uploads keys of a single room."""

    def __init__(self, host: MemoryHost) -> None:
        self.host = host
        self.user: User = host.new_user()
        self.version = self.new_version()

    def send(self, method: str, path: str, body: Any = None) -> Answer:
        """The answer to a request."""
        text = json.dumps(body, ensure_ascii=False)
        content = None if body is None else text.encode()
        token = self.user.access_token
        asked = self.host.request(method, path, token=token, body=content)
        answers: list[Answer] = []
        asked.addCallback(answers.append)
        return answers[0]

    def new_version(self) -> str:
        """Create a version, and use it from now on."""
        self.version = self.create().json["version"]
        return self.version

    def create(self, size: int = AUTH_DATA_SIZE) -> Answer:
        """Make a version whose ``auth_data`` has so many bytes as JSON."""
        body = {"algorithm": ALGORITHM, "auth_data": "x" * (size - 2)}
        return self.send("POST", VERSION, body)

    def update(self, size: int) -> Answer:
        """Change the ``auth_data`` of the version."""
        body = {"algorithm": ALGORITHM, "auth_data": "x" * (size - 2)}
        return self.send("PUT", f"{VERSION}/{self.version}", body)

    def upload(self, *sessions: str, size: int = 10, index: int = 5) -> Answer:
        """Upload keys whose data has so many bytes as JSON."""
        key = {
            "first_message_index": index,
            "forwarded_count": 0,
            "is_verified": False,
            "session_data": "x" * (size - 2),
        }
        body = {"sessions": dict.fromkeys(sessions, key)}
        return self.send("PUT", f"{KEYS}/!room?version={self.version}", body)

    def delete(self, session: str) -> Answer:
        """Delete a key."""
        return self.send("DELETE", f"{KEYS}/!room/{session}?version={self.version}")


class UserLimitTests(SynchronousTestCase):
    """``max_user_keys``, ``max_user_bytes`` and ``max_user_versions``."""

    def assert_refused(self, answer: Answer) -> None:
        """The answer says that the user's limit is exceeded."""
        self.assertEqual(answer.status, 403)
        self.assertEqual(answer.json["errcode"], "M_USER_LIMIT_EXCEEDED")
        self.assertTrue(answer.json["info_uri"].startswith("https://"))

    def assert_taken(self, answer: Answer, count: int) -> None:
        """The backup holds so many keys now."""
        self.assertEqual(answer.status, 200, answer.body)
        self.assertEqual(answer.json["count"], count)

    def test_nothing_is_limited_unless_it_is_asked_for(self) -> None:
        """The defaults have no limit that an honest client could meet."""
        limits = Limits()
        self.assertIsNone(limits.max_user_keys)
        self.assertIsNone(limits.max_user_bytes)

    def test_keys_up_to_the_limit_are_taken_and_no_more(self) -> None:
        """An upload over the limit is refused as a whole, and changes nothing."""
        device = Device(MemoryHost(Limits(max_user_keys=3)))
        self.assert_taken(device.upload("a", "b"), 2)
        self.assert_refused(device.upload("c", "d"))
        answer = device.send("GET", f"{VERSION}/{device.version}")
        self.assertEqual((answer.json["count"], answer.json["etag"]), (2, "1"))
        self.assert_taken(device.upload("c"), 3)

    def test_who_is_at_the_limit_may_still_better_and_delete_keys(self) -> None:
        """An upload or a deletion that doesn't enlarge a backup isn't refused."""
        device = Device(
            MemoryHost(Limits(max_user_keys=2, max_user_bytes=20 + AUTH_DATA_SIZE))
        )
        self.assert_taken(device.upload("a", "b"), 2)
        self.assert_taken(device.upload("a", "b"), 2)
        self.assert_taken(device.upload("a", "b", index=4), 2)
        self.assert_taken(device.upload("a", index=3, size=5), 2)
        self.assert_taken(device.delete("a"), 1)
        self.assert_taken(device.upload("c"), 2)

    def test_bytes_are_limited(self) -> None:
        """The limit counts ``session_data``, also of keys that replace others."""
        device = Device(MemoryHost(Limits(max_user_bytes=100 + AUTH_DATA_SIZE)))
        self.assert_taken(device.upload("a", size=60), 1)
        self.assert_refused(device.upload("b", size=41))
        self.assert_taken(device.upload("b", size=40), 2)
        self.assert_refused(device.upload("b", size=41, index=4))
        self.assert_taken(device.upload("a", size=50, index=4), 2)
        self.assert_taken(device.upload("b", size=50, index=4), 2)
        self.assert_refused(device.upload("c", size=4))

    def test_bytes_are_those_of_utf8(self) -> None:
        """A character may have several bytes."""
        device = Device(MemoryHost(Limits(max_user_bytes=10 + AUTH_DATA_SIZE)))
        key = {"first_message_index": 0, "forwarded_count": 0, "is_verified": True}
        path = f"{KEYS}/!room/s?version={device.version}"
        for data, status in (("\u00e4" * 5, 403), ("\u00e4" * 4, 200)):
            answer = device.send("PUT", path, {**key, "session_data": data})
            self.assertEqual(answer.status, status)

    def test_a_deleted_key_frees_its_bytes(self) -> None:
        """After a deletion, the bytes of the backup are measured again."""
        device = Device(MemoryHost(Limits(max_user_bytes=100 + AUTH_DATA_SIZE)))
        self.assert_taken(device.upload("a", size=60), 1)
        self.assert_taken(device.delete("a"), 0)
        self.assert_taken(device.upload("b", size=100), 1)
        self.assert_refused(device.upload("c", size=4))

    def test_all_versions_count_together(self) -> None:
        """Making another version doesn't get round the limit; deleting one does."""
        device = Device(
            MemoryHost(Limits(max_user_keys=3, max_user_bytes=30 + 2 * AUTH_DATA_SIZE))
        )
        old = device.version
        self.assert_taken(device.upload("a", "b"), 2)
        device.new_version()
        self.assert_refused(device.upload("a", "b"))
        self.assert_taken(device.upload("a"), 1)
        self.assertEqual(device.send("DELETE", f"{VERSION}/{old}").status, 200)
        self.assert_taken(device.upload("b", "c"), 3)

    def test_another_user_is_not_counted(self) -> None:
        """Each user has the whole limit."""
        host = MemoryHost(Limits(max_user_keys=1))
        for _ in range(2):
            device = Device(host)
            self.assert_taken(device.upload("a"), 1)
            self.assert_refused(device.upload("b"))

    def test_what_was_there_before_the_limit_counts(self) -> None:
        """A backup without a cached size is measured."""
        host = MemoryHost(Limits(max_user_bytes=100 + AUTH_DATA_SIZE))
        device = Device(host)
        self.assert_taken(device.upload("a", size=60), 1)
        for forget in (
            "UPDATE roomkeys_counts SET key_bytes = NULL",
            "UPDATE roomkeys_counts SET etag = etag - 1",
            "DELETE FROM roomkeys_counts",
        ):
            host.database.connection.execute(forget)
            host.database.connection.commit()
            self.assert_refused(device.upload("b", size=41))
        host.reactor.advance(3601)
        self.assert_refused(device.upload("b", size=41))
        self.assert_taken(device.upload("b", size=40), 2)

    def measured_device(self, size: int) -> Device:
        """Return a device whose backup of 5 keys with so many bytes each isn't measured
        yet. Each transaction measures 2 keys at most."""
        self.patch(measuring, "MEASURED_AT_ONCE", 2)
        host = MemoryHost(Limits(max_user_bytes=100 + AUTH_DATA_SIZE))
        device = Device(host)
        self.assert_taken(device.upload(*"abcde", size=size), 5)
        connection = host.database.connection
        connection.execute("UPDATE e2e_room_keys SET room_id = '' WHERE rowid < 4")
        connection.execute("UPDATE e2e_room_keys SET session_id = '' WHERE rowid = 2")
        connection.execute("DELETE FROM roomkeys_counts")
        connection.commit()
        return device

    def test_a_large_backup_is_measured_in_batches(self) -> None:
        """On SQLite, the bytes of a backup are measured exactly in several short
        transactions, and the limit holds to the byte."""
        device = self.measured_device(size=19)
        database = device.host.database
        database.statements.clear()
        self.assert_refused(device.upload("f", size=6))
        batches = [text for text in database.statements if "LIMIT 3" in text]
        self.assertEqual(len(batches), 3)
        database.statements.clear()
        self.assert_taken(device.upload("f", size=5), 6)
        self.assertFalse([text for text in database.statements if "LIMIT 3" in text])
        rows = database.connection.execute("SELECT key_bytes FROM roomkeys_counts")
        self.assertEqual(rows.fetchall(), [(100,)])

    def test_a_deletion_in_a_backup_that_is_not_measured(self) -> None:
        """The answer to a DELETE has the exact count, also if the keys must be measured
        first."""
        device = self.measured_device(size=10)
        self.assert_taken(device.delete("e"), 4)

    def test_a_write_between_two_batches_is_measured(self) -> None:
        """If another process writes to a backup between two batches, the backup is
        measured again: the limit counts the other process' keys too."""
        device = self.measured_device(size=10)
        database = device.host.database
        run, batches = database.run, 0

        def write_after_two_batches(desc: str, *args: Any) -> Any:
            nonlocal batches
            batches += desc == "roomkeys_measure_keys"
            if batches == 2 and desc == "roomkeys_measure_keys":
                key = (device.user.user_id, "", "-", int(device.version), '"' * 40)
                database.connection.execute(
                    "INSERT INTO e2e_room_keys"
                    " (user_id, room_id, session_id, version, session_data)"
                    " VALUES (?, ?, ?, ?, ?)",
                    key,
                )
                database.connection.execute(
                    "UPDATE e2e_room_keys_versions SET etag = etag + 1"
                )
                database.connection.commit()
            return run(desc, *args)

        self.patch(database, "run", write_after_two_batches)
        self.assert_refused(device.upload("f", size=11))
        self.assertEqual(batches, 2 + 3)
        self.assert_taken(device.upload("f", size=10), 7)

    def test_a_version_that_is_deleted_between_two_batches(self) -> None:
        """If another process deletes the measured version, the write is answered like
        any write to a deleted version."""
        device = self.measured_device(size=10)
        database = device.host.database
        run = database.run

        def delete_before_measuring(desc: str, *args: Any) -> Any:
            if desc == "roomkeys_measure_keys":
                database.connection.execute(
                    "UPDATE e2e_room_keys_versions SET deleted = 1"
                )
                database.connection.commit()
            return run(desc, *args)

        self.patch(database, "run", delete_before_measuring)
        self.assertEqual(device.upload("f").status, 404)

    def test_a_version_that_is_deleted_while_it_is_counted(self) -> None:
        """The keys of a deleted version don't count, and an upload to another
        version is stored."""
        host = MemoryHost(Limits(max_user_keys=2))
        device = Device(host)
        old = device.version
        self.assert_taken(device.upload("a", "b"), 2)
        device.new_version()
        host.database.connection.execute("DELETE FROM roomkeys_counts")
        host.database.connection.commit()
        counts = host.store._uploads._counts
        recount = counts.recount

        def interrupted(txn: Any, backup: BackupId) -> Any:
            if backup.version == int(old):
                txn.execute(
                    "UPDATE e2e_room_keys_versions SET deleted = 1 WHERE version = ?",
                    (backup.version,),
                )
            return recount(txn, backup)

        self.patch(counts, "recount", interrupted)
        self.assert_taken(device.upload("a"), 1)

    def test_auth_data_counts(self) -> None:
        """``auth_data`` takes of ``max_user_bytes``, in POST, PUT and uploads; one that
        gets no longer is taken, and a deleted version frees its bytes."""
        device = Device(MemoryHost(Limits(max_user_bytes=100)))
        old = device.version
        self.assertEqual(device.create(90).status, 200)
        self.assert_refused(device.create(9))
        device.version = device.send("GET", VERSION).json["version"]
        self.assert_refused(device.update(99))
        self.assertEqual(device.update(98).status, 200)
        self.assert_refused(device.upload("a", size=3))
        self.assertEqual(device.update(98).status, 200)
        self.assertEqual(device.update(97).status, 200)
        self.assertEqual(device.send("GET", VERSION).json["auth_data"], "x" * 95)
        self.assertEqual(device.send("DELETE", f"{VERSION}/{old}").status, 200)
        self.assert_taken(device.upload("a", size=3), 1)

    def test_posts_under_a_limit_take_no_more_room(self) -> None:
        """However often a client makes a version of 60 KB, the limit holds."""
        device = Device(MemoryHost(Limits(max_user_bytes=1000)))
        for _ in range(20):
            self.assert_refused(device.create(60_000))
        self.assertEqual(device.send("GET", VERSION).json["version"], device.version)

    def test_versions_are_limited(self) -> None:
        """A version over the limit is refused, and accepted after a DELETE."""
        device = Device(MemoryHost(Limits(max_user_versions=2)))
        device.new_version()
        answer = device.create()
        self.assert_refused(answer)
        self.assertEqual(
            answer.json["error"], "A user may have 2 versions at most: delete one first"
        )
        self.assertEqual(device.send("GET", VERSION).json["version"], device.version)
        device.send("DELETE", f"{VERSION}/{device.version}")
        self.assertEqual(device.create().status, 200)

    def test_a_user_has_a_hundred_versions_by_default(self) -> None:
        """The number is limited without any option, as each has its ``auth_data``."""
        device = Device(MemoryHost())
        for _ in range(99):
            device.new_version()
        self.assert_refused(device.create())

    def test_deleted_versions_take_little_room(self) -> None:
        """A deleted version has no ``auth_data``, and the newest hundred have a row: a
        loop of POST and DELETE leaves little."""
        host = MemoryHost()
        host.sweeper.start()
        device = Device(host)
        for _ in range(105):
            device.create(60_000)
            device.version = device.send("GET", VERSION).json["version"]
            device.send("DELETE", f"{VERSION}/{device.version}")
            host.reactor.pump([0, 0.1])
        rows = host.database.connection.execute(
            "SELECT deleted, auth_data FROM e2e_room_keys_versions"
        ).fetchall()
        self.assertEqual(sum(deleted for deleted, _ in rows), 101)
        self.assertEqual({data for deleted, data in rows if deleted}, {"{}"})

    def test_a_deleted_version_with_keys_keeps_its_row(self) -> None:
        """The row is there as long as keys are, so that the keys can be deleted."""
        host = MemoryHost()
        device = Device(host)
        self.assert_taken(device.upload("a"), 1)
        first = device.version
        connection = host.database.connection
        connection.execute("UPDATE e2e_room_keys_versions SET deleted = 1")
        connection.commit()
        for _ in range(105):
            device.new_version()
            device.send("DELETE", f"{VERSION}/{device.version}")
        answer = device.send("DELETE", f"{VERSION}/{first}")
        self.assertEqual(answer.status, 200)
        host.sweeper.start()
        host.reactor.pump([0.1] * 120)
        rows = connection.execute("SELECT * FROM e2e_room_keys").fetchall()
        self.assertEqual(rows, [])

    def test_it_costs_one_statement(self) -> None:
        """An upload within the limit takes one statement more, however many keys."""
        counts = []
        for limits in (Limits(), Limits(max_user_keys=100, max_user_bytes=1000)):
            host = MemoryHost(limits)
            device = Device(host)
            device.upload("a")
            host.database.statements.clear()
            device.upload("b", "c")
            counts.append(len(host.database.statements))
        self.assertEqual(counts[1], counts[0] + 1)

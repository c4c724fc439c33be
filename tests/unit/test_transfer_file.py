"""The files of export and import: format, checks, and the plan of an import."""

import contextlib
import io
import json
from collections.abc import Iterable
from pathlib import Path

import attrs
from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys.admin.transfer_file import (
    FileError,
    LinesEncoder,
    LinesFile,
)
from synapse_roomkeys.encoding import BackupEncoder, encode_key
from synapse_roomkeys.errors import RoomKeysError
from synapse_roomkeys.storage import Owner
from synapse_roomkeys.tools.exports import open_target
from synapse_roomkeys.tools.imports import COMPARE, CREATE, LEAVE, MERGE, plan_import
from synapse_roomkeys.tools.session import ToolError
from synapse_roomkeys.tools.transfer_body import BodyFile
from synapse_roomkeys.types import KeyMetadata, KeyPage, RoomKey

from .test_tools import facts

USER = "@user:test.example"
METADATA = KeyMetadata(1, 2, True)
KEYS = [
    RoomKey("!room:x", "a/+=é🔑", METADATA, '{"a":"\\n \u2028é"}'),
    RoomKey("!room:x", "b", METADATA, '"text"'),
    RoomKey('!"\\', "c", METADATA, "[1.50, 1e3]"),
]


def row(key: RoomKey) -> tuple[str, str, str]:
    """Return a key as a row of a `KeyPage`."""
    text = encode_key(key).decode()
    head = json.dumps(key.session_id, ensure_ascii=False) + ":" + text
    end = head.index('"session_data":') + len('"session_data":')
    return key.room_id, head[:end], key.session_data


def export(*versions: int) -> bytes:
    """Return an export of versions, each with the same keys."""
    encoder = LinesEncoder(USER)
    data = encoder.start(1)
    for version in versions:
        found = facts(version, "current", etag=7)
        found = attrs.evolve(found, auth_data='{"a":\n1}')
        data += encoder.begin(found) + encoder.encode(page(KEYS)) + encoder.finish()
    return data + encoder.end()


def page(keys: Iterable[RoomKey]) -> KeyPage:
    """Return a page of keys."""
    return KeyPage([row(key) for key in keys], (), None)


def read(data: bytes) -> list[list[RoomKey]]:
    """Check an export; return the keys of each version."""
    file = LinesFile(io.BytesIO(data))
    list(file.check())
    return [[k.parse() for k in file.read_keys(v)] for v in file.versions]


def read_body(text: str, most: int = 1 << 20) -> list[RoomKey]:
    """Check a body that arrives in pieces; return its keys.

    Args:
        most: maximum characters of a piece.
    """

    class Pieces(io.StringIO):
        def read(self, size: int | None = -1, /) -> str:
            return super().read(most)

    file = BodyFile(Pieces(text))
    list(file.check())
    return [key.parse() for key in file.read_keys(file.versions[0])]


class LinesTests(SynchronousTestCase):
    """Exports."""

    def test_what_is_written_is_read(self) -> None:
        """A reader returns the user, the versions and the keys, byte for byte."""
        self.assertEqual(read(export(5, 1795421234)), [KEYS, KEYS])
        file = LinesFile(io.BytesIO(export(5)))
        list(file.check())
        info = file.versions[0].info
        assert info is not None
        self.assertEqual(file.user_id, USER)
        self.assertEqual((info.version, info.etag, info.algorithm), (5, 7, "a"))
        self.assertEqual(json.loads(info.auth_data), {"a": 1})

    def test_a_line_break_in_data_becomes_a_space(self) -> None:
        """Each key is one line; the JSON value stays the same."""
        data = '{"a":\r\n[1,\n2]}'
        lines = LinesEncoder(USER).encode(page([RoomKey("!r", "s", METADATA, data)]))
        self.assertEqual(lines.count(b"\n"), 1)
        self.assertNotIn(b"\r", lines)
        found = json.loads(lines)["session_data"]
        self.assertEqual(found, json.loads(data))

    def test_every_cut_is_refused(self) -> None:
        """No beginning of an export is an export."""
        data = export(5)
        for end in range(len(LinesEncoder(USER).start(1)), len(data)):
            with self.assertRaises(FileError):
                read(data[:end])

    def test_every_altered_byte_is_refused(self) -> None:
        """An export with another byte anywhere is no export."""
        data = export(5)
        for place, byte in enumerate(data):
            altered = data[:place] + bytes([byte ^ 1]) + data[place + 1 :]
            with self.assertRaises((FileError, ValueError), msg=str(place)):
                read(altered)

    def test_an_order_of_lines_that_no_export_has(self) -> None:
        """Versions in another order, keys before a version, and bytes after the end are
        refused, whatever the last line says."""
        encoder = LinesEncoder(USER)
        wrong_keys = encoder.start(1) + encoder.encode(page(KEYS)) + encoder.end()
        for data in (
            export(6, 5),
            export(5, 5),
            export(5) + b"\n",
            wrong_keys,
            export(5).replace(b'"version":"5"', b'"version":"05"'),
        ):
            with self.assertRaises(FileError):
                read(data)

    def test_another_format_is_named(self) -> None:
        """A later format asks for another version of the program."""
        data = export(5).replace(b'"format_number":1', b'"format_number":2')
        with self.assertRaisesRegex(FileError, "number 2"):
            read(data)


class BodyTests(SynchronousTestCase):
    """Bodies of GET /keys."""

    def body(self) -> str:
        """Return the body of the keys."""
        encoder = BackupEncoder(with_rooms=True)
        page = KeyPage([row(key) for key in KEYS], (), None)
        return (encoder.encode(page) + encoder.finish()).decode()

    def test_pieces_of_any_length_are_read(self) -> None:
        """Wherever a piece ends, the keys are the same."""
        for most in (1, 2, 3, 7, 100, 1 << 20):
            self.assertEqual(read_body(self.body(), most), KEYS)
        spaced = json.dumps(json.loads(self.body()), indent=2)
        self.assertEqual(len(read_body(spaced, 5)), len(KEYS))
        self.assertEqual(read_body('{"rooms": {}}'), [])

    def test_every_cut_is_refused(self) -> None:
        """No beginning of a body is a body."""
        body = self.body()
        for end in range(len(body)):
            with self.assertRaises(FileError):
                read_body(body[:end])

    def test_other_json_is_refused(self) -> None:
        """A file without rooms and sessions is no body, and the error says so."""
        for text in ("{}", "[]", '{"a": 1}', '{"rooms":{"!a":{}}} {}', '{"rooms":[]}'):
            with self.assertRaisesRegex(FileError, "body of GET /keys"):
                read_body(text)

    def test_a_key_that_no_upload_may_have(self) -> None:
        """Such a key passes the check of the file, and is refused by itself."""
        body = self.body().replace('"forwarded_count":2', '"forwarded_count":-2', 1)
        with self.assertRaisesRegex(RoomKeysError, "forwarded_count"):
            read_body(body)


class TargetTests(SynchronousTestCase):
    """The file that an export writes."""

    def setUp(self) -> None:
        self.directory = Path(self.mktemp())
        self.directory.mkdir()
        self.path = self.directory / "file"
        self.path.write_text("old")
        self.path.chmod(0o644)

    def test_a_whole_file_replaces_the_old_one(self) -> None:
        """Only the owner may read the new file; nothing else is left."""
        with open_target(self.path) as stream:
            stream.write(b"new")
            self.assertEqual(self.path.read_text(), "old")
        self.assertEqual(self.path.read_text(), "new")
        self.assertEqual(self.path.stat().st_mode & 0o777, 0o600)
        self.assertEqual(list(self.directory.iterdir()), [self.path])

    def test_an_error_leaves_the_old_file(self) -> None:
        """After an error in the middle, the old file is unchanged and alone."""
        with contextlib.suppress(KeyError), open_target(self.path) as stream:
            stream.write(b"new")
            raise KeyError
        self.assertEqual(self.path.read_text(), "old")
        self.assertEqual(list(self.directory.iterdir()), [self.path])

    def test_a_path_that_is_no_file(self) -> None:
        """A directory, a device and a path without a directory are refused with their
        name."""
        absent = self.directory / "absent" / "file"
        for path in (self.directory, Path("/dev/null"), absent):
            with self.assertRaisesRegex(ToolError, str(path)), open_target(path):
                pass


class PlanTests(SynchronousTestCase):
    """The decision of an import for each version of the file."""

    def plan(self, *states: str) -> list[str]:
        """Return the actions for the versions 5 and 6 of a file.

        Args:
            states: the states of the user's versions 5, 6 and 7; "" for no version.
        """
        file = LinesFile(io.BytesIO(export(5, 6)))
        list(file.check())
        versions = [
            attrs.evolve(facts(number, state), auth_data='{"a": 1}')
            for number, state in enumerate(states, 5)
            if state
        ]
        steps = plan_import(Owner(USER, tuple(versions)), file)
        return [step.action for step in steps]

    def test_what_becomes_of_a_version(self) -> None:
        """An absent version is created unless a newer version is current; the current
        version takes keys; a superseded version is compared."""
        self.assertEqual(self.plan(), [CREATE, CREATE])
        self.assertEqual(self.plan("current"), [MERGE, CREATE])
        self.assertEqual(self.plan("superseded", "current"), [COMPARE, MERGE])
        self.assertEqual(self.plan("", "current"), [LEAVE, MERGE])
        self.assertEqual(self.plan("", "", "current"), [LEAVE, LEAVE])
        self.assertEqual(self.plan("current", "", "deleted"), [MERGE, CREATE])

    def test_what_stops_an_import(self) -> None:
        """A deleted version, keys without a version, and a version with other data stop
        the import, and the error says what to do."""
        with self.assertRaisesRegex(ToolError, "version 6 was deleted.*restore"):
            self.plan("current", "deleted")
        with self.assertRaisesRegex(ToolError, "purge --orphans"):
            self.plan("orphaned")
        file = LinesFile(io.BytesIO(export(5)))
        list(file.check())
        current = facts(5, "current")
        for other in (
            attrs.evolve(current, auth_data='{"a": true}'),
            attrs.evolve(current, auth_data="damaged"),
            attrs.evolve(current, auth_data='{"a": 1}', algorithm="other"),
        ):
            with self.assertRaisesRegex(ToolError, "another algorithm or auth_data"):
                plan_import(Owner(USER, (other,)), file)

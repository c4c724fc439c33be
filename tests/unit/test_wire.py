"""Tests of the parser and the encoder of bodies."""

import json
from unittest import mock

from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys.encoding import BackupEncoder, encode_backup_info, encode_key
from synapse_roomkeys.errors import (
    BadJsonError,
    InvalidParamError,
    NotFoundError,
    NotJsonError,
    TooLargeError,
)
from synapse_roomkeys.identifiers import parse_version, quote_for_log
from synapse_roomkeys.types import (
    BackupInfo,
    KeyMetadata,
    KeyPage,
    Limits,
    RoomKey,
)
from synapse_roomkeys.wire import parse_new_version, parse_upload, parse_version_info

LIMITS = Limits(max_body_bytes=1000, max_session_data_bytes=100)
BEFORE = b'{"first_message_index":1,"forwarded_count":2,"is_verified":true,'


def parse(
    body: bytes, room_id: str | None, session_id: str | None, limits: Limits
) -> list[RoomKey]:
    """Return the keys of an upload as a list."""
    return list(parse_upload(body, room_id, session_id, limits))


def parse_key(session_data: bytes) -> RoomKey:
    """Return the only key of an upload with these session data."""
    body = BEFORE + b'"session_data":' + session_data + b"}"
    [key] = parse(body, "!r", "s", LIMITS)
    return key


class ParseUploadTests(SynchronousTestCase):
    """Tests of `parse_upload` that the contract's scenarios do not cover."""

    def test_session_data_is_stored_unchanged(self) -> None:
        """White space, escapes and the order of members in session_data are stored
        unchanged."""
        for text in (r'{ "b" : 1e3, "a":"\u00e9\/é" }', "-0", "[]", '"é"', "0.10"):
            self.assertEqual(parse_key(text.encode()).session_data, text)

    def test_the_limit_of_session_data_counts_bytes(self) -> None:
        """A session_data of exactly `max_session_data_bytes` bytes is accepted, and a
        longer session_data is refused."""
        self.assertEqual(len(parse_key(b'"' + b"x" * 98 + b'"').session_data), 100)
        self.assertRaises(TooLargeError, parse_key, b'"' + b"x" * 99 + b'"')
        self.assertRaises(TooLargeError, parse_key, f'"{"é" * 50}"'.encode())

    def test_numbers_outside_of_doubles_are_refused(self) -> None:
        """A number that a double cannot hold is refused anywhere in session_data;
        digits in strings are text."""
        for number in (
            b"1e999",
            b"-1E+0400",
            b"[1.5e309]",
            b"9" * 309,
            b"9" * 4300,
            b"9" * 5000,
            b'{"a":"1","b":[-2%b]}' % (b"0" * 308),
            b'{"a":%b,"a":"1"}' % (b"9" * 309),
            b'{"a":2e308}',
        ):
            self.assertRaises(
                BadJsonError,
                parse,
                BEFORE + b'"session_data":' + number + b"}",
                "!r",
                "s",
                Limits(),
            )
        for text in (
            b'": 1e999"',
            b'"' + b"9" * 400 + b'"',
            b'{"a":1,"b":"' + b"9" * 400 + b'"}',
            b"1" + b"0" * 308,
            b"1e-999",
            b"[1e300]",
        ):
            body = BEFORE + b'"session_data":' + text + b"}"
            [key] = parse(body, "!r", "s", Limits())
            self.assertEqual(key.session_data, text.decode())

    def test_deep_nesting_is_refused(self) -> None:
        """Nesting deeper than the parser accepts is refused anywhere in a body, with a
        short message."""
        deep = b"[" * 100_000 + b"]" * 100_000
        for body in (deep, BEFORE + b'"session_data":' + deep + b"}", deep[:100_000]):
            error = self.assertRaises(
                (BadJsonError, NotJsonError), parse, body, "!r", "s", Limits()
            )
            self.assertLess(len(str(error)), 200)

    def test_a_large_body_is_parsed_only_as_far_as_needed(self) -> None:
        """Values of a large body are parsed only as far as needed, because a parsed
        value takes a hundred times its bytes of memory; the message of an error then
        has less detail."""
        lists = b"[" + b"[]," * 300_000 + b"[]]"
        before = BEFORE + b'"session_data":1,"more":'
        for body, error, says in (
            (before + lists + b"}", None, ""),
            (BEFORE + b'"session_data":' + lists + b"}", TooLargeError, "65536"),
            (BEFORE + b'"more":' + lists + b"}", BadJsonError, "`session_data`"),
            (lists, BadJsonError, "`object`"),
            (before + lists, NotJsonError, "truncated"),
            (b'{"is_verified":1,"more":' + lists, NotJsonError, "truncated"),
        ):
            with self.subTest(error=error), mock.patch.object(json, "loads", None):
                if error is None:
                    self.assertEqual(len(parse(body, "!r", "s", Limits())), 1)
                else:
                    raised = self.assertRaises(error, parse, body, "!r", "s", Limits())
                    self.assertIn(says, str(raised))

    def test_many_objects_in_a_large_body_are_refused(self) -> None:
        """An upload may be large or hold many small objects, but not both."""
        empty = b'{"rooms":{%b}}'
        rooms = [b'"%d":{"sessions":{}}' % n for n in range(20_000)]
        few, many = (empty % b",".join(rooms[:n]) for n in (4_000, 20_000))
        self.assertEqual(parse(few, None, None, Limits()), [])
        error = self.assertRaises(
            TooLargeError, parse, many, None, None, Limits(max_body_bytes=10**7)
        )
        self.assertIn("objects", str(error))
        key = BEFORE + b'"session_data":{"ciphertext":"%b"}}' % (b"x" * 400)
        sessions = b",".join(b'"%d":%b' % (n, key) for n in range(20_000))
        body = b'{"sessions":{%b}}' % sessions
        self.assertEqual(len(parse(body, "!r", None, Limits())), 20_000)

    def test_messages_name_room_session_and_field(self) -> None:
        """The message of an error names room, session and field in ASCII, whatever
        their characters."""
        body = '{"rooms":{"!é":{"sessions":{"s\\n":' + BEFORE.decode() + '"x":1}}}}}'
        error = self.assertRaises(
            BadJsonError, parse, body.encode(), None, None, Limits()
        )
        self.assertEqual(
            str(error),
            'session_data of session "s\\n" in room "!\\u00e9"'
            " must be there and not null",
        )

    def test_messages_are_short(self) -> None:
        """A long id is cut in the message of an error."""
        body = b'{"rooms":{"' + b"x" * 900 + b'":{"sessions":{}}, "":1}}'
        error = self.assertRaises(
            (BadJsonError, InvalidParamError), parse, body, None, None, LIMITS
        )
        self.assertLess(len(str(error)), 400)

    def test_messages_are_short_with_escaped_characters(self) -> None:
        """A message is short even if each character of an id is escaped to several."""
        for id_ in ("\U0001f511" * 255, "\u00e9" * 255, "\ud800" * 255, "\0" * 255):
            self.assertLess(len(quote_for_log(id_)), 610)
            self.assertTrue(quote_for_log(id_).endswith('..."'))
        self.assertEqual(len(quote_for_log("x" * 255)), 257)


class ParseVersionTests(SynchronousTestCase):
    """Tests of `parse_version`, `parse_new_version` and `parse_version_info`."""

    def test_a_version_has_one_notation(self) -> None:
        """A version number is accepted only in the notation in which versions are
        issued."""
        self.assertEqual(parse_version("1795421234"), 1795421234)
        self.assertEqual(parse_version(str(2**63 - 1)), 2**63 - 1)
        for text in (
            "",
            "0",
            "01",
            "-1",
            "+1",
            "1_0",
            " 1",
            "1\n",
            "\u0661",
            str(2**63),
        ):
            self.assertRaises(NotFoundError, parse_version, text)

    def test_auth_data_is_stored_unchanged(self) -> None:
        """auth_data is opaque like session_data, and stored unchanged."""
        body = b'{"auth_data": { "a" : [1.0] },"algorithm":"m"}'
        info = parse_version_info(body, LIMITS)
        self.assertEqual(info.auth_data, '{ "a" : [1.0] }')
        self.assertIsNone(info.version)

    def test_a_large_version_body_is_refused(self) -> None:
        """A body of a version over the limit is refused before parsing."""
        body = b'{"auth_data":{},"algorithm":"m","more":[' + b"[]," * 22_000 + b"1]}"
        self.assertRaises(TooLargeError, parse_version_info, body, Limits())

    def test_the_version_of_an_update_must_be_a_string(self) -> None:
        """An update with a version other than a string is refused; a new version
        ignores the member."""
        for version in (b"1", b"null", b"[{}]"):
            body = b'{"auth_data":{},"algorithm":"m","version":' + version + b"}"
            self.assertRaises(BadJsonError, parse_version_info, body, LIMITS)
            self.assertIsNone(parse_new_version(body, LIMITS).version)


class EncodeTests(SynchronousTestCase):
    """Tests of the encoder."""

    def test_pages_are_encoded_as_one_object(self) -> None:
        """Pages are encoded as one JSON object, wherever one page ends and the next
        begins."""
        rows = [
            ("!a", '"1":{"d":', "1"),
            ("!a", '"2":{"d":', "2"),
            ('"', '"3":{"d":', '"é"'),
        ]
        for cut in range(len(rows) + 1):
            encoder = BackupEncoder(with_rooms=True)
            pages = [KeyPage(rows[:cut], (), None), KeyPage(rows[cut:], (), None)]
            self.assertEqual(
                b"".join(map(encoder.encode, pages)) + encoder.finish(),
                (
                    '{"rooms":{"!a":{"sessions":{"1":{"d":1},"2":{"d":2}}},'
                    '"\\"":{"sessions":{"3":{"d":"é"}}}}}'
                ).encode(),
            )

    def test_a_single_key_is_encoded(self) -> None:
        """A key is encoded with its unchanged session data; a NULL in a field is
        encoded as 0 or false."""
        for given, wanted in (
            (
                (3, 2, True),
                b'"first_message_index":3,"forwarded_count":2,"is_verified":true',
            ),
            (
                (None, None, None),
                b'"first_message_index":0,"forwarded_count":0,"is_verified":false',
            ),
        ):
            data = '{ "é" : "\\ud800" }'
            key = RoomKey("!room", "s", KeyMetadata(*given), data)
            text = b'{%b,"session_data":%b}' % (wanted, data.encode())
            self.assertEqual(encode_key(key), text)

    def test_no_keys_are_an_empty_object(self) -> None:
        """A backup or room without keys is encoded as an object without members."""
        for with_rooms, whole in ((True, b'{"rooms":{}}'), (False, b'{"sessions":{}}')):
            encoder = BackupEncoder(with_rooms)
            self.assertEqual(
                encoder.encode(KeyPage((), (), None)) + encoder.finish(), whole
            )

    def test_numbers_of_a_version_are_strings(self) -> None:
        """Etag and version are encoded as strings, because clients fail on numbers."""
        self.assertEqual(
            encode_backup_info(BackupInfo(7, 'a"b', "{}", 3, 5)),
            b'{"algorithm":"a\\"b","auth_data":{},"count":5,"etag":"3","version":"7"}',
        )

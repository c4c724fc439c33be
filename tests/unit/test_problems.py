"""Faults of stored values, in words."""

import attrs
from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys.storage import Blob, StoredRow, StoredVersion
from synapse_roomkeys.tools.problems import (
    Port,
    find_key_problems,
    find_version_problems,
)

KEY = StoredRow(b"@a:x", 1, b"!r", b"s", 0, 0, False, b'"data"')
VERSION = StoredVersion(b"@a:x", 1, b"m.other", b"{}", 0, 1, None, None)
NUMBER = "first_message_index"


class KeyTests(SynchronousTestCase):
    """The faults of a key."""

    def check(
        self, field: str, value: object, *expected: tuple[str, bool, Port]
    ) -> None:
        """Check kind, use and port of the faults of a key with a changed field."""
        key = attrs.evolve(KEY, **{field: value})
        found = [(p.kind, p.is_usable, p.port) for p in find_key_problems(key)]
        self.assertEqual(found, list(expected), (field, value))

    def test_values_without_a_fault(self) -> None:
        """The limits of types are valid, and JSON that few decoders accept."""
        for field, value in (
            (NUMBER, 2**31 - 1),
            ("is_verified", 1),
            ("session_id", b"x" * 255),
            ("room_id", "\N{KEY}".encode()),
            ("session_data", b'"\\ud800"'),
            ("session_data", b"[" * 5000 + b"]" * 5000),
        ):
            self.check(field, value)

    def test_numbers(self) -> None:
        """The server reads a wrong number as 0, so the key is usable; PostgreSQL rounds
        fractions and refuses other types and large numbers."""
        for value, kind, port in (
            (None, "null", Port.COPIES),
            (-1, "out_of_range", Port.COPIES),
            (-(2**31) - 1, "out_of_range", Port.STOPS),
            (2**31, "out_of_range", Port.STOPS),
            (1.5, "wrong_type", Port.CHANGES),
            (2.0**31, "wrong_type", Port.STOPS),
            (float("inf"), "wrong_type", Port.STOPS),
            (b"5", "wrong_type", Port.STOPS),
            (Blob(b"5"), "wrong_type", Port.STOPS),
        ):
            self.check(NUMBER, value, (kind, True, port))

    def test_texts(self) -> None:
        """The server can't send a BLOB or broken text as an id, but a NUL; PostgreSQL
        may not index long ids."""
        self.check("room_id", Blob(b"!r"), ("wrong_type", False, Port.CHANGES))
        self.check("session_id", b"\xff", ("not_utf8", False, Port.STOPS))
        self.check("session_id", b"a\0", ("nul", True, Port.DROPS))
        self.check(
            "room_id",
            b"x" * 2700,
            ("bad_length", True, Port.COPIES),
            ("long_ids", True, Port.STOPS),
        )
        self.check("session_data", b" null", ("json_null", False, Port.COPIES))
        self.check("session_data", b"{", ("not_json", False, Port.COPIES))
        self.check("session_data", Blob(b"{}"), ("wrong_type", True, Port.CHANGES))

    def test_no_data_is_quoted(self) -> None:
        """No word of a key's data stands in a finding."""
        key = attrs.evolve(KEY, session_data=b"secret\0\xff", is_verified=b"secret")
        texts = [problem.text for problem in find_key_problems(key)]
        self.assertEqual(len(texts), 2)
        self.assertNotIn("secret", "".join(texts))


class VersionTests(SynchronousTestCase):
    """The faults of a version."""

    def test_auth_data_of_deleted_versions(self) -> None:
        """A deleted version without auth_data has no fault."""
        algorithm = b"m.megolm_backup.v1.curve25519-aes-sha2"
        live = attrs.evolve(VERSION, algorithm=algorithm)
        [problem] = find_version_problems(live)
        self.assertEqual(problem.kind, "public_key")
        self.assertEqual([*find_version_problems(attrs.evolve(live, deleted=1))], [])
        self.assertEqual([*find_version_problems(VERSION)], [])

    def test_values_of_a_wrong_type(self) -> None:
        """A number of another type, and a text that isn't, are named."""
        for field, value in (
            ("version", b"abc"),
            ("deleted", Blob(b"")),
            ("etag", 1.5),
            ("algorithm", Blob(b"a")),
            ("auth_data", Blob(b"{}")),
        ):
            version = attrs.evolve(VERSION, **{field: value})
            [problem] = find_version_problems(version)
            self.assertEqual((problem.kind, problem.is_usable), ("wrong_type", False))
            self.assertIn(field, problem.text)

"""The values that a migration compares: keys, versions, and their digests."""

import hashlib
from collections.abc import Iterable
from typing import Any

import attrs

#: A key: room id, session id, first_message_index, forwarded_count, is_verified,
#: session_data. An SQLite file may hold values of any type in them.
Row = tuple[Any, ...]

#: The sum of hashes is kept modulo 2^64, the range of a hash.
_MODULUS = 2**64


def _wrapped(total: Any) -> int:
    """Reduce a sum, which PostgreSQL returns as a `Decimal`, to the range of a hash."""
    return int(total) % _MODULUS


@attrs.frozen
class KeysDigest:
    """The number of a version's keys, and a sum that changes with any key.

    The sum does not depend on the order of the keys: a database can compute the sum
    without sorting, and the keys that a target refuses can be subtracted.

    Attributes:
        count: how many keys there are.
        total: the sum of `hash_key` over the keys, modulo 2^64.
    """

    count: int = 0
    total: int = attrs.field(default=0, converter=_wrapped)

    def __add__(self, other: "KeysDigest") -> "KeysDigest":
        """Return the digest of the keys of both."""
        return KeysDigest(self.count + other.count, self.total + other.total)

    def __sub__(self, other: "KeysDigest") -> "KeysDigest":
        """Return the digest of the keys without a subset of them."""
        return KeysDigest(self.count - other.count, self.total - other.total)


def digest_keys(rows: Iterable[Row]) -> KeysDigest:
    """Compute the digest of some keys."""
    count = total = 0
    for row in rows:
        count += 1
        total += hash_key(row)
    return KeysDigest(count, total)


def hash_key(row: Row) -> int:
    """Hash a key: the first 64 bits of a SHA-256.

    The two lengths in front make the hashed text unambiguous. PostgreSQL computes the
    same number with the expression in `postgres_side`.
    """
    room_id, session_id, index, forwarded, verified, data = row
    text = (
        f"{len(room_id)},{len(session_id)},{_text(index)},{_text(forwarded)},"
        f"{_text(verified)},{room_id}{session_id}{data}"
    )
    return int.from_bytes(hashlib.sha256(_encode(text)).digest()[:8], "big")


def _encode(text: str) -> bytes:
    """Encode a text with the bytes of the database: a connection to SQLite decodes
    broken UTF-8 to surrogates."""
    return text.encode("utf-8", "surrogateescape")


def _text(value: Any) -> str:
    """Format a number like PostgreSQL: NULL as the empty text, a boolean as 0 or 1. Use
    Python's format for any other value of an SQLite file."""
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, int) else repr(value)


@attrs.frozen
class Version:
    """One version of a user's backup, as a database holds it.

    Attributes:
        auth_data: JSON text.
        deleted: the user has deleted the version; the row stays and the keys go.
        etag: 0 for NULL.
        keys: the digest of the keys. At the source, the digest of the keys after
            `Target.fit`, which makes both sides comparable.
    """

    user_id: str
    version: int
    algorithm: str
    auth_data: str
    deleted: bool
    etag: int
    keys: KeysDigest

    @property
    def ids(self) -> tuple[str, int]:
        """Identify the version."""
        return self.user_id, self.version

    @property
    def digest(self) -> str:
        """Return a SHA-256 of the version and its keys, as 64 hexadecimal digits."""
        facts = f"{self.etag} {self.deleted:d} {self.keys.count} {self.keys.total}"
        text = f"{facts} {self.algorithm}\n{self.auth_data}"
        return hashlib.sha256(_encode(text)).hexdigest()


@attrs.frozen
class SourceVersion:
    """A version at the source.

    Attributes:
        copied: the digest that the last migration into this database recorded, or None.
        lost_keys: the number of keys that the target cannot hold at all.
    """

    version: Version
    copied: str | None = None
    lost_keys: int = 0


@attrs.frozen
class Held:
    """The state of one version at the target.

    Attributes:
        version: None if the target has no such version.
        copied: the digest that the last migration into this database recorded, or None.
        keys: the number of keys at the target, counted without a version's row too.
    """

    version: Version | None
    copied: str | None
    keys: int


def is_text(value: Any) -> bool:
    """Tell whether a value is text that UTF-8 can encode; SQLite files may hold bytes,
    numbers and broken text instead."""
    try:
        return isinstance(value, str) and (value.isascii() or bool(value.encode()))
    except UnicodeEncodeError:
        return False

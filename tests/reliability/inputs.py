"""Random inputs, valid, almost valid or broken: bodies, ids, paths and requests."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from urllib.parse import quote

from ..contract.base import ALGORITHM, PREFIX

#: Probabilities of corruption of a part of an input; each input draws a value from this
#: list.
CORRUPTION_RATES = (0.0, 0.0, 0.02, 0.1, 0.4)
#: Fraction of large or deeply nested values among the odd ones: parsing large values is
#: slow.
LARGE = 1 / 2000

ROOMS = ("!a:h", "!b:h", "!31hneApxJ_1o-63DmFrpeqnkFfWppnzWso1JvH3ogLM")
SESSIONS = ("s", "Zm9v/YmFy+YmF6/cXV4+Zg==", "t")
FIELDS = ("first_message_index", "forwarded_count", "is_verified", "session_data")
#: JSON texts in the place of an id: strings at and beyond the limits of a valid room or
#: session id, and texts that are no JSON string.
ODD_IDS = (
    *('""', '"\\u0000"', '"a\\u0000b"', '"\\ud800"', '"\\udc00\\ud800"', '"\\uDBFF"'),
    *(f'"{"x" * 255}"', f'"{"x" * 256}"', f'"{chr(0xE9) * 128}"', '"\\ud83d\\udd11"'),
    *(f'"{chr(0x1F511) * 64}"', '"\u2028"', '"\\\\"', '"\\""', '"\\n"', '"../.."'),
    *('"%2F"', "'a'", "a", "1", "null", '"a', '"\x01"', '"\\x41"', '"\\u12"'),
)
NUMBERS = (
    *("0", "1", "-0", "-1", "2147483647", "2147483648", "9223372036854775807"),
    *("9223372036854775808", "18446744073709551616", "-9223372036854775809"),
    *("1.0", "1e0", "1E2", "-0.0", "1.5", "1e400", "-1e400", "1e-400", "1e308"),
    *("9" * 310, "9" * 5_000, "1" + "0" * 10_000, "-" + "9" * 10_000, "0." + "1" * 400),
    *("01", "+1", ".5", "1.", "1_0", "1e", "0x1", "NaN", "Infinity", "-Infinity"),
    *("\u0661", "\uff11", "--1", "1 0"),
)
WORDS = ("true", "false", "null", "True", "None", "undefined", "tru", "", " ", "\0")
TEXTS = (
    *('""', '"a"', '"true"', '"1"', '"\u00e9\u2603\U0001f511"', '"\\ud83d\\udd11"'),
    *('"\\u0000"', '"\\/\\b\\f\\n\\r\\t\\u007f"', f'"{"x" * 1000}"'),
    *('"<script>"', '"%s%n{0}"', '"\' OR 1=1 --"', '"\x7f\x80"'),
)
#: Bytes for insertion into a body, without a valid JSON value.
RUBBISH = (
    *(b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\0", b"\x1a"),
    *(b"}", b"]", b",", b":", b'"', b"//", b"/*", b"{}", b" x", b"\r\n", b"\xe2\x80"),
)
DEPTHS = (100, 1_000, 5_000, 100_000)

VERSIONS = (
    *("", "0", "1", "-1", "01", "1_0", " 1", "1 ", "+1", "1.0", "1e3", "null", "0x1"),
    *("\u0661", "\u00b2", "\uff11", "1\0", "\0", "1\n", "9" * 18, "9" * 19, "9" * 20),
    *(str(2**63 - 1), str(2**63), str(10**400), "\ud7ff", "%31", "1;2", "1' OR '1'='1"),
)
#: Path segments as sent, in percent-encoding.
SEGMENTS = (
    *("%2F%2e%2e", "%2e%2e%2f%2e%2e%2fetc", "..", ".", "%2E", "%2F", "%252F", "%"),
    *("%0", "%zz", "%u0041", "%ff", "%c0%af", "%ed%a0%80", "%00", "a%00b", "%0d%0a"),
    *("a;b", "a=b", "a&b", "a%26b", "+", "%20", "%7F", "x" * 255, "x" * 256),
    *("%F0%9F%94%91" * 64, "%c3%a9" * 128, "x" * 4_000, "~", "*", "'", "\\", "|", "{}"),
)
METHODS = ("GET", "PUT", "DELETE", "POST", "HEAD", "OPTIONS", "PATCH", "get", "TRACE")
QUERIES = (
    *(
        "",
        "version",
        "version=",
        "=1",
        "&&",
        "%",
        "version=%",
        "version=%ff",
        "a" * 999,
    ),
    *("version[]=1", "VERSION=1", "access_token=x", "user_id=%40b%3Ah", "version=%zz"),
)
#: Names of headers read by Twisted, the service or the authentication.
HEADERS = (
    *(b"X-Forwarded-For", b"X-Request-ID", b"Authorization", b"Cookie", b"Host"),
    *(b"Connection", b"Expect", b"Content-Type", b"User-Agent", b"Origin", b"Upgrade"),
    *(b"If-None-Match", b"If-Modified-Since", b"Range", b"Accept-Encoding", b"X"),
)
#: Header values that are not text, not ASCII, or invalid for the header.
HEADER_VALUES = (
    *(
        b"",
        b"\xff",
        b"\xc0\x80",
        b"\xed\xa0\x80",
        b"\xe2\x98\x83",
        b"\x1b[31m",
        b"\x7f",
    ),
    *(
        b"Bearer \xff",
        b"Bearer",
        b"\xa0",
        b"\x85",
        b"\xb2",
        b"\t",
        b"a\tb",
        b";;=",
        b"%",
    ),
    *(b"fe80::1%\xff", b"1.2.3.4, \xff", b"::1%", b"127.0.0.1%x", b"1.2.3.4," * 999),
    *(b"close\xff", b"100-continue\xff", b"multipart/form-data; boundary=\xff"),
)


def header_value(random: Random) -> bytes:
    """Return a random header value: any bytes except CR, LF and NUL."""
    value = random.randbytes(random.choice((1, 2, 5, 20, 200)))
    return value.translate(None, b"\r\n\0")


class Inputs:
    """Generator of inputs; the same random numbers give the same inputs.

    Attributes:
        versions: existing versions of the user in whose name the requests are sent.
    """

    def __init__(self, random: Random, versions: tuple[str, ...] = ("1",)) -> None:
        self.versions = versions
        self._random = random
        self._corruption = random.choice(CORRUPTION_RATES)

    def scope(self) -> tuple[str | None, str | None]:
        """Return the room and session id of an upload's path; either may be None."""
        return self._random.choice(((None, None), ("!r:h", None), ("!r:h", "s")))

    def upload(self, room_id: str | None, session_id: str | None) -> bytes:
        """Return the body of an upload to a whole backup, a room or one session."""
        if session_id is not None:
            return self._corrupt(self._key())
        if room_id is not None:
            return self._corrupt(self._sessions())
        rooms = self._object(ROOMS, self._sessions)
        return self._corrupt(self._members([("rooms", rooms)]))

    def version_info(self) -> bytes:
        """Return the body of a request to create or update a version."""
        algorithm = self._maybe_odd(f'"{ALGORITHM}"', self._value)
        members = [("algorithm", algorithm), ("auth_data", self.data())]
        if self._chance(0.2):
            members.append(("version", self._maybe_odd('"1"', self._value)))
        return self._corrupt(self._members(members))

    def data(self, depth: int = 0) -> str:
        """Return the JSON text of any value except null, unless a part gets
        corrupted."""
        kind = self._random.randrange(5 if depth < 4 else 3)
        if kind == 0:
            return self._maybe_odd(self._random.choice(TEXTS), self._value)
        if kind == 1:
            return self._maybe_odd(str(self._random.getrandbits(40)), self._value)
        if kind == 2:
            return self._maybe_odd("true", self._value)
        parts = [self.data(depth + 1) for _ in range(self._random.randrange(4))]
        if kind == 3:
            return f"[{', '.join(parts)}]"
        names = (self._random.choice(TEXTS) for _ in parts)
        return "{" + ",".join(map(":".join, zip(names, parts, strict=True))) + "}"

    def version(self) -> str:
        """Return an existing version number or, if corrupted, another text."""
        return self._maybe_odd(
            self._random.choice(self.versions), lambda: self._random.choice(VERSIONS)
        )

    def id(self) -> str:
        """Return an id as the parser receives one from a decoded path."""
        if not self._corrupts():
            return self._random.choice(ROOMS + SESSIONS)
        code = self._random.choice(
            (0, 1, 0x7F, 0xE9, 0xD800, 0xDFFF, 0x1F511, 0x10FFFF)
        )
        return chr(code) * self._random.choice(
            (0, 1, 2, 63, 64, 127, 128, 255, 256, 999)
        )

    def request(self) -> tuple[str, str, bytes]:
        """Return the method, target and body of a request that is valid HTTP at
        least."""
        kind = self._random.randrange(8)
        method = self._maybe_odd(
            self._random.choice(("PUT", "PUT", "GET", "DELETE")),
            lambda: self._random.choice(METHODS),
        )
        if kind == 0:
            path, method, body = "/version", "POST", self.version_info()
            if self._chance(0.8):
                path, body = "/version", b"" if method == "GET" else body
        elif kind < 3:
            path, body = f"/version/{self._version_segment()}", self.version_info()
        else:
            scope = self._random.randrange(3)
            ids = [self._segment(ROOMS), self._segment(SESSIONS)][:scope]
            path = "/".join(["/keys", *ids])
            body = self.upload(*[*ids, None, None][:2])
        body = body if method in ("PUT", "POST") or self._corrupts() else b""
        return method, self._prefix() + path + self._query(kind > 2), body

    def _prefix(self) -> str:
        if not self._corrupts():
            return PREFIX
        return self._random.choice(
            (
                PREFIX.replace("v3", "r0"),
                PREFIX.replace("v3", "unstable"),
                PREFIX.replace("v3", "v1"),
                *("", "/", PREFIX + "/", "//" + PREFIX, PREFIX.upper(), "/.."),
                PREFIX.replace("_", "%5f"),
            )
        )

    def _version_segment(self) -> str:
        return self._maybe_odd(
            quote(self.version(), safe=""), lambda: self._random.choice(SEGMENTS)
        )

    def _segment(self, ids: tuple[str, ...]) -> str:
        return self._maybe_odd(
            quote(self._random.choice(ids), safe=""),
            lambda: self._random.choice(SEGMENTS),
        )

    def _query(self, wanted: bool) -> str:
        parts = [f"version={quote(self.version(), safe='')}"] if wanted else []
        while self._corrupts():
            parts.insert(
                self._random.randrange(len(parts) + 1),
                self._maybe_odd(f"version={self.version()}", self._odd_query),
            )
        text = "&".join(parts)
        # Quote characters by which the request line would end or break.
        text = "".join(c if "!" <= c < "\x7f" else quote(c) for c in text)
        return f"?{text}" if text or self._corrupts() else ""

    def _odd_query(self) -> str:
        return self._random.choice(QUERIES)

    def _sessions(self) -> str:
        sessions = self._object(SESSIONS, self._key)
        return self._members([("sessions", sessions)])

    def _key(self) -> str:
        values = [
            self._maybe_odd(str(self._random.randrange(2**31)), self._value),
            self._maybe_odd(str(self._random.randrange(9)), self._value),
            self._maybe_odd(self._random.choice(("true", "false")), self._value),
            self.data(),
        ]
        return self._members(list(zip(FIELDS, values, strict=True)))

    def _object(self, names: tuple[str, ...], value: Callable[[], str]) -> str:
        """Return a JSON object with a random subset of the names as members."""
        chosen = self._random.sample(names, self._random.randrange(len(names) + 1))
        return self._members([(name, value()) for name in chosen])

    def _members(self, members: list[tuple[str, str]]) -> str:
        """Return a JSON object; members may be missing, duplicate or oddly named."""
        if self._corrupts():
            return self._value()
        texts = []
        for name, value in members:
            if self._corrupts():
                change = self._random.randrange(4)
                if change == 0:
                    continue
                if change == 1:
                    texts.append(f'"{name}":{self._value()}')
                elif change == 2:
                    name = self._random.choice((*FIELDS, "rooms", "sessions", name * 2))
                else:
                    odd = self._random.choice(ODD_IDS)
                    texts.append(f"{odd}:{self._maybe_odd(value, self._value)}")
                    continue
            texts.append(f'"{name}":{value}')
        self._random.shuffle(texts)
        blank = self._random.choice(("", "", " ", "\n\t"))
        return "{" + ("," + blank).join(texts) + "}"

    def _value(self) -> str:
        """Return the JSON text of any value, or a text that is no JSON."""
        if self._chance(LARGE):
            return self._large()
        kind = self._random.randrange(6)
        if kind < 4:
            return self._random.choice((NUMBERS, WORDS, TEXTS, ODD_IDS)[kind])
        parts = [self._value() for _ in range(self._random.randrange(3))]
        if kind == 4:
            return f"[{','.join(parts)}]"
        return "{" + ",".join(f'"{n}":{part}' for n, part in enumerate(parts)) + "}"

    def _large(self) -> str:
        depth = self._random.choice(DEPTHS)
        kind = self._random.randrange(5)
        if kind == 0:
            return "[" * depth + "]" * depth
        if kind == 1:
            return '{"":' * depth + "1" + "}" * depth
        if kind == 2:
            return "[" * depth
        if kind == 3:
            return '"' + "x" * self._random.choice((65_534, 65_535, 10_485_760)) + '"'
        return "[" + "0," * depth + "0]"

    def _corrupt(self, text: str) -> bytes:
        """Encode a text; the result may be cut, reordered or in another encoding."""
        body = text.encode()
        if not self._corrupts():
            return body
        kind = self._random.randrange(9)
        at, to = sorted(self._random.randrange(len(body) + 1) for _ in range(2))
        if kind == 0:
            return body[:at]
        if kind == 1:
            return body[:at] + body[to:]
        if kind == 2:
            return body[:to] + body[at:]
        if kind == 3:
            return body[:at] + self._random.choice(RUBBISH) + body[at:]
        if kind == 4:
            return body + self._random.choice(RUBBISH)
        if kind == 5:
            return b"\xef\xbb\xbf" + body
        if kind == 6:
            return text.encode(self._random.choice(("utf-16", "utf-16-le", "utf-32")))
        if kind == 7:
            flipped = bytes([self._random.randrange(256)])
            return body[:at] + flipped + body[at + 1 :]
        return b""

    def _maybe_odd(self, right: str, odd: Callable[[], str]) -> str:
        return odd() if self._corrupts() else right

    def _corrupts(self) -> bool:
        return self._chance(self._corruption)

    def _chance(self, chance: float) -> bool:
        return self._random.random() < chance

"""Scenarios of refused requests: the error of each, and that no data changes."""

from __future__ import annotations

import json
from typing import Any

from .base import (
    ALGORITHM,
    NO_VERSION,
    Answer,
    Host,
    Rooms,
    Steps,
    encoded,
    key,
    keys_path,
    new_backup,
    refused,
    same,
    scenario,
    version_path,
    wrapped,
)

ROOM, SESSION = "!badroom:h", "badsession"
OMITTED: Any = object()
"""Stands for a field that is left out."""
EITHER = ("M_NOT_JSON", "M_BAD_JSON")

BAD_INTEGERS: list[Any] = [
    OMITTED, None, "1", "", True, False, 1.5, -1, 2**31, 2**63, 10**30, [], [1], {}
]  # fmt: skip
BAD_FIELDS: list[tuple[str, list[Any]]] = [
    ("first_message_index", BAD_INTEGERS),
    ("forwarded_count", BAD_INTEGERS),
    ("is_verified", [OMITTED, None, 0, 1, "true", "", [], {}]),
    ("session_data", [OMITTED, None]),
]


def with_field(field: str, value: Any) -> dict[str, Any]:
    """A valid key, but with this value of one field."""
    bad = {**key(), field: value}
    if value is OMITTED:
        del bad[field]
    return bad


def describe_value(value: Any) -> str:
    """A short text for a field value in a failure message."""
    return "missing" if value is OMITTED else repr(value)[:60]


@scenario
def one_bad_key_refuses_the_whole_upload(host: Host) -> Steps:
    """A bad field is a 400 that names room, session and field, and no key of the upload
    is stored."""
    client, version = yield new_backup(host)
    kept: Rooms = {"!kept:h": {"kept": key(5)}}
    before: tuple[int, int] = yield client.upload(version, kept)
    good = {"new": key()}
    better = {"kept": key(1)}
    for field, values in BAD_FIELDS:
        for value in values:
            bad = with_field(field, value)
            sessions = {"before": key(), SESSION: bad, "after": key()}
            rooms = {"!good:h": good, "!kept:h": better, ROOM: sessions}
            room_path = keys_path(version, ROOM)
            for path, body in (
                (keys_path(version), wrapped(rooms)),
                (room_path, {"sessions": sessions}),
                (keys_path(version, ROOM, SESSION), bad),
            ):
                row = f"{field} {describe_value(value)} in PUT {path}"
                answer: Answer = yield client.put(path, body)
                names = (ROOM, SESSION, field)
                refused(answer, 400, "M_BAD_JSON", names=names, row=row)
                assert (yield client.tally()) == before, f"{row}: changed something"
    same((yield client.download(version)), kept)


@scenario
def wrong_shapes_are_bad_json(host: Host) -> Steps:
    """Rooms, sessions and keys must be objects; the 400 names the member that is
    none."""
    client, version = yield new_backup(host)
    before: tuple[int, int] = yield client.tally()
    whole, room = keys_path(version), keys_path(version, ROOM)
    single = keys_path(version, ROOM, SESSION)
    not_objects: list[Any] = [[], [{}], "text", 5, 1.5, True, False, None]
    rows: list[tuple[str, Any, tuple[str, ...]]] = [
        (path, encoded(bad) or b"null", ())
        for path in (whole, room, single, version_path(version), "POST")
        for bad in not_objects
    ]
    rows += [(whole, {}, ("rooms",)), (room, {}, ("sessions",)), (single, {}, ())]
    for bad in not_objects:
        rows += [
            (whole, {"rooms": bad}, ("rooms",)),
            (whole, {"rooms": {"!ok:h": {"sessions": {}}, ROOM: bad}}, (ROOM,)),
            (whole, {"rooms": {ROOM: {"sessions": bad}}}, (ROOM, "sessions")),
            (whole, wrapped({ROOM: {"ok": key(), SESSION: bad}}), (ROOM, SESSION)),
            (room, {"sessions": bad}, ("sessions",)),
            (room, {"sessions": {"ok": key(), SESSION: bad}}, (ROOM, SESSION)),
        ]
    rows.append((whole, {"rooms": {ROOM: {}}}, (ROOM, "sessions")))
    for path, body, names in rows:
        row = f"{path} {str(body)[:120]}"
        if path == "POST":
            answer: Answer = yield client.post("/version", body)
        else:
            answer = yield client.put(path, body)
        refused(answer, 400, "M_BAD_JSON", names=names, row=row)
    assert (yield client.tally()) == before
    same((yield client.download(version)), {})
    info: dict[str, Any] = yield client.info()
    assert info["version"] == version, "a refused body made a version"


@scenario
def bad_ids_are_refused_with_the_whole_upload(host: Host) -> Steps:
    """An id must have 1 to 255 bytes, not characters, and no NUL or lone surrogate."""
    client, version = yield new_backup(host)
    before: tuple[int, int] = yield client.tally()
    for name, bad, errcode in (
        ("empty", "", "M_INVALID_PARAM"),
        ("256 bytes", "x" * 256, "M_INVALID_PARAM"),
        ("300 bytes", "x" * 300, "M_INVALID_PARAM"),
        ("256 bytes in 128 characters", "\u00e9" * 128, "M_INVALID_PARAM"),
        ("256 bytes in 64 characters", "\U0001f511" * 64, "M_INVALID_PARAM"),
        ("a NUL", "a\0b", "M_BAD_JSON"),
        ("nothing but a NUL", "\0", "M_BAD_JSON"),
        ("a lone high surrogate", "a\ud800b", "M_BAD_JSON"),
        ("a lone low surrogate", "\udc00", "M_BAD_JSON"),
        ("surrogates the wrong way round", "\udc00\ud800", "M_BAD_JSON"),
    ):
        good = {"good": key()}
        rows: list[tuple[str, str, Any]] = [
            ("room", keys_path(version), wrapped({"!g:h": good, bad: good})),
            ("session", keys_path(version), wrapped({"!g:h": {**good, bad: key()}})),
            ("session", keys_path(version, "!g:h"), {"sessions": {bad: key(), **good}}),
        ]
        # No endpoint has a path with an empty segment, and UTF-8 cannot encode a
        # surrogate.
        if bad and "surrogate" not in name:
            rows += [
                ("room", keys_path(version, bad), {"sessions": good}),
                ("room", keys_path(version, bad, "good"), key()),
                ("session", keys_path(version, "!g:h", bad), key()),
            ]
        for kind, path, body in rows:
            row = f"a {kind} id: {name}, PUT {path[:40]}"
            refused((yield client.put(path, body)), 400, errcode, row=row)
            assert (yield client.tally()) == before, f"{row}: changed something"
    same((yield client.download(version)), {})


@scenario
def bad_ids_in_a_path_are_400_for_every_method(host: Host) -> Steps:
    """A path segment of 256 bytes is M_INVALID_PARAM, and a segment with a NUL is
    M_BAD_JSON."""
    client, version = yield new_backup(host)
    yield client.upload(version, {"!r:h": {"s": key()}})
    room = {"sessions": {"s": key()}}
    for path, body, errcode in (
        ("/keys/" + "x" * 256, room, "M_INVALID_PARAM"),
        ("/keys/" + "x" * 256 + "/s", key(), "M_INVALID_PARAM"),
        ("/keys/!r:h/" + "x" * 256, key(), "M_INVALID_PARAM"),
        ("/keys/%00", room, "M_BAD_JSON"),
        ("/keys/%00/s", key(), "M_BAD_JSON"),
        ("/keys/!r:h/a%00b", key(), "M_BAD_JSON"),
    ):
        for method, sent in (("PUT", body), ("GET", None), ("DELETE", None)):
            row = f"{method} {path}"
            answer: Answer = yield client.request(
                method, f"{path}?version={version}", sent
            )
            refused(answer, 400, errcode, row=row)
    same((yield client.download(version)), {"!r:h": {"s": key()}})


NOT_JSON: dict[str, bytes] = {
    "nothing": b"",
    "blanks": b" \n",
    "text": b"not json",
    "cut short": b'{"rooms": {"!r:h": {"sess',
    "trailing garbage": b"%s x",
    "two values": b"%s %s",
    "a byte order mark": b"\xef\xbb\xbf%s",
    "UTF-16": '{"rooms": {}, "sessions": {}}'.encode("utf-16-le"),
    "a trailing comma": b'{"a": 1,}',
    "single quotes": b"{'rooms': {}}",
    "a comment": b"%s // x",
    "a bare word": b'{"a": None}',
    "a raw newline in a string": b'{"a": "\n"}',
    "a leading zero": b'{"a": 01}',
    "a bad escape": b'{"a": "\\x41"}',
    "not UTF-8": b"\xff\xfe",
}
"""Bodies that are not JSON. `%s` stands for a valid body."""

NOT_DATA: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "NaN": (b"NaN", ("M_NOT_JSON",)),
    "Infinity": (b"[Infinity]", ("M_NOT_JSON",)),
    "-Infinity": (b'{"a": -Infinity}', ("M_NOT_JSON",)),
    "not UTF-8": (b'"\xff"', ("M_NOT_JSON",)),
    "Latin-1": (b'{"a": "caf\xe9"}', ("M_NOT_JSON",)),
    "an overlong form": (b'"\xc0\x80"', ("M_NOT_JSON",)),
    "a surrogate as UTF-8": (b'"\xed\xa0\x80"', ("M_NOT_JSON",)),
    "not UTF-8 in a name": (b'{"\xff": 1}', ("M_NOT_JSON",)),
    "a raw control character": (b'"a\x01b"', ("M_NOT_JSON",)),
    "a bare word": (b"undefined", ("M_NOT_JSON",)),
    "cut short": (b'{"a": ', ("M_NOT_JSON",)),
    "nested deep": (b"[" * 30_000 + b"]" * 30_000, EITHER),
    "nested deep in objects": (b'{"":' * 12_000 + b"1" + b"}" * 12_000, EITHER),
}
"""Values that are not JSON, or nested deeper than a server has to parse."""
NOT_STORABLE: dict[str, tuple[bytes, tuple[str, ...]]] = {
    **NOT_DATA,
    "too large a number": (b"1e999", EITHER),
    "too small a number": (b"[-1e999]", EITHER),
    "too large an integer": (b"9" * 309, EITHER),
    "too small an integer": (b'{"a": {"b": [1, -%b]}}' % (b"9" * 1000), EITHER),
}
"""`NOT_DATA`, and numbers that a server refuses because not every client can read
them."""


def spliced(body: Any, value: bytes) -> bytes:
    """A body as JSON, with raw bytes in place of the text `here`."""
    parts = json.dumps(body).encode().split(b'"here"')
    assert len(parts) == 2, body
    return value.join(parts)


@scenario
def malformed_json_is_not_json(host: Host) -> Steps:
    """A body that is not JSON or not UTF-8 is 400 M_NOT_JSON at every endpoint."""
    client, version = yield new_backup(host)
    before: dict[str, Any] = yield client.info()
    change = {"algorithm": ALGORITHM, "auth_data": {"new": 1}}
    for method, path, good in (
        ("PUT", keys_path(version), wrapped({ROOM: {SESSION: key()}})),
        ("PUT", keys_path(version, ROOM), {"sessions": {SESSION: key()}}),
        ("PUT", keys_path(version, ROOM, SESSION), key()),
        ("PUT", version_path(version), change),
        ("POST", "/version", change),
    ):
        for name, body in NOT_JSON.items():
            body = body.replace(b"%s", encoded(good) or b"")
            row = f"{name}: {method} {path}"
            answer: Answer = yield client.request(method, path, body)
            refused(answer, 400, "M_NOT_JSON", row=row)
            same((yield client.info()), before, row)
    same((yield client.download(version)), {})


@scenario
def malformed_json_inside_opaque_data_is_refused(host: Host) -> Steps:
    """Malformed JSON is refused even in values that a server does not parse."""
    client, version = yield new_backup(host)
    before: dict[str, Any] = yield client.info()
    change = {"algorithm": ALGORITHM, "auth_data": "here"}
    here = key(data="here")
    one = keys_path(version, ROOM, SESSION)
    rooms = {"!good:h": {"good": key()}, ROOM: {SESSION: here}}
    room = {"sessions": {"a": key(), SESSION: here}}
    for method, path, body, values in (
        ("PUT", keys_path(version), wrapped(rooms), NOT_STORABLE),
        ("PUT", keys_path(version, ROOM), room, NOT_STORABLE),
        ("PUT", one, here, NOT_STORABLE),
        ("PUT", one, {**key(), "unknown": "here"}, NOT_DATA),
        ("PUT", version_path(version), change, NOT_STORABLE),
        ("POST", "/version", change, NOT_STORABLE),
    ):
        for name, (value, errcodes) in values.items():
            row = f"{name}: {method} {path}"
            sent = spliced(body, value)
            refused((yield client.request(method, path, sent)), 400, *errcodes, row=row)
            same((yield client.info()), before, row)
    same((yield client.download(version)), {})


@scenario
def unreadable_json_outside_opaque_data_is_refused(host: Host) -> Steps:
    """Bad UTF-8, excessive nesting and excessive numbers are 400 anywhere in a body."""
    client, version = yield new_backup(host)
    before: tuple[int, int] = yield client.tally()
    deep = b"[" * 100_000 + b"]" * 100_000
    deeper = b'{"rooms":' * 100_000 + b"{}" + b"}" * 100_000
    sessions = {ROOM: {SESSION: key("here")}}
    ids = wrapped({ROOM: {"here": key()}})
    for name, body, errcodes in (
        ("a deep body", deep, EITHER),
        ("a deep body, not closed", b"[" * 100_000, EITHER),
        ("a deep object", deeper, EITHER),
        ("deep rooms", spliced({"rooms": "here"}, deep), EITHER),
        ("deep integer", spliced(wrapped(sessions), deep), EITHER),
        ("integer 1e999", spliced(wrapped(sessions), b"1e999"), EITHER),
        ("integer NaN", spliced(wrapped(sessions), b"NaN"), ("M_NOT_JSON",)),
        ("5,000 digits", spliced(wrapped(sessions), b"1" * 5000), EITHER),
        ("a session id that is not UTF-8", spliced(ids, b'"\xff"'), ("M_NOT_JSON",)),
        ("a surrogate as UTF-8", spliced(ids, b'"\xed\xa0\x80"'), ("M_NOT_JSON",)),
    ):
        refused((yield client.put(keys_path(version), body)), 400, *errcodes, row=name)
        assert (yield client.tally()) == before, name
    same((yield client.download(version)), {})


@scenario
def session_data_over_the_limit_is_413(host: Host) -> Steps:
    """An upload with a session_data of 70,000 bytes as sent is refused as a whole: 413
    M_TOO_LARGE."""
    client, version = yield new_backup(host)
    before: tuple[int, int] = yield client.tally()
    for name, value in (
        ("a string", b'"%s"' % (b"x" * 70_000)),
        ("an object", b'{"ciphertext": "%s", "mac": "x"}' % (b"x" * 70_000)),
        ("two bytes a character", b'"%s"' % ("\u00e9" * 35_000).encode()),
        ("escapes", b'"%s"' % (b"\\u0061" * 12_000)),
    ):
        here = key(data="here")
        for path, body in (
            (keys_path(version), wrapped({"!a:h": {"a": key()}, ROOM: {"s": here}})),
            (keys_path(version, ROOM), {"sessions": {"good": key(), "s": here}}),
            (keys_path(version, ROOM, "s"), here),
        ):
            row = f"{name}: PUT {path}"
            answer: Answer = yield client.put(path, spliced(body, value))
            refused(answer, 413, "M_TOO_LARGE", row=row)
            assert (yield client.tally()) == before, f"{row}: changed something"
    same((yield client.download(version)), {})


def key_requests(version: str | None) -> list[tuple[str, str, Any]]:
    """Every request for keys, as method, path and valid body."""
    whole, room = keys_path(version), keys_path(version, "!r:h")
    single = keys_path(version, "!r:h", "s")
    return [
        ("PUT", whole, wrapped({"!r:h": {"s": key(data="new")}})),
        ("PUT", room, {"sessions": {"s": key(data="new")}}),
        ("PUT", single, key(data="new")),
        *((method, path, None) for method in ("GET", "DELETE")
          for path in (whole, room, single)),
    ]  # fmt: skip


@scenario
def keys_without_a_version_are_400(host: Host) -> Steps:
    """A request for keys that names no version is 400 M_MISSING_PARAM."""
    client, version = yield new_backup(host)
    rooms = {"!r:h": {"s": key(1, data="old")}}
    yield client.upload(version, rooms)
    for method, path, body in key_requests(None):
        answer: Answer = yield client.request(method, path, body)
        refused(answer, 400, "M_MISSING_PARAM", row=f"{method} {path}")
    same((yield client.download(version)), rooms)


@scenario
def an_upload_to_an_older_version_is_403(host: Host) -> Steps:
    """An upload to an older version is 403 M_WRONG_ROOM_KEYS_VERSION with the real
    current_version, and stores no key."""
    client, old = yield new_backup(host)
    rooms = {"!r:h": {"s": key(1, data="old")}}
    yield client.upload(old, rooms)
    before: tuple[int, int] = yield client.tally()
    new: str = yield client.create_version()
    for method, path, body in key_requests(old):
        if method != "PUT":
            continue
        answer: Answer = yield client.request(method, path, body)
        row = f"{method} {path}"
        error = refused(answer, 403, "M_WRONG_ROOM_KEYS_VERSION", row=row)
        assert error["current_version"] == new, f"{row}: {answer}"
    assert (yield client.tally(old)) == before
    same((yield client.download(old)), rooms)
    same((yield client.download(new)), {})


@scenario
def a_version_that_was_never_issued_is_404(host: Host) -> Steps:
    """A version number that was never issued is a 404, and so is any text that only
    resembles a number."""
    client, version = yield new_backup(host)
    rooms = {"!r:h": {"s": key(1, data="old")}}
    yield client.upload(version, rooms)
    before: dict[str, Any] = yield client.info()
    arabic = "".join(chr(0x660 + int(digit)) for digit in version)
    wide = "".join(chr(0xFF10 + int(digit)) for digit in version)
    change = {"algorithm": ALGORITHM, "auth_data": {"new": 1}}
    for unknown in (
        *("abc", "1", "0", "-1", "1.5", "1_0", " 1", "+1", "null", "\0", "\u00b2"),
        *(str(2**31), str(2**63), str(10**30), "9" * 5000, "0x1", "1e9", "NaN"),
        *(str(int(version) + 1), str(int(version) - 1), str(int(version) + 2**64)),
        *(f" {version}", f"{version} ", f"+{version}", f"-{version}", f"{version}\n"),
        *(f"{version}.0", f"{version}e0", f"{version[:2]}_{version[2:]}"),
        *(arabic, wide, f"{version}\0", f'"{version}"', f"{version}' OR '1'='1"),
    ):
        rows = key_requests(unknown)
        rows += [
            ("GET", version_path(unknown), None),
            ("PUT", version_path(unknown), change),
            ("DELETE", version_path(unknown), None),
        ]
        for method, path, body in rows:
            row = f"{unknown[:40]!r}: {method} {path[:40]}"
            answer: Answer = yield client.request(method, path, body)
            error = NO_VERSION if path.startswith("/keys") else None
            refused(answer, 404, "M_NOT_FOUND", error=error, row=row)
    for method, path, body in key_requests(""):
        answer = yield client.request(method, path, body)
        row = f"empty: {method} {path}"
        refused(answer, 404, "M_NOT_FOUND", error=NO_VERSION, row=row)
    same((yield client.info()), before)
    same((yield client.download(version)), rooms)

"""Scenarios of accepted uploads: stored keys, replaced keys and unchanged keys."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

from twisted.internet.defer import Deferred, gatherResults

from .base import (
    Answer,
    Host,
    Rooms,
    Steps,
    accepted,
    encoded,
    key,
    keys_path,
    new_backup,
    same,
    scenario,
    tally,
    wrapped,
)
from .versions import OPAQUE

GRADES = list(product((False, True), (1, 2), (1, 2)))
"""Two values of each of is_verified, first_message_index and forwarded_count."""


def graded(grade: tuple[bool, int, int], data: str) -> dict[str, Any]:
    """A key of a grade with these session data."""
    verified, index, forwarded = grade
    return key(index, forwarded, verified, data)


def better(new: tuple[bool, int, int], old: tuple[bool, int, int]) -> bool:
    """Whether a grade is better: verified, then the lower index, then the lower
    forwarded count."""
    return (not new[0], *new[1:]) < (not old[0], *old[1:])


@scenario
def keys_are_uploaded_whole_by_room_or_singly(host: Host) -> Steps:
    """Keys are uploaded whole, by room or singly; each answer has the new etag and
    count."""
    client, version = yield new_backup(host)
    start: tuple[int, int] = yield client.tally()
    one, two, three, four = (key(n, n + 1, n % 2 == 0, f"d{n}") for n in range(4))
    whole = {"!a:h": {"one": one}, "!b:h": {"two": two}}
    for step, (path, body, count) in enumerate(
        (
            (keys_path(version), wrapped(whole), 2),
            (keys_path(version, "!a:h"), {"sessions": {"three": three}}, 3),
            (keys_path(version, "!c:h", "four"), four, 4),
        ),
        start=1,
    ):
        etag_and_count = tally((yield client.put(path, body)), path)
        assert etag_and_count == (start[0] + step, count), path
        assert (yield client.tally()) == etag_and_count, path
    want = {
        "!a:h": {"one": one, "three": three},
        "!b:h": {"two": two},
        "!c:h": {"four": four},
    }
    same((yield client.download(version)), want)


@scenario
def session_data_is_opaque(host: Host) -> Steps:
    """Any JSON value but null is returned as the same value, by whichever upload it was
    sent."""
    client, version = yield new_backup(host)
    rooms: Rooms = {
        "!whole:h": {f"s{n}": key(data=value) for n, value in enumerate(OPAQUE)}
    }
    yield client.upload(version, rooms)
    for number, value in enumerate(OPAQUE):
        path = keys_path(version, "!single:h", f"s{number}")
        tally((yield client.put(path, key(data=value))), repr(value))
        same(accepted((yield client.get(path))), key(data=value), repr(value))
    rooms["!single:h"] = rooms["!whole:h"]
    same((yield client.download(version)), rooms)


@scenario
def json_may_be_written_in_any_way(host: Host) -> Steps:
    """JSON with blanks, escapes or raw UTF-8 is stored as the value that a reader of
    JSON sees."""
    client, version = yield new_backup(host)
    path = keys_path(version, "!r:h")
    body = (
        b' \r\n\t{ "sessi\\u006fns" :\n { "\\u0073\\/\xc3\xa9" : { "session_data" : '
        b'{ "\\u00e9" : [ "\xe2\x98\x83" , 1e2 , -0.5E-1 , "\\ud83d\\udd11" ] } , '
        b'"is_verified" :true,"forwarded_count":2,"first_message_index":\t1}}}\n '
    )
    tally((yield client.put(path, body)))
    data = {"\u00e9": ["\u2603", 100.0, -0.05, "\U0001f511"]}
    want = {"sessions": {"s/\u00e9": key(1, 2, True, data)}}
    same(accepted((yield client.get(path))), want)


@scenario
def a_key_has_four_fields(host: Host) -> Steps:
    """Unknown members of a key are dropped, and its integers may be up to 2**31-1."""
    client, version = yield new_backup(host)
    extra = {"org.example": {"a": [1]}, "session_id": "other", "version": None}
    most = key(2**31 - 1, 2**31 - 1, True, {"kept": extra})
    least = key(0, 0, False, "")
    body = {"sessions": {"most": {**most, **extra}, "least": {**extra, **least}}}
    tally((yield client.put(keys_path(version, "!r:h"), body)))
    path = keys_path(version, "!r:h", "single")
    tally((yield client.put(path, {**extra, **most})))
    same(accepted((yield client.get(path))), most)
    want = {"!r:h": {"most": most, "least": least, "single": most}}
    same((yield client.download(version)), want)


@scenario
def an_id_may_have_255_bytes(host: Host) -> Steps:
    """Room and session ids of up to 255 bytes are accepted in paths and bodies."""
    client, version = yield new_backup(host)
    rooms: Rooms = {}
    for id_ in ("x" * 255, "\u00e9" * 127 + "x", "\U0001f511" * 63 + "xyz"):
        rooms[id_] = {"s": key(), id_: key(1)}
        yield client.upload(version, {id_: {"s": key()}})
        path = keys_path(version, id_, id_)
        tally((yield client.put(path, key(1))), path)
        same(accepted((yield client.get(path)), path), key(1), path)
    same((yield client.download(version)), rooms)


@scenario
def session_data_under_the_limit_is_stored(host: Host) -> Steps:
    """A session_data of 60,000 bytes is accepted, alone and beside others."""
    client, version = yield new_backup(host)
    rooms = {"!r:h": {f"s{n}": key(data=f"{n}" * 60_000) for n in range(3)}}
    yield client.upload(version, rooms)
    path = keys_path(version, "!r:h", "accents")
    accents = key(data="\u00e9" * 30_000)
    body = json.dumps(accents, ensure_ascii=False).encode()
    tally((yield client.put(path, body)))
    rooms["!r:h"]["accents"] = accents
    same((yield client.download(version)), rooms)


@scenario
def empty_uploads_are_accepted_and_change_nothing(host: Host) -> Steps:
    """An upload without rooms or sessions is a 200 with an unchanged etag and count."""
    client, version = yield new_backup(host)
    for rooms in ({}, {"!r:h": {"s": key()}}):
        yield client.upload(version, rooms)
        before: tuple[int, int] = yield client.tally()
        for path, body in (
            (keys_path(version), {"rooms": {}}),
            (keys_path(version), {"rooms": {"!r:h": {"sessions": {}}}}),
            (keys_path(version, "!r:h"), {"sessions": {}}),
            (keys_path(version, "!other:h"), {"sessions": {}}),
        ):
            row = f"{path} {body}"
            assert tally((yield client.put(path, body)), row) == before, row
            assert (yield client.tally()) == before, row
        same((yield client.download(version)), rooms)


@scenario
def the_better_of_two_keys_is_stored(host: Host) -> Steps:
    """The verified key wins, then the lower index, then the lower forwarded count, in
    all 64 pairs of grades."""
    client, version = yield new_backup(host)
    start: tuple[int, int] = yield client.tally()
    pairs = {f"{old} then {new}": (old, new) for old, new in product(GRADES, GRADES)}
    olds = {name: graded(old, "old") for name, (old, _) in pairs.items()}
    news = {name: graded(new, "new") for name, (_, new) in pairs.items()}
    first: tuple[int, int] = yield client.upload(version, {"!r:h": olds})
    assert first == (start[0] + 1, 64), first
    second: tuple[int, int] = yield client.upload(version, {"!r:h": news})
    assert second == (start[0] + 2, 64), second
    rooms: Rooms = yield client.download(version)
    assert rooms["!r:h"].keys() == pairs.keys()
    for name, (old, new) in pairs.items():
        want = news[name] if better(new, old) else olds[name]
        same(rooms["!r:h"][name], want, name)


@scenario
def uploads_by_room_and_single_uploads_store_the_better_key(host: Host) -> Steps:
    """Uploads of a room or a single key replace only worse keys, as an upload of all
    rooms does."""
    client, version = yield new_backup(host)
    held = (False, 5, 5)
    rows = [
        ((False, 5, 5), False),
        ((False, 5, 6), False),
        ((False, 6, 0), False),
        ((False, 5, 4), True),
        ((False, 4, 9), True),
        ((True, 9, 9), True),
    ]
    for number, (grade, wins) in enumerate(rows):
        old, new = graded(held, "old"), graded(grade, "new")
        for room, whole in (("!single:h", False), ("!room:h", True)):
            session = f"s{number}"
            row = f"{room}: {grade} over {held}"
            path = keys_path(version, room, session)
            before = tally((yield client.put(path, old)), row)
            if whole:
                body = {"sessions": {session: new}}
                answer: Answer = yield client.put(keys_path(version, room), body)
            else:
                answer = yield client.put(path, new)
            assert tally(answer, row) == (before[0] + wins, before[1]), row
            same(accepted((yield client.get(path))), new if wins else old, row)


@scenario
def a_mixed_upload_moves_the_etag_once(host: Host) -> Steps:
    """New, better, worse and equal keys of one upload are compared one by one, and the
    etag grows by one.

    A session of the same id in another room is another session.
    """
    client, version = yield new_backup(host)
    old = {name: key(5, data="old") for name in ("better", "worse", "equal", "alone")}
    other = {**old, "new there": key(0, data="old")}
    before: tuple[int, int] = yield client.upload(version, {"!a:h": old, "!b:h": other})
    new = {
        "new there": key(9, data="new"),
        "new": key(9, data="new"),
        "better": key(4, data="new"),
        "worse": key(6, data="new"),
        "equal": key(5, data="new"),
    }
    after: tuple[int, int] = yield client.upload(version, {"!a:h": new})
    assert after == (before[0] + 1, before[1] + 2), (before, after)
    want = {**old, **{name: new[name] for name in ("new", "new there", "better")}}
    same((yield client.download(version)), {"!a:h": want, "!b:h": other})


@scenario
def a_repeated_upload_changes_nothing(host: Host) -> Steps:
    """The same upload, or an upload of worse keys, stores no key and leaves the etag
    unchanged."""
    client, version = yield new_backup(host)
    rooms = {f"!{r}:h": {f"s{s}": key(s) for s in range(5)} for r in range(3)}
    first: tuple[int, int] = yield client.upload(version, rooms)
    assert first[1] == 15
    worse = {room: {name: key(9) for name in keys} for room, keys in rooms.items()}
    for turn, again in enumerate((rooms, rooms, worse)):
        assert (yield client.upload(version, again)) == first, f"turn {turn}"
    same((yield client.download(version)), rooms)


@scenario
def concurrent_uploads_lose_no_key(host: Host) -> Steps:
    """Two concurrent uploads have the same result as two sequential uploads."""
    client, version = yield new_backup(host)
    for turn in range(5):
        before: tuple[int, int] = yield client.tally()
        room = f"!{turn}:h"
        one = {"one": key(1), "a": key(1, data="1"), "b": key(2, data="1")}
        two = {"two": key(2), "a": key(2, data="2"), "b": key(1, data="2")}
        both: list[Deferred[tuple[int, int]]] = [
            client.upload(version, {room: keys}) for keys in (one, two)
        ]
        tallies: list[tuple[int, int]] = yield gatherResults(both, consumeErrors=True)
        etags = sorted(etag for etag, _ in tallies)
        assert etags == [before[0] + 1, before[0] + 2], f"{before}: {tallies}"
        assert (yield client.tally()) == (before[0] + 2, before[1] + 4)
        rooms: Rooms = yield client.download(version)
        same(rooms[room], {**two, **one, "b": two["b"]}, room)


AMBIGUOUS_JSON = {
    "a session twice": b'{"sessions":{"s":%(k)s,"s":%(k)s}}',
    "a session twice, once bad": b'{"sessions":{"s":{},"s":%(k)s}}',
    "sessions twice": b'{"sessions":{"s":%(k)s},"sessions":{"s":%(k)s}}',
    "a field twice": b'{"sessions":{"s":{"is_verified":1,%(f)s}}}',
    "a member of session_data twice": b'{"sessions":{"s":{%(f)s,"session_data":'
    b'{"a":1,"a":2}}}}',
    "a lone surrogate in session_data": b'{"sessions":{"s":{%(f)s,"session_data":'
    b'["\\ud800"]}}}',
    "a lone surrogate in an extra field": b'{"sessions":{"s":{%(f)s,"\\ud800":0}}}',
    "a very long integer in session_data": b'{"sessions":{"s":{%(f)s,"session_data":'
    + b"1" * 5000
    + b"}}}",
    "a very long fraction in session_data": b'{"sessions":{"s":{%(f)s,"session_data":'
    b"0." + b"1" * 5000 + b"}}}",
}


@scenario
def ambiguous_json_is_stored_or_refused_without_damage(host: Host) -> Steps:
    """JSON of ambiguous meaning is accepted or refused, and the backup works
    afterwards."""
    client, version = yield new_backup(host)
    text = encoded(key()) or b""
    fields = {b"k": text, b"f": text[1:-1]}
    for number, (name, body) in enumerate(AMBIGUOUS_JSON.items()):
        path = keys_path(version, f"!{number}:h")
        answer: Answer = yield client.put(path, body % fields)
        assert answer.status in (200, 400), f"{name}: {answer}"
        stored = int(answer.status == 200)
        answer = yield client.get(path)
        assert answer.status == 200, f"{name}: {answer}"
        assert answer.body.count(b'"is_verified"') == stored, f"{name}: {answer}"
        answer = yield client.get(keys_path(version))
        assert answer.status == 200, f"{name}: {answer}"
        tally((yield client.delete(path)), name)
    same((yield client.download(version)), {})

"""Scenarios of backup versions: creation, reads, changes and deletion."""

from __future__ import annotations

import time
from typing import Any

from twisted.internet.defer import gatherResults

from .base import (
    ALGORITHM,
    AUTH_DATA,
    NO_VERSION,
    Answer,
    Client,
    Host,
    Steps,
    accepted,
    key,
    keys_path,
    new_backup,
    refused,
    same,
    scenario,
    version_path,
    wrapped,
)

HUGE = 2**53 - 1
OPAQUE: list[Any] = [
    "a string, as old clients send",
    "",
    {},
    [],
    0,
    -17,
    HUGE,
    1.5,
    1e-9,
    True,
    False,
    [None, [[]], {"": None}],
    {"ciphertext": "aGk=", "mac": "x", "ephemeral": "y", "org.example.new": [1, {}]},
    {"\u00e9\u2603\U0001f511": {'"\\/\b\f\n\r\t\u007f\u2028': "\u00fc\x1f\u0000"}},
    "\u65e5\u672c\u8a9e \U0001f511 <&>'\"",
    {"a": {"b": {"c": {"d": [{"e": [[[[[[0.25]]]]]]}]}}}},
]
"""Any JSON value but null may be a `session_data` or an `auth_data`."""
NOT_STRINGS: list[Any] = [None, 1, 1.5, True, [], {}]


@scenario
def a_version_is_the_time_or_one_more_than_the_last(host: Host) -> Steps:
    """A version number is a string: the Unix time, or the user's last number plus one
    if that is larger."""
    client = Client(host, host.new_user())
    last = 0
    for number in range(6):
        row = f"version {number}"
        body = {"algorithm": ALGORITHM, "auth_data": AUTH_DATA}
        before = int(time.time())
        answer: Answer = yield client.post("/version", body)
        after = int(time.time())
        created = accepted(answer, row)
        assert created.keys() == {"version"}, f"{row}: {answer}"
        version = created["version"]
        assert isinstance(version, str), f"{row}: a number crashes clients: {answer}"
        assert version == str(int(version)), f"{row}: {answer}"
        low, high = max(last + 1, before), max(last + 1, after)
        assert low <= int(version) <= high, f"{row}: {version} not in {low}..{high}"
        last = int(version)
        if number % 2:  # A deleted number is not given out again.
            accepted((yield client.delete(version_path(version))), row)


@scenario
def concurrently_created_versions_differ(host: Host) -> Steps:
    """Concurrent requests for a new version each get their own number."""
    client = Client(host, host.new_user())
    made = [client.create_version({"number": number}) for number in range(4)]
    versions: list[str] = yield gatherResults(made, consumeErrors=True)
    assert len(set(versions)) == 4, versions
    for number, version in enumerate(versions):
        info: dict[str, Any] = yield client.info(version)
        same(info["auth_data"], {"number": number}, version)
    newest: dict[str, Any] = yield client.info()
    assert newest["version"] == max(versions, key=int), versions


@scenario
def a_version_is_described_by_five_fields(host: Host) -> Steps:
    """GET /version and GET /version/{v} answer algorithm, auth_data, count, etag and
    version."""
    client = Client(host, host.new_user())
    version: str = yield client.create_version({"n": 1}, "org.example.one")
    other: str = yield client.create_version({"n": 2}, "org.example.two")
    yield client.upload(other, {"!r:h": {"s": key(), "t": key()}})
    for path, number, algorithm, data, count in (
        ("/version", other, "org.example.two", {"n": 2}, 2),
        (version_path(other), other, "org.example.two", {"n": 2}, 2),
        (version_path(version), version, "org.example.one", {"n": 1}, 0),
    ):
        info = accepted((yield client.get(path)), path)
        etag = info.pop("etag")
        assert isinstance(etag, str) and etag, f"{path}: the etag is {etag!r}"
        want = {"algorithm": algorithm, "auth_data": data}
        same(info, {**want, "version": number, "count": count}, path)


@scenario
def auth_data_is_opaque(host: Host) -> Steps:
    """Any JSON value but null is returned as the same value, after creation and after a
    change."""
    client = Client(host, host.new_user())
    created: str = yield client.create_version()
    for value in OPAQUE:
        version: str = yield client.create_version(value)
        body = {"algorithm": ALGORITHM, "auth_data": value}
        accepted((yield client.put(version_path(created), body)), repr(value))
        for number in (version, created):
            info: dict[str, Any] = yield client.info(number)
            same(info["auth_data"], value, repr(value))
        created = version


@scenario
def unknown_members_are_ignored(host: Host) -> Steps:
    """POST /version ignores `version`, and every endpoint ignores unknown members."""
    client = Client(host, host.new_user())
    good = {"algorithm": ALGORITHM, "auth_data": AUTH_DATA}
    for value in (*NOT_STRINGS, "1", "nonsense"):
        odd = {"version": value, "etag": value, "count": value, "x": value}
        answer: Answer = yield client.post("/version", {**odd, **good})
        version: str = accepted(answer, repr(value))["version"]
        assert version != "1", repr(value)
        info: dict[str, Any] = yield client.info()
        same(info["version"], version, repr(value))
        one = {**odd, **key(), "rooms": value}
        room = {**odd, "sessions": {"s": one}, "rooms": value}
        whole = {**odd, "rooms": {"!r:h": room}, "sessions": value}
        for path, body in (
            (keys_path(version), whole),
            (keys_path(version, "!r:h"), room),
            (keys_path(version, "!r:h", "s"), one),
        ):
            accepted((yield client.put(path, body)), f"{path} {value!r}")
        same((yield client.download(version)), {"!r:h": {"s": key()}}, repr(value))
        change = {**odd, **good, "version": version}
        accepted((yield client.put(version_path(version), change)), repr(value))


@scenario
def changing_a_version_changes_auth_data_alone(host: Host) -> Steps:
    """PUT /version/{v} answers {} and changes auth_data alone, not the etag."""
    client, version = yield new_backup(host)
    yield client.upload(version, {"!r:h": {"s": key()}})
    before: dict[str, Any] = yield client.info()
    for body in (
        {"algorithm": ALGORITHM, "auth_data": {"n": 1}},
        {"algorithm": ALGORITHM, "auth_data": {"n": 2}, "version": version},
        {"algorithm": ALGORITHM, "auth_data": {"n": 2}, "version": version},
    ):
        answer: Answer = yield client.put(version_path(version), body)
        same(accepted(answer, repr(body)), {}, repr(body))
        after: dict[str, Any] = yield client.info()
        same(after, {**before, "auth_data": body["auth_data"]}, repr(body))


@scenario
def a_refused_change_changes_nothing(host: Host) -> Steps:
    """PUT /version/{v} with another algorithm, another version or a bad field is a
    400."""
    client, version = yield new_backup(host)
    before: dict[str, Any] = yield client.info()
    new = {"n": 1}
    good = {"algorithm": ALGORITHM, "auth_data": new}
    other = str(int(version) + 1)
    for body, errcode in (
        ({**good, "algorithm": "org.example.other"}, "M_INVALID_PARAM"),
        ({**good, "version": other}, "M_INVALID_PARAM"),
        ({**good, "version": "nonsense"}, "M_INVALID_PARAM"),
        *(({**good, "version": value}, "M_BAD_JSON") for value in NOT_STRINGS),
        ({**good, "auth_data": None}, "M_BAD_JSON"),
        ({"algorithm": ALGORITHM}, "M_BAD_JSON"),
        ({"algorithm": ALGORITHM, "version": version}, "M_BAD_JSON"),
        ({"auth_data": new}, "M_BAD_JSON"),
        ({**good, "algorithm": None}, "M_BAD_JSON"),
        ({**good, "algorithm": 1}, "M_BAD_JSON"),
        ({}, "M_BAD_JSON"),
    ):
        answer: Answer = yield client.put(version_path(version), body)
        refused(answer, 400, errcode, row=repr(body))
        same((yield client.info()), before, repr(body))


@scenario
def a_refused_version_is_not_created(host: Host) -> Steps:
    """POST /version without a text as algorithm, or with a null auth_data, is a 400."""
    client = Client(host, host.new_user())
    bodies: list[dict[str, Any]] = [
        {},
        {"auth_data": {}},
        {"algorithm": None, "auth_data": {}},
        {"algorithm": 1, "auth_data": {}},
        {"algorithm": True, "auth_data": {}},
        {"algorithm": ["m"], "auth_data": {}},
        {"algorithm": {"m": 1}, "auth_data": {}},
        {"algorithm": "m.\0", "auth_data": {}},
        {"algorithm": ALGORITHM},
        {"algorithm": ALGORITHM, "auth_data": None},
    ]
    for body in bodies:
        answer: Answer = yield client.post("/version", body)
        refused(answer, 400, "M_BAD_JSON", row=repr(body))
    refused((yield client.get("/version")), 404, "M_NOT_FOUND")


@scenario
def changing_or_deleting_without_a_version_is_400(host: Host) -> Steps:
    """PUT and DELETE /version without a version in the path are answered 400."""
    client, version = yield new_backup(host)
    body = {"algorithm": ALGORITHM, "auth_data": {"n": 1}, "version": version}
    refused((yield client.put("/version", body)), 400, "M_MISSING_PARAM")
    text = "No version specified to delete"
    refused((yield client.delete("/version")), 400, "M_NOT_FOUND", error=text)
    same((yield client.info())["auth_data"], AUTH_DATA)


@scenario
def deleting_a_version_deletes_its_keys_and_is_repeatable(host: Host) -> Steps:
    """DELETE /version/{v} answers {} each time; afterwards the version and its keys are
    404."""
    client, version = yield new_backup(host)
    yield client.upload(version, {"!r:h": {"s": key()}})
    other: str = yield client.create_version()
    for turn in ("first", "second", "third"):
        same(accepted((yield client.delete(version_path(version))), turn), {}, turn)
        refused((yield client.get(version_path(version))), 404, "M_NOT_FOUND", row=turn)
        body = {"algorithm": ALGORITHM, "auth_data": {}}
        answer = yield client.put(version_path(version), body)
        refused(answer, 404, "M_NOT_FOUND", row=turn)
        for rest in ((), ("!r:h",), ("!r:h", "s")):
            answer = yield client.get(keys_path(version, *rest))
            refused(answer, 404, "M_NOT_FOUND", error=NO_VERSION, row=turn)
    assert (yield client.info())["version"] == other


@scenario
def the_newest_remaining_version_is_current(host: Host) -> Steps:
    """After the current version is deleted, the newest remaining version is current,
    with its keys."""
    client, first = yield new_backup(host)
    rooms = {"!r:h": {"s": key(5)}}
    yield client.upload(first, rooms)
    versions = [first]
    for _ in range(3):
        version: str = yield client.create_version()
        versions.append(version)
    _, second, third, fourth = versions
    gone = set()
    for deleted, current in ((third, fourth), (fourth, second), (second, first)):
        accepted((yield client.delete(version_path(deleted))), deleted)
        gone.add(deleted)
        assert (yield client.info())["version"] == current, f"{versions}: {gone} gone"
        for version in versions:
            answer: Answer = yield client.put(keys_path(version), wrapped({}))
            row = f"upload to {version} of {versions} with {gone} gone"
            if version == current:
                accepted(answer, row)
            elif version in gone:
                refused(answer, 404, "M_NOT_FOUND", error=NO_VERSION, row=row)
            else:
                error = refused(answer, 403, "M_WRONG_ROOM_KEYS_VERSION", row=row)
                assert error["current_version"] == current, f"{row}: {answer}"
    same((yield client.download(first)), rooms)
    accepted((yield client.delete(version_path(first))))
    refused((yield client.get("/version")), 404, "M_NOT_FOUND")
    answer = yield client.put(keys_path(first), wrapped(rooms))
    refused(answer, 404, "M_NOT_FOUND", error=NO_VERSION)


@scenario
def a_new_version_starts_empty_and_leaves_the_old_one_readable(host: Host) -> Steps:
    """A new version has no keys, and the keys of the old version stay readable there
    alone."""
    client, old = yield new_backup(host)
    rooms = {"!r:h": {"s": key(1, data="old")}}
    yield client.upload(old, rooms)
    new: str = yield client.create_version()
    same((yield client.download(new)), {})
    assert (yield client.tally())[1] == 0
    others = {"!r:h": {"s": key(2, data="new")}}
    yield client.upload(new, others)
    same((yield client.download(old)), rooms)
    same((yield client.download(new)), others)
    path = keys_path(old, "!r:h", "s")
    same(accepted((yield client.get(path)), path), rooms["!r:h"]["s"])


@scenario
def every_request_without_a_backup_is_404(host: Host) -> Steps:
    """For a user without a backup, every request except the creation of a version is
    404 M_NOT_FOUND."""
    client = Client(host, host.new_user())
    version = str(int(time.time()))
    body = {"algorithm": ALGORITHM, "auth_data": {}}
    for method, path, sent in (
        ("GET", "/version", None),
        ("GET", version_path(version), None),
        ("PUT", version_path(version), body),
        ("DELETE", version_path(version), None),
    ):
        answer: Answer = yield client.request(method, path, sent)
        refused(answer, 404, "M_NOT_FOUND", row=f"{method} {path}")
    for method, path, sent in (
        ("PUT", keys_path(version), wrapped({"!r:h": {"s": key()}})),
        ("PUT", keys_path(version, "!r:h", "s"), key()),
        ("GET", keys_path(version), None),
        ("DELETE", keys_path(version), None),
    ):
        answer = yield client.request(method, path, sent)
        row = f"{method} {path}"
        refused(answer, 404, "M_NOT_FOUND", error=NO_VERSION, row=row)


AMBIGUOUS_JSON = {
    "a lone surrogate in the algorithm": b'{"algorithm":"m.\\ud800","auth_data":{}}',
    "a lone surrogate in auth_data": b'{"algorithm":"m","auth_data":{"\\udc00":1}}',
    "algorithm twice": b'{"algorithm":"m","algorithm":"n","auth_data":{}}',
    "auth_data twice": b'{"algorithm":"m","auth_data":null,"auth_data":{}}',
    "a very long integer": b'{"algorithm":"m","auth_data":%s}' % (b"1" * 5000),
}


@scenario
def ambiguous_json_creates_a_version_or_is_refused(host: Host) -> Steps:
    """JSON of ambiguous meaning is accepted or refused, and the backups work
    afterwards."""
    for name, body in AMBIGUOUS_JSON.items():
        client, version = yield new_backup(host)
        for method, path in (("POST", "/version"), ("PUT", version_path(version))):
            row = f"{name}: {method}"
            answer: Answer = yield client.request(method, path, body)
            assert answer.status in (200, 400), f"{row}: {answer}"
            answer = yield client.get("/version")
            assert answer.status == 200, f"{row}: {answer}"
        same((yield client.download(version)), {}, name)

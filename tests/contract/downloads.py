"""Scenarios of downloads and deletions of keys."""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256
from typing import Any

from twisted.internet.defer import gatherResults

from .base import (
    ALGORITHM,
    NO_KEY,
    NO_VERSION,
    Answer,
    Client,
    Host,
    Rooms,
    Steps,
    accepted,
    key,
    keys_path,
    new_backup,
    refused,
    same,
    scenario,
    tally,
    version_path,
    wrapped,
)

SMALL: Rooms = {
    "!a:h": {"one": key(1), "two": key(2)},
    "!b:h": {"one": key(3, 4, True, {"n": 1})},
}


@scenario
def downloads_are_shaped_by_their_path(host: Host) -> Steps:
    """The path of a download selects all rooms, the sessions of a room, or a single
    key."""
    client, version = yield new_backup(host)
    yield client.upload(version, SMALL)
    for path, want in (
        (keys_path(version), wrapped(SMALL)),
        (keys_path(version, "!a:h"), {"sessions": SMALL["!a:h"]}),
        (keys_path(version, "!b:h"), {"sessions": SMALL["!b:h"]}),
        (keys_path(version, "!a:h", "two"), SMALL["!a:h"]["two"]),
        (keys_path(version, "!b:h", "one"), SMALL["!b:h"]["one"]),
    ):
        same(accepted((yield client.get(path)), path), want, path)


@scenario
def a_missing_room_is_empty_but_a_missing_key_is_404(host: Host) -> Steps:
    """A download of an empty backup or room is a 200; a download of a missing key is a
    404."""
    client, version = yield new_backup(host)
    same(accepted((yield client.get(keys_path(version)))), {"rooms": {}})
    for rooms in ({}, SMALL):
        yield client.upload(version, rooms)
        answer: Answer = yield client.get(keys_path(version, "!other:h"))
        same(accepted(answer), {"sessions": {}})
        for room, session in (("!a:h", "three"), ("!b:h", "two"), ("!c:h", "one")):
            path = keys_path(version, room, session)
            answer = yield client.get(path)
            refused(answer, 404, "M_NOT_FOUND", error=NO_KEY, row=path)


@scenario
def a_large_download_returns_every_uploaded_key(host: Host) -> Steps:
    """Seven hundred keys in three rooms are returned unchanged, together and by
    room."""
    client, version = yield new_backup(host)
    rooms: Rooms = {}
    for room, size in (("!most:h", 550), ("!One:h", 1), ("!rest:h", 149)):
        digests = [sha256(f"{room}{n}".encode()).digest() for n in range(size)]
        rooms[room] = {
            b64encode(digest).decode(): key(
                digest[0], digest[1], digest[2] % 2 == 0, {"ciphertext": digest.hex()}
            )
            for digest in digests
        }
    for room, keys in rooms.items():
        names = list(keys)
        for start in range(0, len(names), 100):
            batch = {name: keys[name] for name in names[start : start + 100]}
            yield client.upload(version, {room: batch})
    assert (yield client.tally())[1] == 700
    downloaded: Rooms = yield client.download(version)
    sizes = {room: len(keys) for room, keys in downloaded.items()}
    assert sizes == {room: len(keys) for room, keys in rooms.items()}
    same(downloaded, rooms)
    for room, keys in rooms.items():
        answer: Answer = yield client.get(keys_path(version, room))
        same(accepted(answer, room), {"sessions": keys}, room)


@scenario
def a_deletion_removes_a_key_a_room_or_all_keys(host: Host) -> Steps:
    """DELETE answers the new count, and a new etag exactly if keys were deleted."""
    client, version = yield new_backup(host)
    rooms = {f"!{room}:h": {s: key() for s in "stuv"} for room in "abc"}
    state: tuple[int, int] = yield client.upload(version, rooms)
    for path, count in (
        (keys_path(version, "!a:h", "s"), 11),
        (keys_path(version, "!a:h", "s"), 11),
        (keys_path(version, "!a:h", "nothing"), 11),
        (keys_path(version, "!nothing:h", "s"), 11),
        (keys_path(version, "!nothing:h"), 11),
        (keys_path(version, "!a:h"), 8),
        (keys_path(version, "!a:h"), 8),
        (keys_path(version, "!b:h", "t"), 7),
        (keys_path(version), 0),
        (keys_path(version), 0),
        (keys_path(version, "!c:h", "t"), 0),
    ):
        row = f"DELETE {path}, {state} before"
        after = tally((yield client.delete(path)), row)
        assert after[1] == count, f"{row}: {after}"
        moved = after[0] != state[0]
        assert moved == (after[1] != state[1]), f"{row}: the etag: {after}"
        assert (yield client.tally()) == after, row
        state = after
        downloaded: Rooms = yield client.download(version)
        assert sum(len(keys) for keys in downloaded.values()) == count, row


@scenario
def a_deletion_leaves_all_other_keys(host: Host) -> Steps:
    """A deletion leaves the other keys, and a deleted key can be uploaded again, even a
    worse key."""
    client, version = yield new_backup(host)
    yield client.upload(version, SMALL)
    tally((yield client.delete(keys_path(version, "!a:h", "one"))))
    left = {"!a:h": {"two": SMALL["!a:h"]["two"]}, "!b:h": SMALL["!b:h"]}
    same((yield client.download(version)), left)
    tally((yield client.delete(keys_path(version, "!a:h"))))
    same((yield client.download(version)), {"!b:h": SMALL["!b:h"]})
    worse = {"!a:h": {"one": key(99)}}
    assert (yield client.upload(version, worse))[1] == 2
    same((yield client.download(version)), {"!b:h": SMALL["!b:h"], **worse})


@scenario
def the_count_is_exact(host: Host) -> Steps:
    """The count is exact after inserts, replacements, refused worse keys and
    deletions."""
    client, version = yield new_backup(host)
    mine = {f"s{n}": key(5) for n in range(10)}
    assert (yield client.upload(version, {"!a:h": mine}))[1] == 10
    assert (yield client.upload(version, {"!b:h": mine}))[1] == 20
    mixed = {f"s{n}": key(4 + n % 3) for n in range(5, 15)}
    assert (yield client.upload(version, {"!a:h": mixed}))[1] == 25
    path = keys_path(version, "!a:h", "s12")
    assert tally((yield client.delete(path)))[1] == 24
    assert tally((yield client.put(path, key())))[1] == 25
    assert tally((yield client.put(path, key())))[1] == 25
    assert tally((yield client.delete(keys_path(version, "!b:h"))))[1] == 15
    assert (yield client.tally(version))[1] == 15
    downloaded: Rooms = yield client.download(version)
    assert [len(keys) for keys in downloaded.values()] == [15]


@scenario
def a_user_cannot_access_another_users_backup(host: Host) -> Steps:
    """Requests for another user's version are 404 and change no data of the other
    user."""
    anna, first = yield new_backup(host)
    yield anna.upload(first, SMALL)
    second: str = yield anna.create_version()
    yield anna.upload(second, SMALL)
    infos: list[Any] = yield gatherResults([anna.info(first), anna.info(second)])
    bert = Client(host, host.new_user())
    change = {"algorithm": ALGORITHM, "auth_data": {"from": "bert"}}
    upload = {"!a:h": {"one": key(0, 0, True, "from bert")}}
    for own in (False, True):
        # Anna's two versions differ even if both were created in one second, so at
        # least one of the two numbers is not a version of Bert's.
        number: str | None = (yield bert.create_version()) if own else None
        version = first if number == second else second
        for method, path, body in (
            ("GET", keys_path(version), None),
            ("GET", keys_path(version, "!a:h"), None),
            ("GET", keys_path(version, "!a:h", "one"), None),
            ("PUT", keys_path(version), wrapped(upload)),
            ("PUT", keys_path(version, "!a:h"), {"sessions": upload["!a:h"]}),
            ("PUT", keys_path(version, "!a:h", "one"), upload["!a:h"]["one"]),
            ("DELETE", keys_path(version), None),
            ("DELETE", keys_path(version, "!a:h"), None),
            ("DELETE", keys_path(version, "!a:h", "one"), None),
            ("GET", version_path(version), None),
            ("PUT", version_path(version), change),
            ("DELETE", version_path(version), None),
        ):
            row = f"{method} {path}, own backup: {own}"
            answer: Answer = yield bert.request(method, path, body)
            error = NO_VERSION if path.startswith("/keys") else None
            refused(answer, 404, "M_NOT_FOUND", error=error, row=row)
        for version, info in zip((first, second), infos, strict=True):
            row = f"{version}, own backup: {own}"
            same((yield anna.info(version)), info, row)
            same((yield anna.download(version)), SMALL, row)


@scenario
def equal_rooms_and_sessions_of_two_users_stay_separate(host: Host) -> Steps:
    """Two users with equal rooms, sessions and nearly equal versions have separate
    backups."""
    clients = [Client(host, host.new_user()) for _ in range(2)]
    versions: list[str] = []
    for client in clients:
        version: str = yield client.create_version({"of": client.user.user_id})
        versions.append(version)
    uploads: list[Rooms] = [
        {"!r:h": {"s": key(number, data=f"{number}"), f"own{number}": key()}}
        for number in range(2)
    ]
    for client, version, rooms in zip(clients, versions, uploads, strict=True):
        assert (yield client.upload(version, rooms))[1] == 2
    for client, version, rooms in zip(clients, versions, uploads, strict=True):
        same((yield client.download(version)), rooms)
        info: dict[str, Any] = yield client.info()
        same(info["auth_data"], {"of": client.user.user_id})
    tally((yield clients[0].delete(keys_path(versions[0], "!r:h", "s"))))
    accepted((yield clients[0].delete(version_path(versions[0]))))
    same((yield clients[1].download(versions[1])), uploads[1])
    assert (yield clients[1].tally())[1] == 2

"""Scenarios of isolation between users who know each other's version numbers and
ids."""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import Any

from twisted.internet.defer import Deferred, gatherResults, inlineCallbacks

from .base import (
    ALGORITHM,
    Answer,
    Client,
    Host,
    Rooms,
    Steps,
    User,
    accepted,
    key,
    keys_path,
    quoted,
    refused,
    same,
    scenario,
    version_path,
    wrapped,
)
from .paths import endpoints

MARK = "of-the-other-one"
#: Keys of the other user: the room and session that `endpoints` uses, and a second
#: room.
OTHERS: Rooms = {"!r:h": {"s": key(9, data=MARK)}, f"!{MARK}:h": {MARK: key(data=MARK)}}
#: Query parameters and body members in which a request may name another user. None
#: stands for a request that names no other user.
NAMINGS = (None, "user_id", "user", "org.matrix.msc3202.device_id")


@inlineCallbacks
def request_naming_user(
    client: Client, other: Client, naming: str | None, row: tuple[str, str, Any]
) -> Generator[Deferred[Any], Any, Answer]:
    """Send a request that names another user, and fire with the answer.

    Args:
        naming: name of the query parameter and body member for the other user's id, or
            None to name no user.
        row: method, path and body.

    Raises:
        AssertionError: The answer holds data of the other user.
    """
    method, path, body = row
    if naming is not None:
        name = other.user.user_id
        path += f"{'&' if '?' in path else '?'}{naming}={quoted(name)}"
        body = {**body, naming: name} if isinstance(body, dict) else body
    answer: Answer = yield client.request(method, path, body)
    assert MARK not in answer.body.decode(), f"{method} {path}: {answer}"
    return answer


@inlineCallbacks
def two_backups(
    host: Host,
) -> Generator[Deferred[Any], Any, tuple[Client, Client, list[str]]]:
    """Create two users with two equal version numbers each.

    The data of the second user hold `MARK`.

    Returns:
        Both clients, and the two version numbers that both users have.
    """
    clients = [Client(host, host.new_user()) for _ in range(2)]
    newest = [0, 0]
    shared: list[str] = []
    for _ in range(100):
        behind = newest.index(min(newest))
        version: str = yield clients[behind].create_version({"of": ("a", MARK)[behind]})
        newest[behind] = int(version)
        if newest[0] == newest[1]:
            shared.append(version)
        if len(shared) == 2:
            break
    assert len(shared) == 2, f"their numbers don't meet: {newest}"
    return clients[0], clients[1], shared


@inlineCallbacks
def read_all(
    client: Client, versions: list[str]
) -> Generator[Deferred[Any], Any, list[Any]]:
    """Fire with all data of the versions that their owner can read."""
    found: list[Any] = []
    for path in ("/version", *map(version_path, versions), *map(keys_path, versions)):
        answer: Answer = yield client.get(path)
        found.append(accepted(answer, path))
    return found


@scenario
def requests_never_reach_another_users_backup(host: Host) -> Steps:
    """No request of a user reads, creates, changes or deletes data of another user with
    the same version numbers and ids, even if the request names the other user."""
    client, other, versions = yield two_backups(host)
    yield other.upload(versions[1], OTHERS)
    before: list[Any] = yield read_all(other, versions)
    for version in reversed(versions):
        for naming in NAMINGS:
            for row in endpoints(version)[1:-1]:
                yield request_naming_user(client, other, naming, row)
                same((yield read_all(other, versions)), before, f"{row} with {naming}")
    for room in OTHERS:
        for path in (
            keys_path(versions[1], room),
            keys_path(versions[1], room, "s"),
            keys_path(versions[1], room, MARK),
        ):
            for method in ("GET", "DELETE"):
                answer = yield client.request(method, path)
                assert MARK not in json.dumps(answer.json), f"{method} {path}"
    same((yield client.download(versions[1])), {})
    assert (yield client.tally(versions[1]))[1] == 0
    for naming in NAMINGS:
        for row in (*(endpoints(v)[-1] for v in versions), endpoints("")[0]):
            accepted((yield request_naming_user(client, other, naming, row)))
            same((yield read_all(other, versions)), before, f"{row} with {naming}")


@scenario
def another_users_version_is_answered_like_an_unknown_version(host: Host) -> Steps:
    """An answer does not reveal whether another user has a version."""
    client, other = (Client(host, host.new_user()) for _ in range(2))
    version: str = yield other.create_version()
    yield other.upload(version, OTHERS)
    before: list[Any] = yield read_all(other, [version])
    never = str(int(version) + 1_000_000)
    body = {"algorithm": ALGORITHM, "auth_data": {}, "version": version}
    rows = [
        *endpoints(version)[2:],
        ("PUT", version_path(version), body),
        ("PUT", keys_path(version), wrapped(OTHERS)),
    ]
    for method, path, sent in rows:
        got: Answer = yield client.request(method, path, sent)
        asked = path.replace(version, never)
        if isinstance(sent, dict) and "version" in sent:
            sent = {**sent, "version": never}
        want: Answer = yield client.request(method, asked, sent)
        row = f"{method} {path}"
        assert got.status == want.status == 404, f"{row}: {got}, {want}"
        assert got.body == want.body, f"{row}: {got}, {want}"
    same((yield read_all(other, [version])), before)


@scenario
def counts_and_current_versions_are_per_user(host: Host) -> Steps:
    """Count, etag and current version are per user, even if version numbers and etags
    of two users are equal."""
    client, other, versions = yield two_backups(host)
    clients, rooms = (client, other), ({"!r:h": {"s": key(9)}}, OTHERS)
    for one, its in zip(clients, rooms, strict=True):
        etag = (yield one.upload(versions[1], its))[0]
        assert etag == 1, "the etags aren't the same"
    for one, its in zip(clients, rooms, strict=True):
        for version in (None, versions[1]):
            assert (yield one.tally(version)) == (1, len(its)), version
    newer: str = yield other.create_version()
    assert int(newer) > int(versions[1])
    better = {"!r:h": {"s": key(5)}}
    assert (yield client.upload(versions[1], better)) == (2, 1)
    assert (yield client.info())["version"] == versions[1]
    same((yield client.download(versions[1])), better)
    same((yield other.download(versions[1])), OTHERS)


@scenario
def a_token_authenticates_only_its_user(host: Host) -> Steps:
    """A token authenticates only its user during concurrent requests, and a similar
    token is unknown."""
    clients = [Client(host, host.new_user()) for _ in range(9)]
    names = [client.user.user_id for client in clients]
    yield gatherResults(
        [
            client.create_version({"of": n})
            for client, n in zip(clients, names, strict=True)
        ]
    )
    for _ in range(2):
        infos: list[Any] = yield gatherResults([client.info() for client in clients])
        assert [info["auth_data"]["of"] for info in infos] == names
    token = clients[0].user.access_token
    for near in (token.swapcase(), token[:-1], token[1:], token + "a", token[::-1]):
        stranger = Client(host, User(names[0], near))
        refused((yield stranger.get("/version")), 401, "M_UNKNOWN_TOKEN", row=near)

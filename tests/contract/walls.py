"""Users who know all of each other's numbers and ids, and get nowhere with them."""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks

from .base import (
    ALGORITHM,
    Answer,
    Client,
    Host,
    Rooms,
    Steps,
    accepted,
    key,
    keys_path,
    quoted,
    same,
    scenario,
    version_path,
    wrapped,
)
from .paths import endpoints

MARK = "of-the-other-one"
#: The room and session are those that `endpoints` uses, and others.
OTHERS: Rooms = {"!r:h": {"s": key(9, data=MARK)}, f"!{MARK}:h": {MARK: key(data=MARK)}}


def with_member(path: str, name: str, value: str) -> str:
    """A path with one more query parameter."""
    return f"{path}{'&' if '?' in path else '?'}{name}={quoted(value)}"


@inlineCallbacks
def two_backups(
    host: Host,
) -> Generator[Deferred[Any], Any, tuple[Client, Client, list[str]]]:
    """Two users' clients, and the numbers of two versions that each of them has."""
    clients = [Client(host, host.new_user()) for _ in range(2)]
    newest = [0, 0]
    shared: list[str] = []
    for _ in range(100):
        behind = newest.index(min(newest))
        version: str = yield clients[behind].create_version({"mark": MARK})
        newest[behind] = int(version)
        if newest[0] == newest[1]:
            shared.append(version)
        if len(shared) == 2:
            break
    assert len(shared) == 2, f"their numbers don't meet: {newest}"
    return clients[0], clients[1], shared


@inlineCallbacks
def all_of(
    client: Client, versions: list[str]
) -> Generator[Deferred[Any], Any, list[Any]]:
    """All that a client can learn of its backups."""
    found: list[Any] = []
    for path in ("/version", *map(version_path, versions), *map(keys_path, versions)):
        answer: Answer = yield client.get(path)
        found.append(accepted(answer, path))
    return found


@scenario
def the_same_numbers_and_ids_are_each_users_own(host: Host) -> Steps:
    """Whatever a user asks for, makes, changes and deletes, it's none of another's."""
    client, other, versions = yield two_backups(host)
    yield other.upload(versions[1], OTHERS)
    before: list[Any] = yield all_of(other, versions)
    for version in reversed(versions):
        for naming in (None, "user_id", "user", "org.matrix.msc3202.device_id"):
            for method, path, body in endpoints(version)[1:-1]:
                row = f"{method} {path} with {naming}"
                if naming is not None:
                    path = with_member(path, naming, other.user.user_id)
                if isinstance(body, dict) and naming is not None:
                    body = {**body, naming: other.user.user_id}
                answer: Answer = yield client.request(method, path, body)
                if "/version" not in path:
                    assert MARK not in answer.body.decode(), f"{row}: {answer}"
                same((yield all_of(other, versions)), before, row)
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
    for version in versions:
        accepted((yield client.delete(version_path(version))), version)
    yield client.create_version()
    same((yield all_of(other, versions)), before, "versions deleted")


@scenario
def anothers_version_is_as_unknown_as_none_at_all(host: Host) -> Steps:
    """An answer doesn't tell whether somebody else has such a version."""
    client, other = (Client(host, host.new_user()) for _ in range(2))
    version: str = yield other.create_version()
    yield other.upload(version, OTHERS)
    before: list[Any] = yield all_of(other, [version])
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
    same((yield all_of(other, [version])), before)

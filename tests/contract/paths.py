"""Scenarios of paths, methods, headers and authentication."""

from __future__ import annotations

from typing import Any

import attrs

from .base import (
    ALGORITHM,
    AUTH_DATA,
    PREFIX,
    Answer,
    Client,
    Host,
    Steps,
    User,
    accepted,
    key,
    keys_path,
    new_backup,
    quoted,
    refused,
    same,
    scenario,
    tally,
    version_path,
    wrapped,
)

PREFIXES = [f"/_matrix/client/{name}/room_keys" for name in ("r0", "v3", "unstable")]
UNKNOWN_PATHS = [
    "/room_keys",
    "/room_keys/",
    "/room_keys/nothing",
    "/room_keys/versions",
    "/room_keys/version/1/more",
    "/room_keys/keys/room/session/more?version=1",
    # Paths with an empty segment. At a 404 M_NOT_FOUND, clients disable their backup.
    "/room_keys/version/",
    "/room_keys/version//",
    "/room_keys/version/?version=1",
    "/room_keys/keys/?version=1",
    "/room_keys/keys//?version=1",
    "/room_keys/keys//s?version=1",
    "/room_keys/keys/!r:h/?version=1",
    "/room_keys/keys/!r:h/s/?version=1",
    "/room_keys//version",
    "/room_keys//keys?version=1",
]
BACKUP = {"algorithm": ALGORITHM, "auth_data": AUTH_DATA}


def endpoints(version: str) -> list[tuple[str, str, Any]]:
    """Every endpoint, as method, path and valid body."""
    return [
        ("POST", "/version", BACKUP),
        ("GET", "/version", None),
        ("GET", version_path(version), None),
        ("PUT", version_path(version), BACKUP),
        ("PUT", keys_path(version), wrapped({"!r:h": {"s": key()}})),
        ("PUT", keys_path(version, "!r:h"), {"sessions": {"s": key()}}),
        ("PUT", keys_path(version, "!r:h", "s"), key()),
        ("GET", keys_path(version), None),
        ("GET", keys_path(version, "!r:h"), None),
        ("GET", keys_path(version, "!r:h", "s"), None),
        ("DELETE", keys_path(version, "!r:h", "s"), None),
        ("DELETE", keys_path(version, "!r:h"), None),
        ("DELETE", keys_path(version), None),
        ("DELETE", version_path(version), None),
    ]


@scenario
def the_three_prefixes_are_equivalent(host: Host) -> Steps:
    """Keys uploaded under one of r0, v3 and unstable are downloaded under each of
    them."""
    user = host.new_user()
    for prefix in PREFIXES:
        client = Client(host, user, prefix)
        version: str = yield client.create_version()
        rooms = {"!r:h": {"s": key(data=prefix)}}
        yield client.upload(version, rooms)
        for other in (Client(host, user, prefix) for prefix in PREFIXES):
            info: dict[str, Any] = yield other.info()
            assert (info["version"], info["count"]) == (version, 1), other.prefix
            same((yield other.download(version)), rooms, other.prefix)
        for method, path, body in endpoints(version)[2:]:
            answer: Answer = yield client.request(method, path, body)
            accepted(answer, f"{method} {prefix}{path}")


@scenario
def head_is_a_get_without_the_body(host: Host) -> Steps:
    """HEAD answers with the status and Content-Type of GET, and no body."""
    client, version = yield new_backup(host)
    yield client.upload(version, {"!r:h": {"s": key()}})
    for path in (
        "/version",
        version_path(version),
        keys_path(version),
        keys_path(version, "!r:h"),
        keys_path(version, "!r:h", "s"),
        keys_path(version, "!r:h", "missing"),
        keys_path(None),
        "/nothing",
    ):
        head: Answer = yield client.request("HEAD", path)
        get: Answer = yield client.get(path)
        assert head.status == get.status, f"HEAD {path}: {head}, GET: {get}"
        assert head.body == b"", f"HEAD {path}: {head}"
        types = [answer.headers.get("content-type") for answer in (head, get)]
        assert types[0] == types[1], f"HEAD {path}: {types}"


def check_cors(answer: Answer, row: str) -> None:
    """Check the CORS headers that Matrix requires of every response."""
    for name, wanted in (
        ("origin", "*"),
        ("methods", "GET, POST, PUT, DELETE, OPTIONS"),
        ("headers", "X-Requested-With, Content-Type, Authorization"),
    ):
        header = answer.headers.get("access-control-allow-" + name, "")
        got = {item.strip().lower() for item in header.split(",")}
        missing = set(wanted.lower().split(", ")) - got
        assert not missing, f"{row}: {name} {header!r} lacks {missing}: {answer}"


@scenario
def options_is_204_with_cors_headers_for_anyone(host: Host) -> Steps:
    """OPTIONS without a token is a 204 with CORS headers, for preflight requests of
    browsers."""
    for path in (
        "/version",
        "/version/1",
        "/keys",
        "/keys?version=1",
        "/keys/!r:h?version=1",
        "/keys/!r:h/s?version=1",
    ):
        for prefix in PREFIXES:
            headers = {
                "Origin": "https://app.example.org",
                "Access-Control-Request-Method": "PUT",
            }
            answer: Answer = yield host.request(
                "OPTIONS", prefix + path, token=None, headers=headers
            )
            row = f"OPTIONS {prefix}{path}"
            assert answer.status == 204 and not answer.body, f"{row}: {answer}"
            check_cors(answer, row)


@scenario
def every_answer_is_json_with_cors_headers(host: Host) -> Steps:
    """Every answer, success or error, is application/json with CORS headers."""
    client, old = yield new_backup(host)
    version: str = yield client.create_version()
    huge = key(data="x" * 70_000)
    create, *use, delete = ((200, *row) for row in endpoints(version))
    rows: list[tuple[int, str, str, Any]] = [
        *use,
        (400, "PUT", keys_path(version), b"{"),
        (400, "PUT", keys_path(version), {"rooms": 1}),
        (400, "GET", keys_path(None), None),
        (400, "DELETE", "/version", None),
        (403, "PUT", keys_path(old), wrapped({})),
        (404, "GET", "/nothing", None),
        (404, "GET", keys_path("1"), None),
        (404, "GET", keys_path(version, "!r:h", "s"), None),
        (405, "PATCH", "/version", {}),
        (413, "PUT", keys_path(version, "!r:h", "s"), huge),
        delete,
        create,
    ]
    stranger = Client(host, User("@nobody:h", "no-token-of-this-server"))
    asked = [(client, *row) for row in rows]
    asked.insert(0, (stranger, 401, "GET", "/version", None))
    for who, status, method, path, body in asked:
        answer: Answer = yield who.request(method, path, body)
        row = f"{method} {path}"
        assert answer.status == status, f"{row}: want {status}, got {answer}"
        kind = answer.headers.get("content-type", "")
        assert kind.split(";")[0].strip() == "application/json", f"{row}: {kind}"
        assert isinstance(answer.json, dict), f"{row}: {answer}"
        check_cors(answer, row)


@scenario
def unknown_methods_are_405(host: Host) -> Steps:
    """An unknown method on a known path is 405 M_UNRECOGNIZED."""
    client, version = yield new_backup(host)
    for method, path in (
        ("PATCH", "/version"),
        ("PATCH", version_path(version)),
        ("POST", version_path(version)),
        ("POST", keys_path(version)),
        ("POST", keys_path(version, "!r:h")),
        ("POST", keys_path(version, "!r:h", "s")),
        ("PATCH", keys_path(version, "!r:h", "s")),
    ):
        answer: Answer = yield client.request(method, path, {})
        refused(answer, 405, "M_UNRECOGNIZED", row=f"{method} {path}")


@scenario
def unknown_paths_are_404_unrecognized(host: Host) -> Steps:
    """A path of no endpoint is 404 M_UNRECOGNIZED for every method."""
    user = host.new_user()
    rows = ["/_matrix/client/v3" + path for path in UNKNOWN_PATHS]
    rows.append("/_matrix/client/v1/room_keys/version")
    for path in rows:
        for method, body in (
            *(("GET", None), ("DELETE", None), ("PUT", BACKUP), ("POST", BACKUP)),
        ):
            answer: Answer = yield Client(host, user, "").request(method, path, body)
            refused(answer, 404, "M_UNRECOGNIZED", row=f"{method} {path}")


IDS = [
    "!room:example.org",
    "!31hneApxJ_1o-63DmFrpeqnkFfWppnzWso1JvH3ogLM",
    "Zm9v/YmFy+YmF6/cXV4+Zg==",
    "a/b",
    "a%2Fb",
    "a+b",
    "a b",
    "a?version=1#b&c=d;e",
    "'\"\\<%>",
    "\u00fc\u00f1\u00ef/\u2603/\U0001f511",
    "...",
]


@scenario
def paths_are_split_before_segments_are_decoded(host: Host) -> Steps:
    """A path is split at slashes before its segments are decoded, so any id that is
    percent-encoded once arrives unchanged."""
    client, version = yield new_backup(host)
    rooms = {
        room: {session: key(index, data=f"{room} {session}") for session in IDS}
        for index, room in enumerate(IDS)
    }
    for room, keys in rooms.items():
        for session, sent in keys.items():
            path = keys_path(version, room, session)
            tally((yield client.put(path, sent)), path)
            same(accepted((yield client.get(path)), path), sent, path)
        path = keys_path(version, room)
        same(accepted((yield client.get(path)), path), {"sessions": keys}, path)
    same((yield client.download(version)), rooms)
    for room in IDS:
        path = keys_path(version, room, IDS[2])
        tally((yield client.delete(path)), path)
        del rooms[room][IDS[2]]
    tally((yield client.delete(keys_path(version, IDS[3]))))
    del rooms[IDS[3]]
    same((yield client.download(version)), rooms)


@scenario
def equivalent_encodings_of_a_path_are_the_same_id(host: Host) -> Steps:
    """Raw characters, and escapes in upper or lower case, are the same id; `+` is a
    plus sign."""
    client, version = yield new_backup(host)
    want = key(3)
    yield client.upload(version, {"!a+b:h": {"c/d+e=": want}})
    for room in ("!a+b:h", "%21a%2Bb%3Ah", "%21a%2bb%3ah", "%21%61+b:%68"):
        for session in ("c%2Fd+e=", "c%2fd%2be%3d", "c%2Fd%2Be="):
            path = f"/keys/{room}/{session}?version={version}"
            same(accepted((yield client.get(path)), path), want, path)
    number = "".join(f"%{ord(digit):x}" for digit in version)
    accepted((yield client.get(f"/keys?version={number}")), number)
    accepted((yield client.get(f"/version/{number}")), number)


@scenario
def authentication_precedes_validation(host: Host) -> Steps:
    """A request without a token, with an unknown token or from a guest is refused as
    such, whatever errors the request has besides."""
    client, version = yield new_backup(host)
    yield client.upload(version, {"!r:h": {"s": key()}})
    rows = endpoints(version) + [
        (method, path, body)
        for path in ("/keys", "/keys/!r:h", "/keys/!r:h/s", keys_path("nonsense"))
        for method, body in (("PUT", b"{"), ("PUT", b""), ("GET", None))
    ]
    rows += [
        ("POST", "/version", b"\xff"),
        ("PUT", "/version", b"[]"),
        ("PUT", version_path("nonsense"), b"{}"),
        ("DELETE", "/version", None),
        ("PUT", f"/keys/{quoted('x' * 300)}/s?version={version}", b"null"),
    ]
    nobody = "no-token-of-this-server"
    guest = host.new_guest().access_token
    for method, path, body in rows:
        for token, status, errcode in (
            (None, 401, "M_MISSING_TOKEN"),
            (nobody, 401, "M_UNKNOWN_TOKEN"),
            (guest, 403, "M_GUEST_ACCESS_FORBIDDEN"),
        ):
            row = f"{method} {path[:80]} as {errcode}"
            if token is None:
                raw = body if isinstance(body, bytes) else b"{}"
                answer: Answer = yield host.request(
                    method,
                    PREFIX + path,
                    token=None,
                    body=None if body is None else raw,
                )
            else:
                asker = attrs.evolve(client, user=User("@somebody:h", token))
                answer = yield asker.request(method, path, body)
            error = refused(answer, status, errcode, row=row)
            assert error.get("soft_logout", False) is False, f"{row}: {answer}"
    assert (yield client.tally(version))[1] == 1, "a refused request did something"

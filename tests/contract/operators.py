"""Scenarios of the HTTP interface for operators."""

from __future__ import annotations

import io
import json
from collections.abc import Generator
from typing import Any

import attrs
from twisted.internet.defer import Deferred, inlineCallbacks

from synapse_roomkeys.admin.transfer_file import LinesFile

from .base import (
    ALGORITHM,
    AUTH_DATA,
    Answer,
    Client,
    OperatorHost,
    Rooms,
    Steps,
    accepted,
    key,
    keys_path,
    operator_scenario,
    quoted,
    refused,
    same,
    version_path,
)

ADMIN_PREFIX = "/_synapse/roomkeys/v1"
#: Data of all keys here: no answer but an export may hold it.
DATA = "the-data-of-a-key"
ROOMS: Rooms = {"!a:h": {"s1": key(9, data=DATA), "s2": key(9, data=DATA)}}
#: Number of waits for the end of a task: half a minute on a real server.
PATIENCE = 300


@attrs.frozen
class Operator:
    """An operator of a server.

    Attributes:
        api: sends requests to the interface as the operator.
    """

    host: OperatorHost
    api: Client

    @inlineCallbacks
    def get(self, path: str) -> Generator[Deferred[Any], Any, Any]:
        """Fire with the body of an accepted GET, which has no data of keys."""
        answer: Answer = yield self.api.get(path)
        assert DATA not in answer.body.decode(), f"{path}: {answer}"
        return accepted(answer, path)

    @inlineCallbacks
    def run(self, path: str, body: Any) -> Generator[Deferred[Any], Any, Any]:
        """Begin a task. Fire with the finished task."""
        answer: Answer = yield self.api.post(path, body)
        task_id = accepted(answer, path)["task_id"]
        for _ in range(PATIENCE):
            task: dict[str, Any] = yield self.get(f"/tasks/{task_id}")
            if task["status"] not in ("scheduled", "active"):
                assert task["operator"] == self.api.user.user_id, task
                return task
            yield self.host.wait()
        raise AssertionError(f"{path}: the task didn't end: {task}")

    @inlineCallbacks
    def complete(self, path: str, body: Any) -> Generator[Deferred[Any], Any, Any]:
        """Run a task to completion. Fire with the task's result."""
        task: dict[str, Any] = yield self.run(path, body)
        assert (task["status"], task["error"]) == ("complete", None), task
        return task["result"]


def new_operator(host: OperatorHost) -> Operator:
    """Return an operator."""
    return Operator(host, Client(host, host.new_operator(), ADMIN_PREFIX))


@inlineCallbacks
def new_backup(
    host: OperatorHost, rooms: Rooms = ROOMS
) -> Generator[Deferred[Any], Any, tuple[Client, str]]:
    """Create a user with a backup. Fire with the user's client and the version."""
    client = Client(host.clients, host.clients.new_user())
    version: str = yield client.create_version()
    yield client.upload(version, rooms)
    return client, version


def user_path(client: Client, rest: str = "") -> str:
    """The path of a user."""
    return f"/users/{quoted(client.user.user_id)}{rest}"


def endpoints(client: Client, version: str) -> list[tuple[str, str, Any]]:
    """Method, path and a good body of each endpoint."""
    restore = {"version": version, "before_ms": 0}
    return [
        ("GET", "/users", None),
        ("GET", user_path(client), None),
        ("GET", user_path(client, "/record"), None),
        ("GET", user_path(client, "/export"), None),
        ("POST", user_path(client, "/restore"), restore),
        ("POST", user_path(client, "/erase"), {"even_if_active": True}),
        ("POST", "/purge", {"what": "orphaned"}),
        ("POST", "/statistics", {}),
        ("GET", "/tasks", None),
        ("GET", "/tasks/0", None),
        ("POST", "/tasks/0/cancel", {}),
    ]


@operator_scenario
def only_operators_are_answered(host: OperatorHost) -> Steps:
    """Requests without an operator's token are refused, and change nothing."""
    client, version = yield new_backup(host)
    operator = new_operator(host)
    before = yield operator.get("/tasks")
    strangers: list[tuple[str | None, int, str]] = [
        (None, 401, "M_MISSING_TOKEN"),
        ("unknown_token_0000000000", 401, "M_UNKNOWN_TOKEN"),
        (client.user.access_token, 403, "M_FORBIDDEN"),
    ]
    for method, path, body in endpoints(client, version):
        for token, status, errcode in strangers:
            sent = None if body is None else json.dumps(body).encode()
            answer: Answer = yield host.request(
                method, ADMIN_PREFIX + path, token=token, body=sent
            )
            if token == client.user.access_token and answer.status == 401:
                # A server whose operators have a token of their own knows no other.
                status, errcode = 401, "M_UNKNOWN_TOKEN"
            refused(answer, status, errcode, row=f"{method} {path}")
            assert client.user.user_id not in answer.body.decode(), path
    same((yield operator.get("/tasks"))["total"], before["total"], "no task")
    same((yield client.download(version)), ROOMS)


@operator_scenario
def a_user_is_described(host: OperatorHost) -> Steps:
    """A user's versions have state, count and public key, and no key."""
    client, first = yield new_backup(host)
    auth_data = {
        "public_key": "the-public-key",
        "signatures": {client.user.user_id: {"ed25519:D": "s"}},
    }
    second = yield client.create_version(auth_data)
    operator = new_operator(host)
    found = yield operator.get(user_path(client))
    same(found["user"], client.user.user_id)
    same(found["keys"], 2)
    old, new = found["versions"]
    same([old["version"], new["version"]], [first, second])
    same([old["state"], new["state"]], ["superseded", "current"])
    same([old["keys"], new["keys"]], [2, 0])
    same([new["algorithm"], new["public_key"]], [ALGORITHM, "the-public-key"])
    same(new["signed_by"], ["ed25519:D"])
    assert old["last_upload_ms"] and old["created_ms"], old
    stranger = yield operator.api.get("/users/%40nobody%3Atest.example")
    refused(stranger, 404, "M_NOT_FOUND")


@operator_scenario
def users_are_listed_in_pages(host: OperatorHost) -> Steps:
    """The pages together are the whole list, in each order and direction."""
    clients = []
    for number in (3, 1, 2):
        sessions = {f"{n}": key(data=DATA) for n in range(number)}
        client, _ = yield new_backup(host, {"!a:h": sessions})
        clients.append(client)
    names = [client.user.user_id for client in clients]
    operator = new_operator(host)
    orders = {
        "name": sorted(names),
        "keys": [names[1], names[2], names[0]],
        "bytes": [names[1], names[2], names[0]],
        "last_upload": names,
    }
    for order, wanted in orders.items():
        for direction in ("f", "b"):
            query = f"order_by={order}&dir={direction}"
            whole = yield operator.get(f"/users?{query}&limit=1000")
            users = [user["user"] for user in whole["users"]]
            same(whole["total"], len(users), query)
            assert "next_token" not in whole, query
            own = [name for name in users if name in names]
            if direction == "b":
                own.reverse()
            if order != "last_upload":
                same(own, wanted, query)
            assert {*own} == {*names}, query
            paged: list[str] = []
            token: str | None = "0"
            while token is not None:
                path = f"/users?{query}&limit=2&from={token}"
                page = yield operator.get(path)
                paged += [user["user"] for user in page["users"]]
                same(page["total"], len(users), path)
                token = page.get("next_token")
            same(paged, users, query)
    # Only other orders are sorted in memory.
    end = yield operator.get(f"/users?from={2**53 - 1}")
    same([end["users"], end["total"]], [[], len(users)])
    assert "next_token" not in end, end


@operator_scenario
def the_record_is_answered_newest_first(host: OperatorHost) -> Steps:
    """A recorded change has act, time, device and sessions."""
    client, version = yield new_backup(host)
    yield client.delete(keys_path(version, "!a:h", "s1"))
    operator = new_operator(host)
    path = user_path(client, "/record")
    record = yield operator.get(path)
    acts = [change["act"] for change in record["changes"]]
    same(acts, ["delete_keys", "upload", "create_version"])
    same(record["total"], 3)
    upload = record["changes"][1]
    same(upload["sessions"], {"!a:h": {"stored": ["s1", "s2"]}})
    same([upload["stored"], upload["operator"]], [2, None])
    assert upload["device_id"], upload
    page = yield operator.get(f"{path}?limit=1&from=1")
    same([page["changes"], page["next_token"]], [[upload], "2"])
    later = yield operator.get(f"{path}?since_ms={upload['changed_ms'] + 10**9}")
    same([later["changes"], later["total"]], [[], 0])


@operator_scenario
def an_export_has_all_keys(host: OperatorHost) -> Steps:
    """An export has all keys that clients can read. The export is recorded."""
    rooms: Rooms = {
        "!a:h": {f"{n}": key(n, data={"ciphertext": DATA}) for n in range(150)},
        '!"b"\\ü:h': {"s/+=": key(2, 3, True, data=DATA)},
    }
    client, first = yield new_backup(host, ROOMS)
    second = yield client.create_version()
    yield client.upload(second, rooms)
    operator = new_operator(host)
    path = user_path(client, "/export")
    answer: Answer = yield operator.api.get(path)
    assert answer.status == 200, answer
    same(answer.headers["content-type"], "application/x-ndjson")
    same(read_export(answer.body), {first: ROOMS, second: rooms})
    part: Answer = yield operator.api.get(f"{path}?version={first}")
    same(read_export(part.body), {first: ROOMS})
    head: Answer = yield operator.api.request("HEAD", path)
    same([head.status, head.body.decode()], [200, ""])
    record = yield operator.get(user_path(client, "/record"))
    exports = [c for c in record["changes"] if c["act"] == "export"]
    same(sorted(change["version"] for change in exports), [first, first, second])
    assert {c["operator"] for c in exports} == {operator.api.user.user_id}, exports
    for version in ("1", "x", "9" * 30):
        wrong = yield operator.api.get(f"{path}?version={version}")
        refused(wrong, 404, "M_NOT_FOUND", row=version)


def read_export(data: bytes) -> dict[str, Rooms]:
    """Check an export as the command ``import`` does. Return the keys by version."""
    file = LinesFile(io.BytesIO(data))
    for _ in file.check():
        pass
    found: dict[str, Rooms] = {}
    for version in file.versions:
        assert version.info is not None
        same(json.loads(version.info.auth_data), AUTH_DATA)
        rooms = found.setdefault(str(version.info.version), {})
        for entry in file.read_keys(version):
            value = entry.parse()
            fields = value.metadata
            rooms.setdefault(value.room_id, {})[value.session_id] = key(
                fields.first_message_index,
                fields.forwarded_count,
                fields.is_verified,
                json.loads(value.session_data),
            )
    return found


@operator_scenario
def a_deleted_version_is_given_back(host: OperatorHost) -> Steps:
    """A restored version is current, with all keys. A second request is a 404."""
    client, version = yield new_backup(host)
    yield client.delete(version_path(version))
    operator = new_operator(host)
    path, body = user_path(client, "/restore"), {"version": version}
    restored = accepted((yield operator.api.post(path, body)))
    same(restored, {"restored_keys": 2, "is_current": True})
    same((yield client.download(version)), ROOMS)
    refused((yield operator.api.post(path, body)), 404, "M_NOT_FOUND")
    record = yield operator.get(user_path(client, "/record?limit=1"))
    [change] = record["changes"]
    name = operator.api.user.user_id
    same([change["act"], change["operator"]], ["restore_version", name])


@operator_scenario
def replaced_keys_are_given_back(host: OperatorHost) -> Steps:
    """Old keys replace keys that decrypt fewer messages, in one session or in all
    sessions."""
    client, version = yield new_backup(host)
    worse = {s: key(20, verified=True, data=DATA) for s in ("s1", "s2")}
    yield client.upload(version, {"!a:h": worse})
    operator = new_operator(host)
    path, body = user_path(client, "/restore"), {"version": version, "before_ms": 0}
    kept = accepted((yield operator.api.post(path, body)))
    same(kept, {"restored_keys": 0}, "a verified key is better")
    one = {**body, "room_id": "!a:h", "session_id": "s1", "force": True}
    same(accepted((yield operator.api.post(path, one))), {"restored_keys": 1})
    found = yield client.download(version)
    same(found["!a:h"], {"s1": ROOMS["!a:h"]["s1"], "s2": worse["s2"]})
    every = {**body, "force": True}
    same(accepted((yield operator.api.post(path, every))), {"restored_keys": 1})
    same((yield client.download(version)), ROOMS)


@operator_scenario
def a_user_is_erased(host: OperatorHost) -> Steps:
    """Erasing an active account requires ``even_if_active``. The erasure leaves no row
    of the user, and the task's result is the receipt."""
    client, version = yield new_backup(host)
    operator = new_operator(host)
    path = user_path(client, "/erase")
    for body in ({}, {"even_if_active": False}):
        refused((yield operator.api.post(path, body)), 403, "M_FORBIDDEN")
    receipt = yield operator.complete(path, {"even_if_active": True})
    same(receipt["user"], client.user.user_id)
    rows = receipt["rows"]
    same([rows["e2e_room_keys"], rows["e2e_room_keys_versions"]], [2, 1])
    assert rows["roomkeys_changes"] == 2, rows
    refused((yield client.get(version_path(version))), 404, "M_NOT_FOUND")
    refused((yield operator.api.get(user_path(client))), 404, "M_NOT_FOUND")
    record = yield operator.get(user_path(client, "/record"))
    same(record, {"changes": [], "total": 0})
    again = yield operator.api.post(path, {"even_if_active": True})
    refused(again, 404, "M_NOT_FOUND")


@operator_scenario
def what_nobody_uses_is_purged(host: OperatorHost) -> Steps:
    """A purge deletes superseded and deleted versions with all keys, and no current
    version."""
    client, first = yield new_backup(host)
    second = yield client.create_version()
    yield client.upload(second, ROOMS)
    deleted = Client(host.clients, host.clients.new_user())
    gone = yield deleted.create_version()
    yield deleted.upload(gone, ROOMS)
    yield deleted.delete(version_path(gone))
    operator = new_operator(host)
    early = yield operator.complete("/purge", {"what": "superseded", "before_ms": 9})
    same(early, {"versions": 0, "keys": 0})
    late = {"what": "superseded", "before_ms": 2**52}
    result = yield operator.complete("/purge", late)
    assert result["versions"] >= 1 and result["keys"] >= 2, result
    refused((yield client.get(version_path(first))), 404, "M_NOT_FOUND")
    same((yield client.download(second)), ROOMS)
    record = yield operator.get(user_path(client, "/record?limit=1"))
    [change] = record["changes"]
    name = operator.api.user.user_id
    wanted = ["delete_version", first, name]
    same([change["act"], change["version"], change["operator"]], wanted)
    found = yield operator.get(user_path(deleted))
    same([version["keys"] for version in found["versions"]], [2])
    result = yield operator.complete("/purge", {"what": "deleted"})
    assert result["versions"] >= 1, result
    found = yield operator.get(user_path(deleted))
    same([version["keys"] for version in found["versions"]], [0])
    yield operator.complete("/purge", {"what": "orphaned"})
    yield operator.complete("/purge", {"what": "record", "before_ms": 2**52})
    record = yield operator.get(user_path(client, "/record"))
    same(record["total"], 0)


@operator_scenario
def all_users_are_summed_up(host: OperatorHost) -> Steps:
    """The sums of all users are the result of a task."""
    client, _ = yield new_backup(host)
    operator = new_operator(host)
    result = yield operator.complete("/statistics", {"top": 1000})
    largest = {user["user"]: user for user in result["largest"]}
    same(largest[client.user.user_id]["keys"], 2)
    assert result["users"] == len(largest), result
    assert result["versions"]["current"] >= 1 and result["bytes"] > 0, result
    few = yield operator.complete("/statistics", {"top": 0})
    same(few["largest"], [])


@operator_scenario
def tasks_are_listed(host: OperatorHost) -> Steps:
    """The list begins with the newest task. A finished task can't be cancelled."""
    operator = new_operator(host)
    task = yield operator.run("/purge", {"what": "orphaned"})
    listed = yield operator.get("/tasks?limit=1")
    same(listed["tasks"], [task])
    complete = yield operator.get("/tasks?status=complete&limit=1")
    same(complete["tasks"], [task])
    failed = yield operator.get("/tasks?status=failed")
    assert task["task_id"] not in str(failed), failed
    path = f"/tasks/{task['task_id']}/cancel"
    same(accepted((yield operator.api.post(path, {}))), task)
    for path, method in (("/tasks/0", "GET"), ("/tasks/0/cancel", "POST")):
        unknown = yield operator.api.request(method, path)
        refused(unknown, 404, "M_NOT_FOUND", row=path)


@operator_scenario
def wrong_requests_are_refused(host: OperatorHost) -> Steps:
    """A request with a wrong parameter, body or path is a 4xx, and changes nothing."""
    client, version = yield new_backup(host)
    operator = new_operator(host)
    restore = user_path(client, "/restore")
    bad_json, not_json, invalid = "M_BAD_JSON", "M_NOT_JSON", "M_INVALID_PARAM"
    rows: list[tuple[str, str, Any, int, str]] = [
        ("GET", "/users?limit=0", None, 400, invalid),
        ("GET", "/users?limit=1001", None, 400, invalid),
        ("GET", "/users?limit=-1", None, 400, invalid),
        ("GET", "/users?from=x", None, 400, invalid),
        ("GET", f"/users?from={2**53}", None, 400, invalid),
        ("GET", f"/users?from={'9' * 5000}", None, 400, invalid),
        ("GET", "/users?from=10001&dir=b", None, 400, invalid),
        ("GET", "/users?from=10001&order_by=keys", None, 400, invalid),
        ("GET", "/users?order_by=etag", None, 400, invalid),
        ("GET", "/users?dir=up", None, 400, invalid),
        ("GET", "/users/%00", None, 400, bad_json),
        ("GET", f"/users/{'a' * 256}", None, 400, invalid),
        ("GET", "/users/%ff", None, 400, invalid),
        ("GET", user_path(client, "/record?since_ms=x"), None, 400, invalid),
        ("GET", "/tasks?status=lost", None, 400, invalid),
        ("GET", "/users/%00/export", None, 400, bad_json),
        ("GET", "/tasks/%00", None, 400, bad_json),
        ("POST", "/tasks/%00/cancel", {}, 400, bad_json),
        ("GET", "/nothing", None, 404, "M_UNRECOGNIZED"),
        ("DELETE", user_path(client), None, 405, "M_UNRECOGNIZED"),
        ("POST", "/purge", b"", 400, bad_json),
        ("POST", "/purge", b"{", 400, not_json),
        ("POST", "/purge", b"\xff", 400, not_json),
        ("POST", "/purge", b"[" * 5000, 400, bad_json),
        ("POST", "/purge", [], 400, bad_json),
        ("POST", "/purge", {"what": "all"}, 400, bad_json),
        ("POST", "/purge", {"what": "a\nb" + 9000 * "c"}, 400, bad_json),
        ("POST", "/purge", {"what": "superseded"}, 400, bad_json),
        ("POST", "/purge", {"what": "record"}, 400, bad_json),
        ("POST", "/purge", {"what": "deleted", "before_ms": 1}, 400, bad_json),
        ("POST", "/purge", {"what": "record", "before_ms": 2**53}, 400, bad_json),
        ("POST", "/purge", {"what": "record", "before_ms": "1"}, 400, bad_json),
        ("POST", "/statistics", {"top": 1001}, 400, bad_json),
        ("POST", "/statistics", {"top": True}, 400, bad_json),
        ("POST", restore, {}, 400, bad_json),
        ("POST", restore, {"version": 1}, 400, bad_json),
        ("POST", restore, {"version": "x"}, 404, "M_NOT_FOUND"),
        ("POST", restore, {"version": version}, 404, "M_NOT_FOUND"),
        ("POST", restore, {"version": version, "force": True}, 400, bad_json),
        ("POST", restore, {"version": version, "room_id": "!a:h"}, 400, bad_json),
        ("POST", user_path(client, "/erase"), {"even_if_active": 1}, 400, bad_json),
        ("POST", "/statistics", b" " * 70_000 + b"{}", 413, "M_TOO_LARGE"),
    ]
    for room in ("\0", ""):
        body = {"version": version, "before_ms": 0, "room_id": room}
        errcode = bad_json if room else invalid
        rows.append(("POST", restore, body, 400, errcode))
    for method, path, body, status, errcode in rows:
        answer = yield operator.api.request(method, path, body)
        row = f"{method} {path} {body!r:.80}"
        # A log may have the text: it must be one line.
        text = refused(answer, status, errcode, row=row)["error"]
        assert text.isprintable() and len(text) < 1000, f"{row}: {text!r}"
    same((yield client.download(version)), ROOMS)


@operator_scenario
def a_browser_may_ask_first(host: OperatorHost) -> Steps:
    """A preflight request needs no token."""
    path = ADMIN_PREFIX + "/users"
    answer: Answer = yield host.request("OPTIONS", path, token=None)
    assert answer.status in (200, 204), answer
    same(answer.headers["access-control-allow-origin"], "*")

"""Tests that ``docs/openapi.yaml`` describes exactly the answers of the contract's
scenarios."""

from __future__ import annotations

import json
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from ..contract import OPERATOR_SCENARIOS, SCENARIOS, Answer
from ..contract.base import PREFIX
from ..contract.operators import ADMIN_PREFIX
from ..memory import MemoryAdminHost, MemoryHost
from ..openapi import DescribedHost, DescribedOperatorHost, Description

#: Statuses that occur in no scenario: 413 for a body over the limit at an endpoint that
#: needs no body, 429 for a user who floods the server, and 503 for a database outage.
UNSEEN = {413, 429, 503}
JSON = {"content-type": "application/json"}


def error(errcode: str, **members: Any) -> dict[str, Any]:
    """The body of an error."""
    return {"errcode": errcode, "error": "text", **members}


class DescriptionTests(SynchronousTestCase):
    """Tests of `Description` and of the document."""

    def test_all_answers_are_described(self) -> None:
        """The answers of every scenario are described, and each described status except
        those in `UNSEEN` occurs in a scenario."""
        description = Description()
        for scenario in SCENARIOS.values():
            host = DescribedHost(MemoryHost(), description)
            self.successResultOf(scenario(host))
        for operator_scenario in OPERATOR_SCENARIOS.values():
            operators = DescribedOperatorHost(MemoryAdminHost(), description)
            self.successResultOf(operator_scenario(operators))
        host = DescribedHost(MemoryHost(), description)
        token = host.new_user().access_token
        for method in ("GET", "DELETE"):
            path = PREFIX + "/version/%ff"
            self.successResultOf(host.request(method, path, token=token))
        seen = {(operation, status) for operation, status, _ in description.seen}
        unseen = description.described() - seen
        self.assertEqual({row for row in unseen if row[1] not in UNSEEN}, set())

    def test_answers_that_are_not_described_are_refused(self) -> None:
        """An answer with a status, errcode, type or member that the document lacks
        fails the check."""
        description = Description()
        good = {"etag": "1", "count": 0}
        for method, path, status, body in (
            ("GET", "/keys", 200, good),
            ("DELETE", "/keys", 200, {**good, "count": "0"}),
            ("DELETE", "/keys", 200, {**good, "count": 0.5}),
            ("DELETE", "/keys", 200, {**good, "etag": 1}),
            ("DELETE", "/keys", 200, {**good, "more": 1}),
            ("DELETE", "/keys", 200, {"etag": "1"}),
            ("DELETE", "/keys", 500, error("M_UNKNOWN")),
            ("DELETE", "/keys", 404, error("M_NOT_FOUND")),
            ("DELETE", "/keys", 404, {"error": "Unknown backup version"}),
            ("PUT", "/keys", 403, error("M_WRONG_ROOM_KEYS_VERSION")),
            ("GET", "/version", 404, error("M_UNKNOWN")),
            ("GET", "/version", 429, error("M_LIMIT_EXCEEDED", retry_after_ms=1)),
            ("PATCH", "/version", 404, error("M_UNRECOGNIZED")),
            ("GET", "/versions", 405, error("M_UNRECOGNIZED")),
            ("OPTIONS", "/version", 200, {}),
            ("OPTIONS", "/version", 204, {}),
        ):
            answer = Answer(status, JSON, json.dumps(body).encode())
            row = f"{method} {path} {answer}"
            with self.assertRaises((AssertionError, KeyError), msg=row):
                description.check(method, PREFIX + path, b"{}", answer)

    def test_wrong_answers_to_operators_are_refused(self) -> None:
        """An answer to an operator with contradictory members, or at the path of a
        client's endpoint, fails the check."""
        description = Description()
        task = {
            "task_id": "0123456789abcdef",
            "action": "purge",
            "operator": "@admin:x",
            "parameters": {"what": "record", "before_ms": 9},
            "status": "complete",
            "created_ms": 1,
            "changed_ms": 2,
            "progress": {"after": "@user:x"},
            "result": {"changes": 1},
            "error": None,
        }
        path = ADMIN_PREFIX + "/tasks/0"
        good = Answer(200, JSON, json.dumps(task).encode())
        description.check("GET", path, b"", good)
        for wrong in (
            {**task, "result": None},
            {**task, "status": "active"},
            {**task, "action": "erase"},
            {**task, "progress": {"rows": {}}},
            {**task, "parameters": {"what": "record"}},
            {**task, "task_id": "0"},
            {**task, "more": 1},
        ):
            answer = Answer(200, JSON, json.dumps(wrong).encode())
            with self.assertRaises(AssertionError, msg=str(wrong)):
                description.check("GET", path, b"", answer)
        answer = Answer(200, {"content-type": "application/x-ndjson"}, b'{"type":"x"}')
        with self.assertRaises(AssertionError):
            description.check("GET", ADMIN_PREFIX + "/users/u/export", b"", answer)
        for other in (PREFIX + "/tasks/0", ADMIN_PREFIX + "/version"):
            with self.assertRaises(AssertionError, msg=other):
                description.check("GET", other, b"", good)

    def test_accepted_requests_must_be_described(self) -> None:
        """The body of an accepted request that the document does not allow fails the
        check."""
        answer = Answer(200, JSON, b'{"etag": "1", "count": 0}')
        check = Description().check
        check("PUT", PREFIX + "/keys", b'{"rooms": {}}', answer)
        for body in (b"{}", b'{"rooms": {"": {"sessions": {}}}}', b"[]"):
            with self.assertRaises(AssertionError, msg=body):
                check("PUT", PREFIX + "/keys", body, answer)

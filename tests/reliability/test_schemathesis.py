"""Answers of the service process match ``docs/openapi.yaml``."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import sampled_from
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from ..blocking_http import send
from ..contract.operators import ADMIN_PREFIX
from ..openapi import PATH
from ..servers.fake_homeserver import Homeserver
from ..servers.service import Service
from . import SOAK
from .sockets import exchange, new_version, upload

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
#: Number of requests for each operation.
EXAMPLES = 2_000 if SOAK else 40
SETTINGS = settings(
    max_examples=EXAMPLES,
    derandomize=not SOAK,
    database=None,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
#: Access token of the fake homeserver's first user, who has a backup.
TOKEN = f"token_{0:020}"
#: Token of the operators.
OPERATOR_TOKEN = secrets.token_hex(16)
OPERATIONS = [
    found.ok()
    for found in schemathesis.openapi.from_path(PATH).get_all_operations()
    if isinstance(found, Ok)
]
Operation = APIOperation[Any, Any, Any, Any]


class Fuzzed:
    """A service with one user, and with an interface for operators.

    Attributes:
        service: the process.
        user_id: the user with `TOKEN`.
    """

    def __init__(self, service: Service, user_id: str) -> None:
        self.service = service
        self.user_id = user_id

    def new_backup(self) -> str:
        """Create a version with a key; return the version's number."""
        version = new_version(self.service.port, TOKEN)
        sent = upload(version, TOKEN, "data", "Connection: close")
        # An erasure by an earlier request may delete the version before the upload.
        assert exchange(self.service.port, sent).statuses in ([200], [404])
        return version

    def new_task(self) -> str:
        """Begin a task; return the task's id."""
        url = f"{self.service.operators_url}{ADMIN_PREFIX}/statistics"
        answer = send("POST", url, {"Authorization": f"Bearer {OPERATOR_TOKEN}"}, b"")
        assert answer.status == 200, answer
        task_id: str = answer.json["task_id"]
        return task_id

    def validate(self, case: Case[Any]) -> None:
        """Send a request and check the answer."""
        prefix = urlsplit(case.operation.base_url).path
        is_operators = prefix == ADMIN_PREFIX
        url = self.service.operators_url if is_operators else self.service.url
        token = OPERATOR_TOKEN if is_operators else TOKEN
        case.call_and_validate(
            base_url=url + prefix,
            headers={"Authorization": f"Bearer {token}"},
            checks=CHECKS,
        )


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzed]:
    """A service with one user, whose number of versions isn't limited."""
    settings = {
        "limits": {"max_user_versions": 1_000_000},
        "retention": {"deleted_versions_days": 1},
    }
    directory = tmp_path_factory.mktemp("service")
    with (
        Homeserver() as homeserver,
        Service(
            directory,
            homeserver.url,
            settings=settings,
            operator_token=OPERATOR_TOKEN,
        ) as service,
    ):
        user = homeserver.new_user()
        assert user.access_token == TOKEN
        yield Fuzzed(service, user.user_id)
        log = service.log()
        assert "Traceback" not in log and "by a defect" not in log


@pytest.mark.parametrize(
    "operation", OPERATIONS, ids=lambda operation: str(operation.label)
)
def test_operation(operation: Operation, fuzzed: Fuzzed) -> None:
    """Generated requests get no server error, and every answer matches the description.
    Client requests, and three quarters of the operators', name a version, user or task
    that exists."""
    version = fuzzed.new_backup()
    existing = {"user_id": fuzzed.user_id}
    if "{task_id}" in operation.path:
        existing["task_id"] = fuzzed.new_task()

    @given(operation.as_strategy(), sampled_from((True, True, True, False)))
    @SETTINGS
    def check(case: Case[Any], names_existing: bool) -> None:
        nonlocal version
        if names_existing or not case.path_parameters.keys() & existing.keys():
            if case.operation.path.endswith("/erase"):
                version = fuzzed.new_backup()
            if "version" in case.query:
                case.query["version"] = version
            if isinstance(case.body, dict) and "before_ms" in case.body:
                case.body["version"] = version
            for name in case.path_parameters.keys() & existing.keys():
                case.path_parameters[name] = existing[name]
        fuzzed.validate(case)

    check()

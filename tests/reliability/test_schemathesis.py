"""Answers of the service process match ``docs/openapi.yaml``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
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

from ..contract.base import PREFIX
from ..openapi import PATH
from ..servers.fake_homeserver import Homeserver
from ..servers.service import Service
from . import SOAK
from .sockets import new_version

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
#: Access token of the fake homeserver's first user.
TOKEN = f"token_{0:020}"
OPERATIONS = [
    found.ok()
    for found in schemathesis.openapi.from_path(PATH).get_all_operations()
    if isinstance(found, Ok)
]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with one user."""
    with (
        Homeserver() as homeserver,
        Service(tmp_path_factory.mktemp("service"), homeserver.url) as service,
    ):
        assert homeserver.new_user().access_token == TOKEN
        yield service
        assert "Traceback" not in service.log()


@pytest.mark.parametrize(
    "operation", OPERATIONS, ids=lambda operation: str(operation.label)
)
def test_operation(
    operation: APIOperation[Any, Any, Any, Any], service: Service
) -> None:
    """Generated requests get no server error, and every answer matches the
    description."""
    version = new_version(service.port, TOKEN)

    @given(operation.as_strategy())
    @SETTINGS
    def check(case: Case[Any]) -> None:
        if "version" in case.query:
            case.query["version"] = version
        case.call_and_validate(
            base_url=service.url + PREFIX,
            headers={"Authorization": f"Bearer {TOKEN}"},
            checks=CHECKS,
        )

    check()

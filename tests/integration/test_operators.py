"""The interface for operators of real servers, and its tasks when processes end."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from pytest_twisted import blockon
from twisted.internet.defer import Deferred

from synapse_roomkeys.service.admin_auth import TOKEN_OPERATOR

from ..client import HttpHost, HttpOperatorHost
from ..contract import OPERATOR_SCENARIOS, OperatorScenario, User
from ..servers import Synapse
from ..servers.fake_homeserver import Homeserver
from ..servers.service import Service
from .conftest import host_of

#: Option of servers that keep a deleted version for a day.
KEEPING = {"deleted_versions_days": 1}

each_scenario = pytest.mark.parametrize(
    "scenario", OPERATOR_SCENARIOS.values(), ids=OPERATOR_SCENARIOS
)
Database = Callable[[], Mapping[str, Any] | None]


@pytest.fixture(scope="module")
def service_operators(
    database: Database, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HttpOperatorHost]:
    """A process of the service, whose operators have a token, on each engine."""
    directory = tmp_path_factory.mktemp("service")
    with Homeserver() as homeserver:
        service = Service(
            directory,
            homeserver.url,
            database=database(),
            settings={"retention": KEEPING},
            operator_token=secrets.token_hex(32),
        )
        with service:
            host = operators_of(service, homeserver)
            yield host
            blockon(host.close())
        assert "Traceback" not in service.log()


def operators_of(service: Service, homeserver: Homeserver) -> HttpOperatorHost:
    """Return the interface for operators of a service."""
    assert service.operator_token is not None
    operator = User(TOKEN_OPERATOR, service.operator_token)
    clients = HttpHost(service.url, homeserver.new_user, homeserver.new_guest)
    return HttpOperatorHost(service.operators_url, clients, lambda: operator)


@pytest.fixture(scope="module")
def synapse_operators(
    database: Database, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HttpOperatorHost]:
    """A Synapse whose administrators are operators, on each engine."""
    synapse = Synapse(
        tmp_path_factory.mktemp("synapse"),
        database=database(),
        module_config={**KEEPING, "admin_api": True},
    )
    with synapse:
        admin = synapse.register("admin", admin=True)
        operator = User(admin.user_id, admin.access_token)
        host = HttpOperatorHost(synapse.url, host_of(synapse), lambda: operator)
        yield host
        blockon(host.close())
    log = synapse.log()
    assert "Traceback" not in log
    for line in log.splitlines():
        assert "context" not in line or "WARNING" not in line, line


@each_scenario
def test_service(
    scenario: OperatorScenario, service_operators: HttpOperatorHost
) -> Deferred[None]:
    """The service keeps the contract for operators."""
    return scenario(service_operators)


@each_scenario
def test_synapse(
    scenario: OperatorScenario, synapse_operators: HttpOperatorHost
) -> Deferred[None]:
    """A Synapse with the plugin keeps the contract for operators."""
    return scenario(synapse_operators)

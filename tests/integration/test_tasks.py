"""The tasks of operators: restarts, kills, several processes, and authentication."""

from __future__ import annotations

import secrets
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest

from synapse_roomkeys.storage import SQLITE, postgres

from ..backup_client import Api
from ..blocking_http import send
from ..contract import User
from ..contract.base import accepted, key, quoted, refused, same
from ..contract.operators import ADMIN_PREFIX
from ..servers import PostgresServer, RedisServer, Synapse, Worker
from ..servers.fake_homeserver import Homeserver
from ..servers.service import Service
from ..tool import Tool

#: Timeout of a poll, in seconds.
DEADLINE = 60.0
#: Copies a user's only key to other sessions of its room.
ADD_KEYS = """
    INSERT INTO e2e_room_keys (user_id, version, room_id, session_id,
        first_message_index, forwarded_count, is_verified, session_data)
    WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)
    SELECT user_id, version, room_id, CAST(i AS TEXT), first_message_index,
        forwarded_count, is_verified, session_data
    FROM e2e_room_keys, n WHERE user_id = ? AND session_id = 's'"""

#: Stores a user's key without a version.
LEFT_KEY = """
    INSERT INTO e2e_room_keys (user_id, version, room_id, session_id, session_data)
    VALUES (?, 1, '!room', 's', '{}')"""
#: Options of a service whose operators are the administrators of the homeserver.
SYNAPSE_ADMINS = {"admin": {"synapse_admins": True}}

Database = Callable[[], Mapping[str, Any] | None]


@attrs.frozen
class Deployment:
    """Processes of the service on one database.

    Attributes:
        database: psycopg2's arguments, or None for an SQLite file.
    """

    directory: Path
    homeserver: Homeserver
    database: Mapping[str, Any] | None

    def new_service(self, name: str) -> Service:
        """Return a process that isn't started yet."""
        file = {"name": "sqlite3", "args": {"database": str(self.file)}}
        settings = {} if self.database is not None else {"database": file}
        return Service(
            self.directory / name,
            self.homeserver.url,
            database=self.database,
            settings=settings,
            operator_token=secrets.token_hex(32),
        )

    @property
    def file(self) -> Path:
        """The SQLite file."""
        return self.directory / "roomkeys.db"

    @property
    def tool(self) -> Tool:
        """Reads the database."""
        return Tool(self.directory, (), self.database or self.file)

    @property
    def keys(self) -> int:
        """Number of keys of a large backup, whose deletion takes 2 seconds or more:
        20 batches with a pause of 0.1 seconds each."""
        engine = SQLITE if self.database is None else postgres()
        return 20 * engine.swept_at_once

    def back_up(self, service: Service, user: User) -> str:
        """Make a large backup; return its version."""
        api = Api(service.url, user.access_token)
        version = api.create_version()
        api.upload(version, {"!room": {"s": key()}})
        self.tool.sql(ADD_KEYS, self.keys - 1, user.user_id)
        assert self.keys_of(user) == self.keys
        return version

    def keys_of(self, user: User) -> int:
        """Number of a user's stored keys."""
        count = "SELECT COUNT(*) FROM e2e_room_keys WHERE user_id = ?"
        [(number,)] = self.tool.sql(count, user.user_id)
        return int(number)


@pytest.fixture
def deployment(
    homeserver: Homeserver, database: Database, tmp_path: Path
) -> Deployment:
    """A database of each engine, without a process."""
    return Deployment(tmp_path, homeserver, database())


def operator_of(service: Service) -> Api:
    """The interface for operators of a service."""
    assert service.operator_token is not None
    return Api(service.operators_url, service.operator_token, ADMIN_PREFIX)


def begin(operator: Api, path: str, body: Any) -> str:
    """Begin a task; return its path."""
    return f"/tasks/{accepted(operator.post(path, body), path)['task_id']}"


def erase(operator: Api, user: User) -> str:
    """Begin to erase a user; return the path of the task."""
    path = f"/users/{quoted(user.user_id)}/erase"
    return begin(operator, path, {"even_if_active": True})


def until(condition: Callable[[], Any]) -> Any:
    """Poll until a condition is true, and return it; fail after DEADLINE seconds."""
    end = time.monotonic() + DEADLINE
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def wait_for_end(operator: Api, path: str) -> dict[str, Any]:
    """Wait for the end of a task, and return the task."""

    def read() -> dict[str, Any] | None:
        task: dict[str, Any] = accepted(operator.get(path), path)
        return task if task["status"] not in ("scheduled", "active") else None

    task: dict[str, Any] = until(read)
    return task


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_task_survives_a_restart(
    deployment: Deployment, number: signal.Signals
) -> None:
    """A task continues after a stop or a kill of the process and a restart. The receipt
    counts the keys of both runs."""
    user, other = (deployment.homeserver.new_user() for _ in range(2))
    service = deployment.new_service("service")
    with service:
        deployment.back_up(service, user)
        deployment.back_up(service, other)
        path = erase(operator_of(service), user)
        until(lambda: deployment.keys_of(user) < deployment.keys)
        service.send(number)
        assert service.wait(DEADLINE) is not None
        assert deployment.keys_of(user), "the task ended before the signal"
        # The lease of a killed process ends after a minute.
        deployment.tool.sql("UPDATE roomkeys_leases SET until_ms = 0")
        service.start()
        operator = operator_of(service)
        task = wait_for_end(operator, path)
        same(task["status"], "complete")
        assert deployment.keys_of(user) == 0
        same(task["result"]["rows"]["e2e_room_keys"], deployment.keys)
        same(deployment.keys_of(other), deployment.keys)
        assert "Traceback" not in service.log()


def test_a_task_is_cancelled(deployment: Deployment) -> None:
    """A cancelled task stops within a second. The next task runs, and clients are
    served."""
    user, other = (deployment.homeserver.new_user() for _ in range(2))
    with deployment.new_service("service") as service:
        deployment.back_up(service, user)
        operator = operator_of(service)
        path = erase(operator, user)
        until(lambda: deployment.keys_of(user) < deployment.keys)
        cancelled = accepted(operator.post(f"{path}/cancel", {}))
        same(cancelled["status"], "cancelled")
        deployment.back_up(service, other)
        task = wait_for_end(operator, begin(operator, "/purge", {"what": "orphaned"}))
        same(task["status"], "complete")
        left = deployment.keys_of(user)
        assert left, "the task went on"
        same(accepted(operator.get(path))["status"], "cancelled")
        same(deployment.keys_of(other), deployment.keys)
        # A second task deletes the remaining keys.
        task = wait_for_end(operator, erase(operator, user))
        same(task["result"]["rows"]["e2e_room_keys"], left)


def test_two_processes_share_the_tasks(deployment: Deployment) -> None:
    """A single process runs tasks at a time. After a kill of this process, the other
    process continues the task, and runs the next one."""
    user, other = (deployment.homeserver.new_user() for _ in range(2))
    first, second = (deployment.new_service(name) for name in ("first", "second"))
    with first, second:
        deployment.back_up(first, user)
        deployment.back_up(second, other)
        path = erase(operator_of(first), user)
        until(lambda: deployment.keys_of(user) < deployment.keys)
        operator = operator_of(second)
        other_path = erase(operator, other)
        first.kill()
        assert deployment.keys_of(user) and deployment.keys_of(other) == deployment.keys
        deployment.tool.sql("UPDATE roomkeys_leases SET until_ms = 0")
        for task_path, owner in ((path, user), (other_path, other)):
            same(wait_for_end(operator, task_path)["status"], "complete")
            assert deployment.keys_of(owner) == 0
        assert "Traceback" not in second.log()


def test_each_address_answers_its_own_paths(deployment: Deployment) -> None:
    """The addresses for clients and for metrics have no paths for operators. The
    address for operators has no paths for clients."""
    with deployment.new_service("service") as service:
        token = service.operator_token
        user = deployment.homeserver.new_user()
        headers = {"Authorization": f"Bearer {token}"}
        for url in (service.url, service.metrics_url.removesuffix("/metrics")):
            answer = send("GET", f"{url}{ADMIN_PREFIX}/users", headers)
            refused(answer, 404, "M_UNRECOGNIZED", row=url)
        client = Api(service.operators_url, user.access_token)
        refused(client.get("/version"), 404, "M_UNRECOGNIZED")
        assert token is not None and token not in service.log()


def test_administrators_of_the_homeserver(synapse: Synapse, tmp_path: Path) -> None:
    """The administrators of a Synapse are operators of the service beside it. Other
    users and guests aren't."""
    service = Service(tmp_path, synapse.url, settings=SYNAPSE_ADMINS)
    admin = synapse.register(f"admin{secrets.token_hex(3)}", admin=True)
    user = synapse.register(f"user{secrets.token_hex(3)}")
    with service:
        url = service.operators_url
        api = Api(url, admin.access_token, ADMIN_PREFIX)
        task = begin(api, "/purge", {"what": "orphaned"})
        same(wait_for_end(api, task)["operator"], admin.user_id)
        stranger = Api(url, user.access_token, ADMIN_PREFIX)
        refused(stranger.get("/users"), 403, "M_FORBIDDEN")
        guest = Api(url, synapse.guest().access_token, ADMIN_PREFIX)
        refused(guest.get("/users"), 403, "M_GUEST_ACCESS_FORBIDDEN")
        nobody = Api(url, "nobodys_token_0000000000", ADMIN_PREFIX)
        refused(nobody.get("/users"), 401, "M_UNKNOWN_TOKEN")
        assert "Traceback" not in service.log()


def test_a_homeserver_that_is_no_synapse(
    homeserver: Homeserver, tmp_path: Path
) -> None:
    """Without Synapse's admin API at the homeserver, no user is an operator."""
    service = Service(tmp_path, homeserver.url, settings=SYNAPSE_ADMINS)
    token = homeserver.new_user().access_token
    with service:
        url = f"{service.operators_url}{ADMIN_PREFIX}/users"
        answer = send("GET", url, {"Authorization": f"Bearer {token}"})
        refused(answer, 503, "M_UNKNOWN")
        assert "/_synapse/admin" in service.log(), "the log doesn't say why"


def test_the_interface_is_off_by_default(synapse: Synapse) -> None:
    """A Synapse with the module has no interface for operators by default."""
    admin = synapse.register(f"admin{secrets.token_hex(3)}", admin=True)
    api = Api(synapse.url, admin.access_token, ADMIN_PREFIX)
    refused(api.get("/users"), 404, "M_UNRECOGNIZED")


def test_a_worker_serves_operators(postgres: PostgresServer, tmp_path: Path) -> None:
    """A worker of a Synapse answers operators. A deactivated user is erased without
    ``even_if_active``."""
    module = {"admin_api": True}
    database = postgres.create_database()
    with (
        RedisServer(tmp_path / "redis") as redis,
        Synapse(tmp_path, database=database, module_config=module, redis=redis) as main,
        Worker(main, "worker") as worker,
    ):
        admin = main.register("admin", admin=True)
        user = main.register("user")
        client = Api(worker.url, user.access_token)
        version = client.create_version()
        client.upload(version, {"!room": {"s": key()}})
        api = Api(worker.url, admin.access_token, ADMIN_PREFIX)
        path = f"/users/{quoted(user.user_id)}/erase"
        refused(api.post(path, {}), 403, "M_FORBIDDEN")
        main.deactivate(user)
        Tool(tmp_path, (), database).sql(LEFT_KEY, user.user_id)
        task = wait_for_end(api, begin(api, path, {}))
        same([task["status"], task["operator"]], ["complete", admin.user_id])
        same(task["result"]["rows"]["e2e_room_keys"], 1)
        refused(api.get(path.removesuffix("/erase")), 404, "M_NOT_FOUND")
        assert "Traceback" not in worker.log()

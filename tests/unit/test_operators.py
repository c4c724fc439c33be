"""The scenarios of the interface for operators on a `Site` in memory."""

from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys.storage import record

from ..contract import OPERATOR_SCENARIOS, Client
from ..contract.base import key
from ..contract.operators import (
    ADMIN_PREFIX,
    new_operator,
    read_export,
    user_path,
)
from ..memory import MemoryAdminHost
from .scenarios import add_scenarios


class OperatorTests(SynchronousTestCase):
    """One test for each scenario, on a new server."""


add_scenarios(OperatorTests, OPERATOR_SCENARIOS, MemoryAdminHost)


class ExportTests(SynchronousTestCase):
    """Tests of exports that can't be whole."""

    def test_a_damaged_version_is_refused(self) -> None:
        """An export with a version whose ``auth_data`` isn't JSON is a 500, and the log
        names the version. The other versions are exported one by one."""
        host = MemoryAdminHost()
        client = Client(host.clients, host.clients.new_user())
        damaged, whole = (
            self.successResultOf(client.create_version()) for _ in range(2)
        )
        with host.clients.database.connection as connection:
            connection.execute(
                "UPDATE e2e_room_keys_versions SET auth_data = '{' WHERE version = ?",
                (int(damaged),),
            )
        token = host.new_operator().access_token
        path = ADMIN_PREFIX + user_path(client, "/export")
        with self.assertLogs("synapse_roomkeys.admin.handler", "ERROR") as logs:
            answer = self.successResultOf(host.request("GET", path, token=token))
        self.assertEqual(answer.status, 500)
        self.assertIn(damaged, logs.output[0])
        path += f"?version={whole}"
        answer = self.successResultOf(host.request("GET", path, token=token))
        self.assertEqual(read_export(answer.body), {whole: {}})


class RecordTests(SynchronousTestCase):
    """Tests of the pages of the record."""

    def test_a_page_of_many_sessions_is_shorter(self) -> None:
        """The changes of a page name a bounded number of sessions, or the page has a
        single change. The ``next_token`` leads to the rest."""
        self.patch(record, "PAGE_SESSIONS", 3)
        host = MemoryAdminHost()
        client = Client(host.clients, host.clients.new_user())
        version = self.successResultOf(client.create_version())
        for sizes in (5, 1, 2):
            rooms = {f"!{sizes}": {f"s{n}": key(sizes) for n in range(sizes)}}
            self.successResultOf(client.upload(version, rooms))
        operator = new_operator(host)
        pages = []
        token: str | None = "0"
        while token is not None:
            path = user_path(client, f"/record?from={token}")
            page = self.successResultOf(operator.get(path))
            pages.append([change["stored"] for change in page["changes"]])
            token = page.get("next_token")
        self.assertEqual(pages, [[2, 1], [5], [0]])

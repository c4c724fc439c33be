"""The limit of open files."""

from __future__ import annotations

import resource
from unittest import mock

from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys.service.files import raise_file_limit, room_for_connections


class RaiseFileLimitTests(SynchronousTestCase):
    """`raise_file_limit`; ``integration/test_file_limit.py`` has a real limit."""

    def raised(
        self, soft: int, hard: int, error: Exception | None = None
    ) -> tuple[int, list[mock._Call]]:
        """The limit in force afterwards, and what the system was asked for."""
        with (
            mock.patch.object(resource, "getrlimit", return_value=(soft, hard)),
            mock.patch.object(resource, "setrlimit", side_effect=error) as setrlimit,
        ):
            return raise_file_limit(), setrlimit.mock_calls

    def test_it_is_raised_to_the_hard_limit(self) -> None:
        """That is as far as a process may go."""
        want = mock.call(resource.RLIMIT_NOFILE, (4096, 4096))
        self.assertEqual(self.raised(1024, 4096), (4096, [want]))

    def test_nothing_is_asked_for_in_vain(self) -> None:
        """A filter of system calls may kill who asks."""
        self.assertEqual(self.raised(4096, 4096), (4096, []))

    def test_it_may_be_forbidden(self) -> None:
        """Then the limit stays, and the log says so."""
        for error in (PermissionError("no"), ValueError("not allowed")):
            with self.assertLogs("synapse_roomkeys", "WARNING") as logged:
                limit, _ = self.raised(1024, 4096, error)
            self.assertEqual(limit, 1024)
            self.assertIn("stays at 1024 and isn't raised to 4096", logged.output[0])


class RoomForConnectionsTests(SynchronousTestCase):
    """`room_for_connections`."""

    def test_each_may_have_a_file_for_its_body(self) -> None:
        """Two more files are one more connection; the database takes three each."""

        def room(files: int, database: int) -> int:
            return room_for_connections(
                files, database_connections=database, other_connections=50
            )

        self.assertEqual(room(1024, 10), (1024 - 32 - 30 - 50) // 2)
        self.assertEqual(room(1026, 10), room(1024, 10) + 1)
        self.assertEqual(room(1024, 12), room(1024, 10) - 3)
        self.assertLess(room(64, 10), 1)

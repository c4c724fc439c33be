"""Tests of the limit of open files."""

from __future__ import annotations

import resource
from unittest import mock

from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys.service.files import max_client_connections, raise_file_limit


class RaiseFileLimitTests(SynchronousTestCase):
    """Tests of `raise_file_limit`; ``integration/test_file_limit.py`` tests a real
    limit."""

    def raised(
        self, soft: int, hard: int, error: Exception | None = None
    ) -> tuple[int, list[mock._Call]]:
        """Call `raise_file_limit`; return the limit in force afterwards and the calls
        to the system."""
        with (
            mock.patch.object(resource, "getrlimit", return_value=(soft, hard)),
            mock.patch.object(resource, "setrlimit", side_effect=error) as setrlimit,
        ):
            return raise_file_limit(), setrlimit.mock_calls

    def test_the_soft_limit_is_raised_to_the_hard_limit(self) -> None:
        """The soft limit is raised to the hard limit, the highest that an unprivileged
        process may set."""
        want = mock.call(resource.RLIMIT_NOFILE, (4096, 4096))
        self.assertEqual(self.raised(1024, 4096), (4096, [want]))

    def test_a_sufficient_limit_is_left(self) -> None:
        """If the soft limit equals the hard limit, the system call is not made, because
        a system call filter may kill the caller."""
        self.assertEqual(self.raised(4096, 4096), (4096, []))

    def test_a_forbidden_raise_is_logged(self) -> None:
        """If the system refuses to raise the limit, the limit stays and a warning is
        logged."""
        for error in (PermissionError("no"), ValueError("not allowed")):
            with self.assertLogs("synapse_roomkeys", "WARNING") as logged:
                limit, _ = self.raised(1024, 4096, error)
            self.assertEqual(limit, 1024)
            self.assertIn("stays at 1024 and isn't raised to 4096", logged.output[0])


class RoomForConnectionsTests(SynchronousTestCase):
    """Tests of `max_client_connections`."""

    def test_each_connection_takes_two_files(self) -> None:
        """A client connection takes two files, its socket and a temporary file for the
        body; a database connection takes three files."""

        def room(files: int, database: int) -> int:
            return max_client_connections(
                files, database_connections=database, other_connections=50
            )

        self.assertEqual(room(1024, 10), (1024 - 32 - 30 - 50) // 2)
        self.assertEqual(room(1026, 10), room(1024, 10) + 1)
        self.assertEqual(room(1024, 12), room(1024, 10) - 3)
        self.assertLess(room(64, 10), 1)

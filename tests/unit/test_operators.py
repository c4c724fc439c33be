"""The interface for operators on a server in memory."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from ..contract import OPERATOR_SCENARIOS
from ..memory import MemoryAdminHost


class OperatorTests(SynchronousTestCase):
    """The contract's scenarios for operators."""

    def test_scenarios(self) -> None:
        """Each scenario holds."""
        for name, scenario in OPERATOR_SCENARIOS.items():
            with self.subTest(name):
                self.successResultOf(scenario(MemoryAdminHost()))

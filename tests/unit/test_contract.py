"""The contract, scenario by scenario, through a `Site` in memory."""

from collections.abc import Callable

from twisted.trial.unittest import SynchronousTestCase

from ..contract import SCENARIOS, Scenario
from ..memory import MemoryHost


class ContractTests(SynchronousTestCase):
    """Each scenario on a server of its own."""


def _test(scenario: Scenario) -> Callable[[SynchronousTestCase], None]:
    def test(self: SynchronousTestCase) -> None:
        self.successResultOf(scenario(MemoryHost()))

    test.__doc__ = scenario.__doc__
    return test


for _name, _scenario in SCENARIOS.items():
    setattr(ContractTests, f"test_{_name}", _test(_scenario))

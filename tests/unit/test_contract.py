"""The scenarios of the contract on a `Site` in memory."""

from collections.abc import Callable

from twisted.trial.unittest import SynchronousTestCase

from ..contract import SCENARIOS, Scenario
from ..memory import MemoryHost


class ContractTests(SynchronousTestCase):
    """One test for each scenario, on a new server."""


def _test(scenario: Scenario) -> Callable[[SynchronousTestCase], None]:
    """Return a test method that runs a scenario and has the scenario's docstring."""

    def test(self: SynchronousTestCase) -> None:
        self.successResultOf(scenario(MemoryHost()))

    test.__doc__ = scenario.__doc__
    return test


for _name, _scenario in SCENARIOS.items():
    setattr(ContractTests, f"test_{_name}", _test(_scenario))

"""The scenarios of the contract on a `Site` in memory."""

from twisted.trial.unittest import SynchronousTestCase

from ..contract import SCENARIOS
from ..memory import MemoryHost
from .scenarios import add_scenarios


class ContractTests(SynchronousTestCase):
    """One test for each scenario, on a new server."""


add_scenarios(ContractTests, SCENARIOS, MemoryHost)

"""The scenarios of the interface for operators on a `Site` in memory."""

from twisted.trial.unittest import SynchronousTestCase

from ..contract import OPERATOR_SCENARIOS
from ..memory import MemoryAdminHost
from .scenarios import add_scenarios


class OperatorTests(SynchronousTestCase):
    """One test for each scenario, on a new server."""


add_scenarios(OperatorTests, OPERATOR_SCENARIOS, MemoryAdminHost)

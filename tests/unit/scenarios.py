"""The contract's scenarios as test methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

H = TypeVar("H")


def add_scenarios(
    case: type[SynchronousTestCase],
    scenarios: Mapping[str, Callable[[H], Deferred[None]]],
    new_host: Callable[[], H],
) -> None:
    """Add a test method for each scenario to a class of tests.

    Args:
        scenarios: scenarios by name. A test method has the scenario's docstring.
        new_host: returns a new server in memory for each test.
    """
    for name, scenario in scenarios.items():
        setattr(case, f"test_{name}", _test(scenario, new_host))


def _test(
    scenario: Callable[[H], Deferred[None]], new_host: Callable[[], H]
) -> Callable[[SynchronousTestCase], None]:
    """Return a test method that runs a scenario on a new server."""

    def test(self: SynchronousTestCase) -> None:
        self.successResultOf(scenario(new_host()))

    test.__doc__ = scenario.__doc__
    return test

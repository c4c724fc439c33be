"""Each scenario of the contract over real HTTP on real databases."""

from __future__ import annotations

import pytest
from twisted.internet.defer import Deferred

from ..client import HttpHost
from ..contract import SCENARIOS, Scenario
from ..sites import OwnSite

each_scenario = pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)


@each_scenario
def test_own_site(scenario: Scenario, site: OwnSite) -> Deferred[None]:
    """The plugin's own site keeps the contract."""
    return scenario(site.host)


@each_scenario
def test_synapse(scenario: Scenario, synapse_host: HttpHost) -> Deferred[None]:
    """A Synapse with the plugin keeps the contract."""
    return scenario(synapse_host)

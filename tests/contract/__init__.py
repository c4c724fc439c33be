"""Scenarios of the contract, written once and run against every kind of server.

A scenario takes a `Host`, which is a server under test, and returns a `Deferred` that
fails if the server breaks the rule that names the scenario. The `Host` reaches the
server in memory, over a socket or inside a homeserver.
"""

from __future__ import annotations

from . import downloads, errors, isolation, operators, paths, uploads, versions
from .base import (
    OPERATOR_SCENARIOS,
    SCENARIOS,
    Answer,
    Client,
    Host,
    OperatorHost,
    OperatorScenario,
    Scenario,
    User,
)

__all__ = [
    "OPERATOR_SCENARIOS",
    "SCENARIOS",
    "Answer",
    "Client",
    "Host",
    "OperatorHost",
    "OperatorScenario",
    "Scenario",
    "User",
    "downloads",
    "errors",
    "isolation",
    "operators",
    "paths",
    "uploads",
    "versions",
]

"""The contract as scenarios, written once and run against every kind of server.

A scenario takes a `Host`, a server under test, and returns a `Deferred` that fails
when the server breaks the rule which the scenario is named after. How the server
is reached, in memory, over a socket or inside a homeserver, is the `Host`'s affair.
"""

from __future__ import annotations

from . import downloads, errors, isolation, paths, uploads, versions
from .base import SCENARIOS, Answer, Client, Host, Scenario, User

__all__ = [
    "SCENARIOS",
    "Answer",
    "Client",
    "Host",
    "Scenario",
    "User",
    "downloads",
    "errors",
    "isolation",
    "paths",
    "uploads",
    "versions",
]

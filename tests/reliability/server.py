"""The plugin's own site as a process of its own: DATABASE USERS.

DATABASE is psycopg2's arguments as JSON; USERS is how many users the server knows, with
the tokens that a new `StubAuth` gives to its first ones.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.task import react

from ..sites import Backend, OwnSite


@inlineCallbacks
def serve(
    reactor: Any, database: str, users: str
) -> Generator[Deferred[Any], Any, None]:
    """Print the address and answer requests until a signal comes."""
    site = OwnSite(Backend("postgres", json.loads(database), Path()))
    host = yield site.start()
    for _ in range(int(users)):
        host.new_user()
    print(f"listening at {host.url}", flush=True)
    yield Deferred()


if __name__ == "__main__":
    react(serve, sys.argv[1:])

"""A process that serves the plugin's own site. Arguments: DATABASE USERS.

DATABASE is a JSON object with psycopg2's arguments. USERS is the number of known users;
their tokens are the first tokens issued by a new `StubAuth`.
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
    """Print the server's address and answer requests until a signal ends the
    process."""
    site = OwnSite(Backend("postgres", json.loads(database), Path()))
    host = yield site.start()
    for _ in range(int(users)):
        host.new_user()
    print(f"listening at {host.url}", flush=True)
    yield Deferred()


if __name__ == "__main__":
    react(serve, sys.argv[1:])

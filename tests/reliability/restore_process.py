"""A process that gives all replaced keys of a version back. Arguments: DATABASE USER
VERSION.

DATABASE is a JSON object with psycopg2's arguments.
"""

from __future__ import annotations

import json
import sys
import time

from synapse_roomkeys.storage import EndToEndRoomKeyStore, postgres
from synapse_roomkeys.types import Actor, Limits, Restore, Retention

from .machine import BlockingPostgres, result_of


def main(database: str, user_id: str, version: str) -> None:
    """Restore the keys by force and print their number."""
    store = EndToEndRoomKeyStore(
        BlockingPostgres(json.loads(database)),
        postgres(),
        time.time,
        Limits(),
        Retention(),
    )
    everything = Restore(None, None, 0, is_forced=True)
    actor = Actor(None, "@admin:test.example")
    print(result_of(store.restore_keys(user_id, int(version), everything, actor)))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Failover from a killed PostgreSQL primary to its standby."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred, inlineCallbacks

from ..servers import PostgresServer
from ..servers.fake_homeserver import Homeserver
from ..servers.processes import HOST
from ..servers.service import Service
from ..servers.standby import Standby
from . import SOAK
from .clients import Connection
from .load import Load, is_write, new_load, summary

Steps = Generator[Deferred[Any], Any, None]

FAILOVERS = 10 if SOAK else 1
#: Longest time from the promotion to the first answered new write, in seconds.
RECOVERY_TIMEOUT = 10.0


@pytest.mark.parametrize("number", range(FAILOVERS))
@inlineCallbacks
def test_promotion_of_a_synchronous_standby(
    homeserver: Homeserver, tmp_path: Path, number: int
) -> Steps:
    """When the primary is killed under load and its synchronous standby promoted, no
    acknowledged write is lost, and the service connects to the new primary by
    itself."""
    with PostgresServer(tmp_path / "primary", durable=True) as primary:
        database = primary.create_database()
        with Standby(tmp_path / "standby", primary) as standby:
            standby.make_synchronous(database)
            either = {
                **database,
                "host": f"{HOST},{HOST}",
                "port": f"{primary.port},{standby.port}",
                "target_session_attrs": "read-write",
            }
            with Service(tmp_path, homeserver.url, database=either) as service:
                connection = Connection(service.url, homeserver.new_user())
                load: Load = yield new_load(connection, number)

                def fail_over() -> None:
                    primary.kill()
                    standby.promote()

                yield load.run(fail_over)
                yield load.read_back()
                load.check(may_repeat=True)
                begin, end = load.fault_times
                # Only writes sent after the promotion: earlier writes may have been
                # answered before the fault.
                later = [
                    event
                    for event in load.recorder.events
                    if event.start > end and is_write(event.operation)
                ]
                back = min(event.end for event in later)
                print(
                    f"{summary([load])}; the promotion took {end - begin:.1f} s, and it"
                    f" was back {back - end:.1f} s after it"
                )
                assert back - end < RECOVERY_TIMEOUT
                assert not any(e.is_lost for e in later if e.start > back)

"""Resources per new key: write-ahead log and processor time."""

import contextlib
from collections.abc import Sequence

import attrs

from ..backups import Backup
from ..keys import BATCH, Key
from ..results import Results, compare
from ..sampling import children, cpu_seconds, interleave
from ..testbed import Testbed
from .statements import postgres_database

# Uploads in a sample: enough for the resolution of processor time, which is 10 ms.
_BATCHES = 20
_READ_LSN = "SELECT pg_current_wal_insert_lsn() - '0/0'"


def costs(testbed: Testbed, results: Results) -> None:
    """Measure write-ahead log and processor time, one server uploading at a time."""
    meters = {
        name: ResourceMeter(testbed, backup)
        for name, backup in testbed.create_backups(0).items()
    }
    batches = 5 if testbed.plan.quick else _BATCHES
    inputs = (
        list(testbed.key_source.batches(batches))
        for _ in range(testbed.plan.heavy_samples)
    )
    interleave({name: meter.measure for name, meter in meters.items()}, inputs)
    log = {name: meter.log for name, meter in meters.items()}
    server = {name: meter.server for name, meter in meters.items()}
    database = {name: meter.database for name, meter in meters.items()}
    title = f"{BATCH} new keys an upload"
    results.lines += [
        compare("8", f"write-ahead log, {title}", "bytes/key", log),
        compare("8", f"processor, server, {title}", "s/1,000 keys", server),
        compare("8", f"processor, PostgreSQL, {title}", "s/1,000 keys", database),
    ]
    testbed.run_maintenance()


class ResourceMeter:
    """Meter of the write-ahead log and processor time of one server's uploads.

    Samples are in ``log`` (bytes a key), ``server`` and ``database`` (seconds of
    processor time for 1,000 keys).
    """

    def __init__(self, testbed: Testbed, backup: Backup) -> None:
        """Meter the uploads to one backup."""
        assert testbed.postgres is not None
        self.log: list[float] = []
        self.server: list[float] = []
        self.database: list[float] = []
        self._backup = backup
        self._postmaster = testbed.postgres.pid

    def measure(self, batches: Sequence[Sequence[Key]]) -> float:
        """Upload batches and store a sample of each; return bytes of log a key."""
        requests = [self._backup.upload(keys) for keys in batches]
        thousands = sum(map(len, batches)) / 1e3
        before = self._read()
        for request in requests:
            self._backup.send(request)
        after = self._read()
        used = sum(
            seconds - before.postgres.get(pid, 0.0)
            for pid, seconds in after.postgres.items()
        )
        self.log.append((after.log - before.log) / thousands / 1e3)
        self.server.append((after.server - before.server) / thousands)
        self.database.append(used / thousands)
        return self.log[-1]

    def _read(self) -> "_Counters":
        """Read all counters."""
        ((position,),) = postgres_database(self._backup.server).query(_READ_LSN)
        server = cpu_seconds(self._backup.server.pid)
        postgres = {}
        for pid in (self._postmaster, *children(self._postmaster)):
            # A PostgreSQL process may end between its listing and this.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                postgres[pid] = cpu_seconds(pid)
        return _Counters(int(position), server, postgres)


@attrs.frozen
class _Counters:
    """Counters that grow with a server's work.

    Args:
        log: The position of the write-ahead log's end, in bytes.
        server: The server's processor time, in seconds.
        postgres: The processor time of each PostgreSQL process by id, in seconds.
    """

    log: int
    server: float
    postgres: dict[int, float]

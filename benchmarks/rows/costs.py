"""What new keys cost the machine: write-ahead log and processor time."""

from collections.abc import Sequence

from ..backups import Backup
from ..keys import BATCH, Key
from ..results import Results, compare
from ..sampling import children, cpu_seconds, interleave
from ..stage import Stage
from .statements import postgres

_LOTS = 20
_LSN = "SELECT pg_current_wal_insert_lsn() - '0/0'"


def costs(stage: Stage, results: Results) -> None:
    """Measure log and processor time while each server alone stores keys."""
    meters = {name: Meter(stage, backup) for name, backup in stage.backup(0).items()}
    lots = 5 if stage.plan.quick else _LOTS
    materials = (list(stage.source.batches(lots)) for _ in range(stage.plan.heavy))
    interleave({name: meter.measure for name, meter in meters.items()}, materials)
    log = {name: meter.log for name, meter in meters.items()}
    server = {name: meter.server for name, meter in meters.items()}
    database = {name: meter.database for name, meter in meters.items()}
    title = f"{BATCH} new keys an upload"
    results.lines += [
        compare("8", f"write-ahead log, {title}", "bytes/key", log),
        compare("8", f"processor, server, {title}", "s/1,000 keys", server),
        compare("8", f"processor, PostgreSQL, {title}", "s/1,000 keys", database),
    ]
    stage.settle()


class Meter:
    """Reads off what one server and the database use."""

    def __init__(self, stage: Stage, backup: Backup) -> None:
        """Measure the uploads to one backup."""
        assert stage.postgres is not None
        self.log: list[float] = []
        self.server: list[float] = []
        self.database: list[float] = []
        self._backup = backup
        self._postmaster = stage.postgres.pid

    def measure(self, lots: Sequence[Sequence[Key]]) -> float:
        """Upload some batches, and note what was used per key."""
        requests = [self._backup.upload(keys) for keys in lots]
        thousands = sum(map(len, lots)) / 1e3
        log, server, before = self._read()
        for request in requests:
            self._backup.send(request)
        log_after, server_after, after = self._read()
        used = sum(spent - before.get(pid, 0.0) for pid, spent in after.items())
        self.log.append((log_after - log) / thousands / 1e3)
        self.server.append((server_after - server) / thousands)
        self.database.append(used / thousands)
        return self.log[-1]

    def _read(self) -> tuple[int, float, dict[int, float]]:
        """Return the log's end, and the processor time of server and database."""
        ((position,),) = postgres(self._backup.subject).query(_LSN)
        server = cpu_seconds(self._backup.subject.pid)
        pids = (self._postmaster, *children(self._postmaster))
        return int(position), server, {pid: cpu_seconds(pid) for pid in pids}

"""Full disks under the service's database: uploads are refused while there is no room.

Downloads are served meanwhile, and uploads again once there is room.
"""

from __future__ import annotations

import resource
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import attrs
import pytest
from twisted.internet.defer import inlineCallbacks

from ..contract import Answer
from ..contract.base import PREFIX, key, keys_path, tally, wrapped
from ..servers import PostgresServer
from ..servers.processes import make_directory, remove_directory
from . import SOAK
from .faults import (
    KEYS,
    Backup,
    Serve,
    Served,
    Steps,
    connected,
    new_keys,
    together,
)
from .sockets import exchange, request

#: Free bytes on a full disk: enough for a part of an upload, not for a whole one.
BYTES_LEFT = 65536
TMPFS_SIZE = "40m"
#: Number of connections kept open by the tests' HTTP client.
CONNECTIONS = 8


@attrs.frozen
class Disk:
    """A small file system, separate from the machine's."""

    directory: Path

    def fill(self) -> None:
        """Fill the file system except for BYTES_LEFT bytes, with a ballast file."""
        with (self.directory / "ballast").open("ab", buffering=0) as ballast:
            with suppress(OSError):
                while True:
                    ballast.write(bytes(4096))
            ballast.truncate(ballast.tell() - BYTES_LEFT)

    def free(self) -> None:
        """Delete the ballast file."""
        (self.directory / "ballast").unlink()


@contextmanager
def mounted(size: str) -> Iterator[Disk]:
    """Mount a file system in memory (tmpfs), and unmount the same at the end. Needs
    root."""
    directory = make_directory("disk-")
    how = ["mount", "-t", "tmpfs", "-o", f"size={size}", "roomkeys-tests"]
    subprocess.run([*how, str(directory)], check=True, capture_output=True)
    try:
        yield Disk(directory)
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)
        remove_directory(directory)


def can_mount() -> bool:
    """Whether this process may mount file systems."""
    try:
        with mounted("1m"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


needs_root = pytest.mark.skipif(not can_mount(), reason="needs root")


@inlineCallbacks
def check_full_disk(
    served: Served, fill: Callable[[], None], free: Callable[[], None]
) -> Steps:
    """Check the rules of a full disk: uploads get 503, downloads are served and /ready
    is 503. After `free`, uploads succeed and /ready is 200 again."""
    backups: list[Backup] = yield served.new_backups(3)
    fill()
    yield together([backup.refuse() for backup in backups])
    assert (yield served.ask_if_ready())["database"] == "unavailable"
    yield together([backup.check() for backup in backups])
    free()
    yield together([backup.upload() for backup in backups])
    yield together([backup.check() for backup in backups])
    yield served.wait_until_ready()


@inlineCallbacks
def test_a_file_size_limit(serve: Serve, tmp_path: Path) -> Steps:
    """When SQLite's files reach the process's limit of file size (RLIMIT_FSIZE), the
    rules of a full disk hold and the log has SQLite's error."""
    served = serve()
    log = tmp_path / "service" / "roomkeys.db-wal"

    def limit(size: int) -> None:
        limits = (size, resource.RLIM_INFINITY)
        resource.prlimit(served.service.pid, resource.RLIMIT_FSIZE, limits)

    yield check_full_disk(
        served,
        lambda: limit(log.stat().st_size + BYTES_LEFT),
        lambda: limit(resource.RLIM_INFINITY),
    )
    assert "giving up: OperationalError: disk I/O error" in served.service.log()


@inlineCallbacks
def test_a_count_that_cannot_be_cached(serve: Serve, tmp_path: Path) -> Steps:
    """A version whose cached count has expired is answered with a fresh count of the
    keys, even if SQLite can't write a byte to cache the fresh count."""
    served = serve()
    [backup] = yield served.new_backups(1)
    path = tmp_path / "service" / "roomkeys.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE roomkeys_counts SET counted_ts = 0")
        connection.commit()
        log = path.with_name("roomkeys.db-wal")
        limits = (log.stat().st_size, resource.RLIM_INFINITY)
        resource.prlimit(served.service.pid, resource.RLIMIT_FSIZE, limits)
        yield backup.check()
        found = connection.execute("SELECT counted_ts FROM roomkeys_counts").fetchall()
        assert found == [(0,)]
    failed = "OperationalError: disk I/O error (in roomkeys_keep_count)"
    assert failed in served.service.log()


def refuse_chunks(port: int, backup: Backup) -> None:
    """Send a whole chunked upload; the answer must be a 503 with Retry-After."""
    target = PREFIX + keys_path(backup.version)
    chunk = b"10000\r\n" + bytes(65536) + b"\r\n"
    chunks = [
        request(
            "PUT",
            target,
            backup.client.user.access_token,
            b"",
            "Transfer-Encoding: chunked",
        ),
        *[chunk] * 20,
    ]
    [reply] = exchange(port, *chunks, wanted=1).replies
    assert reply.status == 503, reply
    assert reply.json["errcode"] == "M_UNKNOWN", reply
    assert int(reply.headers["retry-after"]) > 0, reply


@pytest.fixture
def disk() -> Iterator[Disk]:
    """A file system of TMPFS_SIZE."""
    with mounted(TMPFS_SIZE) as disk:
        yield disk


@needs_root
@inlineCallbacks
def test_a_full_disk_under_sqlite(disk: Disk, serve: Serve) -> Steps:
    """When the file system of the SQLite database is full, the rules of a full disk
    hold and the log has SQLite's error."""
    served = serve(path=disk.directory / "roomkeys.db")
    yield check_full_disk(served, disk.fill, disk.free)
    full = "(disk_full), giving up: OperationalError: database or disk is full"
    assert full in served.service.log()


@needs_root
@inlineCallbacks
def test_a_full_temporary_directory(disk: Disk, serve: Serve) -> Steps:
    """When the temporary directory is full, uploads too large for the memory buffer get
    503, small uploads and downloads are served, no files stay open, and the log names
    the directory once."""
    served = serve(environment={"TMPDIR": str(disk.directory)})
    backups: list[Backup] = yield served.new_backups(3)
    files = Path(f"/proc/{served.service.pid}/fd")
    before = len(list(files.iterdir()))
    disk.fill()
    yield together([backup.refuse() for backup in backups])
    for backup in backups:
        refuse_chunks(served.service.port, backup)
        small = {"!small": {"s": key()}}
        tally((yield backup.send("PUT", wrapped(small))))
    for backup in backups:
        yield backup.client.download(backup.version)
    assert len(list(files.iterdir())) <= before + CONNECTIONS
    disk.free()
    for backup in backups:
        tally((yield backup.send("PUT", wrapped(new_keys()))))
    line = f"No room for the body of an upload in {disk.directory}: "
    assert served.service.log().count(line) == 1


@pytest.fixture
def own_postgres(tmp_path: Path) -> Iterator[PostgresServer]:
    """A PostgreSQL server for a single test, without effect on others if broken."""
    with PostgresServer(tmp_path / "own", durable=True) as server:
        yield server


@needs_root
@inlineCallbacks
def test_a_full_tablespace(
    disk: Disk, own_postgres: PostgresServer, serve: Serve
) -> Steps:
    """When PostgreSQL's tablespace is full, the rules of a full disk hold and the log
    has PostgreSQL's error."""
    database = own_postgres.create_database()
    own_postgres.take_ownership(disk.directory)
    with connected(database) as cursor:
        cursor.execute(f"CREATE TABLESPACE small LOCATION '{disk.directory}'")
    served = serve({**database, "options": "-c default_tablespace=small"})
    yield check_full_disk(served, disk.fill, disk.free)
    assert "(disk_full), giving up: DiskFull" in served.service.log()


if SOAK:

    @needs_root
    @inlineCallbacks
    def test_a_full_disk_under_the_write_ahead_log(
        disk: Disk, own_postgres: PostgresServer, serve: Serve
    ) -> Steps:
        """After a crash for lack of room for the write-ahead log, PostgreSQL still has
        all acknowledged uploads; after a restart with free room, uploads succeed."""
        database = own_postgres.create_database()
        own_postgres.move_wal(disk.directory)
        served = serve(database)
        backups: list[Backup] = yield served.new_backups(2)
        disk.fill()
        last = backups[0]
        while True:
            rooms = new_keys()
            answer: Answer = yield last.send("PUT", wrapped(rooms))
            if answer.status == 503:
                break
            tally(answer)
            last.acknowledge(rooms)
        own_postgres.stop()
        disk.free()
        own_postgres.start()
        # The upload during the crash may be stored or not.
        if (yield last.client.tally(last.version))[1] > len(last.rooms) * KEYS:
            last.acknowledge(rooms)
        yield together([backup.check() for backup in backups])
        yield together([backup.upload() for backup in backups])
        yield together([backup.check() for backup in backups])
        assert "No space left on device" in own_postgres.log()

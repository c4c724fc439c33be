"""Disks that are full under the service's database: what clients are told meanwhile,
and that all is well afterwards."""

from __future__ import annotations

import json
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

#: What room there is on a full disk, in bytes: enough for a part of an upload.
BYTES_LEFT = 65536
TMPFS_SIZE = "40m"
#: How many connections the tests' client keeps open.
CONNECTIONS = 8


@attrs.frozen
class Disk:
    """A small file system."""

    directory: Path

    def fill(self) -> None:
        """Leave next to no room."""
        with (self.directory / "ballast").open("ab", buffering=0) as ballast:
            with suppress(OSError):
                while True:
                    ballast.write(bytes(4096))
            ballast.truncate(ballast.tell() - BYTES_LEFT)

    def free(self) -> None:
        """Leave as much room as there was."""
        (self.directory / "ballast").unlink()


@contextmanager
def mounted(size: str) -> Iterator[Disk]:
    """A file system in memory; it takes root to make one."""
    directory = make_directory("disk-")
    how = ["mount", "-t", "tmpfs", "-o", f"size={size}", "roomkeys-tests"]
    subprocess.run([*how, str(directory)], check=True, capture_output=True)
    try:
        yield Disk(directory)
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)
        remove_directory(directory)


def can_mount() -> bool:
    """Whether we may make file systems."""
    try:
        with mounted("1m"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


needs_root = pytest.mark.skipif(not can_mount(), reason="it takes root")


@inlineCallbacks
def check_full_disk(
    served: Served, fill: Callable[[], None], free: Callable[[], None]
) -> Steps:
    """Uploads are refused while there is no room, the service isn't ready and serves
    downloads, and is ready again soon after there is room."""
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
    """SQLite's files have reached the size that the system allows a process."""
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
    """A version whose cached count has expired is shown with the count of its keys,
    though SQLite can't write a byte more."""
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
    """Have an upload of unknown length refused, that goes on to its end."""
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
    assert json.loads(reply.body)["errcode"] == "M_UNKNOWN", reply
    assert int(reply.headers["retry-after"]) > 0, reply


@pytest.fixture
def disk() -> Iterator[Disk]:
    """A file system of which one knows the end."""
    with mounted(TMPFS_SIZE) as disk:
        yield disk


@needs_root
@inlineCallbacks
def test_a_full_disk_under_sqlite(disk: Disk, serve: Serve) -> Steps:
    """There is no room on the file system."""
    served = serve(path=disk.directory / "roomkeys.db")
    yield check_full_disk(served, disk.fill, disk.free)
    full = "(disk_full), giving up: OperationalError: database or disk is full"
    assert full in served.service.log()


@needs_root
@inlineCallbacks
def test_a_full_temporary_directory(disk: Disk, serve: Serve) -> Steps:
    """Uploads that aren't kept in memory are 503 while their bodies have no room; small
    ones and downloads are served. The log names the directory once."""
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
    """A server that a test may break."""
    with PostgresServer(tmp_path / "own", durable=True) as server:
        yield server


@needs_root
@inlineCallbacks
def test_a_full_tablespace(
    disk: Disk, own_postgres: PostgresServer, serve: Serve
) -> Steps:
    """There is no room for PostgreSQL's tables."""
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
        """PostgreSQL has no room for its log, which ends it; it is started again when
        there is some."""
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
        # Nobody knows of the one that ended it.
        if (yield last.client.tally(last.version))[1] > len(last.rooms) * KEYS:
            last.acknowledge(rooms)
        yield together([backup.check() for backup in backups])
        yield together([backup.upload() for backup in backups])
        yield together([backup.check() for backup in backups])
        assert "No space left on device" in own_postgres.log()

"""Copies the backups of a Synapse's database into the service's.

It may run again and again, while Synapse serves: each time it brings what has changed
since. Once nothing but the service serves the backups, it is over: the database of the
service has gone on then. So whatever the target holds that isn't as a copy left it
stays there, and is told: only an operator can know which side is the one to keep. To
have the source's, its rows are deleted at the target, from `e2e_room_keys` and
`e2e_room_keys_versions`, for the user and the version that were told.

An etag moves with every change of the keys, but for Synapse's purge of a room, which
deletes keys and leaves the etags: so the keys are counted too.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from enum import Enum
from typing import Any

from ...config import OptionError
from ...describe import error_line
from ...storage import PAGE_KEYS, SQLITE, SchemaError, postgres
from ..config import DatabaseConfig, check_arguments
from .postgres_side import PostgresSide
from .report import Progress, Result
from .side import Held, Row, Side, Version, parse_version
from .sqlite_side import SqliteSide

#: How many rows are written before they are committed, about. A backup is never split.
_COMMIT_ROWS = 5000
#: How many warnings are written out; all are counted.
_WARNINGS = 100


class MigrateError(Exception):
    """The migration can't go on; the message is for the operator."""


class Verdict(Enum):
    """What is to be done with a version of the source, or why nothing is."""

    SAME = "is the same on both sides"
    COPY = "is to be copied"
    AHEAD = "has changed at the target since it was copied"
    BOTH = "has changed on both sides since it was copied"
    FOREIGN = "is at the target already, is another there and wasn't copied there"


def judge(version: Version, held: Held | None) -> Verdict:
    """Compare a version of the source with what the target holds of it."""
    if held is None:
        return Verdict.COPY
    there = held.version
    same = version.digest == there.digest and version.count == there.count
    if held.copied is None:
        return Verdict.SAME if same else Verdict.FOREIGN
    if held.copied == there.digest:
        return Verdict.SAME if same else Verdict.COPY
    return Verdict.AHEAD if held.copied == version.digest else Verdict.BOTH


def migrate(
    source: DatabaseConfig, target: DatabaseConfig, progress: Progress
) -> Result:
    """Copy the backups, and compare the two sides.

    Each version is copied in one transaction. Users and versions that are at the target
    only are left alone.

    Args:
        source: an existing Synapse's database, which is only read.
        target: the service's database, whose tables are made where they aren't there.

    Raises:
        MigrateError: a database is away, or isn't as expected. What was copied until
            then is there, and another run goes on from there.
    """
    try:
        errors = tuple(_error(config) for config in (source, target))
    except ImportError as error:
        raise MigrateError(str(error)) from None
    try:
        with (
            closing(_open(source, source=True)) as read,
            closing(_open(target, source=False)) as written,
        ):
            written.prepare()
            return _Migration(read, written, progress).run()
    except SchemaError as error:
        raise MigrateError(f"the target can't be used: {error}") from None
    except errors as error:
        raise MigrateError(f"{type(error).__name__}: {error_line(error)}") from None
    finally:
        progress.clear()


def synapse_database(homeserver: Any) -> DatabaseConfig:
    """The database with the backups, of a Synapse's configuration.

    Args:
        homeserver: what homeserver.yaml holds.

    Raises:
        OptionError: it doesn't say which database that is, or libpq can't take an
            argument.
    """
    content = homeserver if isinstance(homeserver, Mapping) else {}
    several = content.get("databases")
    found = [content.get("database")]
    if isinstance(several, Mapping):
        found = [one for one in several.values() if _is_main(one)]
    for one in found:
        if isinstance(one, Mapping) and one.get("name") in ("sqlite3", "psycopg2"):
            args = one.get("args")
            if isinstance(args, Mapping) and (
                one["name"] == "psycopg2" or "database" in args
            ):
                if one["name"] == "psycopg2":
                    check_arguments(args)
                return DatabaseConfig(one["name"], dict(args))
    raise OptionError(
        "database", "must be there, with a name of sqlite3 or psycopg2 and its args"
    )


def _is_main(database: Any) -> bool:
    """Whether one of Synapse's databases is the one for all but the rooms' states."""
    if not isinstance(database, Mapping):
        return False
    return "main" in (database.get("data_stores") or ["main"])


def _error(config: DatabaseConfig) -> type[Exception]:
    return (SQLITE if config.name == "sqlite3" else postgres()).error


def _open(config: DatabaseConfig, source: bool) -> Side:
    kind = SqliteSide if config.name == "sqlite3" else PostgresSide
    return kind(config.args, source)


class _Migration:
    """One run, between two databases that are open."""

    def __init__(self, source: Side, target: Side, progress: Progress) -> None:
        self._source = source
        self._target = target
        self._progress = progress
        self._result = Result()
        self._warnings = 0
        self._uncommitted = 0
        #: How many keys the target goes without, by the ids of their versions.
        self._lost: dict[tuple[str, int], int] = {}
        self._kept: set[tuple[str, int]] = set()

    def run(self) -> Result:
        total = self._source.count_versions()
        done = 0
        for page in self._source.versions():
            for version, held in self._pairs(page):
                self._handle(version, held)
                done += 1
                written = self._result.written
                self._progress.step(f"{done} of {total} backups, {written} keys")
            self._commit()
            self._result.lost_versions += len(page) - len(self._sound(page))
        self._check()
        return self._result

    def _sound(self, page: Sequence[Row]) -> list[Version]:
        """Those of the rows of a page that the target can hold."""
        return [
            parse_version(row)
            for row in page
            if type(row[1]) is int and self._target.holds(row[0], row[2], row[3])
        ]

    def _pairs(self, page: Sequence[Row]) -> Iterator[tuple[Version, Held | None]]:
        """The versions of a page, with what the target holds of each."""
        versions = self._sound(page)
        found = {held.version.ids: held for held in self._target.find(versions)}
        return ((version, found.get(version.ids)) for version in versions)

    def _handle(self, version: Version, held: Held | None) -> None:
        verdict = judge(version, held)
        if verdict is Verdict.COPY:
            # It may have changed since the page was looked at.
            held = self._target.lock(version)
            verdict = judge(version, held)
        if verdict is Verdict.COPY:
            self._copy(version, held)
        elif verdict is Verdict.SAME:
            self._result.unchanged += 1
        else:
            self._result.kept += 1
            self._kept.add(version.ids)
            self._warn(version, f"{verdict.value}: left as it is there")

    def _copy(self, version: Version, held: Held | None) -> None:
        """Make a version, which is locked where it is there, what it is at the
        source."""
        present = held.version.count if held else 0
        if version.count:
            self._copy_keys(version, present)
        elif present:
            self._target.clear(version)
            self._result.deleted += present
        self._target.save(version, new=held is None)
        self._result.copied += 1
        self._uncommitted += 1
        if self._uncommitted >= _COMMIT_ROWS:
            self._commit()

    def _copy_keys(self, version: Version, present: int) -> None:
        """Write the keys that aren't the same at the target, delete what isn't at the
        source.

        Args:
            present: how many the target holds.
        """
        rows = self._fit(
            version, self._source.keys(version, version.count, present > 0)
        )
        held = self._target.keys(version, present, True) if present else iter(())
        deletes: list[tuple[str, str]] = []
        writes: list[Row] = []
        for old, row in changes(rows, held):
            if old is not None:
                deletes.append(old)
                self._result.deleted += row is None
            if row is not None:
                writes.append(row)
            if max(len(deletes), len(writes)) >= PAGE_KEYS:
                self._write(version, deletes, writes)
        self._write(version, deletes, writes)

    def _fit(self, version: Version, rows: Iterable[Row]) -> Iterator[Row]:
        """The keys of a version as the target can hold them."""
        lost = 0
        for row in rows:
            if not self._target.holds(row[0], row[1], row[5]):
                lost += 1
                continue
            fitted = self._target.fit(row)
            self._result.mended += fitted != row
            yield fitted
        self._lose(version, lost)

    def _write(
        self, version: Version, deletes: list[tuple[str, str]], writes: list[Row]
    ) -> None:
        """Delete keys, then add keys; both lists are empty afterwards."""
        if deletes:
            self._target.delete(version, deletes)
        if writes:
            lost = self._target.write(version, writes)
            self._result.written += len(writes) - lost
            self._lose(version, lost)
        self._uncommitted += len(deletes) + len(writes)
        deletes.clear()
        writes.clear()

    def _lose(self, version: Version, keys: int) -> None:
        if keys:
            self._lost[version.ids] = self._lost.get(version.ids, 0) + keys
            self._result.lost_keys += keys
            self._warn(version, f"{keys} keys left out: the target can't hold them")

    def _commit(self) -> None:
        self._target.commit()
        self._uncommitted = 0

    def _check(self) -> None:
        """Compare what is on both sides now, but for what was left alone."""
        result = self._result
        for page in self._source.versions():
            for version, held in self._pairs(page):
                if version.ids in self._kept:
                    continue
                count = version.count - self._lost.get(version.ids, 0)
                result.checked += 1
                result.checked_keys += count
                found = held and (held.version.etag, held.version.count)
                if found != (version.etag, count):
                    result.differing += 1
                    self._warn(version, "isn't the same on both sides after all")

    def _warn(self, version: Version, text: str) -> None:
        self._warnings += 1
        if self._warnings <= _WARNINGS:
            self._progress.warn(f"{version.user_id} version {version.version}: {text}")


def changes(
    rows: Iterable[Row], held: Iterator[Row]
) -> Iterator[tuple[tuple[str, str] | None, Row | None]]:
    """What is to be done to make one list of keys the other; both are in the order of
    their ids, or there is none in the second.

    Returns:
        Of each change, the ids of the key that goes, and the key that comes.
    """
    old = next(held, None)
    for row in rows:
        while old is not None and old[:2] < row[:2]:
            yield (old[0], old[1]), None
            old = next(held, None)
        if old is None or old[:2] != row[:2]:
            yield None, row
            continue
        if old != row:
            yield (old[0], old[1]), row
        old = next(held, None)
    while old is not None:
        yield (old[0], old[1]), None
        old = next(held, None)

"""Copies the backups of one database into another, and compares the two.

A migration may be repeated while the source's server serves: each run brings the
changes since the last run. Changes at the target are never overwritten without the
operator's consent; `decisions` has the rules.
"""

from collections.abc import Iterable, Iterator
from contextlib import closing
from types import ModuleType

import attrs

from ...storage import PAGE_KEYS, SchemaError
from ..config import DatabaseConfig
from .decisions import (
    Action,
    Change,
    Decision,
    Keep,
    changes,
    decide,
    joining_changes,
    lacks_auth_data,
)
from .layouts import SYNAPSE, Layout
from .report import Progress, Result
from .side import Ids, MigrateError, RefusedError, Source, Target, pages_of
from .sqlite_side import SqliteSource, SqliteTarget
from .values import Held, KeysDigest, Row, SourceVersion, Version, digest_keys

#: Rows that are written before a commit, about. A backup is never split.
_COMMIT_ROWS = 5000
#: The decisions that change the target.
_WRITING = (Action.COPY, Action.JOIN)


@attrs.frozen
class Options:
    """The operator's choices for one run.

    Attributes:
        keep: the side that wins where the target has changed, or None to ask.
        users: the only users to copy, or none for all.
        dry_run: write nothing, and report the work of a run.
        make_tables: make the service's tables at the target; a homeserver has made its
            own.
        layout: the tables of the source.
    """

    keep: Keep | None = None
    users: tuple[str, ...] = ()
    dry_run: bool = False
    make_tables: bool = True
    layout: Layout = SYNAPSE


def migrate(
    source: DatabaseConfig,
    target: DatabaseConfig,
    progress: Progress,
    options: Options | None = None,
) -> Result:
    """Copy the backups, and compare the two sides.

    Each version is copied in one transaction. Users and versions of the target alone
    stay unchanged.

    Args:
        source: the database to read.
        target: the database to write to.

    Raises:
        MigrateError: a database is away or unsuitable. The backups committed until then
            stay, and the next run copies the rest.
    """
    chosen = Options() if options is None else options
    try:
        with (
            closing(_open_source(source, chosen)) as read,
            closing(_open_target(target, chosen)) as written,
        ):
            progress.say(f"From {read.place}\nto {written.place}")
            identity = read.identity()
            if identity is not None and identity == written.identity():
                raise RefusedError(
                    f"{read.place} and {written.place}: both are the same tables; name"
                    " two different databases"
                )
            if not chosen.dry_run:
                written.claim()
                written.prepare(chosen.make_tables)
            read.take_snapshot()
            return _Migration(read, written, chosen, progress).run()
    except SchemaError as error:
        raise MigrateError(f"target: {error}") from None
    finally:
        progress.clear()


def _open_source(config: DatabaseConfig, options: Options) -> Source:
    if config.name == "sqlite3":
        return SqliteSource(config.args, options.layout, options.users)
    side = _postgres_side()
    source: Source = side.PostgresSource(config.args, options.layout, options.users)
    return source


def _open_target(config: DatabaseConfig, options: Options) -> Target:
    if config.name == "sqlite3":
        return SqliteTarget(config.args, options.dry_run)
    target: Target = _postgres_side().PostgresTarget(config.args, options.dry_run)
    return target


def _postgres_side() -> ModuleType:
    """Import the module for PostgreSQL, whose driver is an optional dependency."""
    try:
        from . import postgres_side
    except ImportError as error:
        raise RefusedError(
            f"PostgreSQL needs the package psycopg2 or psycopg2-binary: {error}"
        ) from None
    return postgres_side


class _Migration:
    """One run between two open databases."""

    def __init__(
        self, source: Source, target: Target, options: Options, progress: Progress
    ) -> None:
        self._source = source
        self._target = target
        self._options = options
        self._progress = progress
        self._result = Result(dry_run=options.dry_run)
        self._uncommitted_rows = 0
        #: The expected state of each written version until the commit.
        self._expected: dict[Ids, Version] = {}

    def run(self) -> Result:
        """Copy or compare each version of the source, page by page."""
        counted = self._source.count_keys()
        self._progress.begin(counted.read)
        self._result.left_keys = counted.left
        missing = set(self._options.users)
        for page in self._source.versions(self._target):
            held = self._target.find([one.version.ids for one in page.versions])
            for source in page.versions:
                self._handle(source, held.get(source.version.ids))
                missing.discard(source.version.user_id)
            self._result.lost_versions += page.lost
            self._commit()
        self._result.missing_users = tuple(sorted(missing))
        return self._result

    def _handle(self, source: SourceVersion, held: Held | None) -> None:
        decision = self._decide(source, held)
        if decision.action in _WRITING and not self._options.dry_run:
            # The target may have changed since the page was read.
            held = self._target.lock(source.version.ids)
            decision = self._decide(source, held)
        self._count(source, decision)
        if decision.action in _WRITING and not self._options.dry_run:
            self._write(source.version, held, decision.action)
        else:
            self._progress.advance(source.version.keys.count)

    def _decide(self, source: SourceVersion, held: Held | None) -> Decision:
        if self._options.layout.may_lack_auth_data and lacks_auth_data(source.version):
            keys = source.version.keys.count
            reason = f"its auth_data is empty, null or no JSON ({keys} keys)"
            return Decision(Action.LEAVE, reason)
        is_named = source.version.user_id in self._options.users
        return decide(source, held, self._options.keep, is_named)

    def _count(self, source: SourceVersion, decision: Decision) -> None:
        """Count a decision in the result, and warn the operator where a version needs
        attention."""
        result, action = self._result, decision.action
        result.unchanged += action is Action.NOTHING
        result.copied += action is Action.COPY
        result.joined += action is Action.JOIN
        result.kept += action is Action.KEEP
        result.erased += action is Action.ERASED
        result.undecided += action is Action.ASK
        result.unusable += action is Action.LEAVE
        if action is Action.NOTHING:
            self._note_checked(source.version)
        if action is Action.NOTHING or action in _WRITING:
            self._lose(source.version, source.lost_keys)
        if action in (Action.ASK, Action.ERASED, Action.LEAVE):
            self._warn(source.version, f"{decision.reason}: {action.value}")
        elif self._options.dry_run and action in _WRITING:
            keys = source.version.keys.count
            would = f"would be {action.value} ({keys} keys)"
            self._warn(source.version, f"{decision.reason}: {would}")

    def _write(self, version: Version, held: Held | None, action: Action) -> None:
        """Copy or merge a version, after `Target.lock`."""
        there = held.version if held else None
        if action is Action.JOIN and there is not None:
            expected = self._join(version, there)
            # The digest of the source, not of the result: the next run has to find
            # that the target has changed since, and that the source has not.
            copied = version.digest
        else:
            expected = self._copy(version, held.keys if held else 0)
            copied = expected.digest
        self._target.save(expected, copied, is_new=there is None)
        self._expected[version.ids] = expected
        self._uncommitted_rows += 1
        if self._uncommitted_rows >= _COMMIT_ROWS:
            self._commit()

    def _copy(self, version: Version, present: int) -> Version:
        """Make the target's keys the source's; return the expected state.

        Args:
            present: how many keys the target holds.
        """
        if not version.keys.count:
            if present:
                self._target.clear(version.ids)
                self._result.deleted += present
            return version
        rows = self._source_rows(version, present > 0)
        held = self._target_rows(version.ids, present)
        lost = self._apply(version, changes(rows, held))
        return attrs.evolve(version, keys=version.keys - lost)

    def _join(self, version: Version, there: Version) -> Version:
        """Merge the source's keys into the target's; return the expected state. The new
        etag is above both, so that clients of either side see a change."""
        keys = there.keys

        def followed() -> Iterator[Change]:
            nonlocal keys
            rows = self._source_rows(version, True)
            held = self._target_rows(version.ids, there.keys.count)
            for old, row in joining_changes(rows, held):
                keys += digest_keys([row] if row else [])
                keys -= digest_keys([old] if old else [])
                yield old, row

        lost = self._apply(version, followed())
        etag = max(version.etag, there.etag) + 1
        return attrs.evolve(there, etag=etag, keys=keys - lost)

    def _source_rows(self, version: Version, ordered: bool) -> Iterator[Row]:
        """Yield the source's keys without the impossible keys, and advance the
        progress."""
        number = 0
        for row in self._source.keys(version.ids, version.keys.count, ordered):
            fitted = self._target.fit(row)
            if fitted is None:
                continue
            number += 1
            if number % PAGE_KEYS == 0:
                self._progress.advance(PAGE_KEYS)
            self._result.mended += fitted != row
            yield fitted
        self._progress.advance(number % PAGE_KEYS)

    def _target_rows(self, ids: Ids, present: int) -> Iterator[Row]:
        return self._target.keys(ids, present, True) if present else iter(())

    def _apply(self, version: Version, found: Iterable[Change]) -> KeysDigest:
        """Change the target's keys; return the digest of the refused keys."""
        lost = KeysDigest()
        for part in pages_of(found, PAGE_KEYS):
            gone = [old for old, _ in part if old is not None]
            come = [row for _, row in part if row is not None]
            refused: list[Row] = []
            if gone:
                self._target.delete(version.ids, gone)
            if come:
                refused = self._target.write(version.ids, come)
            self._result.written += len(come) - len(refused)
            self._result.deleted += len(part) - len(come)
            self._uncommitted_rows += len(part)
            self._lose(version, len(refused))
            lost += digest_keys(refused)
        return lost

    def _lose(self, version: Version, keys: int) -> None:
        if keys:
            self._result.lost_keys += keys
            self._warn(version, f"{keys} keys left out: the target can't hold them")

    def _commit(self) -> None:
        """Compare the written versions with their expected state, then commit. Before
        the commit, no other program can have changed the versions."""
        found = self._target.find(list(self._expected)) if self._expected else {}
        for ids, version in self._expected.items():
            held = found.get(ids)
            if held is None or held.version != version:
                self._result.differing += 1
                self._warn(version, "isn't the same on both sides after all")
            self._note_checked(version)
        self._target.commit()
        self._expected.clear()
        self._uncommitted_rows = 0

    def _note_checked(self, version: Version) -> None:
        self._result.checked += 1
        self._result.checked_keys += version.keys.count

    def _warn(self, version: Version, text: str) -> None:
        self._progress.warn(f"{version.user_id} version {version.version}: {text}")

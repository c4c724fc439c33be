"""The command ``import``: a user's backups from a file."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import attrs
from twisted.internet.defer import Deferred, inlineCallbacks

from ..admin.transfer_file import FileError, FileVersion, LinesFile
from ..errors import NotFoundError, RoomKeysError, RoomKeysVersionError
from ..inline import Inline
from ..storage import Owner, VersionFacts, batches
from ..storage.overview import CURRENT, DELETED, ORPHANED, SUPERSEDED
from ..types import Actor, BackupId, RoomKey
from .output import Output, plural, progress, warn
from .session import DONE, FINDINGS, USAGE, Session, ToolError
from .transfer_body import BodyFile

#: Actions of an import with a version of the file.
CREATE = "created"
MERGE = "merged"
COMPARE = "compared"
LEAVE = "left out"

_USER_ID = re.compile(r"@[^:\0]*:[^\0]+")

File = LinesFile | BodyFile


@attrs.frozen
class Import:
    """A file to import.

    Attributes:
        user_id: the user who gets the backups; None for the user of the file.
        operator: the name for the record.
        is_dry_run: Whether nothing is written.
    """

    path: Path
    user_id: str | None
    operator: str
    is_dry_run: bool


@attrs.frozen
class Step:
    """What an import does with a version of the file.

    Attributes:
        number: the number of the user's version.
        action: `CREATE`; `MERGE` into the current version; `COMPARE` with a version
            that takes no keys any more; or `LEAVE`.
        reason: why keys are left out, for the operator; None for a version that takes
            keys.
    """

    version: FileVersion
    number: int
    action: str
    reason: str | None = None


@attrs.define
class _Tally:
    """The outcome of an import for the keys of a version."""

    stored: int = 0
    replaced: int = 0
    unchanged: int = 0
    left_out: int = 0

    @property
    def seen(self) -> int:
        """Number of counted keys."""
        return self.stored + self.replaced + self.unchanged + self.left_out


@inlineCallbacks
def import_file(session: Session, output: Output, wanted: Import) -> Inline[int]:
    """Check a file, and merge its keys into a user's backups by the rule of uploads.

    Raises:
        ToolError: the file is cut, altered or foreign, the user is unknown, or the user
            has another version under a number of the file. Nothing was written.
    """
    with _open_file(wanted.path) as file:
        yield _check(session, wanted.path, file)
        user_id = wanted.user_id or file.user_id
        if user_id is None:
            raise ToolError(
                f"{wanted.path}: a body of GET /keys names no user: add --user", USAGE
            )
        yield _check_user(session, user_id)
        owner: Owner = yield session.overview.find_owner(user_id)
        steps = plan_import(owner, file)
        has_left_out = False
        with progress("keys", sum(version.keys for version in file.versions)) as bar:
            for step in steps:
                importer = _Importer(session, user_id, wanted, step)
                tally: _Tally = yield importer.run(file, bar)
                _report(output, user_id, step, tally, wanted.is_dry_run)
                has_left_out |= step.action == LEAVE or tally.left_out > 0
    return FINDINGS if has_left_out else DONE


@inlineCallbacks
def _check(session: Session, path: Path, file: File) -> Inline[None]:
    """Read a file to its end.

    Raises:
        ToolError: the file is cut, altered or foreign.
    """
    try:
        with progress("keys checked") as bar:
            for keys in file.check():
                bar.update(keys)
                # The reactor delivers signals.
                yield session.clock.sleep(0)
    except FileError as error:
        raise ToolError(f"{path}: {error}; nothing was imported", USAGE) from None


@contextmanager
def _open_file(path: Path) -> Iterator[File]:
    """Open a file, and recognize its kind by its first line.

    Raises:
        ToolError: the file can't be read or imported.
    """
    try:
        if not path.is_file():
            raise ToolError(f"{path}: there is no such file", USAGE)
        with ExitStack() as stack:
            stream = stack.enter_context(path.open("rb"))
            file: File
            try:
                file = LinesFile(stream)
            except ValueError:
                text = stack.enter_context(path.open(encoding="utf-8", newline=""))
                file = BodyFile(text)
            yield file
    except FileError as error:
        raise ToolError(f"{path}: {error}", USAGE) from None
    except OSError as error:
        raise ToolError(f"{path}: {error.strerror}", USAGE) from None


@inlineCallbacks
def _check_user(session: Session, user_id: str) -> Inline[None]:
    """
    Raises:
        ToolError: there is no such user, as far as the database tells.
    """
    if not _USER_ID.fullmatch(user_id):
        raise ToolError(
            f"{user_id!r} is no user: write one as in Matrix, such as"
            " @alice:example.org",
            USAGE,
        )
    if session.is_synapse and (yield session.overview.find_gone([user_id])):
        raise ToolError(
            f"{user_id} is no active account of this homeserver: register the user"
            " first, or name another one with --user"
        )


def plan_import(owner: Owner, file: File) -> list[Step]:
    """Decide what to do with each version of a file, in the order of numbers.

    Raises:
        ToolError: the user has another version under a number of the file, or deleted
            the version.
    """
    live = [v.version for v in owner.versions if v.state in (CURRENT, SUPERSEDED)]
    current = max(live, default=None)
    known = {version.version: version for version in owner.versions}
    steps = []
    for version in file.versions:
        if version.info is not None:
            found = known.get(version.info.version)
            steps.append(_decide(version, found, current))
        elif current is None:
            raise ToolError(
                f"{owner.user_id} has no version that could take the keys: a client of"
                " the user has to create one first"
            )
        else:
            steps.append(Step(version, current, MERGE))
    return steps


def _decide(
    version: FileVersion, found: VersionFacts | None, current: int | None
) -> Step:
    """Decide what to do with a version of a file.

    Args:
        found: the user's version of the same number, or None.
        current: the number of the user's current version, or None.

    Raises:
        ToolError: as `plan_import`.
    """
    info = version.info
    assert info is not None
    number = info.version
    if found is None:
        if current is None or number > current:
            return Step(version, number, CREATE)
        reason = f"the user's current version {current} is newer"
        return Step(version, number, LEAVE, reason)
    if found.state == DELETED:
        raise ToolError(
            f"version {number} was deleted here: give it back first, with restore"
            f" {found.user_id} {number}; nothing was imported"
        )
    if found.state == ORPHANED:
        raise ToolError(
            f"there are keys of {found.user_id} under the number {number}, but no"
            " version: delete them first, with purge --orphans; nothing was imported"
        )
    if not _is_same(found, info.algorithm, info.auth_data):
        raise ToolError(
            f"version {number} of {found.user_id} has another algorithm or auth_data"
            " than the file's: nothing was imported"
        )
    if number == current:
        return Step(version, number, MERGE)
    reason = f"version {current} is the current one, and no other takes keys"
    return Step(version, number, COMPARE, reason)


def _is_same(found: VersionFacts, algorithm: str, auth_data: str) -> bool:
    """Whether a version has an algorithm and, as JSON values, ``auth_data``."""
    if found.algorithm != algorithm:
        return False
    try:
        one, other = json.loads(found.auth_data or ""), json.loads(auth_data)
    except (ValueError, RecursionError):
        return False
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


class _Importer:
    """The import of a version of a file."""

    def __init__(
        self, session: Session, user_id: str, wanted: Import, step: Step
    ) -> None:
        self._session = session
        self._backup = BackupId(user_id, step.number)
        self._actor = Actor(None, wanted.operator)
        self._is_dry_run = wanted.is_dry_run
        self._step = step
        self._tally = _Tally()

    @inlineCallbacks
    def run(self, file: File, bar: Any) -> Inline[_Tally]:
        """Import the keys of the version, a batch in each transaction, and fire with
        the outcome."""
        step, tally = self._step, self._tally
        reason = step.reason
        try:
            if step.action == CREATE and not self._is_dry_run:
                yield self._create()
            keys = () if step.action == LEAVE else self._parse(file)
            for batch in batches(keys):
                yield self._import(batch)
                bar.update(len(batch))
        except RoomKeysVersionError as error:
            reason = f"a client has created version {error.current_version} meanwhile"
        except NotFoundError:
            reason = "a client has deleted the version meanwhile"
        rest = step.version.keys - tally.seen
        if reason is not None and rest:
            tally.left_out += rest
            warn(f"version {step.number}: {plural(rest, 'key')} left out: {reason}")
        return tally

    def _create(self) -> "Deferred[None]":
        info = self._step.version.info
        assert info is not None
        user_id = self._backup.user_id
        return self._session.imports.insert_version(user_id, info, self._actor)

    def _parse(self, file: File) -> Iterator[RoomKey]:
        """Yield the keys of the version. Report and leave out keys that break a rule of
        uploads."""
        for key in file.read_keys(self._step.version):
            try:
                yield key.parse()
            except RoomKeysError as error:
                self._tally.left_out += 1
                warn(f"version {self._step.number}: a key is left out: {error}")

    @inlineCallbacks
    def _import(self, batch: Sequence[RoomKey]) -> Inline[None]:
        """Upload a batch of keys, or compare the batch with the stored keys.

        Raises:
            NotFoundError: the version was deleted.
            RoomKeysVersionError: the version isn't the current one any more.
        """
        action, tally = self._step.action, self._tally
        # In one upload, a session has one key.
        keys = list({(key.room_id, key.session_id): key for key in batch}.values())
        repeated = len(batch) - len(keys)
        if action == CREATE and self._is_dry_run:
            tally.stored += len(keys)
        elif action == COMPARE or self._is_dry_run:
            plan = yield self._session.imports.compare_keys(self._backup, keys)
            tally.unchanged += plan.unchanged
            if action == MERGE:
                tally.stored += len(plan.new)
                tally.replaced += len(plan.replaced)
        else:
            result = yield self._session.store.upload_keys(
                self._backup.user_id, self._backup.version, keys, self._actor
            )
            tally.stored += result.stored
            tally.replaced += len(result.replaced)
            tally.unchanged += result.unchanged
        tally.unchanged += repeated


def _report(
    output: Output, user_id: str, step: Step, tally: _Tally, is_dry_run: bool
) -> None:
    """Print the outcome of an import for a version."""
    values = {
        "user": user_id,
        "version": str(step.number),
        "action": step.action,
        **attrs.asdict(tally),
        "is_dry_run": is_dry_run,
    }
    would = "would be " if is_dry_run else ""
    output.write(
        values,
        f"Version {step.number} {would}{step.action}: {tally.stored:,} stored,"
        f" {tally.replaced:,} replaced, {tally.unchanged:,} unchanged,"
        f" {tally.left_out:,} left out",
    )

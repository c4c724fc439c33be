"""The command ``verify``: finds faulty rows, and fixes two kinds of faults."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import attrs
from tqdm import tqdm
from twisted.internet.defer import inlineCallbacks

from ..identifiers import quote_for_log
from ..inline import Inline
from ..storage import StoredRow, StoredVersion, Tally
from ..storage.inspection import Value
from ..types import BackupId
from .output import Output, plural, progress, require_yes
from .owners import no_backup
from .problems import (
    Port,
    Problem,
    find_key_problems,
    find_number_problems,
    find_user_problems,
    find_version_problems,
    is_utf8,
)
from .removal import paced
from .session import DONE, FINDINGS, Session

#: The faults that ``--fix`` fixes.
COUNTS = "counts"
ORPHANS = "orphans"


@attrs.frozen
class Repair:
    """The faults to fix.

    Attributes:
        fix: `COUNTS`, `ORPHANS`, or None for no fault.
        is_dry_run: Whether nothing is written.
        has_yes: Whether the operator has agreed to the deletion of keys.
    """

    fix: str | None
    is_dry_run: bool
    has_yes: bool


@inlineCallbacks
def verify(
    session: Session, output: Output, user_id: str | None, repair: Repair
) -> Inline[int]:
    """Print a line for each fault of the rows of all users, and the sums.

    Args:
        user_id: only this user; None for all users.

    Raises:
        ToolError: the user has no backup, or ``--yes`` is missing.
    """
    if repair.fix == ORPHANS and not repair.is_dry_run:
        require_yes(repair.has_yes, "the keys of no version will be lost")
    report = _Report(session, output, repair)
    with progress("keys") as bar:
        if user_id is not None:
            user = user_id.encode("utf-8", "surrogateescape")
            yield _check_users(session, report, [user], bar)
            if not report.versions:
                raise no_backup(user_id)
        else:
            users: list[Value] = [b""]
            while users := (yield session.inspection.list_users(users[-1])):
                yield _check_users(session, report, users, bar)
    report.write_sums()
    return FINDINGS if report.left else DONE


@attrs.define
class _Seen:
    """A version, and the number of its keys that the search has read.

    Attributes:
        ids: user and version as `_Report.write` needs them.
        row: None for a version without a row.
        size: bytes of ``session_data`` of these keys.
        is_readable: Whether the drivers can decode the ids of all these keys.
    """

    ids: dict[str, Value]
    row: StoredVersion | None = None
    keys: int = 0
    size: int = 0
    is_readable: bool = True

    @property
    def is_live(self) -> bool:
        """Whether clients can read the version."""
        return self.row is not None and self.row.deleted == 0

    @property
    def is_suspect(self) -> bool:
        """Whether the version has keys that no client can read, or a wrong cached
        count. A server may have changed the version during the search."""
        if not self.is_live:
            return self.keys > 0
        assert self.row is not None
        cached = self.row.cached_keys, self.row.cached_bytes
        return _is_wrong(cached[0], self.keys) or _is_wrong(cached[1], self.size)


def _is_wrong(cached: int | None, counted: int) -> bool:
    """Return whether a cached number, None for no number, is wrong."""
    return cached is not None and cached != counted


class _Report:
    """Prints the findings, and sums them up.

    Attributes:
        versions: number of versions that the search has read, with a row or not.
        keys: number of keys that the search has read.
        left: number of findings that aren't fixed.
    """

    def __init__(self, session: Session, output: Output, repair: Repair) -> None:
        self.repair = repair
        self.versions = self.keys = self.left = 0
        self._has_port = session.has_port
        self._output = output
        self._kinds: Counter[str] = Counter()
        self._fixable = 0

    def write(
        self,
        ids: dict[str, Value],
        problem: Problem,
        is_live: bool = True,
        is_fixable: bool = False,
    ) -> None:
        """Print a finding.

        Args:
            ids: the ids of the row, by their names for programs.
            is_live: Whether clients can read the row's version.
            is_fixable: Whether the finding is fixed now, or would be in a dry run.
        """
        is_usable = problem.is_usable and is_live
        is_fixed = is_fixable and not self.repair.is_dry_run
        marks = ["clients can use it" if is_usable else "clients can't use it"]
        if self._has_port and problem.port is not Port.COPIES:
            marks.append(problem.port.value)
        if is_fixable:
            marks.append("fixed" if is_fixed else "would be fixed")
        place, texts = _describe_ids(ids)
        values = {
            **texts,
            "kind": problem.kind,
            "problem": problem.text,
            "usable": is_usable,
            "survives_port": problem.port is Port.COPIES if self._has_port else None,
            "fixed": is_fixed,
        }
        self._output.write(values, f"{place}: {problem.text} ({'; '.join(marks)})")
        self._kinds[problem.kind] += 1
        self._fixable += is_fixable
        self.left += not is_fixed

    def write_sums(self) -> None:
        """Print the sums of the findings by kind."""
        found = self._kinds.total()
        values = {
            "findings": found,
            "kinds": dict(sorted(self._kinds.items())),
            "left": self.left,
            "versions": self.versions,
            "keys": self.keys,
        }
        where = f"{plural(self.versions, 'version')}, {plural(self.keys, 'key')}"
        text = f"{plural(found, 'finding')} in {where}"
        if found:
            kinds = [f"{kind} {n:,}" for kind, n in sorted(self._kinds.items())]
            text += f": {', '.join(kinds)}"
        if self._fixable:
            verb = "would be fixed" if self.repair.is_dry_run else "fixed"
            text += f"; {self._fixable:,} {verb}"
        self._output.write(values, text)


#: The names of the ids in findings.
_IDS = ("user", "version", "room", "session")


def _describe_ids(ids: dict[str, Value]) -> tuple[str, dict[str, str | None]]:
    """Return the ids of a row for people, and for programs."""
    texts = {
        name: value.decode("utf-8", "backslashreplace")
        if isinstance(value, bytes)
        else str(value)
        for name, value in ids.items()
    }
    parts = [
        f"{name} {quote_for_log(text) if name in ('room', 'session') else text}"
        for name, text in texts.items()
    ]
    place = ", ".join(parts)
    if not place.isprintable():
        place = quote_for_log(place)
    return place, {name: texts.get(name) for name in _IDS}


@inlineCallbacks
def _check_users(
    session: Session, report: _Report, users: list[Value], bar: "tqdm[Any]"
) -> Inline[None]:
    """Check all rows from the first to the last of some users.

    Args:
        users: a page of all users, in the database's order.
    """
    for user_id in users:
        _write_all(report, {"user": user_id}, find_user_problems(user_id))
    seen: dict[tuple[Value, Value], _Seen] = {}
    bounds = users[0], users[-1]
    version: StoredVersion | None = None
    while rows := (yield session.inspection.read_versions(*bounds, version)):
        for version in rows:
            ids = {"user": version.user_id, "version": version.version}
            seen[version.user_id, version.version] = _Seen(ids, version)
            _write_all(report, ids, find_version_problems(version))
    key: StoredRow | None = None
    while keys := (yield session.inspection.read_keys(*bounds, key)):
        for key in keys:
            _check_key(report, seen, key)
        bar.update(len(keys))
    report.versions += len(seen)
    for (user_id, number), found in seen.items():
        if found.is_suspect:
            tally = yield session.inspection.tally(user_id, number)
            yield _check_tally(session, report, found, tally)


def _write_all(
    report: _Report, ids: dict[str, Value], problems: Iterable[Problem]
) -> None:
    """Print the problems of a user or of a version."""
    for problem in problems:
        report.write(ids, problem)


def _check_key(
    report: _Report, seen: dict[tuple[Value, Value], _Seen], key: StoredRow
) -> None:
    """Print the problems of a key, and count the key."""
    version = seen.get((key.user_id, key.version))
    if version is None:
        version = _Seen({"user": key.user_id, "version": key.version})
        seen[key.user_id, key.version] = version
        problems = find_number_problems("version", key.version)
        _write_all(report, version.ids, problems)
    version.keys += 1
    version.size += len(key.session_data)
    report.keys += 1
    for problem in find_key_problems(key):
        ids = {**version.ids, "room": key.room_id, "session": key.session_id}
        version.is_readable &= is_utf8(key.room_id) and is_utf8(key.session_id)
        report.write(ids, problem, version.is_live)


@inlineCallbacks
def _check_tally(
    session: Session, report: _Report, version: _Seen, tally: Tally
) -> Inline[None]:
    """Print the problem of a suspect version, and fix the problem on request."""
    backup, repair = _find_backup(version), report.repair
    if not tally.is_stored and tally.keys:
        is_fixable = repair.fix == ORPHANS and version.is_readable and bool(backup)
        if is_fixable and backup is not None and not repair.is_dry_run:
            with paced(session, tally.keys, None) as after_batch:
                yield session.removal.delete_keys(backup, after_batch)
        text = f"{plural(tally.keys, 'key')} of a version that has no row"
        report.write(version.ids, Problem("orphans", text, False), True, is_fixable)
    elif not tally.is_live and not tally.is_queued and tally.keys:
        text = (
            f"{plural(tally.keys, 'key')} of a deleted version that isn't queued for"
            " the sweeper; purge --deleted deletes them"
        )
        report.write(version.ids, Problem("unqueued", text, False))
    elif tally.is_live and (text := _find_wrong_count(tally)):
        is_fixable = repair.fix == COUNTS and bool(backup)
        if is_fixable and backup is not None and not repair.is_dry_run:
            yield session.inspection.forget_count(backup)
        report.write(version.ids, Problem("wrong_count", text), True, is_fixable)


def _find_wrong_count(tally: Tally) -> str:
    """Describe the cached numbers that are wrong; "" if none is."""
    parts = []
    if _is_wrong(tally.cached_keys, tally.keys):
        parts.append(f"{tally.cached_keys:,} keys are cached, {tally.keys:,} stored")
    if _is_wrong(tally.cached_bytes, tally.size):
        parts.append(f"{tally.cached_bytes:,} bytes are cached, {tally.size:,} stored")
    return "; ".join(parts)


def _find_backup(version: _Seen) -> BackupId | None:
    """Return the ids of a version; None if a user id isn't UTF-8, or a version number
    isn't an integer."""
    user_id, number = version.ids["user"], version.ids["version"]
    if not is_utf8(user_id) or not isinstance(number, int):
        return None
    return BackupId(user_id.decode(), number)

"""The command ``export``: a user's backups as a file."""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import attrs
from twisted.internet.defer import inlineCallbacks

from ..admin.transfer_file import LinesEncoder
from ..encoding import BackupEncoder, session_id_of
from ..errors import NotFoundError
from ..identifiers import quote_for_log
from ..inline import Inline
from ..json_text import are_valid_json
from ..storage import Owner, VersionFacts
from ..storage.overview import CURRENT, DELETED, ORPHANED, SUPERSEDED
from ..types import Actor, KeyPage, Position
from .output import Output, plural, progress, warn
from .owners import find_owner
from .session import DONE, FINDINGS, USAGE, Session, ToolError

Row = tuple[str, str, str]


@attrs.frozen
class Export:
    """A user's backups to export.

    Attributes:
        version: the number of a version; None for all, or for the current one if the
            file is a body.
        is_plain: Whether the file is the body of GET /keys.
        path: the file; None for standard output.
        operator: the name for the record.
    """

    user_id: str
    version: int | None
    is_plain: bool
    path: Path | None
    operator: str


@attrs.define
class _Exported:
    """The numbers of an export."""

    versions: int = 0
    keys: int = 0
    left_out: int = 0


@inlineCallbacks
def export(session: Session, output: Output, wanted: Export) -> Inline[int]:
    """Write a user's backups to a file, a page of keys at a time, and record the export
    of each version.

    Raises:
        ToolError: the user or the version can't be exported, or the file can't be
            written.
    """
    owner: Owner = yield find_owner(session, wanted.user_id)
    versions = _choose(owner, wanted)
    done = _Exported()
    with (
        open_target(wanted.path) as stream,
        progress("keys", sum(version.keys for version in versions)) as bar,
    ):
        lines = LinesEncoder(wanted.user_id)
        encoder: BackupEncoder | LinesEncoder = lines
        if wanted.is_plain:
            encoder = BackupEncoder(with_rooms=True)
        else:
            stream.write(lines.start(int(1000 * time.time())))
        for version in versions:
            if not wanted.is_plain and not are_valid_json([version.auth_data or ""]):
                done.left_out += max(version.keys, 1)
                warn(
                    f"version {version.version} is left out, its auth_data isn't JSON:"
                    " --plain exports its keys"
                )
                continue
            if not wanted.is_plain:
                stream.write(lines.begin(version))

            def take(rows: Sequence[Row], version: VersionFacts = version) -> None:
                whole = _whole_rows(version.version, rows)
                done.keys += len(whole)
                done.left_out += len(rows) - len(whole)
                stream.write(encoder.encode(KeyPage(whole, (), None)))
                bar.update(len(rows))

            actor = Actor(None, wanted.operator)
            yield session.store.note_export(wanted.user_id, version.version, actor)
            yield _read_keys(session, version, take)
            done.versions += 1
            stream.write(encoder.finish())
        if not wanted.is_plain:
            stream.write(lines.end())
    _report_export(output, wanted, done)
    return FINDINGS if done.left_out else DONE


def _choose(owner: Owner, wanted: Export) -> list[VersionFacts]:
    """Return the versions to export.

    Raises:
        ToolError: there is no such version.
    """
    live = [v for v in owner.versions if v.state in (CURRENT, SUPERSEDED)]
    if wanted.version is not None:
        chosen = [v for v in live if v.version == wanted.version]
    else:
        chosen = [v for v in live if v.state == CURRENT or not wanted.is_plain]
        for version in owner.versions:
            if version.state in (DELETED, ORPHANED) and version.keys:
                warn(
                    f"version {version.version} isn't exported, it is {version.state}"
                    f" with {plural(version.keys, 'key')}"
                )
    if chosen:
        return chosen
    which = "" if wanted.version is None else f" {wanted.version}"
    raise ToolError(
        f"{owner.user_id} has no version{which} that can be exported. The command show"
        " lists the versions; give a deleted one back with restore first"
    )


def _whole_rows(version: int, rows: Sequence[Row]) -> Sequence[Row]:
    """Return the rows whose data are JSON, and report the others."""
    if are_valid_json([data for _, _, data in rows]):
        return rows
    whole = []
    for row in rows:
        if are_valid_json([row[2]]):
            whole.append(row)
        else:
            room_id, session_id = quote_for_log(row[0]), session_id_of(row[1])
            warn(
                f"a key of version {version} is left out, its session_data isn't JSON:"
                f" room {room_id}, session {quote_for_log(session_id)}"
            )
    return whole


@inlineCallbacks
def _read_keys(
    session: Session, version: VersionFacts, take: Callable[[Sequence[Row]], object]
) -> Inline[None]:
    """Read the keys of a version.

    Args:
        take: is called with each page of keys, in the database's thread: the next page
            is read after the call.

    Raises:
        ToolError: the version was deleted meanwhile.
    """
    after: Position | None = None

    def on_page(page: KeyPage) -> bool:
        nonlocal after
        take(page.rows)
        after = page.last
        return after is not None

    is_first = True
    while is_first or after is not None:
        is_first = False
        try:
            yield session.store.get_pages(
                version.user_id, version.version, None, after, on_page
            )
        except NotFoundError:
            raise ToolError(
                f"version {version.version} was deleted during the export: run the"
                " command again"
            ) from None


@contextmanager
def open_target(path: Path | None) -> Iterator[BinaryIO]:
    """Open the file of an export, which only its owner may read. The file has a
    temporary name until the end.

    Args:
        path: the file; None for standard output.

    Raises:
        ToolError: the file can't be written.
    """
    try:
        if path is None:
            yield sys.stdout.buffer
            return
        path = path.resolve()
        if path.exists() and not path.is_file():
            raise ToolError(f"{path}: isn't a file", USAGE)
        number, name = tempfile.mkstemp(".part", f".{path.name}.", path.parent)
        try:
            with open(number, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(number)
            os.replace(name, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(name)
    except BrokenPipeError:
        raise
    except OSError as error:
        where = "standard output" if path is None else path
        raise ToolError(f"{where}: {error.strerror}", USAGE) from None


def _report_export(output: Output, wanted: Export, done: _Exported) -> None:
    """Print the numbers of an export, on stderr if the export is on stdout."""
    if wanted.path is None:
        output = Output(output.is_json, sys.stderr)
    where = "standard output" if wanted.path is None else str(wanted.path)
    values = {"user": wanted.user_id, "file": where, **attrs.asdict(done)}
    left_out = f", {plural(done.left_out, 'key')} left out" if done.left_out else ""
    output.write(
        values,
        f"{wanted.user_id}: {plural(done.versions, 'version')},"
        f" {plural(done.keys, 'key')} exported to {where}{left_out}",
    )

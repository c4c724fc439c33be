"""The decisions of a migration: functions on values, without any IO."""

import json
from collections.abc import Iterable, Iterator
from enum import Enum

import attrs

from ...json_text import is_valid_json
from ...merge import is_better, is_complete
from ...storage.rows import metadata
from ...types import StoredKey
from .values import Held, Row, SourceVersion, Version


class Verdict(Enum):
    """The comparison of a version with the target's; the texts are for the operator."""

    SAME = "is the same on both sides"
    COPY = "is to be copied"
    ERASED = "was deleted at the target after it had been copied there"
    AHEAD = "has changed at the target since it was copied"
    BOTH = "has changed on both sides since it was copied"
    FOREIGN = "is another one at the target, and was never copied there"


class Keep(Enum):
    """The side that wins where the target has changed; the operator's ``--keep``."""

    SOURCE = "source"
    TARGET = "target"
    BETTER = "better"


class Action(Enum):
    """The work that a version needs."""

    NOTHING = "nothing to do"
    COPY = "copied"
    JOIN = "merged"
    KEEP = "left as the target has it, by --keep"
    ERASED = "not copied again"
    ASK = "left as the target has it until you decide"
    LEAVE = "not copied"


@attrs.frozen
class Decision:
    """The work that a version needs, and the reason for the operator."""

    action: Action
    reason: str


def lacks_auth_data(version: Version) -> bool:
    """Whether the auth_data of a version is null or isn't JSON.

    No client can use such a backup: auth_data has the public key with which clients
    check the user's recovery key.
    """
    return version.auth_data.strip() == "null" or not is_valid_json(version.auth_data)


def judge(source: SourceVersion, held: Held | None) -> Verdict:
    """Compare a version of the source with the state at the target.

    A migration records the digest of each written version at its target. Either side
    may therefore know the last common state: the target if the version came from the
    source, the source if the version came from the target (the way back). A target's
    version in the common state has not changed, and may be overwritten.
    """
    if held is None or (held.version is None and held.copied is None):
        return Verdict.COPY
    if held.version is None:
        return Verdict.ERASED
    if source.version == held.version:
        return Verdict.SAME
    common = {source.copied, held.copied} - {None}
    if not common:
        return Verdict.FOREIGN
    if held.version.digest in common:
        return Verdict.COPY
    return Verdict.AHEAD if source.version.digest in common else Verdict.BOTH


def decide(
    source: SourceVersion, held: Held | None, keep: Keep | None, is_named: bool
) -> Decision:
    """Choose the work that a version needs.

    Args:
        keep: the operator's choice, or None.
        is_named: the operator named this user (``--user``). Only then an erased version
            may come back: a general ``--keep source`` must not undo erasures.
    """
    verdict = judge(source, held)
    reason = verdict.value
    if verdict is Verdict.SAME:
        return Decision(Action.NOTHING, reason)
    if verdict is Verdict.COPY or held is None or held.version is None:
        comes_back = verdict is Verdict.COPY or (keep is Keep.SOURCE and is_named)
        return Decision(Action.COPY if comes_back else Action.ERASED, reason)
    if keep is not Keep.BETTER:
        return Decision(_ACTIONS[keep], reason)
    if verdict is Verdict.AHEAD:
        # The target has all of the source's keys. Merging would bring back the keys
        # that were deleted at the target.
        return Decision(Action.KEEP, reason)
    obstacle = _obstacle(source.version, held.version)
    if obstacle is None:
        return Decision(Action.JOIN, reason)
    return Decision(Action.ASK, f"{reason}, and can't be merged: {obstacle}")


_ACTIONS = {None: Action.ASK, Keep.SOURCE: Action.COPY, Keep.TARGET: Action.KEEP}


def _obstacle(source: Version, target: Version) -> str | None:
    """Return the reason why two versions cannot be merged, or None if they can."""
    if source.deleted or target.deleted:
        return "it is deleted on one side"
    if source.algorithm != target.algorithm:
        return "the algorithms differ"
    if source.auth_data != target.auth_data:
        return "auth_data differs"
    return None


#: The target's key to delete, and the source's key to write; one may be None.
Change = tuple[Row | None, Row | None]


def changes(rows: Iterable[Row], held: Iterator[Row]) -> Iterator[Change]:
    """Return the changes that turn the target's keys into the source's.

    Args:
        rows: the source's keys, ordered by room and session id, or in any order if
            ``held`` is empty.
        held: the target's keys, ordered likewise.
    """
    return (change for change in _pairs(rows, held) if change[0] != change[1])


def joining_changes(rows: Iterable[Row], held: Iterator[Row]) -> Iterator[Change]:
    """Yield the changes that merge the source's keys into the target's: a key is
    replaced by a better key only. Arguments as for `changes`."""
    for old, row in _pairs(rows, held):
        if row is not None and (old is None or _is_better(row, old)):
            yield old, row


def _pairs(rows: Iterable[Row], held: Iterator[Row]) -> Iterator[Change]:
    """Pair the keys of equal ids, the target's first; None where a side has no such
    key."""
    old = next(held, None)
    for row in rows:
        while old is not None and old[:2] < row[:2]:
            yield old, None
            old = next(held, None)
        if old is not None and old[:2] == row[:2]:
            yield old, row
            old = next(held, None)
        else:
            yield None, row
    while old is not None:
        yield old, None
        old = next(held, None)


def _is_better(row: Row, old: Row) -> bool:
    """Apply the merge rule; a source's row with NULLs, or with data that isn't JSON,
    replaces no other row."""
    key = _stored(row)
    return is_complete(key) and is_better(key.metadata, _stored(old))


def _stored(row: Row) -> StoredKey:
    try:
        has_session_data = json.loads(row[5]) is not None
    except (ValueError, RecursionError):
        has_session_data = False
    return StoredKey(metadata(row[2:5]), has_session_data, 0)

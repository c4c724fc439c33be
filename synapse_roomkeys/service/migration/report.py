"""The report to the operator: while a migration runs, and at its end."""

import time
from collections.abc import Callable
from typing import TextIO

import attrs

#: Seconds between two updates of the line on a terminal.
_STEP_SECONDS = 0.5
#: Maximum number of warnings on the terminal; the result counts all.
_WARNINGS = 100


class Progress:
    """Report the progress of a migration to a terminal, in one line with updates.

    A file gets the permanent lines and no progress.
    """

    def __init__(
        self, stream: TextIO, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream
        self._now = now
        self._shown = now() if stream.isatty() else float("inf")
        self._began = 0.0
        self._total = 0
        self._settled = 0
        self._warnings = 0

    def begin(self, keys: int) -> None:
        """Start the clock; ``keys`` is the number of keys at the source."""
        self._began = self._now()
        self._total = keys

    def advance(self, keys: int) -> None:
        """Count more keys as done, and update the line twice a second at most."""
        self._settled += keys
        now = self._now()
        if now - self._shown >= _STEP_SECONDS:
            self._shown = now
            self._stream.write(f"\r{self._line(now)}\x1b[K")
            self._stream.flush()

    def _line(self, now: float) -> str:
        # Keys uploaded after the count must not make 101 %.
        total = max(self._total, self._settled)
        line = f"{self._settled:,} of {total:,} keys"
        if self._settled:
            left = (now - self._began) * (total - self._settled) / self._settled
            line += f" ({100 * self._settled // total} %), {_duration(left)} left"
        return line

    def say(self, text: str) -> None:
        """Write a permanent line."""
        self.clear()
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def warn(self, text: str) -> None:
        """Write a permanent line. After 100 lines write a last line about the rest."""
        self._warnings += 1
        if self._warnings <= _WARNINGS:
            self.say(text)
        elif self._warnings == _WARNINGS + 1:
            self.say("(more lines of this kind are left out)")

    def clear(self) -> None:
        """Remove the progress from the terminal."""
        if self._stream.isatty():
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def _duration(seconds: float) -> str:
    """Format seconds as "50 s", "3 min" or "2 h 5 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return (
        f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
    )


@attrs.define
class Result:
    """The outcome of a run; a dry run counts the backups that a run would write.

    Attributes:
        dry_run: no database was changed.
        unchanged: versions with equal state on both sides.
        copied: versions made equal to the source's.
        joined: versions merged key by key (``--keep better``).
        kept: versions changed at the target and left as ``--keep`` says.
        erased: versions deleted at the target after an earlier copy, not copied again.
        undecided: versions changed at the target, without a decision of the operator.
        written: keys added or replaced.
        deleted: keys deleted; replaced keys don't count.
        mended: keys written with NULL for a number out of the target's range; NULL
            reads as 0.
        lost_keys: keys left out because the target cannot hold a text in them.
        lost_versions: versions left out, with all keys, for the same reason.
        unusable: versions not copied because the source has lost their auth_data.
        left_keys: keys not copied because their version is deleted or doesn't exist.
        checked: versions compared by digest after the last write.
        checked_keys: the keys of the checked versions.
        differing: versions whose comparison failed.
        missing_users: users named by ``--user`` without a backup at the source.
    """

    dry_run: bool = False
    unchanged: int = 0
    copied: int = 0
    joined: int = 0
    kept: int = 0
    erased: int = 0
    undecided: int = 0
    written: int = 0
    deleted: int = 0
    mended: int = 0
    lost_keys: int = 0
    lost_versions: int = 0
    unusable: int = 0
    left_keys: int = 0
    checked: int = 0
    checked_keys: int = 0
    differing: int = 0
    missing_users: tuple[str, ...] = ()

    @property
    def is_done(self) -> bool:
        """Whether nothing is left for another run or for the operator to decide."""
        return not (self.undecided or self.differing or self.missing_users)

    def lines(self) -> list[str]:
        """Describe the result; the last line begins with DONE, NOT DONE or DRY RUN."""
        return [self._first_line(), *self._remarks(), self._last_line()]

    def _first_line(self) -> str:
        if self.dry_run:
            return (
                f"{self.copied} backups would be copied, {self.joined} merged;"
                f" {self.unchanged} are the same on both sides"
            )
        return (
            f"{self.copied} backups copied, {self.joined} merged, {self.unchanged}"
            f" unchanged; {self.written} keys written, {self.deleted} deleted"
        )

    def _remarks(self) -> list[str]:
        remarks = (
            (self.mended, "keys had numbers that the target can't hold: now NULL"),
            (self.lost_keys, "keys left out: the target can't hold them"),
            (self.lost_versions, "backups left out: the target can't hold them"),
            (
                self.unusable,
                "backups not copied: the source has lost their auth_data, and no client"
                " can use them there. Unless the target has an earlier copy, ask their"
                " users to set up a new backup",
            ),
            (self.left_keys, "keys not copied: of deleted backups, or of none"),
            (self.kept, "backups left as the target has them, by --keep"),
            (
                self.erased,
                "backups not copied: they were deleted at the target after they had"
                " been copied (--keep source --user USER copies a user's again)",
            ),
        )
        found = [f"{number} {text}" for number, text in remarks if number]
        users = ", ".join(self.missing_users)
        return [*found, f"No backup at the source: {users}"] if users else found

    def _last_line(self) -> str:
        todo = []
        if self.undecided:
            todo.append(
                f"{self.undecided} backups have changed at the target: run again with"
                " --keep better, source or target (--user USER for one user)"
            )
        if self.differing:
            todo.append(
                f"{self.differing} backups differ after the copy: did another program"
                " write to them? Run again"
            )
        if self.missing_users:
            todo.append("check the names given with --user")
        if self.dry_run:
            return "; ".join(["DRY RUN: nothing was written", *todo])
        if todo:
            return "NOT DONE: " + "; ".join(todo)
        return f"DONE: compared {self.checked} backups, {self.checked_keys} keys: equal"

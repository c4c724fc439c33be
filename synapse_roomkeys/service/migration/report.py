"""The report to the operator: while a migration runs, and at its end."""

import time
from collections.abc import Callable
from typing import TextIO

import attrs

#: Seconds between two updates of the line on a terminal.
_STEP_SECONDS = 0.5
#: Warnings that are written out; all of them are counted.
_WARNINGS = 100


class Progress:
    """Report how far a migration is: on a terminal, in one line that is updated.

    A file gets the lines that stay, and no progress.
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
        """Note the start, and how many keys there are to compare or to copy."""
        self._began = self._now()
        self._total = keys

    def advance(self, keys: int) -> None:
        """Note that some more keys are done, and update the line if the last update is
        half a second ago."""
        self._settled += keys
        now = self._now()
        if now - self._shown >= _STEP_SECONDS:
            self._shown = now
            self._stream.write(f"\r{self._line(now)}\x1b[K")
            self._stream.flush()

    def _line(self, now: float) -> str:
        # Keys that were added since they were counted make no 101 %.
        total = max(self._total, self._settled)
        line = f"{self._settled:,} of {total:,} keys"
        if self._settled:
            left = (now - self._began) * (total - self._settled) / self._settled
            line += f" ({100 * self._settled // total} %), {_duration(left)} left"
        return line

    def say(self, text: str) -> None:
        """Write a line that stays."""
        self.clear()
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def warn(self, text: str) -> None:
        """Write a line that stays, unless there were a hundred."""
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
    """Write a time as an operator says it: "50 s", "3 min", "2 h 5 min"."""
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
        dry_run: nothing was written.
        unchanged: versions that were the same on both sides.
        copied: versions that were written as the source has them.
        joined: versions whose keys of both sides were merged (``--keep better``).
        kept: versions that the target has changed, and that were left as ``--keep``
            says.
        erased: versions that were deleted at the target after they had been copied,
            and were not copied again.
        undecided: versions that the target has changed, and that the operator has to
            decide about.
        written: keys that were added or replaced.
        deleted: keys that were deleted, without those that were replaced.
        mended: keys written with NULL for a number that the target cannot hold; NULL
            reads as 0.
        lost_keys: keys that the target cannot hold at all, and that were left out.
        lost_versions: versions that the target cannot hold, left out with their keys.
        checked: versions that were compared, key by key, after the last write to them.
        checked_keys: how many keys they hold.
        differing: versions whose comparison failed.
        missing_users: users named by ``--user`` who have no backup at the source.
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
    checked: int = 0
    checked_keys: int = 0
    differing: int = 0
    missing_users: tuple[str, ...] = ()

    @property
    def is_done(self) -> bool:
        """Whether nothing is left for another run or for the operator to decide."""
        return not (self.undecided or self.differing or self.missing_users)

    def lines(self) -> list[str]:
        """Return the result in words; the last line begins with DONE, NOT DONE or DRY
        RUN."""
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

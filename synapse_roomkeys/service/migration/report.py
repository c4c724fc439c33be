"""How an operator is told of a migration: while it runs, and at its end."""

import time
from collections.abc import Callable
from typing import TextIO

import attrs

#: Seconds between two looks of the line that shows the progress.
_STEP_SECONDS = 0.5


class Progress:
    """Tells an operator how far it is: in one line, where that is a terminal."""

    def __init__(
        self, stream: TextIO, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream
        self._now = now
        self._shown = now() if stream.isatty() else float("inf")

    def step(self, text: str) -> None:
        """Show how far it is, if the last time is long enough ago."""
        if self._now() - self._shown >= _STEP_SECONDS:
            self._shown = self._now()
            self._stream.write(f"\r{text}\x1b[K")
            self._stream.flush()

    def warn(self, text: str) -> None:
        """Write a line that stays."""
        self.clear()
        self._stream.write(f"{text}\n")

    def clear(self) -> None:
        """Take the line away that shows how far it is."""
        if self._stream.isatty():
            self._stream.write("\r\x1b[K")
            self._stream.flush()


@attrs.define
class Result:
    """What a run did.

    Attributes:
        unchanged: how many versions were the same on both sides.
        copied: how many versions weren't, and were copied.
        written: how many keys were added or replaced.
        deleted: how many keys were deleted, those that were replaced left out.
        mended: how many of the keys written had a number that the target can't hold,
            and have NULL instead, which reads as 0.
        lost_keys: how many keys the target can't hold at all, and goes without.
        lost_versions: how many versions the same is true of, with all their keys.
        kept: how many versions were left as they are at the target, which has changed
            them itself.
        checked: how many versions were compared at the end, but those.
        checked_keys: how many keys they hold.
        differing: how many of them hadn't the same etag and count on both sides.
    """

    unchanged: int = 0
    copied: int = 0
    written: int = 0
    deleted: int = 0
    mended: int = 0
    lost_keys: int = 0
    lost_versions: int = 0
    kept: int = 0
    checked: int = 0
    checked_keys: int = 0
    differing: int = 0

    @property
    def is_equal(self) -> bool:
        """Whether the target holds what the source does, as far as it can."""
        return not self.kept and not self.differing

    def lines(self) -> list[str]:
        """The result in words; the last line is that of the check."""
        found = [
            f"{self.copied} backups copied, {self.unchanged} unchanged;"
            f" {self.written} keys written, {self.deleted} deleted"
        ]
        for number, text in (
            (self.mended, "keys had numbers that the target can't hold: now NULL"),
            (self.lost_keys, "keys left out: the target can't hold them"),
            (self.lost_versions, "backups left out: the target can't hold them"),
            (self.kept, "backups left as they are: the target has changed them"),
        ):
            if number:
                found.append(f"{number} {text}")
        verdict = f"{self.differing} differ" if self.differing else "equal"
        found.append(
            f"checked etag and count of {self.checked} backups with"
            f" {self.checked_keys} keys: {verdict}"
        )
        return found

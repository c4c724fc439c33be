"""The output of the commands: lines for people or JSON, and progress on a terminal."""

import json
import re
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, TextIO

from tqdm import tqdm

from .session import USAGE, ToolError

#: Seconds after which the progress bar of a command appears.
_DELAY = 1.0
_SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 604800}
_DURATION = re.compile(r"(\d+)([mhdw])")
_UNITS = ("B", "kB", "MB", "GB", "TB")


class Output:
    """Where a command prints its results.

    Attributes:
        is_json: Whether to print JSON: one value, or one line a row of a list.
    """

    def __init__(self, is_json: bool, stream: TextIO | None = None) -> None:
        self.is_json = is_json
        self._stream = sys.stdout if stream is None else stream

    def write(self, values: Mapping[str, Any], text: str) -> None:
        """Print a result, or a row of a list.

        Args:
            values: the result for programs.
            text: the result for people.
        """
        line = json.dumps(values, ensure_ascii=False) if self.is_json else text
        self._stream.write(f"{line}\n")

    def say(self, text: str) -> None:
        """Print a line for people only."""
        if not self.is_json:
            self._stream.write(f"{text}\n")


def progress(unit: str, total: int | None = None) -> "tqdm[Any]":
    """Return a progress bar on stderr, which a file doesn't get."""
    return tqdm(
        total=total,
        unit=f" {unit}",
        delay=_DELAY,
        disable=None,
        leave=False,
        dynamic_ncols=True,
    )


def warn(text: str) -> None:
    """Print a line on stderr, above the progress bar."""
    tqdm.write(f"synapse-roomkeys: {text}", file=sys.stderr)


def time_text(ms: int | None) -> str:
    """Format a Unix time in milliseconds, in UTC; a dash for None."""
    if ms is None:
        return "-"
    return datetime.fromtimestamp(ms / 1000, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


def size_text(size: int) -> str:
    """Format a number of bytes with a decimal unit, such as "1.4 GB"."""
    amount = float(size)
    for unit in _UNITS:
        if amount < 1000 or unit == _UNITS[-1]:
            break
        amount /= 1000
    return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"


def plural(number: int, noun: str) -> str:
    """Format a number of things, such as "1 key" or "2,000 keys"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def parse_duration(text: str) -> int:
    """Return the seconds of a duration, such as 30m, 2h, 7d or 4w.

    Raises:
        ValueError: the text is no duration.
    """
    found = _DURATION.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no duration: write 30m, 2h, 7d or 4w")
    return int(found[1]) * _SECONDS[found[2]]


def parse_moment(text: str, now: float) -> int:
    """Return a Unix time in milliseconds.

    Args:
        text: a duration before now, such as 2h, or a time in ISO 8601, in UTC unless
            it names another offset.
        now: the Unix time in seconds.

    Raises:
        ValueError: the text is neither.
    """
    if _DURATION.fullmatch(text):
        return int(1000 * (now - parse_duration(text)))
    try:
        # Python 3.10 doesn't read the Z.
        moment = datetime.fromisoformat(text.removesuffix("Z"))
    except ValueError:
        msg = f"{text!r} is no time: write 2h, 7d, or 2026-01-31T12:00:00"
        raise ValueError(msg) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return int(1000 * moment.timestamp())


def require_yes(has_yes: bool, text: str) -> None:
    """Refuse to destroy anything without the operator's word.

    Raises:
        ToolError: ``--yes`` is missing.
    """
    if not has_yes:
        raise ToolError(f"{text}: repeat the command with --yes", USAGE)

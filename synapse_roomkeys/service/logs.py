"""One handler for all logs: text or JSON lines on stderr, with the request's id.

Access tokens are removed from each line here, also from lines of other libraries.
"""

import json
import logging
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from datetime import datetime, timezone
from itertools import accumulate
from typing import Any

from twisted.logger import STDLibLogObserver, globalLogBeginner

from ..describe import error_line

#: Id of the current request. `inlineCallbacks` restores the variable after each wait.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

#: Limit of a line in bytes, without its traceback.
MAX_LINE = 2048
#: Limit of a traceback in characters. The end of a longer traceback is logged.
MAX_TRACEBACK = 16384
#: Limit of a text field in JSON, in bytes: user ids have up to 255 bytes. The five text
#: fields of an access line leave room for a message.
MAX_FIELD = 255
#: Bytes reserved for a line's time, level, logger and request id, and also the minimum
#: that a message may use.
_RESERVED = 256
#: Minimum of seconds between two lines of a `RateLimitedWarning`: an attack of one day
#: logs 1,440 lines.
WARNING_SECONDS = 60
_TOKEN = re.compile(r"(access_token=|Bearer )[^\s&\"']+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def set_up_logs(log_format: str, level: str) -> None:
    """Send all logs to stderr, with Twisted's own log and Python's warnings.

    Args:
        log_format: ``text`` or ``json``.
        level: the lowest level that is logged.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], level=level, force=True)
    logging.captureWarnings(True)
    # At INFO Twisted logs each connection that is opened or closed.
    logging.getLogger("twisted").setLevel(max(logging.WARNING, logging.root.level))
    globalLogBeginner.beginLoggingTo([STDLibLogObserver()], redirectStandardIO=False)


class RateLimitedWarning:
    """A warning that is logged at most once a minute, however often its cause occurs.

    If warnings were left out, the next line has their number.
    """

    def __init__(
        self,
        logger: logging.Logger,
        now: Callable[[], float],
        seconds: float = WARNING_SECONDS,
    ) -> None:
        """
        Args:
            now: returns the time in seconds.
            seconds: minimum time between two lines.
        """
        self._logger = logger
        self._now = now
        self._seconds = seconds
        self._next = -math.inf
        self._left_out = 0

    def warn(self, message: str, *args: object) -> None:
        """Log a line, or count a line left out if the last line is too recent."""
        now = self._now()
        if now < self._next:
            self._left_out += 1
            return
        left_out, self._left_out = self._left_out, 0
        self._next = now + self._seconds
        if left_out:
            message += " (%d times more since the last such line)"
            args = (*args, left_out)
        self._logger.warning(message, *args)


class TextFormatter(logging.Formatter):
    """Formatter of lines with time, level, logger, request id and message. A traceback
    is on the lines after the message."""

    def format(self, record: logging.LogRecord) -> str:
        """As `logging.Formatter.format`."""
        start = f"{_time(record)} {record.levelname} {record.name}"
        line = f"{start} [{request_id.get() or '-'}] {_message(record)}"
        return "\n".join([line, *_exception(record)])


class JsonFormatter(logging.Formatter):
    """Formatter of JSON objects, one a line: time, level, logger, message, request_id,
    exception.

    The ``fields`` of a record (``extra={"fields": {...}}``) are members, too.
    """

    def format(self, record: logging.LogRecord) -> str:
        """As `logging.Formatter.format`."""
        fields = {
            name: _cut(_clean(value), MAX_FIELD) if isinstance(value, str) else value
            for name, value in getattr(record, "fields", {}).items()
        }
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": _message(record, len(json.dumps(fields))),
            "request_id": request_id.get(),
            **fields,
        }
        exception = "\n".join(_exception(record))
        return json.dumps({**line, "exception": exception} if exception else line)


def _time(record: logging.LogRecord) -> str:
    """Return the time of a record in UTC, in the format of ISO 8601."""
    time = datetime.fromtimestamp(record.created, timezone.utc)
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _message(record: logging.LogRecord, taken: int = 0) -> str:
    """Return the message as one line of printable ASCII, cut at the limit of a line.

    Args:
        taken: number of bytes that fields use of the line.
    """
    size = max(MAX_LINE - _RESERVED - taken, _RESERVED)
    return _cut(_clean(record.getMessage()), size)


def _clean(text: str) -> str:
    """Escape a text to printable ASCII on one line, and remove access tokens."""
    text = _TOKEN.sub(r"\1<redacted>", text)
    text = _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)
    return text.encode("ascii", "backslashreplace").decode()


def _cut(text: str, size: int) -> str:
    """Cut a text to a number of bytes in JSON. Append "..." to a text that was cut.

    Args:
        text: printable ASCII.
        size: limit of the bytes, without the "...".
    """
    # In JSON quotes and backslashes need two bytes each.
    if len(text) + text.count('"') + text.count("\\") <= size:
        return text
    sizes = accumulate(2 if char in '"\\' else 1 for char in text[:size])
    return text[: sum(needed <= size for needed in sizes)] + "..."


def _exception(record: logging.LogRecord) -> list[str]:
    """Return the lines of a record's traceback, or no lines.

    The text of each exception is replaced by its line without secrets (`error_line`).
    """
    error = record.exc_info[1] if record.exc_info else None
    lines = "".join(_chain(error)).rstrip("\n") if error else ""
    return _TOKEN.sub(r"\1<redacted>", lines)[-MAX_TRACEBACK:].splitlines()


def _chain(error: BaseException) -> Iterator[str]:
    """Yield the tracebacks of an exception and its causes, the first cause first."""
    before = error.__cause__ or (
        None if error.__suppress_context__ else error.__context__
    )
    if before is not None:
        yield from _chain(before)
        yield "\nWhich led to:\n\n"
    yield "Traceback (most recent call last):\n"
    yield from traceback.format_tb(error.__traceback__)
    yield f"{type(error).__qualname__}: {error_line(error)[:MAX_LINE]}\n"

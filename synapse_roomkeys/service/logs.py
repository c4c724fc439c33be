"""One handler for all logs: text or JSON lines on stderr, with the request's id.

No line has an access token, whoever wrote it: they are cut out here once more.
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

#: The id of the request that is being answered. `inlineCallbacks` keeps it over waits.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

#: The longest line in bytes, but for tracebacks.
MAX_LINE = 2048
#: The longest traceback in characters, of which the end is kept.
MAX_TRACEBACK = 16384
#: The longest text of a field in JSON, in bytes: user ids have up to 255. Five such
#: texts, of an access line, leave room for a message.
MAX_FIELD = 255
#: Room for a line's time, level, logger and request id, in bytes; also the least room
#: that a message has.
_ROOM = 256
#: The least time between two lines of a `RareLine`, in seconds: an attack that goes on
#: for a day logs 1,440.
RARE_SECONDS = 60
_TOKEN = re.compile(r"(access_token=|Bearer )[^\s&\"']+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def set_up_logs(log_format: str, level: str) -> None:
    """Have everything logged to stderr, Twisted's own log and warnings as well.

    Args:
        log_format: ``text`` or ``json``.
        level: the least level that is logged.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], level=level, force=True)
    logging.captureWarnings(True)
    # Twisted tells of every connection that it opens or drops.
    logging.getLogger("twisted").setLevel(max(logging.WARNING, logging.root.level))
    globalLogBeginner.beginLoggingTo([STDLibLogObserver()], redirectStandardIO=False)


class RareLine:
    """A warning that is logged at most once a minute, however often its cause occurs.

    The next line says how often it was left out.
    """

    def __init__(
        self,
        logger: logging.Logger,
        now: Callable[[], float],
        seconds: float = RARE_SECONDS,
    ) -> None:
        """
        Args:
            now: the time in seconds.
            seconds: the least time between two lines.
        """
        self._logger = logger
        self._now = now
        self._seconds = seconds
        self._next = -math.inf
        self._left_out = 0

    def warn(self, message: str, *args: object) -> None:
        """Log a line, unless the last one is too recent."""
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
    """Lines of time, level, logger, request id and message; tracebacks after them."""

    def format(self, record: logging.LogRecord) -> str:
        """As `logging.Formatter.format`."""
        start = f"{_time(record)} {record.levelname} {record.name}"
        line = f"{start} [{request_id.get() or '-'}] {_message(record)}"
        return "\n".join([line, *_exception(record)])


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, request_id, exception.

    A record's ``fields`` (``extra={"fields": {...}}``) are members as well.
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
    """When it was logged, in UTC, as ISO 8601 has it."""
    time = datetime.fromtimestamp(record.created, timezone.utc)
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _message(record: logging.LogRecord, taken: int = 0) -> str:
    """The message on one line, of printable ASCII, cut to what a line has room for.

    Args:
        taken: how many bytes of the line are taken by fields.
    """
    return _cut(_clean(record.getMessage()), max(MAX_LINE - _ROOM - taken, _ROOM))


def _clean(text: str) -> str:
    """A text without line ends and access tokens, in printable ASCII."""
    text = _TOKEN.sub(r"\1<redacted>", text)
    text = _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)
    return text.encode("ascii", "backslashreplace").decode()


def _cut(text: str, room: int) -> str:
    """The beginning of a text that takes at most so many bytes in JSON, and "..." after
    it where something is missing.

    Args:
        text: printable ASCII.
    """
    # JSON doubles quotes and backslashes.
    if len(text) + text.count('"') + text.count("\\") <= room:
        return text
    sizes = accumulate(2 if char in '"\\' else 1 for char in text[:room])
    return text[: sum(size <= room for size in sizes)] + "..."


def _exception(record: logging.LogRecord) -> list[str]:
    """The lines of a traceback, if there is one.

    Of each exception's own text it has the line that holds no secret (`error_line`).
    """
    error = record.exc_info[1] if record.exc_info else None
    lines = "".join(_chain(error)).rstrip("\n") if error else ""
    return _TOKEN.sub(r"\1<redacted>", lines)[-MAX_TRACEBACK:].splitlines()


def _chain(error: BaseException) -> Iterator[str]:
    """The traceback of an exception after that of the one that led to it."""
    before = error.__cause__ or (
        None if error.__suppress_context__ else error.__context__
    )
    if before is not None:
        yield from _chain(before)
        yield "\nWhich led to:\n\n"
    yield "Traceback (most recent call last):\n"
    yield from traceback.format_tb(error.__traceback__)
    yield f"{type(error).__qualname__}: {error_line(error)[:MAX_LINE]}\n"

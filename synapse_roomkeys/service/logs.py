"""One handler for all logs: text or JSON lines on stderr, with the request's id.

No line has an access token, whoever wrote it: they are cut out here once more.
"""

import json
import logging
import re
import sys
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import datetime, timezone

from twisted.logger import STDLibLogObserver, globalLogBeginner

from ..describe import error_line

#: The id of the request that is being answered. `inlineCallbacks` keeps it over waits.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

#: The longest line in bytes, but for tracebacks.
MAX_LINE = 2048
#: The longest traceback in characters, of which the end is kept.
MAX_TRACEBACK = 16384
#: What a line has besides its message is less than this.
_ROOM = 256
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


class TextFormatter(logging.Formatter):
    """Lines of time, level, logger, request id and message; tracebacks after them."""

    def format(self, record: logging.LogRecord) -> str:
        """As `logging.Formatter.format`."""
        start = f"{_time(record)} {record.levelname} {record.name}"
        line = f"{start} [{request_id.get() or '-'}] {_message(record)}"
        return "\n".join([line, *_exception(record)])


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, request_id, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """As `logging.Formatter.format`."""
        line = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": _message(record),
            "request_id": request_id.get(),
        }
        exception = "\n".join(_exception(record))
        return json.dumps({**line, "exception": exception} if exception else line)


def _time(record: logging.LogRecord) -> str:
    """When it was logged, in UTC, as ISO 8601 has it."""
    time = datetime.fromtimestamp(record.created, timezone.utc)
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _message(record: logging.LogRecord) -> str:
    """The message on one line, of printable ASCII, cut to what a line has room for."""
    text = _TOKEN.sub(r"\1<redacted>", record.getMessage())
    text = _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)
    text = text.encode("ascii", "backslashreplace").decode()
    # JSON escapes marks and backslashes once more.
    room = MAX_LINE - _ROOM - text.count('"') - text.count("\\")
    return text if len(text) <= room else text[: max(room, _ROOM)] + "..."


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

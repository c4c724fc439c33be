"""The lines that the service logs."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.trial.unittest import SynchronousTestCase

from synapse_roomkeys.service.logs import (
    MAX_FIELD,
    MAX_LINE,
    JsonFormatter,
    RareLine,
    TextFormatter,
    request_id,
)

SECRET = "syt_secret"
FORMATTERS = (TextFormatter(), JsonFormatter())


def record(message: str, *args: object, error: bool = False) -> logging.LogRecord:
    """What a call of a logger makes; its time is 2001-09-09T01:46:40.123Z."""
    found = logging.LogRecord(
        *("synapse_roomkeys.test", logging.INFO, "test.py", 1, message, args),
        exc_info=sys.exc_info() if error else None,
    )
    found.created = 1_000_000_000.1234
    return found


class FormatterTests(SynchronousTestCase):
    """`TextFormatter` and `JsonFormatter`."""

    def test_text(self) -> None:
        """Time, level, logger, request and message."""
        line = TextFormatter().format(record("%d keys", 3))
        start = "2001-09-09T01:46:40.123Z INFO synapse_roomkeys.test"
        self.assertEqual(line, f"{start} [-] 3 keys")
        token = request_id.set("abc")
        self.addCleanup(request_id.reset, token)
        line = TextFormatter().format(record("%d keys", 3))
        self.assertEqual(line, f"{start} [abc] 3 keys")

    def test_json(self) -> None:
        """The same, as an object; an exception only where there is one."""
        token = request_id.set("abc")
        self.addCleanup(request_id.reset, token)
        self.assertEqual(
            json.loads(JsonFormatter().format(record("%d keys", 3))),
            {
                "time": "2001-09-09T01:46:40.123Z",
                "level": "INFO",
                "logger": "synapse_roomkeys.test",
                "message": "3 keys",
                "request_id": "abc",
            },
        )

    def test_json_has_fields_of_their_own(self) -> None:
        """Numbers as they are, long texts cut; the line is one line, and bounded."""
        found: Any = record("%s", "x" * 5000)
        fields = {"status": 200, "seconds": 0.5, "user": "@a:b", "device": None}
        found.fields = fields
        line = json.loads(JsonFormatter().format(found))
        self.assertEqual({name: line[name] for name in fields}, fields)
        self.assertNotIn("fields", line)
        for text in ("é☃\udc80" * 500, '"\\' * 4000, f"Bearer {SECRET}", "\x1b" * 3000):
            found.fields = {f"field_{number}": text for number in range(5)}
            whole = JsonFormatter().format(found)
            self.assertLessEqual(len(whole), MAX_LINE)
            self.assertTrue(whole.isprintable() and whole.isascii(), whole)
            self.assertNotIn(SECRET, whole)
            self.assertLess(len(json.loads(whole)["field_0"]), MAX_FIELD + 4)
            self.assertIn("xxx", json.loads(whole)["message"])

    def test_a_message_is_one_bounded_line(self) -> None:
        """Whatever a client has had put there."""
        for text in ("a\nb\r\x1b[1m\u2028c\x85", "é☃\udc80", "x" * 9999, '"\\' * 4000):
            for formatter in FORMATTERS:
                line = formatter.format(record("Refused: %s", text))
                self.assertEqual(len(line.splitlines()), 1)
                self.assertTrue(line.isprintable(), line)
                self.assertLessEqual(len(line.encode()), MAX_LINE)
                self.assertIn("Refused: ", line)

    def test_no_line_has_a_token(self) -> None:
        """Though somebody logs the address or the header that it came in."""
        for text in (
            f"GET /a?b=c&access_token={SECRET}&d=e",
            f"{{'Authorization': 'Bearer {SECRET}'}}",
        ):
            for formatter in FORMATTERS:
                try:
                    raise ValueError(text)
                except ValueError:
                    line = formatter.format(record(text, error=True))
                self.assertNotIn(SECRET, line)
                self.assertIn("ValueError", line)

    def test_an_exception_tells_its_first_line(self) -> None:
        """The driver of a database puts parameters of the statement on the others."""
        for formatter in FORMATTERS:
            try:
                try:
                    raise RuntimeError(f"first\n{SECRET}")
                except RuntimeError as error:
                    raise ValueError(f"second\n{SECRET}") from error
            except ValueError:
                text = formatter.format(record("It failed", error=True))
            self.assertIn("RuntimeError: first", text)
            self.assertIn("ValueError: second", text)
            self.assertIn("test_service_logs.py", text)
            self.assertNotIn(SECRET, text)

    def test_an_exception_in_json_is_on_the_same_line(self) -> None:
        """One object a line, always."""
        try:
            raise ValueError("why")
        except ValueError:
            line = JsonFormatter().format(record("It failed", error=True))
        self.assertEqual(len(line.splitlines()), 1)
        exception: str = json.loads(line)["exception"]
        self.assertTrue(exception.startswith("Traceback"), exception)
        self.assertTrue(exception.endswith("ValueError: why"), exception)


class RareLineTests(SynchronousTestCase):
    """`RareLine`."""

    def test_it_is_logged_once_in_a_while(self) -> None:
        """And says how often it was left out."""
        now = 100.0
        logger = logging.getLogger("synapse_roomkeys.test")
        line = RareLine(logger, lambda: now, seconds=60)
        with self.assertLogs(logger) as logged:
            for now in (100.0, 101.0, 159.9, 160.0, 219.9, 300.0, 400.0):
                line.warn("At %d", now)
        self.assertEqual(
            [one.getMessage() for one in logged.records],
            [
                "At 100",
                "At 160 (2 times more since the last such line)",
                "At 300 (1 times more since the last such line)",
                "At 400",
            ],
        )


class ContextTests(SynchronousTestCase):
    """`request_id`."""

    def test_it_outlasts_waits(self) -> None:
        """Two that wait in turns each find their own, whoever ends their wait."""
        waits: list[Deferred[None]] = []
        found: list[tuple[str, str | None]] = []

        @inlineCallbacks
        def answer(name: str) -> Any:
            request_id.set(name)
            for _ in range(2):
                wait: Deferred[None] = Deferred()
                waits.append(wait)
                yield wait
                found.append((name, request_id.get()))

        for name in ("a", "b"):
            answer(name)
        self.assertIsNone(request_id.get())
        while waits:
            waits.pop(0).callback(None)
        self.assertEqual(found, [(name, name) for name in ("a", "b", "a", "b")])

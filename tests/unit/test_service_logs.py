"""Tests of the service's log lines."""

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
    RateLimitedWarning,
    TextFormatter,
    request_id,
)

SECRET = "syt_secret"
FORMATTERS = (TextFormatter(), JsonFormatter())


def record(message: str, *args: object, error: bool = False) -> logging.LogRecord:
    """A log record; its time is 2001-09-09T01:46:40.123Z."""
    found = logging.LogRecord(
        *("synapse_roomkeys.test", logging.INFO, "test.py", 1, message, args),
        exc_info=sys.exc_info() if error else None,
    )
    found.created = 1_000_000_000.1234
    return found


class FormatterTests(SynchronousTestCase):
    """Tests of `TextFormatter` and `JsonFormatter`."""

    def test_a_line_of_text_has_all_fields(self) -> None:
        """A line of text has time, level, logger, request id and message."""
        line = TextFormatter().format(record("%d keys", 3))
        start = "2001-09-09T01:46:40.123Z INFO synapse_roomkeys.test"
        self.assertEqual(line, f"{start} [-] 3 keys")
        token = request_id.set("abc")
        self.addCleanup(request_id.reset, token)
        line = TextFormatter().format(record("%d keys", 3))
        self.assertEqual(line, f"{start} [abc] 3 keys")

    def test_a_line_of_json_has_all_fields(self) -> None:
        """A line of JSON is an object of time, level, logger, message and request id,
        with an exception only if the record has an exception."""
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

    def test_fields_of_a_record_are_members_in_json(self) -> None:
        """Extra fields of a record are members in JSON: numbers stay numbers, long
        texts are cut, and the line stays one line of bounded length."""
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
        """A message of any text that a client may send is one printable line of bounded
        length."""
        for text in ("a\nb\r\x1b[1m\u2028c\x85", "é☃\udc80", "x" * 9999, '"\\' * 4000):
            for formatter in FORMATTERS:
                line = formatter.format(record("Refused: %s", text))
                self.assertEqual(len(line.splitlines()), 1)
                self.assertTrue(line.isprintable(), line)
                self.assertLessEqual(len(line.encode()), MAX_LINE)
                self.assertIn("Refused: ", line)

    def test_no_line_has_a_token(self) -> None:
        """A token in a logged address or header is not in the line."""
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

    def test_an_exception_is_logged_with_its_first_line(self) -> None:
        """Only the first line of an exception's message is logged, because database
        drivers put the parameters of a statement on the other lines."""
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
        """The exception of a record is a member of the JSON object, so a line is always
        a whole object."""
        try:
            raise ValueError("why")
        except ValueError:
            line = JsonFormatter().format(record("It failed", error=True))
        self.assertEqual(len(line.splitlines()), 1)
        exception: str = json.loads(line)["exception"]
        self.assertTrue(exception.startswith("Traceback"), exception)
        self.assertTrue(exception.endswith("ValueError: why"), exception)


class RateLimitedWarningTests(SynchronousTestCase):
    """Tests of `RateLimitedWarning`."""

    def test_a_rare_line_is_logged_once_a_period(self) -> None:
        """A line is logged at most once in 60 seconds, and the next line states how
        many were left out."""
        now = 100.0
        logger = logging.getLogger("synapse_roomkeys.test")
        line = RateLimitedWarning(logger, lambda: now, seconds=60)
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
    """Tests of `request_id`."""

    def test_a_request_id_survives_waits(self) -> None:
        """Two generators that wait by turns each read their own request id, whichever
        code fires their Deferreds."""
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

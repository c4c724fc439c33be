"""Log lines about outages: the beginning, reminders and the end of each outage."""

import logging
import math
import time
from collections.abc import Callable, Collection

import attrs

logger = logging.getLogger(__name__)

#: Seconds between two log lines about the same outage: some thousand lines in a night.
REMINDER_SECONDS = 30.0


@attrs.frozen
class Cause:
    """A kind of fault of a server that the plugin depends on.

    Attributes:
        name: label of the cause in metrics and log lines.
        advice: a sentence for the operator: the first thing to try.
        settle_seconds: minimum time between the last failure and the success that ends
            an outage. Requests of other users succeed during a lock, and reads succeed
            while a disk is full: without this time the log would alternate between
            failure and recovery.
    """

    name: str
    advice: str
    settle_seconds: float = 3.0


@attrs.define
class _Outage:
    """An outage that isn't over.

    Attributes:
        began: time of the first failed try.
        failed: time of the last failed try.
        recovered: time of the first success after the last failure, or None.
        logged: time of the last log line about the outage.
        retries: number of failed tries that were followed by a retry.
        refused: number of requests that were given up.
    """

    began: float
    failed: float
    logged: float
    recovered: float | None = None
    retries: int = 0
    refused: int = 0


class Outages:
    """The outages of one server, at most one for each cause at a time.

    Not thread-safe: call the methods from the reactor's thread only.
    """

    def __init__(
        self, subject: str, seconds: Callable[[], float] = time.monotonic
    ) -> None:
        """
        Args:
            subject: the server with its address, as log lines begin.
            seconds: a clock that is never set back.
        """
        self._subject = subject
        self._seconds = seconds
        self._open: dict[Cause, _Outage] = {}
        #: Time of the last failure by each cause.
        self._last: dict[Cause, float] = {}

    def note_failure(self, cause: Cause, description: str) -> None:
        """Count a failed try that is followed by a retry. Log the first failure of an
        outage, and a reminder every `REMINDER_SECONDS`.

        Args:
            cause: the kind of the failure.
            description: the request and the error on one line, without a secret.
        """
        now = self._last[cause] = self._seconds()
        outage = self._open.get(cause)
        if outage is None:
            outage = self._open[cause] = _Outage(now, now, now)
            self._log_begin(logging.WARNING, "trying again", cause, description)
        outage.retries += 1
        outage.failed = now
        outage.recovered = None
        self._remind(cause, outage, description)

    def note_refusal(self, cause: Cause, description: str) -> None:
        """Count a request that was given up after its last try. Log the first such
        request of an outage, and a reminder every `REMINDER_SECONDS`.

        Args:
            cause: the kind of the failure.
            description: as for `note_failure`.
        """
        now = self._last[cause] = self._seconds()
        outage = self._open.setdefault(cause, _Outage(now, now, now))
        outage.refused += 1
        outage.failed = now
        outage.recovered = None
        if outage.refused == 1:
            outage.logged = now
            self._log_begin(logging.ERROR, "giving up", cause, description)
        else:
            self._remind(cause, outage, description)

    def note_success(self) -> None:
        """Note that a request succeeded. End each outage whose last failure is
        ``settle_seconds`` ago, and log the end."""
        if not self._open:
            return
        now = self._seconds()
        for cause, outage in list(self._open.items()):
            if outage.recovered is None:
                outage.recovered = now
            if now - outage.failed >= cause.settle_seconds:
                del self._open[cause]
                logger.warning(
                    "%s is back (%s) after %.1f s: %d retries, %d requests given up",
                    self._subject,
                    cause.name,
                    outage.recovered - outage.began,
                    outage.retries,
                    outage.refused,
                )

    def has_failure(self, causes: Collection[Cause], seconds: float) -> bool:
        """Whether a try failed by one of the causes within the last seconds, also in an
        outage that has ended."""
        since = self._seconds() - seconds
        return any(self._last.get(cause, -math.inf) >= since for cause in causes)

    def _log_begin(
        self, level: int, consequence: str, cause: Cause, description: str
    ) -> None:
        """Log the first failure, or the first refusal, of an outage."""
        logger.log(
            level,
            "%s fails (%s), %s: %s. %s",
            self._subject,
            cause.name,
            consequence,
            description.rstrip("."),
            cause.advice,
        )

    def _remind(self, cause: Cause, outage: _Outage, description: str) -> None:
        """Log an outage if the last line about it is `REMINDER_SECONDS` old."""
        if outage.failed - outage.logged < REMINDER_SECONDS:
            return
        outage.logged = outage.failed
        logger.warning(
            "%s still fails (%s) after %.0f s: %d retries, %d requests given up; the"
            " last: %s",
            self._subject,
            cause.name,
            outage.failed - outage.began,
            outage.retries,
            outage.refused,
            description.rstrip("."),
        )

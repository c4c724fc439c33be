"""Outages in the log: lines for the beginning, reminders and the end of each."""

import logging
import math
import time
from collections.abc import Callable, Collection

import attrs

logger = logging.getLogger(__name__)

#: Seconds between two log lines about one outage. A night of two lines a minute is some
#: thousand lines.
REMINDER_SECONDS = 30.0


@attrs.frozen
class Cause:
    """A kind of fault of a server that the plugin depends on.

    Attributes:
        name: its label in metrics and log lines.
        advice: a sentence for the operator: the first thing to try.
        settle_seconds: an outage is over when a request succeeds so long after the last
            failure. Requests of other users succeed during a lock, and reads succeed
            while a disk is full: without a pause the log would alternate between
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
        retries: failed tries since the beginning that were followed by another.
        refused: requests that were given up since the beginning.
    """

    began: float
    failed: float
    logged: float
    recovered: float | None = None
    retries: int = 0
    refused: int = 0


class Outages:
    """The outages of one server, at most one for each cause at a time.

    It is used from the reactor's thread alone.
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

    def note_failure(self, cause: Cause, what: str) -> None:
        """Count a failed try that is followed by another. Log the first of an outage,
        and one in `REMINDER_SECONDS`.

        Args:
            what: the request and the error on one line, without a secret.
        """
        now = self._last[cause] = self._seconds()
        outage = self._open.get(cause)
        if outage is None:
            outage = self._open[cause] = _Outage(now, now, now)
            logger.warning(
                "%s fails (%s), trying again: %s. %s",
                *(self._subject, cause.name, what.rstrip("."), cause.advice),
            )
        outage.retries += 1
        outage.failed = now
        outage.recovered = None
        self._remind(cause, outage, what)

    def note_refusal(self, cause: Cause, what: str) -> None:
        """Count a request that was given up after its last try. Log the first of an
        outage.

        Args:
            what: as for `note_failure`.
        """
        now = self._last[cause] = self._seconds()
        outage = self._open.setdefault(cause, _Outage(now, now, now))
        outage.refused += 1
        outage.failed = now
        outage.recovered = None
        if outage.refused == 1:
            outage.logged = now
            logger.error(
                "%s fails (%s), giving up: %s. %s",
                *(self._subject, cause.name, what.rstrip("."), cause.advice),
            )
        else:
            self._remind(cause, outage, what)

    def note_success(self) -> None:
        """Note that a request succeeded. Log the end of each outage whose last failure
        is long enough ago."""
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
                    *(self._subject, cause.name, outage.recovered - outage.began),
                    *(outage.retries, outage.refused),
                )

    def has_met(self, causes: Collection[Cause], seconds: float) -> bool:
        """Tell whether a try or request failed by one of the causes within a number of
        seconds, in an outage that is over or not."""
        since = self._seconds() - seconds
        return any(self._last.get(cause, -math.inf) >= since for cause in causes)

    def _remind(self, cause: Cause, outage: _Outage, what: str) -> None:
        if outage.failed - outage.logged < REMINDER_SECONDS:
            return
        outage.logged = outage.failed
        logger.warning(
            "%s still fails (%s) after %.0f s: %d retries, %d requests given up; the"
            " last: %s",
            *(self._subject, cause.name, outage.failed - outage.began),
            *(outage.retries, outage.refused, what.rstrip(".")),
        )

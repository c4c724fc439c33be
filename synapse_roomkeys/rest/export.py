"""The answer with a user's backups, as the command ``export`` writes them."""

import time

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.web.http import Request

from ..admin.transfer_file import LinesEncoder
from ..inline import Inline
from ..pages import KeyPages
from ..storage import VersionFacts
from .host import AdminHost
from .streaming import PacedWriter, stream, write_pages


class ExportAnswer:
    """An answer with versions and their keys."""

    def __init__(
        self,
        hs: AdminHost,
        request: Request,
        versions: list[VersionFacts],
        operator: str,
    ) -> None:
        self._handler = hs.handler
        self._versions = versions
        self._operator = operator
        #: The keys of the version that is being sent.
        self._pages: KeyPages | None = None
        self._writer = PacedWriter(
            request, hs.clock, hs.stalled_download_seconds, self._idle
        )

    def _idle(self, seconds: float) -> None:
        """Note that the client has paused reading: see `KeyPages.idle`."""
        if self._pages is not None:
            self._pages.idle(seconds)

    def run(self, user_id: str) -> "Deferred[None]":
        """Send the answer. Fire with None after its end."""
        return stream(self._writer, lambda: self._write(LinesEncoder(user_id)))

    @inlineCallbacks
    def _write(self, encoder: LinesEncoder) -> Inline[None]:
        start = encoder.start(int(1000 * time.time()))
        yield self._writer.write_all(iter((start,)))
        for version in self._versions:
            yield self._writer.write_all(iter((encoder.begin(version),)))
            pages = yield self._handler.export_version(version, self._operator)
            self._pages = pages
            try:
                yield write_pages(self._writer, pages, encoder)
            finally:
                self._pages = None
                yield pages.close()
        yield self._writer.write_all(iter((encoder.end(),)))

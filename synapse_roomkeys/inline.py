"""The return type of functions that `inlineCallbacks` decorates."""

from collections.abc import Generator
from typing import Any, TypeVar

from twisted.internet.defer import Deferred

T = TypeVar("T")

#: ``Inline[T]``: a generator that waits for Deferreds and returns a T. After decoration
#: the function returns a Deferred that fires with the T.
Inline = Generator[Deferred[Any], Any, T]

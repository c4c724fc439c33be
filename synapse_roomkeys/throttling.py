"""One limit: a user's huge body keeps the reactor from others for a few milliseconds.

The reactor serves all users in a single thread. An upload passes four measures, in
this order:

1. `has_too_many_objects` refuses a body with more objects than a real upload of its
   length, before decoding, which can't be interrupted.
2. `is_explainable` limits the second decoding of a refused body (see `refusals`).
3. `for_each` splits the work on the keys into slices of `SLICE` seconds, and yields to
   the reactor after each slice.
4. A step longer than a slice is followed by a pause of `PAUSE_FACTOR` times the excess.
   The pause limits a user's share of the reactor's time.
"""

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from twisted.internet.defer import inlineCallbacks

from .clock import Clock
from .inline import Inline

T = TypeVar("T")

#: Longest time for which interruptible work runs without yielding to the reactor, in
#: seconds.
SLICE = 0.005
#: Factor of the pause after a step that used more than SLICE seconds of CPU: the pause
#: is the excess times PAUSE_FACTOR. With 200, one user delays others for longer than
#: SLICE less than 1 % of the time, however often the user repeats the request.
PAUSE_FACTOR = 200
#: Longest pause of `for_each`, in seconds.
MAX_PAUSE = 10.0
#: Maximum JSON objects of an upload: `_OBJECTS`, and one more for each
#: `_BYTES_PER_OBJECT` bytes. A real key has two objects in 900 bytes. The limit keeps
#: the decoding of 10 MiB, which doesn't yield to the reactor, below 35 ms.
_OBJECTS = 10_000
_BYTES_PER_OBJECT = 256
#: Approximate maximum of values in a refused body that is decoded a second time for a
#: message that names room, session and field. An upload of 200 keys has 2,000 values.
MAX_EXPLAINED_VALUES = 10_000


def has_too_many_objects(body: bytes) -> bool:
    """Return whether a body has more opening braces than a real upload of its size."""
    return body.count(b"{") > _OBJECTS + len(body) // _BYTES_PER_OBJECT


def is_explainable(body: bytes) -> bool:
    """Return whether a refused body has at most about `MAX_EXPLAINED_VALUES` values, so
    a second decoding is short."""
    return sum(map(body.count, (b"{", b"[", b","))) <= MAX_EXPLAINED_VALUES


@inlineCallbacks
def for_each(
    clock: Clock, call: Callable[[T], object], values: "Iterable[T]"
) -> Inline[None]:
    """Call a function with each value, yielding to the reactor after each `SLICE`.

    The pause is as long as the CPU time of the slice. After a step that exceeded
    `SLICE` (a single step can't be interrupted) the pause is longer: see
    `PAUSE_FACTOR`.

    Raises:
        Exception: any exception of the function or of the iterator.
    """
    steps = map(call, values)
    goes_on = True
    while goes_on:
        before = time.thread_time()
        end = clock.seconds() + SLICE
        try:
            with _uncollected():
                goes_on = any(clock.seconds() > end for _ in steps)
        finally:
            if clock.seconds() > end:
                yield clock.sleep(_pause(time.thread_time() - before))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Context in which the garbage collector is disabled, because a collection would
    otherwise count as CPU time of the user served at the moment."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _pause(taken: float) -> float:
    """Seconds for which to yield to the reactor after `taken` seconds of CPU time."""
    return min(taken + PAUSE_FACTOR * max(0, taken - SLICE), MAX_PAUSE)

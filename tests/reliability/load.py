"""Clients that share a backup and go on through a fault, and what they saw."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from random import Random
from typing import Any

import attrs
from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults, inlineCallbacks
from twisted.internet.task import deferLater

from synapse_roomkeys.storage import FIRST_KEYS

from ..contract import Answer
from ..contract.base import ALGORITHM, accepted
from .clients import ROOMS, SESSIONS, Connection, Recorder, any_key, any_operation
from .linearizability import (
    Delete,
    Download,
    Event,
    GetInfo,
    Operation,
    Upload,
    linearize,
)

CLIENTS = 6
#: How many operations there are before a fault, at most. The checker's memory grows
#: with the length of a history: this and what is lost keep it small.
OPERATIONS = 90
#: How many operations each client performs after it.
OPERATIONS_AFTER = 4
#: How long after an operation's begin the fault comes, at most, in seconds: about as
#: long as an upload takes.
FAULT_DELAY = 0.02
#: The part of the operations that upload keys which nobody else uploads.
NEW_KEYS_FRACTION = 0.4
NEW_KEYS = 6
#: What waits longer for an answer is lost, in seconds.
ANSWER_TIMEOUT = 60.0
#: How long a client waits after a failure, in seconds.
PAUSE = 0.1
#: How long it may take until all is well again, in seconds.
DEADLINE = 30.0


@attrs.define
class Load:
    """Clients of one backup.

    Attributes:
        recorder: what they saw.
        random: chooses what they do, and when the fault comes.
        fault_at: how many operations there are before it.
        started: how many operations there were.
        fault: fires after it.
        fault_times: when it began and when it was over.
        new_keys_left: how many new keys there may be yet: a download of one page shows one
            moment, which a longer one doesn't.
    """

    connection: Connection
    recorder: Recorder
    random: Random
    fault_at: int
    started: int = 0
    fault: Deferred[None] = attrs.field(factory=Deferred)
    fault_times: tuple[float, float] = (0, 0)
    new_keys_left: int = FIRST_KEYS - len(ROOMS) * len(SESSIONS)

    @inlineCallbacks
    def run(self, inject: Callable[[], None]) -> Generator[Deferred[Any], Any, None]:
        """Perform operations, inject a fault meanwhile, and perform some more.

        Args:
            inject: the fault and, where something must be started again, its end.
        """
        delay = self.random.random() * FAULT_DELAY
        clients = [self._act(number) for number in range(CLIENTS)]
        while self.started < self.fault_at:
            yield deferLater(reactor, 0.001)
        yield deferLater(reactor, delay)
        start = time.monotonic()
        inject()
        self.fault_times = start, time.monotonic()
        self.fault.callback(None)
        yield gatherResults(clients, consumeErrors=True)

    @inlineCallbacks
    def _act(self, number: int) -> Generator[Deferred[Any], Any, None]:
        """One client's operations."""
        random = Random(self.random.random())
        while not self.fault.called and self.started < OPERATIONS:
            yield self._perform(random, number)
        if not self.fault.called:
            yield wait_for(self.fault)
        for _ in range(OPERATIONS_AFTER):
            yield self._perform(random, number)

    @inlineCallbacks
    def _perform(
        self, random: Random, number: int
    ) -> Generator[Deferred[Any], Any, None]:
        mark = f"{number}/{self.started}"
        self.started += 1
        operation = self._choose(random, mark)
        yield self.recorder.perform(self.connection, operation, ANSWER_TIMEOUT)
        if self.recorder.events[-1].is_lost:
            yield deferLater(reactor, PAUSE)

    def _choose(self, random: Random, mark: str) -> Operation:
        """What a client may do next.

        Args:
            mark: tells its new keys from those of others.
        """
        if random.random() > NEW_KEYS_FRACTION or not self.new_keys_left:
            return any_operation(random, mark)
        number = random.randint(1, min(NEW_KEYS, self.new_keys_left))
        self.new_keys_left -= number
        return Upload(
            {
                (random.choice(ROOMS), f"{mark}/{n}"): any_key(random, mark)
                for n in range(number)
            }
        )

    @inlineCallbacks
    def read_back(self) -> Generator[Deferred[Any], Any, list[Any]]:
        """What there is in the end: the keys, and the etag and the count."""
        seen = []
        for operation in (Download(), GetInfo()):
            end = time.monotonic() + DEADLINE
            while True:
                yield self.recorder.perform(self.connection, operation, ANSWER_TIMEOUT)
                event = self.recorder.events[-1]
                if not event.is_lost:
                    break
                assert time.monotonic() < end, f"no answer in {DEADLINE} s"
                yield deferLater(reactor, PAUSE)
            seen.append(event.answer)
        return seen

    def check(self, may_repeat: bool) -> None:
        """See whether what was seen has an order.

        Args:
            may_repeat: whether the server may have done twice what was under way when
                the fault came.

        Raises:
            NotLinearizable: it hasn't.
        """
        twins = self.writes_during_fault() if may_repeat else []
        linearize(
            [*self.recorder.events, *(Event(e.operation, e.start) for e in twins)]
        )

    def writes_during_fault(self) -> list[Event]:
        """The writes that were under way during the fault."""
        start, end = self.fault_times
        return [
            event
            for event in self.recorder.events
            if is_write(event.operation) and event.start <= end and event.end >= start
        ]


@inlineCallbacks
def new_load(
    connection: Connection, seed: object
) -> Generator[Deferred[Any], Any, Load]:
    """Clients of a new backup."""
    body = {"algorithm": ALGORITHM, "auth_data": {}}
    answer: Answer = yield connection.request("POST", "/version", body)
    random = Random(str(seed))
    return Load(
        connection,
        Recorder(accepted(answer)["version"]),
        random,
        random.randint(1, OPERATIONS),
    )


def is_write(operation: Operation) -> bool:
    """Whether it may change a backup."""
    return isinstance(operation, Upload | Delete)


def wait_for(deferred: Deferred[None]) -> Deferred[None]:
    """A Deferred that fires with another one, which several wait for."""
    waiter: Deferred[None] = Deferred()

    def fire(result: None) -> None:
        waiter.callback(None)

    deferred.addCallback(fire)
    return waiter


def summary(loads: Sequence[Load]) -> str:
    """What was tried, for the one who runs a test; each load had a fault.

    Raises:
        AssertionError: no fault has met a write.
    """
    met = sum(len(load.writes_during_fault()) for load in loads)
    assert met
    events = [event for load in loads for event in load.recorder.events]
    lost = sum(event.is_lost and is_write(event.operation) for event in events)
    return (
        f"{len(loads)} faults in {len(events)} operations; {met} writes met one,"
        f" {lost} had no answer"
    )

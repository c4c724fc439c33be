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
from .history import (
    Delete,
    Event,
    Look,
    Operation,
    Read,
    Upload,
    find_order,
)

CLIENTS = 6
#: How many operations there are before a fault, at most. The checker's memory grows
#: with the length of a history: this and what is lost keep it small.
OPERATIONS = 90
#: How many operations each client performs after it.
AFTERWARDS = 4
#: How long after an operation's begin the fault comes, at most, in seconds: about as
#: long as an upload takes.
MOMENT = 0.02
#: The part of the operations that upload keys which nobody else uploads.
NEW = 0.4
NEW_KEYS = 6
#: What waits longer for an answer is lost, in seconds.
PATIENCE = 60.0
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
        begun: how many operations there were.
        fault: fires after it.
        fault_times: when it began and when it was over.
        room: how many new keys there may be yet: a download of one page shows one
            moment, which a longer one doesn't.
    """

    connection: Connection
    recorder: Recorder
    random: Random
    fault_at: int
    begun: int = 0
    fault: Deferred[None] = attrs.field(factory=Deferred)
    fault_times: tuple[float, float] = (0, 0)
    room: int = FIRST_KEYS - len(ROOMS) * len(SESSIONS)

    @inlineCallbacks
    def run(self, cause: Callable[[], None]) -> Generator[Deferred[Any], Any, None]:
        """Perform operations, cause a fault meanwhile, and perform some more.

        Args:
            cause: the fault and, where something must be started again, its end.
        """
        moment = self.random.random() * MOMENT
        clients = [self._act(number) for number in range(CLIENTS)]
        while self.begun < self.fault_at:
            yield deferLater(reactor, 0.001)
        yield deferLater(reactor, moment)
        start = time.monotonic()
        cause()
        self.fault_times = start, time.monotonic()
        self.fault.callback(None)
        yield gatherResults(clients, consumeErrors=True)

    @inlineCallbacks
    def _act(self, number: int) -> Generator[Deferred[Any], Any, None]:
        """One client's operations."""
        random = Random(self.random.random())
        while not self.fault.called and self.begun < OPERATIONS:
            yield self._perform(random, number)
        if not self.fault.called:
            yield wait_for(self.fault)
        for _ in range(AFTERWARDS):
            yield self._perform(random, number)

    @inlineCallbacks
    def _perform(
        self, random: Random, number: int
    ) -> Generator[Deferred[Any], Any, None]:
        mark = f"{number}/{self.begun}"
        self.begun += 1
        operation = self._choose(random, mark)
        yield self.recorder.perform(self.connection, operation, PATIENCE)
        if self.recorder.events[-1].is_lost:
            yield deferLater(reactor, PAUSE)

    def _choose(self, random: Random, mark: str) -> Operation:
        """What a client may do next.

        Args:
            mark: tells its new keys from those of others.
        """
        if random.random() > NEW or not self.room:
            return any_operation(random, mark)
        number = random.randint(1, min(NEW_KEYS, self.room))
        self.room -= number
        return Upload(
            {
                (random.choice(ROOMS), f"{mark}/{n}"): any_key(random, mark)
                for n in range(number)
            }
        )

    @inlineCallbacks
    def look(self) -> Generator[Deferred[Any], Any, list[Any]]:
        """What there is in the end: the keys, and the etag and the count."""
        seen = []
        for operation in (Read(), Look()):
            end = time.monotonic() + DEADLINE
            while True:
                yield self.recorder.perform(self.connection, operation, PATIENCE)
                event = self.recorder.events[-1]
                if not event.is_lost:
                    break
                assert time.monotonic() < end, f"no answer in {DEADLINE} s"
                yield deferLater(reactor, PAUSE)
            seen.append(event.answer)
        return seen

    def check(self, tries_again: bool) -> None:
        """See whether what was seen has an order.

        Args:
            tries_again: whether the server may have done twice what was under way when
                the fault came.

        Raises:
            NoOrder: it hasn't.
        """
        twins = self.met() if tries_again else []
        find_order(
            [*self.recorder.events, *(Event(e.operation, e.start) for e in twins)]
        )

    def met(self) -> list[Event]:
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


def shown(loads: Sequence[Load]) -> str:
    """What was tried, for the one who runs a test; each load had a fault.

    Raises:
        AssertionError: no fault has met a write.
    """
    met = sum(len(load.met()) for load in loads)
    assert met
    events = [event for load in loads for event in load.recorder.events]
    lost = sum(event.is_lost and is_write(event.operation) for event in events)
    return (
        f"{len(loads)} faults in {len(events)} operations; {met} writes met one,"
        f" {lost} had no answer"
    )

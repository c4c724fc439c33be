"""Clients that keep a shared backup under load during a fault, and check the result."""

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
#: Largest number of operations before a fault. The checker's memory grows with the
#: length of a history; this limit, and few lost answers, keep the memory small.
OPERATIONS = 90
#: Number of operations of each client after the fault.
OPERATIONS_AFTER = 4
#: Longest delay between the start of an operation and the fault, in seconds: about the
#: time of an upload.
FAULT_DELAY = 0.02
#: Fraction of uploads with new keys, different from the keys of all other clients.
NEW_KEYS_FRACTION = 0.4
NEW_KEYS = 6
#: Timeout of a request, in seconds; then the answer counts as lost.
ANSWER_TIMEOUT = 60.0
#: Pause of a client after a lost answer, in seconds.
PAUSE = 0.1
#: Longest recovery after a fault, in seconds.
DEADLINE = 30.0


@attrs.define
class Load:
    """Concurrent clients of a backup, and the fault during their operations.

    Attributes:
        recorder: records all operations.
        random: source of the operations and of the fault's time.
        fault_at: number of operations started before the fault.
        started: number of operations started.
        fault: fires after the fault.
        fault_times: begin and end of the fault, in monotonic seconds.
        new_keys_left: number of new keys that may still be uploaded. The limit keeps a
            download on one page, because only a download of one page is a snapshot.
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
        """Run the clients, inject a fault, and run them for some more operations.

        Args:
            inject: causes the fault and, where a process must be restarted, ends the
                fault.
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
        """Run one client: operations until the fault, then OPERATIONS_AFTER more."""
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
        """Return a random operation.

        Args:
            mark: text in the data and new ids of the uploaded keys, unique for each
                upload.
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
        """Read the keys, then the etag and count, with retries until DEADLINE.

        Returns:
            A Deferred that fires with both answers.
        """
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
        """Check that the recorded operations are linearizable.

        Args:
            may_repeat: whether the server may have run the writes under way during the
                fault twice.

        Raises:
            NotLinearizable: the history isn't linearizable.
        """
        twins = self.writes_during_fault() if may_repeat else []
        linearize(
            [*self.recorder.events, *(Event(e.operation, e.start) for e in twins)]
        )

    def writes_during_fault(self) -> list[Event]:
        """Return the writes under way during the fault."""
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
    """Create a backup; fire with a load of clients for the new backup."""
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
    """Whether an operation may change a backup."""
    return isinstance(operation, Upload | Delete)


def wait_for(deferred: Deferred[None]) -> Deferred[None]:
    """Return a new Deferred that fires when a shared Deferred fires."""
    waiter: Deferred[None] = Deferred()

    def fire(result: None) -> None:
        waiter.callback(None)

    deferred.addCallback(fire)
    return waiter


def summary(loads: Sequence[Load]) -> str:
    """Return a line with the numbers of faults, operations and lost answers.

    Args:
        loads: loads with one fault each.

    Raises:
        AssertionError: no write was under way during any fault.
    """
    interrupted = sum(len(load.writes_during_fault()) for load in loads)
    assert interrupted
    events = [event for load in loads for event in load.recorder.events]
    lost = sum(event.is_lost and is_write(event.operation) for event in events)
    return (
        f"{len(loads)} faults in {len(events)} operations; {interrupted} writes were"
        f" under way at a fault, {lost} had no answer"
    )

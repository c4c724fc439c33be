"""The store gives the same answers and tables as the model, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from ..contract.base import ALGORITHM
from ..memory import ImmediateDatabase
from ..servers import PostgresServer
from . import SOAK
from .machine import ACTOR, USERS, BlockingPostgres, result_of
from .mutations import HIDDEN, PLAIN, UNDO
from .record_machine import RecordMachine

STEPS_OF_ONE = 50
#: Number of runs of the state machine, on each engine.
MACHINES = 500 if SOAK else 40
#: Least number of steps, on each engine; hypothesis ends some runs early.
LEAST_STEPS = 10_000 if SOAK else 1_000
SETTINGS = settings(
    max_examples=MACHINES,
    stateful_step_count=STEPS_OF_ONE,
    derandomize=not SOAK,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
#: Settings for planted faults: run until the first error, and don't simplify the run.
UNTIL_FOUND = settings(
    SETTINGS,
    max_examples=500,
    derandomize=True,
    phases=(Phase.generate,),
    report_multiple_bugs=False,
)


@pytest.fixture(params=["sqlite", "postgres"])
def new_database(
    request: pytest.FixtureRequest,
) -> Iterator[Callable[[], ImmediateDatabase | BlockingPostgres]]:
    """A function that returns a database for a state machine; the machine empties the
    tables."""
    if request.param == "sqlite":
        yield ImmediateDatabase
        return
    server: PostgresServer = request.getfixturevalue("postgres")
    database = BlockingPostgres(server.create_database())
    yield lambda: database
    database.connection.close()


def run_machines(
    new_database: Callable[[], ImmediateDatabase | BlockingPostgres], how: settings
) -> None:
    """Run state machines with these hypothesis settings."""

    def new_machine() -> RecordMachine:
        return RecordMachine(new_database())

    # Hypothesis annotates a class but accepts any factory of a state machine.
    factory: Any = new_machine
    run_state_machine_as_test(factory, settings=how)


def test_the_store_matches_the_model(
    new_database: Callable[[], ImmediateDatabase | BlockingPostgres],
) -> None:
    """After each random step, the store's answers and tables match the model."""
    before = RecordMachine.states
    run_machines(new_database, SETTINGS)
    steps = RecordMachine.states - before - MACHINES
    print(f"{steps} steps")
    assert steps >= LEAST_STEPS


#: By planted fault, the beginning of the expected error.
ERRORS = {
    "wrong rank": r"etag: \d+, not \d+",
    "equal keys replace": r"upload: \(",
    "etag moves twice": "versions: missing",
    "count off": r"\d+ is not in ",
    "lost key": "keys: missing",
    "deletes too much": r"\d+ is not in ",
    "a count for ever": r"\d+ is not in ",
    "nobody forgotten": r"\d+ rows of the user in counts",
    "one page of many": r"download: \d+, not \d+",
}


@pytest.mark.parametrize("fault", [*PLAIN, *HIDDEN])
def test_a_planted_fault_is_detected(fault: str) -> None:
    """A store with a planted fault deviates from the model within the given steps, in
    the value that the fault concerns."""
    before = RecordMachine.states
    plant, error = {**PLAIN, **HIDDEN}[fault], ERRORS[fault]
    with plant(), pytest.raises(AssertionError, match=f"^{error}"):
        run_machines(ImmediateDatabase, UNTIL_FOUND)
    print(f"{fault}: found within {RecordMachine.states - before} steps")


@pytest.mark.parametrize("fault", UNDO)
def test_a_planted_fault_of_undo_is_detected(fault: str) -> None:
    """A store with a planted fault in the record, in undo or in the sweeper deviates
    from the model, in the table that the fault concerns."""
    error, plant = UNDO[fault]
    before = RecordMachine.states
    with plant(), pytest.raises(AssertionError, match=f"^{error}"):
        run_machines(ImmediateDatabase, UNTIL_FOUND)
    print(f"{fault}: found within {RecordMachine.states - before} steps")


def test_a_number_from_before_a_deactivation() -> None:
    """A user who is deactivated and reactivated a second later gets a version number
    that was never used."""
    machine = RecordMachine(ImmediateDatabase())
    user_id = USERS[0]
    store = machine.store
    before = result_of(store.create_version(user_id, ALGORITHM, "{}", ACTOR))
    machine.sql("DELETE FROM e2e_room_keys_versions WHERE user_id = ?", user_id)
    result_of(store.forget_user(user_id))
    machine.now += 1
    assert result_of(store.create_version(user_id, ALGORITHM, "{}", ACTOR)) > before

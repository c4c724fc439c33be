"""The store, step by step, against the model of the contract."""

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
from .machine import USERS, BackupMachine, BlockingPostgres, result_of
from .mutations import HIDDEN, PLAIN

STEPS_OF_ONE = 50
#: How many times the machine starts anew, on each engine.
MACHINES = 500 if SOAK else 40
#: How many steps there are at least, on each engine; hypothesis ends some runs early.
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


@pytest.fixture(params=["sqlite", "postgres"])
def new_database(
    request: pytest.FixtureRequest,
) -> Iterator[Callable[[], ImmediateDatabase | BlockingPostgres]]:
    """Gives each machine a database; the machine empties it."""
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
    """Take machines through as many steps as the settings say."""

    def new_machine() -> BackupMachine:
        return BackupMachine(new_database())

    # Hypothesis says that it wants a class, but takes whatever makes a machine.
    factory: Any = new_machine
    run_state_machine_as_test(factory, settings=how)


def test_the_store_matches_the_model(
    new_database: Callable[[], ImmediateDatabase | BlockingPostgres],
) -> None:
    """Whatever the steps, the store's answers and tables are those of the contract."""
    before = BackupMachine.states
    run_machines(new_database, SETTINGS)
    steps = BackupMachine.states - before - MACHINES
    print(f"{steps} steps")
    assert steps >= LEAST_STEPS


@pytest.mark.parametrize("fault", [*PLAIN, *HIDDEN])
def test_a_planted_fault_is_detected(fault: str) -> None:
    """A store with a fault does something else than the model sooner or later."""
    until_found = settings(
        SETTINGS,
        max_examples=500,
        derandomize=True,
        phases=(Phase.generate,),
        report_multiple_bugs=False,
    )
    before = BackupMachine.states
    with {**PLAIN, **HIDDEN}[fault](), pytest.raises(AssertionError):
        run_machines(ImmediateDatabase, until_found)
    print(f"{fault}: found within {BackupMachine.states - before} steps")


def test_a_number_from_before_a_deactivation() -> None:
    """A user who is deactivated and back a second later gets a number never used."""
    machine = BackupMachine(ImmediateDatabase())
    user_id = USERS[0]
    store = machine.store
    before = result_of(store.create_version(user_id, ALGORITHM, "{}"))
    machine.sql("DELETE FROM e2e_room_keys_versions WHERE user_id = ?", user_id)
    result_of(store.forget_user(user_id))
    machine.now += 1
    assert result_of(store.create_version(user_id, ALGORITHM, "{}")) > before

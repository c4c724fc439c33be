"""The tasks of the HTTP interface for operators, which survive a restart."""

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
from twisted.internet.defer import Deferred

from .leases import Leases
from .transactions import Transaction, Transactions

#: The statuses of a task, as in Synapse's ``scheduled_tasks``.
SCHEDULED = "scheduled"
ACTIVE = "active"
COMPLETE = "complete"
CANCELLED = "cancelled"
FAILED = "failed"
STATUSES = (SCHEDULED, ACTIVE, COMPLETE, CANCELLED, FAILED)

#: Milliseconds for which a finished task is kept: four weeks, as long as the record by
#: default.
_KEPT_MS = 28 * 24 * 60 * 60 * 1000

_COLUMNS = """task_id, action, operator, parameters, status, created_ms, changed_ms,
        progress, result, error"""
#: Inserts a task.
ADD_TASK = """
    INSERT INTO roomkeys_tasks (task_id, action, operator, parameters, status,
        created_ms, changed_ms, progress)
    VALUES (:task_id, :action, :operator, :parameters, 'scheduled', :now_ms, :now_ms,
        '{}')"""
#: Returns a task.
GET_TASK = f"""
    SELECT {_COLUMNS} FROM roomkeys_tasks WHERE task_id = :task_id"""
#: Returns the unfinished task with the oldest change: a new task, or a task whose
#: progress was saved long ago. A task that fails in each pass, for example because a
#: lock is never released, doesn't delay the other tasks for ever.
NEXT_TASK = f"""
    SELECT {_COLUMNS} FROM roomkeys_tasks WHERE status IN ('scheduled', 'active')
    ORDER BY changed_ms, created_ms, task_id LIMIT 1"""
#: Returns a page of tasks, the newest first, of a status or, for NULL, of all.
LIST_TASKS = f"""
    SELECT {_COLUMNS} FROM roomkeys_tasks
    WHERE status = COALESCE(CAST(:status AS TEXT), status)
    ORDER BY created_ms DESC, task_id LIMIT :most OFFSET :skipped"""
#: Returns the number of tasks of a status or, for NULL, of all.
COUNT_TASKS = """
    SELECT COUNT(*) FROM roomkeys_tasks
    WHERE status = COALESCE(CAST(:status AS TEXT), status)"""
#: Saves the progress of an unfinished task.
SAVE_PROGRESS = """
    UPDATE roomkeys_tasks
    SET status = 'active', progress = :progress, changed_ms = :now_ms
    WHERE task_id = :task_id AND status IN ('scheduled', 'active')"""
#: Finishes an unfinished task.
FINISH_TASK = """
    UPDATE roomkeys_tasks SET status = :status, result = :result, error = :error,
        changed_ms = :now_ms
    WHERE task_id = :task_id AND status IN ('scheduled', 'active')"""
#: Deletes the tasks finished before a time.
EXPIRE_TASKS = """
    DELETE FROM roomkeys_tasks
    WHERE changed_ms < :due_ms AND status NOT IN ('scheduled', 'active')"""


@attrs.frozen
class Task:
    """A task.

    Attributes:
        action: the kind of work.
        operator: the operator's name.
        parameters: the details of the work, as a JSON object.
        status: one of `STATUSES`.
        created_ms: Unix time in milliseconds.
        changed_ms: Unix time in milliseconds of the last change of this row.
        progress: how far the work is, as a JSON object.
        result: the result of a complete task, as a JSON object, or None.
        error: why the task failed, or None.
    """

    task_id: str
    action: str
    operator: str
    parameters: Mapping[str, Any]
    status: str
    created_ms: int
    changed_ms: int
    progress: Mapping[str, Any]
    result: Mapping[str, Any] | None
    error: str | None


class Tasks:
    """The transactions of tasks, one method each. The Deferreds fail as the
    `Transactions` do.

    Attributes:
        leases: the leases in the same database.
    """

    def __init__(self, database: Transactions, now: Callable[[], float]) -> None:
        """
        Args:
            now: returns the Unix time in seconds.
        """
        self.leases = Leases(database, now)
        self._database = database
        self._now = now

    def add(
        self, action: str, operator: str, parameters: Mapping[str, Any]
    ) -> "Deferred[str]":
        """Add a task. Fire with its id."""
        task_id = secrets.token_hex(8)
        values = {
            "task_id": task_id,
            "action": action,
            "operator": operator,
            "parameters": json.dumps(parameters),
            "now_ms": self._now_ms(),
        }

        def add(txn: Transaction) -> str:
            txn.execute(ADD_TASK, values)
            return task_id

        return self._database.write("roomkeys_add_task", add)

    def get(self, task_id: str) -> "Deferred[Task | None]":
        """Fire with a task, or with None if there is no such task."""

        def read(txn: Transaction) -> Task | None:
            txn.execute(GET_TASK, {"task_id": task_id})
            row = txn.fetchone()
            return None if row is None else _parse_task(row)

        return self._database.run("roomkeys_get_task", read)

    def find_next(self) -> "Deferred[Task | None]":
        """Fire with the unfinished task with the oldest change, or with None."""

        def read(txn: Transaction) -> Task | None:
            txn.execute(NEXT_TASK)
            row = txn.fetchone()
            return None if row is None else _parse_task(row)

        return self._database.run("roomkeys_next_task", read)

    def list(
        self, status: str | None, skipped: int, most: int
    ) -> "Deferred[tuple[list[Task], int]]":
        """Fire with a page of tasks, the newest first, and the number of all tasks.

        Args:
            status: only tasks of this status; None for all.
            skipped: number of tasks before the page.
            most: maximum number of tasks of the page.
        """

        def read(txn: Transaction) -> tuple[list[Task], int]:
            txn.execute(COUNT_TASKS, {"status": status})
            ((total,),) = txn.fetchall()
            page = {"status": status, "skipped": skipped, "most": most}
            txn.execute(LIST_TASKS, page)
            return [_parse_task(row) for row in txn.fetchall()], int(total)

        return self._database.run("roomkeys_list_tasks", read)

    def save(self, task_id: str, progress: Mapping[str, Any]) -> "Deferred[bool]":
        """Save the progress of a task. Fire with False if the task was cancelled."""
        values = {
            "task_id": task_id,
            "progress": json.dumps(progress),
            "now_ms": self._now_ms(),
        }

        def save(txn: Transaction) -> bool:
            txn.execute(SAVE_PROGRESS, values)
            return txn.rowcount > 0

        return self._database.write("roomkeys_save_task", save)

    def finish(
        self,
        task_id: str,
        status: str,
        result: Mapping[str, Any] | None = None,
        error: str | None = None,
    ) -> "Deferred[bool]":
        """Finish a task. Fire with False if it was finished already.

        Args:
            status: `COMPLETE`, `CANCELLED` or `FAILED`.
        """
        values = {
            "task_id": task_id,
            "status": status,
            "result": None if result is None else json.dumps(result),
            "error": error,
            "now_ms": self._now_ms(),
        }

        def finish(txn: Transaction) -> bool:
            txn.execute(FINISH_TASK, values)
            return txn.rowcount > 0

        return self._database.write("roomkeys_finish_task", finish)

    def expire(self) -> "Deferred[bool]":
        """Delete the tasks finished four weeks ago or earlier."""
        values = {"due_ms": self._now_ms() - _KEPT_MS}

        def expire(txn: Transaction) -> bool:
            txn.execute(EXPIRE_TASKS, values)
            return txn.rowcount > 0

        return self._database.write("roomkeys_expire_tasks", expire)

    def _now_ms(self) -> int:
        return int(1000 * self._now())


def _parse_task(row: Sequence[Any]) -> Task:
    values = list(row)
    for place in (3, 7, 8):
        values[place] = None if values[place] is None else json.loads(values[place])
    return Task(*values)

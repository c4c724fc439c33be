"""The tasks of the HTTP interface: long work, done in the background by one process at
a time, which goes on after a restart."""

import logging
import time
from collections.abc import Callable
from typing import Any

import attrs
from twisted.internet.defer import Deferred, inlineCallbacks

from .. import metrics
from ..background import InterruptedPassError, LeasedLoop, Start
from ..clock import Clock
from ..errors import RoomKeysError, UnavailableError
from ..inline import Inline
from ..storage import Owner, Task
from ..storage.tasks import COMPLETE, FAILED
from ..types import Actor
from .backend import Backend
from .removal import Choice, find_deleted, find_orphans, superseded_before
from .survey import Survey

logger = logging.getLogger(__name__)

#: The actions of tasks.
STATISTICS = "statistics"
ERASE = "erase"
PURGE = "purge"
#: What a purge deletes.
SUPERSEDED = "superseded"
ORPHANED = "orphaned"
DELETED = "deleted"
RECORD = "record"

#: Seconds between two saves of a task's progress, which also find out whether the task
#: was cancelled.
_SAVE_SECONDS = 1.0
#: Shortest pause after a batch of deleted keys, in seconds. Another process that waits
#: for the lock of an SQLite file retries every 0.1 s.
_PAUSE = 0.1


class _CancelledTaskError(Exception):
    """The task was cancelled."""


@attrs.define
class _Run:
    """A run of a task.

    Attributes:
        progress: how far the work is. An interrupted task continues from here.
        saved: reactor's time of the last save, in seconds.
        busy_since: reactor's time since the last pause, in seconds.
    """

    task: Task
    progress: dict[str, Any]
    saved: float
    busy_since: float

    def count(self, name: str, number: int) -> None:
        """Add to a number of the progress."""
        self.progress[name] = self.progress.get(name, 0) + number


class TaskRunner(LeasedLoop):
    """The background process that runs tasks, one after the other."""

    def __init__(self, backend: Backend, clock: Clock, start: Start) -> None:
        """
        Args:
            start: the host's way to start background work.
        """
        leases = backend.tasks.leases
        super().__init__("tasks", leases, clock, start, metrics.task_failures)
        self._tasks = backend.tasks
        self._overview = backend.overview
        self._erasure = backend.erasure
        self._removal = backend.removal
        self._actions: dict[str, Callable[[_Run], Deferred[dict[str, Any]]]] = {
            STATISTICS: self._survey,
            ERASE: self._erase,
            PURGE: self._purge,
        }

    @inlineCallbacks
    def make_pass(self) -> Inline[bool]:
        """Run the tasks that aren't finished, unless another process has the lease.
        Fire with False if another process has the lease."""
        yield self._tasks.expire()
        if (yield self._tasks.find_next()) is None:
            return True
        has_lease: bool = yield self.hold(self._run_all)
        return has_lease

    @inlineCallbacks
    def _run_all(self) -> Inline[None]:
        while task := (yield self._tasks.find_next()):
            yield self._run_task(task)

    @inlineCallbacks
    def _run_task(self, task: Task) -> Inline[None]:
        """Run a task, and save its result or its error."""
        now = self.clock.seconds()
        run = _Run(task, dict(task.progress), now, now)
        try:
            yield self._save(run)
            result: dict[str, Any] = yield self._actions[task.action](run)
            yield self._save(run)
            if not (yield self._tasks.finish(task.task_id, COMPLETE, result)):
                raise _CancelledTaskError
        except (InterruptedPassError, UnavailableError):
            raise
        except _CancelledTaskError:
            logger.info("Task %s of %s is cancelled", task.task_id, task.operator)
        except RoomKeysError as error:
            yield self._tasks.finish(task.task_id, FAILED, error=error.msg)
        except Exception:
            logger.exception("Task %s of %s failed", task.task_id, task.operator)
            text = "It failed by a defect: see the server's log"
            yield self._tasks.finish(task.task_id, FAILED, error=text)
        else:
            logger.info("Task %s of %s is complete", task.task_id, task.operator)

    @inlineCallbacks
    def _save(self, run: _Run) -> Inline[None]:
        """Save the progress of a task.

        Raises:
            _CancelledTaskError: the task was cancelled.
        """
        if not (yield self._tasks.save(run.task.task_id, run.progress)):
            raise _CancelledTaskError
        run.saved = self.clock.seconds()

    @inlineCallbacks
    def _step(self, run: _Run, pause: float) -> Inline[None]:
        """End a small part of the work: pause, and save the progress from time to time.

        Args:
            pause: shortest pause in seconds.

        Raises:
            InterruptedPassError: this process stops, or has lost the lease.
            _CancelledTaskError: the task was cancelled.
        """
        yield self.check_lease()
        if self.clock.seconds() - run.saved >= _SAVE_SECONDS:
            yield self._save(run)
        yield self.rest(self.clock.seconds() - run.busy_since, pause)
        run.busy_since = self.clock.seconds()

    @inlineCallbacks
    def _survey(self, run: _Run) -> Inline[dict[str, Any]]:
        """Sum up all users. After an interruption, begin again."""
        now_ms = int(1000 * time.time())
        survey = Survey(self._overview, run.task.parameters["top"], now_ms)
        after = ""
        while page := (yield self._overview.list_owners(after)):
            yield survey.take(page)
            after = page[-1].user_id
            run.progress["users"] = survey.totals.users
            yield self._step(run, 0)
        tables: dict[str, int] = yield self._overview.measure_tables()
        return {"measured_ms": now_ms, **survey.describe(tables)}

    @inlineCallbacks
    def _erase(self, run: _Run) -> Inline[dict[str, Any]]:
        """Delete a user's rows in all tables. Return the receipt, with the numbers of
        rows at the beginning."""
        user_id: str = run.task.parameters["user"]

        def after_batch(deleted: int) -> "Deferred[None]":
            run.count("keys", deleted)
            return self._step(run, _PAUSE)

        owner: Owner = yield self._removal.begin_erasure(user_id)
        if "rows" not in run.progress:
            # After an interruption, some of these rows are deleted already.
            rows = yield self._overview.count_rows(user_id)
            run.progress["rows"] = {"e2e_room_keys": owner.keys, **rows}
            yield self._save(run)
        yield self._removal.erase(owner, after_batch)
        erased_ms = int(1000 * time.time())
        return {"user": user_id, "rows": run.progress["rows"], "erased_ms": erased_ms}

    @inlineCallbacks
    def _purge(self, run: _Run) -> Inline[dict[str, Any]]:
        """Delete what nobody uses, user by user."""
        what = run.task.parameters["what"]
        if what == RECORD:
            result: dict[str, Any] = yield self._purge_record(run)
            return result
        wanted: Choice = find_orphans if what == ORPHANED else find_deleted
        if what == SUPERSEDED:
            wanted = superseded_before(run.task.parameters["before_ms"])
        actor = Actor(None, run.task.operator)

        def after_batch(deleted: int) -> "Deferred[None]":
            return self._step(run, _PAUSE)

        while page := (yield self._overview.list_owners(run.progress.get("after", ""))):
            for version in (v for owner in page for v in wanted(owner)):
                if (
                    yield self._removal.delete_version(
                        version, wanted, actor, after_batch
                    )
                ):
                    run.count("versions", 1)
                    run.count("keys", version.keys)
            run.progress["after"] = page[-1].user_id
            yield self._step(run, 0)
        return {name: run.progress.get(name, 0) for name in ("versions", "keys")}

    @inlineCallbacks
    def _purge_record(self, run: _Run) -> Inline[dict[str, Any]]:
        """Delete the old part of the record, user by user."""
        before_ms: int = run.task.parameters["before_ms"]
        while page := (yield self._overview.list_users(run.progress.get("after", ""))):
            for user_id in page:
                deleted = yield self._erasure.delete_changes(user_id, before_ms)
                run.count("changes", deleted)
                run.progress["after"] = user_id
                yield self._step(run, 0)
        return {"changes": run.progress.get("changes", 0)}

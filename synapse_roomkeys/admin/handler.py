"""The operations of the HTTP interface for operators, independent of HTTP."""

import heapq
import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

import attrs
from twisted.internet.defer import Deferred, inlineCallbacks

from ..clock import Clock
from ..errors import (
    DamagedVersionError,
    ForbiddenError,
    NotFoundError,
    unknown_version,
)
from ..fairness import UserQueues
from ..handler import E2eRoomKeysHandler
from ..identifiers import parse_version
from ..inline import Inline
from ..json_text import is_valid_json
from ..pages import KeyPages
from ..storage import Owner, Task, VersionFacts
from ..storage.overview import CURRENT, SUPERSEDED
from ..storage.tasks import CANCELLED
from ..types import Actor, RecordedChange, Restore
from .backend import Backend
from .runner import ERASE, PURGE, STATISTICS, TaskRunner
from .survey import ORDERS

logger = logging.getLogger(__name__)

#: Number of lists of users that may wait for the list that is being read.
_WAITING_LISTS = 10


@attrs.frozen
class UsersPage:
    """A page of the list of users.

    Attributes:
        order: a name of `survey.ORDERS`, or ``name``.
        direction: ``f`` for forwards, the smallest first, or ``b`` for backwards.
        skipped: number of users before the page.
        most: maximum number of users of the page.
    """

    order: str
    direction: Literal["f", "b"]
    skipped: int
    most: int

    @property
    def end(self) -> int:
        """Number of users to the end of the page."""
        return self.skipped + self.most


class AdminHandler:
    """The operations of the HTTP interface.

    Each may fail with `UnavailableError` during a database outage. The numbers of
    versions are strings, as in requests.
    """

    def __init__(
        self,
        backend: Backend,
        handler: E2eRoomKeysHandler,
        runner: TaskRunner,
        clock: Clock,
        *,
        knows_accounts: bool,
    ) -> None:
        """
        Args:
            handler: the operations for clients, whose queues of users the operator's
                requests share.
            runner: runs the tasks.
            knows_accounts: Whether the database tells which accounts are active: it is
                a Synapse's.
        """
        self._store = backend.store
        self._overview = backend.overview
        self._tasks = backend.tasks
        self._handler = handler
        self._runner = runner
        self._knows_accounts = knows_accounts
        self._lists = UserQueues(clock, _WAITING_LISTS)

    def list_users(
        self, page: UsersPage, is_wanted: Callable[[], bool]
    ) -> "Deferred[tuple[list[Owner], int]]":
        """Fire with a page of the users who have a version or a key, and the number of
        all of them. All users are read, by one request after the other.

        Args:
            is_wanted: returns False after the client has left. The remaining users
                aren't read then.

        Raises:
            LimitExceededError: too many lists wait.
        """
        return self._lists.run("", self._list_users, page, is_wanted)

    @inlineCallbacks
    def _list_users(
        self, page: UsersPage, is_wanted: Callable[[], bool]
    ) -> Inline[tuple[list[Owner], int]]:
        choose = self._choose_by_name if page.order == "name" else self._choose_by_value
        chosen, total = yield choose(page, is_wanted)
        owners = []
        for user_id in chosen:
            owners.append((yield self._overview.find_owner(user_id)))
        return owners, total

    @inlineCallbacks
    def _choose_by_name(
        self, page: UsersPage, is_wanted: Callable[[], bool]
    ) -> Inline[tuple[list[str], int]]:
        """Fire with the ids of a page in the order of names, and the number of all."""
        is_forward = page.direction == "f"
        ids: deque[str] = deque(maxlen=page.most if is_forward else page.end)
        total, after = 0, ""
        while is_wanted() and (
            found := (yield self._overview.list_users(after, with_backup=True))
        ):
            if is_forward:
                start, end = (max(n - total, 0) for n in (page.skipped, page.end))
                ids.extend(found[start:end])
            else:
                ids.extend(found)
            total += len(found)
            after = found[-1]
        chosen = list(ids) if is_forward else [*reversed(ids)][page.skipped :]
        return chosen, total

    @inlineCallbacks
    def _choose_by_value(
        self, page: UsersPage, is_wanted: Callable[[], bool]
    ) -> Inline[tuple[list[str], int]]:
        """Fire with the ids of a page in the order of a number, and the number of all.
        Users of the same number come in the order of names."""
        value = ORDERS[page.order]
        choose = heapq.nsmallest if page.direction == "f" else heapq.nlargest
        first: list[tuple[int, str]] = []
        total, after = 0, ""
        while is_wanted() and (found := (yield self._overview.list_owners(after))):
            first += [(value(owner), owner.user_id) for owner in found]
            if len(first) > 2 * page.end:
                first = choose(page.end, first)
            total += len(found)
            after = found[-1].user_id
        ordered = choose(page.end, first)
        return [user_id for _, user_id in ordered[page.skipped :]], total

    @inlineCallbacks
    def get_user(self, user_id: str) -> Inline[Owner]:
        """Fire with a user who has a version or a key.

        Raises:
            NotFoundError: the user has none.
        """
        owner: Owner = yield self._overview.find_owner(user_id)
        if not owner.versions:
            raise NotFoundError("This user has no backup")
        return owner

    def get_record(
        self, user_id: str, since_ms: int, skipped: int, most: int
    ) -> "Deferred[tuple[list[RecordedChange], int]]":
        """Fire with a page of the recorded changes of a user's backups since a Unix
        time in milliseconds, the newest first, and the number of all of them.

        Args:
            skipped: number of changes before the page.
            most: maximum number of changes of the page.
        """
        return self._store.get_newest_record(user_id, since_ms, skipped, most)

    @inlineCallbacks
    def restore_version(
        self, user_id: str, version: str, operator: str
    ) -> Inline[VersionFacts]:
        """Give a deleted version back. Fire with the version.

        Raises:
            NotFoundError: as `E2eRoomKeysHandler.restore_version`.
        """
        yield self._handler.restore_version(user_id, version, operator)
        owner: Owner = yield self._overview.find_owner(user_id)
        number = parse_version(version)
        for found in owner.versions:
            if found.version == number:
                return found
        # Deleted again meanwhile.
        raise unknown_version()

    def restore_keys(
        self, user_id: str, version: str, restore: Restore, operator: str
    ) -> "Deferred[int]":
        """As `E2eRoomKeysHandler.restore_room_keys`."""
        return self._handler.restore_room_keys(user_id, version, restore, operator)

    @inlineCallbacks
    def erase_user(
        self, user_id: str, operator: str, *, is_forced: bool
    ) -> Inline[str]:
        """Begin to delete all rows of a user. Fire with the id of the task.

        Args:
            is_forced: Whether to erase a user whose account is active, or of whom that
                isn't known.

        Raises:
            NotFoundError: no table has a row of the user.
            ForbiddenError: the account is active, or isn't known not to be.
        """
        rows = yield self._overview.count_rows(user_id)
        if not any(rows.values()):
            yield self.get_user(user_id)
        if not is_forced:
            if not self._knows_accounts:
                raise ForbiddenError(
                    "This server doesn't know whether the account is active:"
                    " deactivate it first, then set even_if_active"
                )
            if user_id not in (yield self._overview.find_gone([user_id])):
                raise ForbiddenError(
                    "The account is active: deactivate it first, or set even_if_active"
                )
        task_id: str = yield self._add_task(ERASE, operator, {"user": user_id})
        return task_id

    def purge(self, what: str, before_ms: int | None, operator: str) -> "Deferred[str]":
        """Begin to delete unused versions, or old recorded changes. Fire with the id of
        the task.

        Args:
            what: a constant of `runner`, such as `runner.SUPERSEDED`.
            before_ms: Unix time in milliseconds, for what has a time.
        """
        parameters = {"what": what, "before_ms": before_ms}
        return self._add_task(PURGE, operator, parameters)

    def sum_up(self, top: int, operator: str) -> "Deferred[str]":
        """Begin to sum up all users. Fire with the id of the task.

        Args:
            top: number of the largest users in the result.
        """
        return self._add_task(STATISTICS, operator, {"top": top})

    @inlineCallbacks
    def _add_task(
        self, action: str, operator: str, parameters: dict[str, Any]
    ) -> Inline[str]:
        task_id: str = yield self._tasks.add(action, operator, parameters)
        logger.info("Task %s of %s: %s %s", task_id, operator, action, parameters)
        self._runner.wake()
        return task_id

    @inlineCallbacks
    def get_task(self, task_id: str) -> Inline[Task]:
        """Fire with a task.

        Raises:
            NotFoundError: there is no such task.
        """
        task: Task | None = yield self._tasks.get(task_id)
        if task is None:
            raise NotFoundError("Unknown task")
        return task

    def list_tasks(
        self, status: str | None, skipped: int, most: int
    ) -> "Deferred[tuple[list[Task], int]]":
        """As `Tasks.list`."""
        return self._tasks.list(status, skipped, most)

    @inlineCallbacks
    def cancel_task(self, task_id: str, operator: str) -> Inline[Task]:
        """Cancel a task unless the task is finished. Its earlier deletions stay. Fire
        with the task.

        Raises:
            NotFoundError: there is no such task.
        """
        if (yield self._tasks.finish(task_id, CANCELLED)):
            logger.info("Task %s is cancelled by %s", task_id, operator)
        task: Task = yield self.get_task(task_id)
        return task

    @inlineCallbacks
    def choose_exported(
        self, user_id: str, version: str | None
    ) -> Inline[list[VersionFacts]]:
        """Fire with the versions to export: those that clients can read.

        Args:
            version: the number of a version; None for all.

        Raises:
            NotFoundError: there is no such version.
            DamagedVersionError: the ``auth_data`` of such a version isn't JSON.
        """
        owner: Owner = yield self.get_user(user_id)
        number = None if version is None else parse_version(version)
        chosen = []
        for found in owner.versions:
            is_readable = found.state in (CURRENT, SUPERSEDED)
            if not is_readable or number not in (None, found.version):
                continue
            if not is_valid_json(found.auth_data or ""):
                logger.error(
                    "Damaged version: its auth_data isn't JSON; the others can be"
                    " exported one by one: user=%s version=%s",
                    user_id,
                    found.version,
                )
                raise DamagedVersionError
            chosen.append(found)
        if not chosen and number is None:
            raise NotFoundError(
                "No version of this user can be read: restore a deleted one first"
            )
        if not chosen:
            raise unknown_version()
        return chosen

    @inlineCallbacks
    def export_version(self, version: VersionFacts, operator: str) -> Inline[KeyPages]:
        """Record the export of a version, and fire with the version's keys, as
        `E2eRoomKeysHandler.get_room_keys` does."""
        user_id, number = version.user_id, version.version
        yield self._store.note_export(user_id, number, Actor(None, operator))
        logger.info(
            "Exported version: user=%s operator=%s version=%s",
            user_id,
            operator,
            number,
        )
        pages: KeyPages = yield self._handler.get_room_keys(user_id, str(number))
        return pages

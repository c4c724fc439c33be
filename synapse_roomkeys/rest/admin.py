"""The HTTP interface for operators: the servlets below ``/_synapse/roomkeys/v1``.

The shapes of lists are those of Synapse's admin API: ``from``, ``limit``, ``order_by``
and ``dir`` in a request, ``total`` and ``next_token`` in an answer. Each request is
authenticated first; only an operator is answered.
"""

import re
from collections.abc import Iterator
from typing import Any

import attrs
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.web.http import Request

from ..admin.facts import describe_change, describe_owner, describe_version
from ..admin.runner import RECORD, SUPERSEDED
from ..errors import BadJsonError
from ..identifiers import check_id
from ..inline import Inline
from ..storage import Owner, Task, VersionFacts
from ..storage.overview import CURRENT
from ..storage.tasks import STATUSES
from ..types import Restore
from .admin_requests import (
    PurgeBody,
    RestoreBody,
    decode_erase,
    decode_purge,
    decode_restore,
    decode_statistics,
    parse_body,
    parse_choice,
    parse_page,
    parse_time,
    parse_users_page,
)
from .export import ExportAnswer
from .host import AdminHost
from .resource import (
    Answer,
    HttpServer,
    RestServlet,
    find_parameter,
    notes_of,
    set_headers,
)
from .room_keys import check_ids

Answering = Inline[Answer]

#: The path below which a Synapse serves the interface.
ROOT = "/_synapse/roomkeys"
_USER = "/users/(?P<user_id>[^/]+)"


class AdminServlet(RestServlet):
    """Base class of the servlets."""

    def __init__(self, hs: AdminHost) -> None:
        super().__init__()
        self.hs = hs
        self.handler = hs.handler

    def authenticate(self, request: Request) -> "Deferred[str]":
        """Fire with the operator's name, as `AdminAuth.get_operator` does, and note the
        name for the request's log lines."""

        def note(operator: str) -> str:
            notes_of(request)["user"] = operator
            return operator

        return self.hs.auth.get_operator(request).addCallback(note)


def admin_patterns(path: str) -> "tuple[re.Pattern[str], ...]":
    """Path patterns of an endpoint."""
    return (re.compile(f"^{ROOT}/v1{path}$"),)


class AdminUsersServlet(AdminServlet):
    """``/users``: the users with a backup."""

    PATTERNS = admin_patterns("/users")

    @inlineCallbacks
    def on_GET(self, request: Request) -> Answering:
        """Answer with a page of users, after a read of all users."""
        yield self.authenticate(request)
        page = parse_users_page(request)
        owners: list[Owner]
        owners, total = yield self.handler.list_users(
            page, lambda: not request._disconnected
        )
        users = [describe_owner(owner) for owner in owners]
        return 200, _list_dict("users", users, total, page.end)


class AdminUserServlet(AdminServlet):
    """``/users/{user}``: a user's versions, without keys."""

    PATTERNS = admin_patterns(_USER)

    @inlineCallbacks
    def on_GET(self, request: Request, user_id: str) -> Answering:
        """Answer with a user's versions."""
        yield self.authenticate(request)
        check_id("User", user_id)
        owner: Owner = yield self.handler.get_user(user_id)
        versions = [describe_version(version) for version in owner.versions]
        return 200, {**describe_owner(owner), "versions": versions}


class AdminRecordServlet(AdminServlet):
    """``/users/{user}/record``: the recorded changes of a user's backups."""

    PATTERNS = admin_patterns(_USER + "/record")

    @inlineCallbacks
    def on_GET(self, request: Request, user_id: str) -> Answering:
        """Answer with a page of the recorded changes, the newest first."""
        yield self.authenticate(request)
        check_id("User", user_id)
        skipped, most = parse_page(request)
        since_ms = parse_time(request, "since_ms")
        found, total = yield self.handler.get_record(user_id, since_ms, skipped, most)
        changes = [describe_change(change) for change in found]
        return 200, _list_dict("changes", changes, total, skipped + len(changes))


class AdminExportServlet(AdminServlet):
    """``/users/{user}/export``: a user's backups, in the format of the command
    ``export``."""

    PATTERNS = admin_patterns(_USER + "/export")

    @inlineCallbacks
    def on_GET(self, request: Request, user_id: str) -> Answering:
        """Answer with lines of JSON: a header, the versions with their keys, and an end
        with a SHA-256. A broken connection leaves a file that every import refuses."""
        operator: str = yield self.authenticate(request)
        check_id("User", user_id)
        number = find_parameter(request, "version")
        versions: list[VersionFacts] = yield self.handler.choose_exported(
            user_id, number
        )
        set_headers(request, b"application/x-ndjson")
        if request.method != b"HEAD":
            yield ExportAnswer(self.hs, request, versions, operator).run(user_id)
        elif not request._disconnected:
            request.finish()
        return None


class AdminRestoreServlet(AdminServlet):
    """``/users/{user}/restore``: undo."""

    PATTERNS = admin_patterns(_USER + "/restore")

    @inlineCallbacks
    def on_POST(self, request: Request, user_id: str) -> Answering:
        """Give back a deleted version, or keys as they were before a time."""
        operator: str = yield self.authenticate(request)
        check_id("User", user_id)
        body = parse_body(request, decode_restore)
        check_ids(body.room_id, body.session_id)
        notes_of(request)["version"] = body.version
        if body.before_ms is not None:
            restored: int = yield self.handler.restore_keys(
                user_id, body.version, _restore_of(body, body.before_ms), operator
            )
            return 200, {"restored_keys": restored}
        if body.room_id is not None or body.session_id is not None or body.force:
            raise BadJsonError("room_id, session_id and force need before_ms")
        version: VersionFacts = yield self.handler.restore_version(
            user_id, body.version, operator
        )
        is_current = version.state == CURRENT
        return 200, {"restored_keys": version.keys, "is_current": is_current}


def _restore_of(body: RestoreBody, since_ms: int) -> Restore:
    return Restore(body.room_id, body.session_id, since_ms, body.force)


class AdminEraseServlet(AdminServlet):
    """``/users/{user}/erase``: deletion of all rows of a user."""

    PATTERNS = admin_patterns(_USER + "/erase")

    @inlineCallbacks
    def on_POST(self, request: Request, user_id: str) -> Answering:
        """Begin a task, whose result has the numbers of deleted rows."""
        operator: str = yield self.authenticate(request)
        check_id("User", user_id)
        body = parse_body(request, decode_erase)
        task_id: str = yield self.handler.erase_user(
            user_id, operator, is_forced=body.even_if_active
        )
        return 200, {"task_id": task_id}


class AdminPurgeServlet(AdminServlet):
    """``/purge``: deletion of unused versions, and of old recorded changes."""

    PATTERNS = admin_patterns("/purge")

    @inlineCallbacks
    def on_POST(self, request: Request) -> Answering:
        """Begin a task, whose result has the numbers of deleted versions and keys, or
        of deleted changes."""
        operator: str = yield self.authenticate(request)
        body = parse_body(request, decode_purge)
        _check_purge(body)
        task_id: str = yield self.handler.purge(body.what, body.before_ms, operator)
        return 200, {"task_id": task_id}


def _check_purge(body: PurgeBody) -> None:
    """
    Raises:
        BadJsonError: a time is missing, or has no meaning.
    """
    if (body.what in (SUPERSEDED, RECORD)) != (body.before_ms is not None):
        raise BadJsonError(
            f"before_ms must be there for {SUPERSEDED} and {RECORD}, and only then"
        )


class AdminStatisticsServlet(AdminServlet):
    """``/statistics``: sums over all users."""

    PATTERNS = admin_patterns("/statistics")

    @inlineCallbacks
    def on_POST(self, request: Request) -> Answering:
        """Begin a task, whose result has the sums."""
        operator: str = yield self.authenticate(request)
        body = parse_body(request, decode_statistics)
        task_id: str = yield self.handler.sum_up(body.top, operator)
        return 200, {"task_id": task_id}


class AdminTasksServlet(AdminServlet):
    """``/tasks``: the tasks of the last four weeks."""

    PATTERNS = admin_patterns("/tasks")

    @inlineCallbacks
    def on_GET(self, request: Request) -> Answering:
        """Answer with a page of tasks, the newest first."""
        yield self.authenticate(request)
        skipped, most = parse_page(request)
        status = parse_choice(request, "status", STATUSES)
        found, total = yield self.handler.list_tasks(status or None, skipped, most)
        tasks = [_task_dict(task) for task in found]
        return 200, _list_dict("tasks", tasks, total, skipped + len(tasks))


class AdminTaskServlet(AdminServlet):
    """``/tasks/{task}``: a task."""

    PATTERNS = admin_patterns("/tasks/(?P<task_id>[^/]+)")

    @inlineCallbacks
    def on_GET(self, request: Request, task_id: str) -> Answering:
        """Answer with a task, with progress and result."""
        yield self.authenticate(request)
        check_id("Task", task_id)
        task: Task = yield self.handler.get_task(task_id)
        return 200, _task_dict(task)


class AdminCancelServlet(AdminServlet):
    """``/tasks/{task}/cancel``: the early end of a task."""

    PATTERNS = admin_patterns("/tasks/(?P<task_id>[^/]+)/cancel")

    @inlineCallbacks
    def on_POST(self, request: Request, task_id: str) -> Answering:
        """Cancel a task unless the task is finished, and answer with the task."""
        operator: str = yield self.authenticate(request)
        check_id("Task", task_id)
        task: Task = yield self.handler.cancel_task(task_id, operator)
        return 200, _task_dict(task)


def _task_dict(task: Task) -> dict[str, Any]:
    """Describe a task."""
    return attrs.asdict(task)


def _list_dict(
    name: str, items: list[dict[str, Any]], total: int, end: int
) -> dict[str, Any]:
    """Return a page of a list. A page without items has no successor.

    Args:
        end: number of items to the end of the page.
    """
    following = {"next_token": str(end)} if items and end < total else {}
    return {name: items, "total": total, **following}


def _servlets(hs: AdminHost) -> Iterator[AdminServlet]:
    for servlet in (
        AdminUsersServlet,
        AdminUserServlet,
        AdminRecordServlet,
        AdminExportServlet,
        AdminRestoreServlet,
        AdminEraseServlet,
        AdminPurgeServlet,
        AdminStatisticsServlet,
        AdminTasksServlet,
        AdminTaskServlet,
        AdminCancelServlet,
    ):
        yield servlet(hs)


def register_admin_servlets(hs: AdminHost, http_server: HttpServer) -> None:
    """Register the servlets for operators with a server."""
    for servlet in _servlets(hs):
        servlet.register(http_server)

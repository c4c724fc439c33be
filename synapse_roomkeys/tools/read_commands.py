"""The command line of the commands ``stats``, ``users``, ``show``, ``audit`` and
``verify``."""

import argparse
from typing import Any

from twisted.internet.defer import Deferred

from ..admin.survey import ORDERS
from . import history, owners, verify
from .arguments import add_command, moment, natural
from .output import Output
from .session import Session


def add_read_commands(commands: Any) -> None:
    """Add the commands that look at backups to the subparsers of the program."""
    _add_looks(commands)
    _add_verify(commands)


def _add_looks(commands: Any) -> None:
    """Add the commands that only read."""
    stats = add_command(
        commands,
        "stats",
        lambda session, output, o: owners.stats(session, output, o.top),
        "print sums over all backups: users, versions, keys, growth, sizes on disk",
        "--top 20",
    )
    stats.add_argument(
        "--top",
        type=natural,
        default=10,
        metavar="N",
        help="print the N largest backups (10)",
    )
    users = add_command(
        commands, "users", _users, "print a line for each user", "--order keys"
    )
    users.add_argument(
        "--order",
        choices=["name", *ORDERS],
        default="name",
        help="by name (all users), or the largest first",
    )
    users.add_argument(
        "--min-keys", type=int, default=0, metavar="N", help="at least N keys"
    )
    users.add_argument(
        "--superseded",
        action="store_true",
        help="only users with a version that a newer one has superseded",
    )
    users.add_argument(
        "--limit", type=natural, metavar="N", help="print N users at most"
    )
    users.add_argument(
        "--from",
        dest="after",
        default="",
        metavar="USER",
        help="only users after this one, in the order of names",
    )
    show = add_command(
        commands,
        "show",
        lambda session, output, o: owners.show(session, output, o.user, o.rooms),
        "print the versions of a user's backup, without any key's data",
        "@alice:example.org",
    )
    show.add_argument("user", metavar="USER")
    show.add_argument(
        "--rooms", action="store_true", help="print the number of keys in each room"
    )
    audit = add_command(
        commands,
        "audit",
        _audit,
        "print who changed a user's backup, when, and from which device",
        "@alice:example.org --since 7d",
    )
    audit.add_argument("user", metavar="USER")
    audit.add_argument(
        "--since",
        type=moment,
        default=0,
        metavar="TIME",
        help="only changes since a time: 2h, 7d, or 2026-01-31T12:00:00 (UTC)",
    )
    audit.add_argument("--room", metavar="ROOM", help="only changes in this room")
    audit.add_argument("--session", metavar="SESSION", help="only changes of this key")


def _users(
    session: Session, output: Output, options: argparse.Namespace
) -> "Deferred[int]":
    wanted = owners.UserFilter(
        options.order,
        options.min_keys,
        options.superseded,
        options.limit,
        options.after,
    )
    return owners.users(session, output, wanted)


def _audit(
    session: Session, output: Output, options: argparse.Namespace
) -> "Deferred[int]":
    wanted = history.AuditFilter(options.since, options.room, options.session)
    return history.audit(session, output, options.user, wanted)


def _add_verify(commands: Any) -> None:
    """Add the command that looks for faults."""
    parser = add_command(
        commands,
        "verify",
        lambda session, output, o: verify.verify(session, output, o.user, _repair(o)),
        "look for keys and versions that clients can't use, or that can't be copied to"
        " PostgreSQL, and for wrong counts",
        "@alice:example.org",
    )
    parser.add_argument(
        "user", metavar="USER", nargs="?", help="only this user; without it, all users"
    )
    parser.add_argument(
        "--fix",
        choices=[verify.COUNTS, verify.ORPHANS],
        help="delete wrong cached counts, which the server recounts, or the keys whose"
        " version has no row",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="fix nothing, say what would be fixed"
    )
    parser.add_argument(
        "--yes", action="store_true", help="delete the keys; needed for --fix orphans"
    )


def _repair(options: argparse.Namespace) -> verify.Repair:
    return verify.Repair(options.fix, options.dry_run, options.yes)

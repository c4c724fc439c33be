"""The command line of the operator's commands."""

import argparse
import getpass
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred

from ..identifiers import parse_version
from ..service.config import load_database
from ..service.logs import set_up_logs
from ..service.migration import load_synapse_database
from ..types import Restore
from . import exports, history, imports, owners, removal, verify
from .output import Output, parse_duration, parse_moment
from .session import USAGE, Session, ToolError, run

_WHERE = """
The command works on the service's database, which --config names, or on a Synapse's,
which --synapse names, whether or not a server runs.
"""
_CODES = """
exit codes: 0 done, 1 findings, or not all done, 2 wrong usage or configuration, 3 the
database can't be reached, 130 interrupted by Ctrl-C: run the command again to go on
"""
#: Work of a command: takes the session and the output.
Work = Callable[[Session, Output, argparse.Namespace], "Deferred[int]"]


def add_commands(commands: Any) -> None:
    """Add the operator's commands to the subparsers of the program."""
    _add_looks(commands)
    _add_undo(commands)
    _add_transfers(commands)
    _add_removals(commands)
    _add_verify(commands)


def _add(commands: Any, name: str, work: Work, help_: str, example: str) -> Any:
    """Add a command and return its parser.

    Args:
        help_: a sentence without a full stop.
        example: arguments of an example, without the program and the database.
    """
    parser = commands.add_parser(
        name,
        help=help_,
        description=f"{help_[0].upper()}{help_[1:]}.\n{_WHERE}",
        epilog=f"example:\n  synapse-roomkeys {name} --config roomkeys.yaml {example}\n"
        + _CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--config",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="YAML file of the service; as for serve",
    )
    where.add_argument(
        "--synapse",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="homeserver.yaml of a Synapse; of several files the later one wins",
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON; lists as one object a line"
    )
    parser.set_defaults(run=lambda options: _run(options, work))
    return parser


def _run(options: argparse.Namespace, work: Work) -> int:
    """Run a command; return the exit status.

    Raises:
        OptionError: the configuration is wrong.
        ToolError: the command can't do its work.
    """
    if options.synapse:
        config = load_synapse_database(options.synapse)
    else:
        config = load_database(options.config, os.environ)
    # The command's own error names the cause once, at the end.
    set_up_logs("text", "CRITICAL")
    from twisted.internet import reactor

    session = Session(config, bool(options.synapse), reactor)
    output = Output(options.json)
    return run(session, lambda found: work(found, output, options), reactor)


def _moment(text: str) -> int:
    """Parse a time for argparse."""
    try:
        return parse_moment(text, time.time())
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _days(text: str) -> int:
    """Parse a number of days for argparse."""
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if seconds % 86400:
        raise argparse.ArgumentTypeError(
            f"{text!r} isn't a number of days, such as 28d"
        )
    return seconds // 86400


def _natural(text: str) -> int:
    """Parse a number from 1 on for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} isn't a number from 1 on")
    return int(text)


def _version(text: str) -> int:
    """Parse the number of a version for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} isn't the number of a version")
    return parse_version(text)


def _add_looks(commands: Any) -> None:
    """Add the commands that only read."""
    stats = _add(
        commands,
        "stats",
        lambda session, output, o: owners.stats(session, output, o.top),
        "print sums over all backups: users, versions, keys, growth, sizes on disk",
        "--top 20",
    )
    stats.add_argument(
        "--top",
        type=_natural,
        default=10,
        metavar="N",
        help="print the N largest backups (10)",
    )
    users = _add(
        commands, "users", _users, "print a line for each user", "--order keys"
    )
    users.add_argument(
        "--order",
        choices=["name", *owners.ORDERS],
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
        "--limit", type=_natural, metavar="N", help="print N users at most"
    )
    users.add_argument(
        "--from",
        dest="after",
        default="",
        metavar="USER",
        help="only users after this one, in the order of names",
    )
    show = _add(
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
    audit = _add(
        commands,
        "audit",
        _audit,
        "print who changed a user's backup, when, and from which device",
        "@alice:example.org --since 7d",
    )
    audit.add_argument("user", metavar="USER")
    audit.add_argument(
        "--since",
        type=_moment,
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


def _add_operator(parser: Any) -> None:
    """Add the options of commands that write."""
    parser.add_argument(
        "--operator",
        metavar="NAME",
        help="name for the record (the system's user)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="write nothing, say what would be done"
    )


def _operator(options: argparse.Namespace) -> str:
    """Return the operator's name: the option, or the system's user."""
    if options.operator is not None:
        return str(options.operator)
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # A container may run under a number that has no name.
        return f"uid {os.getuid()}"


def _add_undo(commands: Any) -> None:
    """Add the command that gives backups back."""
    restore = _add(
        commands,
        "restore",
        _restore,
        "give back a deleted version, or keys as they were before a time",
        "@alice:example.org 1795421234 --before 2h",
    )
    restore.add_argument("user", metavar="USER")
    restore.add_argument("version", metavar="VERSION", type=_version)
    restore.add_argument(
        "--before",
        type=_moment,
        metavar="TIME",
        help="give back the keys that were replaced since this time: 2h, 7d, or"
        " 2026-01-31T12:00:00 (UTC); without it, the version was deleted and is"
        " given back",
    )
    restore.add_argument("--room", metavar="ROOM", help="only keys of this room")
    restore.add_argument("--session", metavar="SESSION", help="only this key")
    restore.add_argument(
        "--force",
        action="store_true",
        help="also where the replaced key is worse than the stored one",
    )
    _add_operator(restore)


def _restore(
    session: Session, output: Output, options: argparse.Namespace
) -> "Deferred[int]":
    """
    Raises:
        ToolError: the options don't go together.
    """
    keys = None
    if options.before is not None:
        ids = options.room, options.session
        keys = Restore(*ids, since_ms=options.before, is_forced=options.force)
    elif options.room or options.session or options.force:
        raise ToolError("--room, --session and --force need --before", USAGE)
    undo = history.Undo(
        options.user, options.version, _operator(options), keys, options.dry_run
    )
    return history.restore(session, output, undo)


def _add_transfers(commands: Any) -> None:
    """Add the commands that hand a user's backups over."""
    export = _add(
        commands,
        "export",
        lambda session, output, o: exports.export(
            session, output, exports.Export(o.user, o.backup, o.plain, o.output)
        ),
        "write a user's backups to a file",
        "@alice:example.org -o alice.jsonl",
    )
    export.add_argument("user", metavar="USER")
    export.add_argument(
        "--version",
        dest="backup",
        type=_version,
        metavar="V",
        help="only this version; without it all versions, or with --plain the current"
        " one. A deleted version isn't exported: give it back with restore first",
    )
    export.add_argument(
        "--plain",
        action="store_true",
        help="write the body of GET /keys, the keys of one version, instead of lines",
    )
    export.add_argument(
        "-o",
        dest="output",
        type=Path,
        metavar="FILE",
        help="write to FILE, which only its owner may read, and which is replaced if it"
        " exists; without it, write to standard output",
    )
    import_ = _add(
        commands,
        "import",
        lambda session, output, o: imports.import_file(
            session,
            output,
            imports.Import(o.file, o.as_user, _operator(o), o.dry_run),
        ),
        "merge a file of export into a user's backups",
        "alice.jsonl --dry-run",
    )
    import_.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="file of export, or a body of GET /keys. The file is checked first; then"
        " the keys are merged as if a client uploaded them. A version that the user"
        " doesn't have is created under its number",
    )
    import_.add_argument(
        "--user",
        dest="as_user",
        metavar="USER",
        help="the user who gets the backups, if not the one in the file; necessary for"
        " a body of GET /keys, which goes into the user's current version",
    )
    _add_operator(import_)


def _add_removals(commands: Any) -> None:
    """Add the commands that delete."""
    purge = _add(
        commands,
        "purge",
        _purge,
        "delete backups that nobody uses, of all users",
        "--superseded-older-than 90d --yes",
    )
    subject = purge.add_mutually_exclusive_group(required=True)
    subject.add_argument(
        "--superseded-older-than",
        dest="superseded",
        type=_moment,
        metavar="TIME",
        help="versions that were superseded, and last changed, before this time",
    )
    subject.add_argument(
        "--orphans", action="store_true", help="keys whose version has no row"
    )
    subject.add_argument(
        "--deleted",
        action="store_true",
        help="deleted versions whose keys are still there",
    )
    subject.add_argument(
        "--record-older-than",
        dest="record",
        type=_days,
        metavar="DAYS",
        help="recorded changes that are older, such as 28d",
    )
    erase = _add(
        commands,
        "erase",
        lambda session, output, o: removal.erase(
            session, output, o.user, o.even_if_active, _manner(o)
        ),
        "delete all rows of a user, and print a receipt",
        "@alice:example.org --yes",
    )
    erase.add_argument("user", metavar="USER")
    erase.add_argument(
        "--even-if-active",
        action="store_true",
        help="erase a user whose account is active, or may be",
    )
    sweep = _add(
        commands,
        "sweep",
        _sweep,
        "erase the users that the homeserver no longer has",
        "--users gone.txt --yes",
    )
    subject = sweep.add_mutually_exclusive_group(required=True)
    subject.add_argument(
        "--deactivated",
        action="store_true",
        help="users who are deactivated or absent in the Synapse's database",
    )
    subject.add_argument(
        "--users",
        type=Path,
        metavar="FILE",
        help="the users to erase, a line each",
    )
    for parser in (purge, erase, sweep):
        _add_operator(parser)
        parser.add_argument(
            "--yes", action="store_true", help="delete; without it nothing is deleted"
        )
        parser.add_argument(
            "--rate",
            type=_natural,
            metavar="N",
            help="delete N keys a second at most",
        )


def _manner(options: argparse.Namespace) -> removal.Manner:
    return removal.Manner(
        _operator(options), options.dry_run, options.yes, options.rate
    )


def _purge(
    session: Session, output: Output, options: argparse.Namespace
) -> "Deferred[int]":
    manner = _manner(options)
    if options.record is not None:
        return removal.purge_record(session, output, options.record, manner)
    wanted: removal.Choice = removal.find_deleted
    if options.orphans:
        wanted = removal.find_orphans
    if options.superseded is not None:
        wanted = removal.superseded_before(options.superseded)
    return removal.purge_versions(session, output, wanted, manner)


def _sweep(
    session: Session, output: Output, options: argparse.Namespace
) -> "Deferred[int]":
    """
    Raises:
        ToolError: the users who are gone aren't known.
    """
    gone = None
    if options.users is not None:
        try:
            lines = options.users.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise ToolError(f"{options.users}: {error}", USAGE) from None
        gone = frozenset(line.strip() for line in lines if line.strip())
    elif not session.is_synapse:
        raise ToolError(
            "the service's database doesn't tell who is deactivated: give --users with"
            " a file, a user a line",
            USAGE,
        )
    return removal.sweep_deactivated(session, output, gone, _manner(options))


def _add_verify(commands: Any) -> None:
    """Add the command that looks for faults."""
    parser = _add(
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

"""The command line of the commands for changes and copies: ``restore``, ``export``,
``import``, ``purge``, ``erase`` and ``sweep``."""

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks

from ..admin.removal import Choice, find_deleted, find_orphans, superseded_before
from ..inline import Inline
from ..service.config import load_homeserver
from ..types import Restore
from . import exports, history, imports, removal
from .accounts import Accounts, read_token
from .arguments import (
    add_command,
    add_dry_run,
    add_operator,
    days,
    moment,
    natural,
    operator_of,
    version_number,
)
from .output import Output
from .session import USAGE, Session, ToolError


def add_write_commands(commands: Any) -> None:
    """Add the commands for changes and copies to the subparsers of the program."""
    _add_undo(commands)
    _add_transfers(commands)
    _add_removals(commands)


def _add_undo(commands: Any) -> None:
    """Add the command ``restore``."""
    restore = add_command(
        commands,
        "restore",
        _restore,
        "give back a deleted version, or keys as they were before a time",
        "@alice:example.org 1795421234 --before 2h",
    )
    restore.add_argument("user", metavar="USER")
    restore.add_argument("version", metavar="VERSION", type=version_number)
    restore.add_argument(
        "--before",
        type=moment,
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
    add_operator(restore)
    add_dry_run(restore)


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
        options.user, options.version, operator_of(options), keys, options.dry_run
    )
    return history.restore(session, output, undo)


def _add_transfers(commands: Any) -> None:
    """Add the commands ``export`` and ``import``."""
    export = add_command(
        commands,
        "export",
        lambda session, output, o: exports.export(
            session,
            output,
            exports.Export(o.user, o.backup, o.plain, o.output, operator_of(o)),
        ),
        "write a user's backups to a file",
        "@alice:example.org -o alice.jsonl",
    )
    export.add_argument("user", metavar="USER")
    export.add_argument(
        "--version",
        dest="backup",
        type=version_number,
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
    add_operator(export)
    import_ = add_command(
        commands,
        "import",
        lambda session, output, o: imports.import_file(
            session,
            output,
            imports.Import(o.file, o.as_user, operator_of(o), o.dry_run),
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
    add_operator(import_)
    add_dry_run(import_)


def _add_removals(commands: Any) -> None:
    """Add the commands ``purge``, ``erase`` and ``sweep``."""
    purge = add_command(
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
        type=moment,
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
        type=days,
        metavar="DAYS",
        help="recorded changes that are older, such as 28d",
    )
    erase = add_command(
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
    sweep = add_command(
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
        help="users who are deactivated or absent: in the Synapse's database, or, for"
        " the service, at the homeserver, which must be a Synapse",
    )
    subject.add_argument(
        "--users",
        type=Path,
        metavar="FILE",
        help="the users to erase, a line each",
    )
    sweep.add_argument(
        "--admin-token-file",
        type=Path,
        metavar="FILE",
        help="file with the access token of an administrator of the homeserver; for"
        " --deactivated at the service, which asks homeserver.url for each user",
    )
    for parser in (purge, erase, sweep):
        add_operator(parser)
        add_dry_run(parser)
        parser.add_argument(
            "--yes", action="store_true", help="delete; without it nothing is deleted"
        )
        parser.add_argument(
            "--rate",
            type=natural,
            metavar="N",
            help="delete N keys a second at most",
        )


def _manner(options: argparse.Namespace) -> removal.Manner:
    return removal.Manner(
        operator_of(options), options.dry_run, options.yes, options.rate
    )


def _purge(
    session: Session, output: Output, options: argparse.Namespace
) -> "Deferred[int]":
    manner = _manner(options)
    if options.record is not None:
        return removal.purge_record(session, output, options.record, manner)
    wanted: Choice = find_deleted
    if options.orphans:
        wanted = find_orphans
    if options.superseded is not None:
        wanted = superseded_before(options.superseded)
    return removal.purge_versions(session, output, wanted, manner)


@inlineCallbacks
def _sweep(
    session: Session, output: Output, options: argparse.Namespace
) -> Inline[int]:
    """
    Raises:
        OptionError: no homeserver is configured.
        ToolError: the options don't go together, a file can't be used, or the
            homeserver gives no answer.
    """
    manner = _manner(options)
    token_path: Path | None = options.admin_token_file
    if token_path is not None and (session.is_synapse or not options.deactivated):
        raise ToolError("--admin-token-file needs --config and --deactivated", USAGE)
    if options.users is not None:
        names = _read_names(options.users)
        code: int = yield removal.sweep_named(session, output, names, manner)
        return code
    find_gone = session.overview.find_gone
    if not session.is_synapse:
        if token_path is None:
            raise ToolError(
                "the service's database doesn't tell who is deactivated: give"
                " --admin-token-file, or --users with a file, a user a line",
                USAGE,
            )
        homeserver = load_homeserver(options.config, os.environ)
        token = read_token(token_path)
        accounts = Accounts(session.reactor, session.clock, homeserver, token)
        yield accounts.check()
        find_gone = accounts.find_gone
    code = yield removal.sweep_deactivated(session, output, find_gone, manner)
    return code


def _read_names(path: Path) -> Iterable[str]:
    """Return the users in a file, each once.

    Raises:
        ToolError: the file can't be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ToolError(f"{path}: {error}", USAGE) from None
    return dict.fromkeys(line.strip() for line in lines if line.strip())

"""The arguments that the operator's commands share, and the run of a command."""

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
from .output import Output, parse_duration, parse_moment
from .session import Session, run

_WHERE = """
The command works on the service's database, which --config names, or on a Synapse's,
which --synapse names, whether or not a server runs.
"""
_CODES = """
exit codes: 0 done, 1 findings, or not all done, 2 wrong usage or configuration, 3 the
database, or the homeserver that sweep asks, can't be reached, 130 interrupted by
Ctrl-C: run the command again to go on
"""
#: Work of a command: takes the session and the output.
Work = Callable[[Session, Output, argparse.Namespace], "Deferred[int]"]


def add_command(commands: Any, name: str, work: Work, help_: str, example: str) -> Any:
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


def moment(text: str) -> int:
    """Parse a time for argparse."""
    try:
        return parse_moment(text, time.time())
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def days(text: str) -> int:
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


def natural(text: str) -> int:
    """Parse a number from 1 on for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} isn't a number from 1 on")
    return int(text)


def version_number(text: str) -> int:
    """Parse the number of a version for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} isn't the number of a version")
    return parse_version(text)


def add_operator(parser: Any) -> None:
    """Add the option of commands that the record names."""
    parser.add_argument(
        "--operator",
        metavar="NAME",
        help="name for the record (the system's user)",
    )


def add_dry_run(parser: Any) -> None:
    """Add the option of commands that change backups."""
    parser.add_argument(
        "--dry-run", action="store_true", help="write nothing, say what would be done"
    )


def operator_of(options: argparse.Namespace) -> str:
    """Return the operator's name: the option, or the system's user."""
    if options.operator is not None:
        return str(options.operator)
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # A container may run under a number that has no name.
        return f"uid {os.getuid()}"

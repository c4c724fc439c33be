"""The command ``synapse-roomkeys``."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..config import OptionError
from ..version import __version__
from . import app
from .check import Check
from .config import example, load_config, load_database, read_yaml
from .logs import set_up_logs
from .migration import MigrateError, Progress, migrate, synapse_database

#: What the process ends with when the configuration is wrong, as argparse has it.
_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns what the process is to end with.

    Args:
        arguments: those of the command line, unless given.
    """
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        return code
    except OptionError as error:
        print(f"synapse-roomkeys: {error}", file=sys.stderr)
        return _USAGE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="synapse-roomkeys",
        description="Server-side key backup for Matrix, beside any homeserver.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    files = argparse.ArgumentParser(add_help=False)
    files.add_argument(
        "--config",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="YAML; of several, later ones win; the environment wins over all",
    )
    service = argparse.ArgumentParser(add_help=False, parents=[files])
    service.add_argument("--homeserver", metavar="URL", help="wins over all")

    serve = commands.add_parser("serve", parents=[service], help="serve /room_keys")
    serve.set_defaults(run=_serve)

    check = commands.add_parser(
        "check",
        parents=[service],
        help="tell whether the service could start: configuration, listeners,"
        " database and homeserver",
    )
    check.set_defaults(run=_check)

    config = commands.add_parser("config", help="show the configuration there can be")
    config.add_argument("--example", action="store_true", required=True)
    config.set_defaults(run=_config)

    move = commands.add_parser(
        "migrate", parents=[files], help="copy the backups of a Synapse's database"
    )
    move.add_argument(
        "--from",
        dest="source",
        type=Path,
        required=True,
        metavar="FILE",
        help="the Synapse's homeserver.yaml",
    )
    move.set_defaults(run=_migrate)
    return parser


def _serve(options: argparse.Namespace) -> int:
    config = load_config(options.config, os.environ, options.homeserver)
    set_up_logs(config.log_format, config.log_level)
    from twisted.internet import reactor

    return app.Service(config, reactor).run()


def _check(options: argparse.Namespace) -> int:
    config = load_config(options.config, os.environ, options.homeserver)
    # The lines that are printed have all of it.
    set_up_logs("text", "CRITICAL")
    from twisted.internet import reactor

    return Check(config, reactor).run()


def _config(options: argparse.Namespace) -> int:
    print(example(), end="")
    return 0


def _migrate(options: argparse.Namespace) -> int:
    target = load_database(options.config, os.environ)
    try:
        source = synapse_database(read_yaml(options.source))
    except OptionError as error:
        raise OptionError(str(options.source), str(error)) from None
    try:
        result = migrate(source, target, Progress(sys.stderr))
    except MigrateError as error:
        print(f"synapse-roomkeys: {error}", file=sys.stderr)
        return 1
    print("\n".join(result.lines()))
    return 0 if result.is_equal else 1

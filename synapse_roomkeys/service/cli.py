"""The command ``synapse-roomkeys``."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..config import OptionError
from ..tools.read_commands import add_read_commands
from ..tools.session import ToolError
from ..tools.write_commands import add_write_commands
from ..version import __version__
from . import app
from .check import Check
from .config import example, load_config, load_database
from .logs import set_up_logs
from .migration import (
    DENDRITE,
    SYNAPSE,
    Keep,
    MigrateError,
    Options,
    Progress,
    load_dendrite_database,
    load_synapse_database,
    migrate,
)

#: Exit status for a wrong configuration, as argparse uses it for wrong arguments.
_USAGE = 2
#: Exit status after Ctrl-C, as in a shell: 128 plus the number of SIGINT.
_INTERRUPTED = 130

_MIGRATE = """\
Copy key backups between the service's database and a Synapse's, in either direction,
or from a Dendrite's database, while the servers run. Each run copies the changes since
the last run, and continues a run that was interrupted.
"""
_MIGRATE_EXAMPLES = """\
examples:
  synapse-roomkeys migrate --config roomkeys.yaml --from homeserver.yaml --dry-run
  synapse-roomkeys migrate --config roomkeys.yaml --from homeserver.yaml
  synapse-roomkeys migrate --config roomkeys.yaml --to homeserver.yaml
  synapse-roomkeys migrate --config roomkeys.yaml --from-dendrite dendrite.yaml
  synapse-roomkeys migrate --config roomkeys.yaml --from homeserver.yaml \\
      --keep better --user @alice:example.org

exit codes: 0 done, 1 something is left to do (the last line says what), 2 wrong usage
or configuration, 3 a database can't be reached, 130 interrupted by Ctrl-C
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status of the process.

    Args:
        arguments: arguments of the command; by default, the process's arguments.
    """
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        return code
    except OptionError as error:
        print(f"synapse-roomkeys: {error}", file=sys.stderr)
        return _USAGE
    except ToolError as error:
        print(f"synapse-roomkeys: {error}", file=sys.stderr)
        return error.code


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
        help="YAML file; of several files the later one wins, and the environment wins"
        " over files",
    )
    service = argparse.ArgumentParser(add_help=False, parents=[files])
    service.add_argument(
        "--homeserver",
        metavar="URL",
        help="address of the homeserver; wins over files and the environment",
    )

    serve = commands.add_parser("serve", parents=[service], help="serve /room_keys")
    serve.set_defaults(run=_serve)

    check = commands.add_parser(
        "check",
        parents=[service],
        help="test whether the service could start: configuration, listeners,"
        " database and homeserver",
    )
    check.set_defaults(run=_check)

    config = commands.add_parser("config", help="print a configuration")
    config.add_argument("--example", action="store_true", required=True)
    config.set_defaults(run=_config)

    move = commands.add_parser(
        "migrate",
        parents=[files],
        help="copy the backups of a Synapse or a Dendrite, or back to a Synapse",
        description=_MIGRATE,
        epilog=_MIGRATE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    homeserver = move.add_mutually_exclusive_group(required=True)
    homeserver.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="FILE",
        help="homeserver.yaml of the Synapse to copy from",
    )
    homeserver.add_argument(
        "--from-dendrite",
        dest="dendrite",
        type=Path,
        metavar="FILE",
        help="dendrite.yaml of the Dendrite to copy from; a relative path of an SQLite"
        " file in it starts at the current directory, as Dendrite's does",
    )
    homeserver.add_argument(
        "--to",
        dest="target",
        type=Path,
        metavar="FILE",
        help="homeserver.yaml of the Synapse to copy back to",
    )
    move.add_argument(
        "--keep",
        choices=[keep.value for keep in Keep],
        help="where the target has changed: overwrite it with the source, leave the"
        " target, or merge the better keys of both; without it nothing is done there",
    )
    move.add_argument(
        "--user",
        dest="users",
        action="append",
        default=[],
        metavar="USER",
        help="copy this user only, such as @alice:example.org; may be repeated",
    )
    move.add_argument(
        "--dry-run",
        action="store_true",
        help="write nothing, say what would be done",
    )
    move.set_defaults(run=_migrate)
    add_read_commands(commands)
    add_write_commands(commands)

    generate = commands.add_parser(
        "generate", help="print the manual page, or a completion for a shell"
    )
    generate.add_argument("what", choices=["manual", "bash", "zsh"])
    generate.set_defaults(run=lambda options: _generate(parser, options.what))
    return parser


def _serve(options: argparse.Namespace) -> int:
    config = load_config(options.config, os.environ, options.homeserver)
    set_up_logs(config.log.format, config.log.level)
    from twisted.internet import reactor

    return app.Service(config, reactor).run()


def _check(options: argparse.Namespace) -> int:
    config = load_config(options.config, os.environ, options.homeserver)
    # The printed lines have the facts of the log: don't print them twice.
    set_up_logs("text", "CRITICAL")
    from twisted.internet import reactor

    return Check(config, reactor).run()


def _config(options: argparse.Namespace) -> int:
    print(example(), end="")
    return 0


def _generate(parser: argparse.ArgumentParser, what: str) -> int:
    """Print the manual page, or the completion for a shell.

    Raises:
        ToolError: the packages that generate them aren't installed.
    """
    try:
        import shtab
        from argparse_manpage.manpage import Manpage
    except ImportError as error:
        raise ToolError(
            f'{error}: install the package with its extra "manual"', _USAGE
        ) from None
    print(Manpage(parser) if what == "manual" else shtab.complete(parser, what))
    return 0


def _migrate(options: argparse.Namespace) -> int:
    try:
        service = load_database(options.config, os.environ)
        to_service = options.target is None
        if options.dendrite is not None:
            homeserver = load_dendrite_database(options.dendrite)
        else:
            homeserver = load_synapse_database([options.source or options.target])
        result = migrate(
            homeserver if to_service else service,
            service if to_service else homeserver,
            Progress(sys.stderr),
            Options(
                keep=None if options.keep is None else Keep(options.keep),
                users=tuple(options.users),
                dry_run=options.dry_run,
                make_tables=to_service,
                layout=SYNAPSE if options.dendrite is None else DENDRITE,
            ),
        )
    except MigrateError as error:
        print(f"synapse-roomkeys: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(
            "synapse-roomkeys: interrupted: the backups committed so far stay; run the"
            " same command again to go on",
            file=sys.stderr,
        )
        return _INTERRUPTED
    print("\n".join(result.lines()))
    return 0 if result.is_done else 1

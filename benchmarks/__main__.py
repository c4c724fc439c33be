"""Measures the module against Synapse's built-in endpoints: ``python -m benchmarks``.

Two Synapses, the service and a bare site (the physical limit) run side by side, each on
a database of its own with the same backups. Samples of all servers are interleaved.
"""

import argparse
import gc
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import attrs

from tests.servers import temporary_directory

from .plots import plot
from .report import describe_environment, format_line, write_json, write_table
from .results import Results
from .rows import NAMES, ON_POSTGRES, ON_SQLITE, SQLITE, Row
from .sampling import log_progress
from .servers import postgres_testbed, sqlite_testbed
from .testbed import Plan, Testbed

_MIN_KEYS = 1_000


def _parse_arguments() -> argparse.Namespace:
    """Parse the command line, and exit with an error if a value is invalid."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="use small sizes and few samples"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        default=Path("benchmark-results"),
        help="directory for results.json, table.rst and the plots (%(default)s)",
    )
    parser.add_argument(
        "--rows",
        metavar="NAME,...",
        default=",".join(NAMES),
        help="rows to run, separated by commas (%(default)s)",
    )
    parser.add_argument(
        "--keys",
        type=int,
        metavar="N",
        help="number of keys in a full backup (100000; with --quick 5000)",
    )
    arguments = parser.parse_args()
    arguments.rows = arguments.rows.split(",")
    if arguments.keys is not None and arguments.keys < _MIN_KEYS:
        parser.error(f"--keys must be at least {_MIN_KEYS}")
    unknown = set(arguments.rows).difference(NAMES)
    if unknown:
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}")
    return arguments


def _terminate(number: int, _: FrameType | None) -> None:
    """Raise KeyboardInterrupt on a signal, so that all servers are stopped."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def _measure(
    testbed: Testbed, rows: Mapping[str, Row], selected: Sequence[str], results: Results
) -> None:
    """Run the selected rows on a testbed and log the lines that each row adds."""
    for name, row in rows.items():
        if name in selected:
            start = time.monotonic()
            first_new = len(results.lines)
            row(testbed, results)
            seconds = time.monotonic() - start
            log_progress(f"{testbed.title}: {name} took {seconds:.0f} s")
            for line in results.lines[first_new:]:
                log_progress(f"   {format_line(line)}")


def _run(
    arguments: argparse.Namespace,
    plan: Plan,
    results: Results,
    environment: dict[str, Any],
) -> None:
    """Run the selected rows on PostgreSQL, then on SQLite.

    The version of PostgreSQL is added to the environment.
    """
    with temporary_directory("benchmark-") as directory:
        if set(arguments.rows) & set(ON_POSTGRES):
            with postgres_testbed(directory, plan) as testbed:
                environment["postgresql"] = testbed.database_version()
                _measure(testbed, ON_POSTGRES, arguments.rows, results)
        if SQLITE in arguments.rows:
            with sqlite_testbed(directory, plan) as testbed:
                sqlite_results = Results()
                _measure(testbed, ON_SQLITE, list(ON_SQLITE), sqlite_results)
                results.lines += [
                    attrs.evolve(line, row="9", title=f"SQLite: {line.title}")
                    for line in sqlite_results.lines
                ]


def _write(directory: Path, results: Results, environment: dict[str, Any]) -> None:
    """Write the results, the table and the plots into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "results.json", results, environment)
    write_table(directory / "table.rst", results, environment)
    plot(directory, results)


def main() -> None:
    """Run the benchmark, and write the results even if a row fails."""
    arguments = _parse_arguments()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _terminate)
    # A collection during a sample would add to the measured duration.
    gc.disable()
    start = time.monotonic()
    plan = Plan.of(arguments.keys, arguments.quick)
    environment: dict[str, Any] = {
        **describe_environment(),
        "postgresql": "(none)",
        "keys": plan.keys,
        "quick": plan.quick,
    }
    results = Results()
    try:
        _run(arguments, plan, results, environment)
    except KeyboardInterrupt:
        log_progress("interrupted")
        sys.exit(130)
    finally:
        environment["load_after"] = os.getloadavg()
        environment["seconds"] = round(time.monotonic() - start)
        if results.lines:
            _write(arguments.output, results, environment)
    log_progress(f"done in {environment['seconds']} s: {arguments.output}")


if __name__ == "__main__":
    main()

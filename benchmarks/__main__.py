"""Measures the module against Synapse's built-in endpoints: ``python -m benchmarks``.

Two Synapses and a bare site that is the physical limit run side by side, each on a
database of its own with the same backups, and take turns.
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
from .report import machine, summary_of, write_json, write_table
from .results import Results
from .rows import NAMES, ON_POSTGRES, ON_SQLITE, SQLITE, Row
from .sampling import progress
from .servers import on_postgres, on_sqlite
from .stage import Plan, Stage

_FEWEST_KEYS = 1_000


def _arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, few samples")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        default=Path("benchmark-results"),
        help="where results.json, table.rst and the plots go (%(default)s)",
    )
    parser.add_argument(
        "--rows",
        metavar="NAME,...",
        default=",".join(NAMES),
        help="what to measure (%(default)s)",
    )
    parser.add_argument(
        "--keys", type=int, metavar="N", help="keys of a full backup (100000)"
    )
    arguments = parser.parse_args()
    arguments.rows = arguments.rows.split(",")
    if arguments.keys is not None and arguments.keys < _FEWEST_KEYS:
        parser.error(f"at least {_FEWEST_KEYS} keys are needed")
    unknown = set(arguments.rows).difference(NAMES)
    if unknown:
        parser.error(f"no such rows: {', '.join(sorted(unknown))}")
    return arguments


def _terminate(number: int, _: FrameType | None) -> None:
    """End as Ctrl-C does, which stops all servers."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def _measure(
    stage: Stage, rows: Mapping[str, Row], chosen: Sequence[str], results: Results
) -> None:
    """Run the chosen rows on one stage."""
    for name, row in rows.items():
        if name in chosen:
            start = time.monotonic()
            found = len(results.lines)
            row(stage, results)
            seconds = time.monotonic() - start
            progress(f"{stage.title}: {name} took {seconds:.0f} s")
            for line in results.lines[found:]:
                progress(f"   {summary_of(line)}")


def _run(
    arguments: argparse.Namespace, plan: Plan, results: Results, about: dict[str, Any]
) -> None:
    """Run on PostgreSQL, then on SQLite."""
    with temporary_directory("benchmark-") as directory:
        if set(arguments.rows) & set(ON_POSTGRES):
            with on_postgres(directory, plan) as stage:
                about["postgresql"] = stage.database_version()
                _measure(stage, ON_POSTGRES, arguments.rows, results)
        if SQLITE in arguments.rows:
            with on_sqlite(directory, plan) as stage:
                found = Results()
                _measure(stage, ON_SQLITE, list(ON_SQLITE), found)
                results.lines += [
                    attrs.evolve(line, row="9", title=f"SQLite: {line.title}")
                    for line in found.lines
                ]


def _write(directory: Path, results: Results, about: dict[str, Any]) -> None:
    """Write down what was found."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "results.json", results, about)
    write_table(directory / "table.rst", results, about)
    plot(directory, results)


def main() -> None:
    """Measure, and keep what was found even if not all of it could be."""
    arguments = _arguments()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _terminate)
    gc.disable()
    start = time.monotonic()
    plan = Plan.of(arguments.keys, arguments.quick)
    about: dict[str, Any] = {
        **machine(),
        "postgresql": "(none)",
        "keys": plan.keys,
        "quick": plan.quick,
    }
    results = Results()
    try:
        _run(arguments, plan, results, about)
    except KeyboardInterrupt:
        progress("interrupted")
        sys.exit(130)
    finally:
        about["load_after"] = os.getloadavg()
        about["seconds"] = round(time.monotonic() - start)
        if results.lines:
            _write(arguments.output, results, about)
    progress(f"done in {about['seconds']} s: {arguments.output}")


if __name__ == "__main__":
    main()

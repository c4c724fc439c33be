"""Output of a run: JSON with all numbers, and a table for readers."""

import csv
import datetime
import io
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs

import synapse_roomkeys

from .results import LIMIT, PLUGIN, SERVICE, STOCK, TIMES, Line, Results
from .sampling import Summary

_COLUMNS = (
    "",
    "row",
    STOCK,
    PLUGIN,
    "ratio",
    "goal",
    "verdict",
    LIMIT,
    SERVICE,
    "service/limit",
    "goal",
    "verdict",
)
_WIDTHS = "3 30 9 9 16 7 7 9 9 7 7 7"
_MIN_SAMPLES_FOR_P99 = 20


def describe_environment() -> dict[str, object]:
    """Return date, host and versions for the report."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "synapse": metadata.version("matrix-synapse"),
        "twisted": metadata.version("twisted"),
        "plugin": synapse_roomkeys.__version__,
    }


def format_line(line: Line) -> str:
    """Format a line of the table as a single line of text for the log."""
    values = (f"{name} {format_summary(each)}" for name, each in line.values.items())
    parts = [", ".join(values), _format_ratio(line.ratio), line.verdict]
    parts += [_format_ratio(line.service_times_limit), line.service_verdict]
    return f"{line.title} [{line.unit}]: " + "; ".join(filter(None, parts))


def write_json(file: Path, results: Results, environment: Mapping[str, object]) -> None:
    """Write all results as JSON."""
    content = {
        "about": dict(environment),
        "lines": [_line_to_json(line) for line in results.lines],
        "points": [attrs.asdict(point) for point in results.points],
        "latencies_ms": {
            name: [round(value, 3) for value in values]
            for name, values in results.latencies.items()
        },
    }
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_table(
    file: Path, results: Results, environment: Mapping[str, object]
) -> None:
    """Write the table as reStructuredText, with the environment above it."""
    file.write_text(
        "\n".join(_table_lines(results, environment)) + "\n", encoding="utf-8"
    )


def _line_to_json(line: Line) -> dict[str, Any]:
    """Convert a line of the table to JSON-compatible values."""
    fields = attrs.asdict(line, filter=attrs.filters.exclude("goal", "service_goal"))
    return {
        **fields,
        "goal": line.goal.text if line.goal else None,
        "met": line.verdict == "met" if line.verdict else None,
        "service_goal": line.service_goal.text if line.service_goal else None,
        "service_met": line.service_verdict == "met" if line.service_verdict else None,
    }


def _table_lines(results: Results, environment: Mapping[str, object]) -> Iterator[str]:
    """Yield the lines of the reStructuredText table."""
    yield (
        f"Measured on {environment['date']} with {environment['cores']} cores, Python "
        f"{environment['python']}, Synapse {environment['synapse']}, PostgreSQL "
        f"{environment['postgresql']}; full size {environment['keys']:,} keys."
    )
    yield from ("", ".. csv-table::", f"   :header: {_csv(_COLUMNS)}")
    yield from (f"   :widths: {_WIDTHS}", "")
    for line in results.lines:
        yield f"   {_csv(_cells(line))}"


def _cells(line: Line) -> Iterator[str]:
    """Yield the table cells of a line: medians, the ratio with quartiles, verdicts."""
    yield from (line.row, f"{line.title} [{line.unit}]" if line.unit else line.title)
    yield from (_format_median(line, STOCK), _format_median(line, PLUGIN))
    yield _format_ratio(line.ratio, line.ratio_quartiles)
    yield from (line.goal.text if line.goal else "", line.verdict)
    yield from (_format_median(line, LIMIT), _format_median(line, SERVICE))
    yield _format_ratio(line.service_times_limit)
    is_judged = line.service_goal is not None and SERVICE in line.values
    yield line.service_goal.text if line.service_goal and is_judged else ""
    yield line.service_verdict


def _csv(cells: Iterable[str]) -> str:
    """Format a row for reStructuredText's ``csv-table``."""
    row = io.StringIO()
    csv.writer(row, quoting=csv.QUOTE_ALL, lineterminator="").writerow(cells)
    return row.getvalue()


def _format_median(line: Line, name: str) -> str:
    """Format a server's median, or return an empty text if it wasn't measured."""
    summary = line.values.get(name)
    return "" if summary is None else format_number(summary.median)


def format_summary(summary: Summary | None) -> str:
    """Format the median, the quartiles, and the 99th percentile.

    With few samples the maximum takes the place of the 99th percentile, which has no
    meaning there.
    """
    if summary is None:
        return ""
    if summary.n == 1:
        return format_number(summary.median)
    last = "max" if summary.n < _MIN_SAMPLES_FOR_P99 else "p99"
    top = summary.maximum if summary.n < _MIN_SAMPLES_FOR_P99 else summary.p99
    quartiles = f"{format_number(summary.q1)} to {format_number(summary.q3)}"
    return f"{format_number(summary.median)} ({quartiles}; {last} {format_number(top)})"


def format_number(value: float) -> str:
    """Format a number with three significant digits, or as an integer from 1,000 on."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _format_ratio(
    ratio: float | None, quartiles: tuple[float, float] | None = None
) -> str:
    """Format a ratio, with the quartiles of the paired ratios if given."""
    if ratio is None:
        return ""
    spread = ""
    if quartiles is not None:
        spread = f" ({format_number(quartiles[0])} to {format_number(quartiles[1])})"
    return f"{format_number(ratio)}{TIMES}{spread}"

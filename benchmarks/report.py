"""What a run leaves behind: its numbers, and a table to read."""

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
    *("", "row", STOCK, PLUGIN, "ratio", "goal", "verdict", LIMIT),
    *(SERVICE, "service/limit", "goal", "verdict"),
)
_WIDTHS = "3 30 9 9 16 7 7 9 9 7 7 7"
_FEW = 20


def machine() -> dict[str, object]:
    """Describe what the run was made on."""
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


def summary_of(line: Line) -> str:
    """Tell in one line of text what a line of the table tells."""
    values = (f"{name} {cell(each)}" for name, each in line.values.items())
    parts = [", ".join(values), _times(line.ratio), line.verdict]
    parts += [_times(line.service_times_limit), line.service_verdict]
    return f"{line.title} [{line.unit}]: " + "; ".join(filter(None, parts))


def write_json(file: Path, results: Results, about: Mapping[str, object]) -> None:
    """Write everything that was found."""
    content = {
        "about": dict(about),
        "lines": [_line(line) for line in results.lines],
        "points": [attrs.asdict(point) for point in results.points],
        "latencies_ms": {
            name: [round(value, 3) for value in values]
            for name, values in results.latencies.items()
        },
    }
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_table(file: Path, results: Results, about: Mapping[str, object]) -> None:
    """Write the table, with what it was measured on."""
    file.write_text("\n".join(_table(results, about)) + "\n", encoding="utf-8")


def _line(line: Line) -> dict[str, Any]:
    """Turn a line into JSON."""
    fields = attrs.asdict(line, filter=attrs.filters.exclude("goal", "service_goal"))
    return {
        **fields,
        "goal": line.goal.text if line.goal else None,
        "met": line.verdict == "met" if line.verdict else None,
        "service_goal": line.service_goal.text if line.service_goal else None,
        "service_met": line.service_verdict == "met" if line.service_verdict else None,
    }


def _table(results: Results, about: Mapping[str, object]) -> Iterator[str]:
    """Lay the table out."""
    yield (
        f"Measured on {about['date']} with {about['cores']} cores, Python "
        f"{about['python']}, Synapse {about['synapse']}, PostgreSQL "
        f"{about['postgresql']}; full size {about['keys']:,} keys."
    )
    yield from ("", ".. csv-table::", f"   :header: {_csv(_COLUMNS)}")
    yield from (f"   :widths: {_WIDTHS}", "")
    for line in results.lines:
        yield f"   {_csv(_cells(line))}"


def _cells(line: Line) -> Iterator[str]:
    """List what the table shows of a line: medians, and the spread of the ratio."""
    yield from (line.row, f"{line.title} [{line.unit}]" if line.unit else line.title)
    yield from (_median(line, STOCK), _median(line, PLUGIN))
    yield _times(line.ratio, line.ratio_quartiles)
    yield from (line.goal.text if line.goal else "", line.verdict)
    yield from (_median(line, LIMIT), _median(line, SERVICE))
    yield _times(line.service_times_limit)
    is_judged = line.service_goal is not None and SERVICE in line.values
    yield line.service_goal.text if line.service_goal and is_judged else ""
    yield line.service_verdict


def _csv(cells: Iterable[str]) -> str:
    """Write a row of comma-separated values, as reStructuredText's csv-table reads."""
    row = io.StringIO()
    csv.writer(row, quoting=csv.QUOTE_ALL, lineterminator="").writerow(cells)
    return row.getvalue()


def _median(line: Line, name: str) -> str:
    """Write one server's median, or nothing if it was not measured."""
    summary = line.values.get(name)
    return "" if summary is None else number(summary.median)


def cell(summary: Summary | None) -> str:
    """Write a median, the quartiles, and what all but one in a hundred stay below."""
    if summary is None:
        return ""
    if summary.n == 1:
        return number(summary.median)
    last = "max" if summary.n < _FEW else "p99"
    top = summary.maximum if summary.n < _FEW else summary.p99
    return (
        f"{number(summary.median)} "
        f"({number(summary.q1)} to {number(summary.q3)}; {last} {number(top)})"
    )


def number(value: float) -> str:
    """Write a number with three digits that mean something."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _times(ratio: float | None, quartiles: tuple[float, float] | None = None) -> str:
    """Write a ratio, with the quartiles of the ratios within each turn."""
    if ratio is None:
        return ""
    spread = ""
    if quartiles is not None:
        spread = f" ({number(quartiles[0])} to {number(quartiles[1])})"
    return f"{number(ratio)}{TIMES}{spread}"

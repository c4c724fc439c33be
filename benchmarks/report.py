"""What a run leaves behind: its numbers, and a table to read."""

import datetime
import json
import os
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs

import synapse_roomkeys

from .results import LIMIT, PLUGIN, SERVICE, STOCK, TIMES, Line, Results
from .sampling import Summary

_COLUMNS = (
    *("", "row", STOCK, PLUGIN, "ratio", "goal", "verdict", LIMIT, "plugin/limit"),
    *(SERVICE, "service/limit", "goal", "verdict"),
)
_WIDTHS = "3 30 14 14 12 9 7 14 8 14 8 9 7"
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
    yield from ("", ".. list-table::", "   :header-rows: 1", f"   :widths: {_WIDTHS}")
    yield ""
    yield from _row(*_COLUMNS)
    for line in results.lines:
        yield from _row(
            line.row,
            f"{line.title} [{line.unit}]" if line.unit else line.title,
            cell(line.values.get(STOCK)),
            cell(line.values.get(PLUGIN)),
            _times(line.ratio, line.ratio_quartiles),
            line.goal.text if line.goal else "",
            line.verdict,
            cell(line.values.get(LIMIT)),
            _times(line.times_limit),
            cell(line.values.get(SERVICE)),
            _times(line.service_times_limit),
            line.service_goal.text
            if line.service_goal and SERVICE in line.values
            else "",
            line.service_verdict,
        )


def _row(*cells: str) -> Iterator[str]:
    """Lay a row out."""
    for index, text in enumerate(cells):
        bullet = "   * -" if index == 0 else "     -"
        yield f"{bullet} {text}".rstrip()


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

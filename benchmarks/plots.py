"""Plots of a run: cost against backup size, and latency during a restore."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .results import LIMIT, PLUGIN, SERVICE, STOCK, Results

_COLOURS = {
    STOCK: "tab:red",
    PLUGIN: "tab:blue",
    SERVICE: "tab:green",
    LIMIT: "tab:gray",
}
_MARKERS = {STOCK: "o", PLUGIN: "s", SERVICE: "D", LIMIT: "^"}
_OPERATIONS = {
    "upload_one": "upload of one new key",
    "get_version": "GET version",
    "upload": "upload of 200 new keys",
}
_PROBE_TITLES = {"upload": "single upload", "whoami": "GET whoami"}
_STYLES = {"idle": ":", "restoring": "-"}


def plot(directory: Path, results: Results) -> None:
    """Save the plots whose rows were measured."""
    if results.points:
        _cost_figure(results).savefig(directory / "cost.png", dpi=130)
    if results.latencies:
        _restore_figure(results).savefig(directory / "restore.png", dpi=130)


def _cost_figure(results: Results) -> Figure:
    """Plot the median duration of three requests against the size of the backup."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    panels = figure.subplots(1, len(_OPERATIONS))
    largest = max(point.keys for point in results.points)
    ticks = [0, *(largest // 10**power for power in (3, 2, 1, 0))]
    for axes, (operation, title) in zip(panels, _OPERATIONS.items(), strict=True):
        for subject in _COLOURS:
            _draw_medians(axes, results, operation, subject)
        axes.set_xscale("symlog", linthresh=ticks[1], linscale=0.5)
        axes.set_yscale("log")
        axes.set_xlim(-ticks[1] / 10, largest * 1.5)
        axes.set_xticks(ticks, [_abbreviate(tick) for tick in ticks], minor=False)
        axes.set_title(title)
        axes.set_xlabel("keys in the backup")
        axes.grid(True, which="both", alpha=0.25)
    panels[0].set_ylabel("median ms a request (bars: quartiles)")
    panels[0].legend()
    return figure


def _abbreviate(count: int) -> str:
    """Format a number of keys with the suffix k or M."""
    for size, letter in ((1_000_000, "M"), (1_000, "k")):
        if count >= size:
            return f"{count / size:g}{letter}"
    return str(count)


def _draw_medians(axes: Axes, results: Results, operation: str, subject: str) -> None:
    """Draw a server's medians of an operation, with quartiles as error bars."""
    points = sorted(
        (point.keys, point.milliseconds)
        for point in results.points
        if (point.operation, point.subject) == (operation, subject)
    )
    if not points:
        return
    medians = [summary.median for _, summary in points]
    axes.errorbar(
        [keys for keys, _ in points],
        medians,
        yerr=[
            [summary.median - summary.q1 for _, summary in points],
            [summary.q3 - summary.median for _, summary in points],
        ],
        color=_COLOURS[subject],
        marker=_MARKERS[subject],
        capsize=3,
        label=subject,
    )


def _restore_figure(results: Results) -> Figure:
    """Plot, for each latency, the share of other users' requests that took longer."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, len(_PROBE_TITLES), sharey=True)
    for axes, (kind, title) in zip(panels, _PROBE_TITLES.items(), strict=True):
        for name, samples in results.latencies.items():
            measured, subject, situation = name.split("/")
            if measured == kind:
                _draw_exceedance(axes, samples, subject, situation)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(f"another user's {title}")
        axes.set_xlabel("ms")
        axes.grid(True, which="both", alpha=0.25)
    panels[0].set_ylabel("share of requests that took longer")
    panels[0].legend()
    return figure


def _draw_exceedance(
    axes: Axes, samples: Sequence[float], subject: str, situation: str
) -> None:
    """Draw, for each sample, the share of samples that exceed it."""
    ordered = sorted(samples)
    shares = [1 - index / len(ordered) for index in range(len(ordered))]
    axes.step(
        ordered,
        shares,
        where="post",
        color=_COLOURS[subject],
        linestyle=_STYLES[situation],
        label=f"{subject}, {situation}",
    )

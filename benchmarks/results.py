"""Results of a run: lines of the table, and points of the plots."""

from collections.abc import Callable, Mapping, Sequence

import attrs

from .sampling import Summary

TIMES = "\N{MULTIPLICATION SIGN}"
STOCK, PLUGIN, SERVICE, LIMIT = "stock", "plugin", "service", "limit"

Samples = Mapping[str, Sequence[float]]


@attrs.frozen
class Goal:
    """A bound for a number in a line, with the text to show for it."""

    text: str
    reached: Callable[[float], bool] = attrs.field(repr=False)


def at_least(bound: float) -> Goal:
    """Return the goal that a ratio to the built-in endpoints reaches a bound."""
    return Goal(f"\u2265 {bound:g}{TIMES}", lambda value: value >= bound)


def at_most(bound: float, unit: str = "") -> Goal:
    """Return the goal that a number doesn't exceed a bound."""
    return Goal(f"\u2264 {bound:g}{unit}", lambda value: value <= bound)


def at_most_times_limit(bound: float) -> Goal:
    """Return the goal that the ratio to the limit doesn't exceed a bound."""
    return at_most(bound, TIMES)


def below(bound: float, unit: str = "") -> Goal:
    """Return the goal that a number is below a bound."""
    return Goal(f"< {bound:g}{unit}", lambda value: value < bound)


def at_most_rounded(bound: int) -> Goal:
    """Return the goal that a count, rounded, doesn't exceed a bound.

    Rounding tolerates an occasional background statement among many requests.
    """
    return Goal(f"\u2264 {bound}", lambda value: round(value) <= bound)


@attrs.frozen
class Line:
    """A line of the table.

    Args:
        row: The number of the row, which groups lines.
        values: A summary for each server.
        ratio: How many times better the plugin is than the built-in endpoints.
        ratio_quartiles: The quartiles of the ratios of paired samples.
        times_limit: How many times worse than the limit the plugin is.
        goal: The goal that the plugin is judged by.
        judged: The number that the goal applies to: the ratio, or a number of the
            plugin alone.
        service_times_limit: How many times worse than the limit the service is.
        service_goal: The goal that service_times_limit is judged by.
    """

    row: str
    title: str
    unit: str
    values: Mapping[str, Summary]
    ratio: float | None = None
    ratio_quartiles: tuple[float, float] | None = None
    times_limit: float | None = None
    goal: Goal | None = None
    judged: float | None = None
    service_times_limit: float | None = None
    service_goal: Goal | None = None

    @property
    def verdict(self) -> str:
        """Return "met" or "missed" for the plugin's goal, or "" without a goal."""
        return _verdict(self.goal, self.judged)

    @property
    def service_verdict(self) -> str:
        """Return "met" or "missed" for the service's goal, or "" without a goal."""
        return _verdict(self.service_goal, self.service_times_limit)

    def with_goal(self, judged: float, goal: Goal | None) -> "Line":
        """Return a copy with a goal for another number than the ratio."""
        return attrs.evolve(self, judged=judged, goal=goal)


def _verdict(goal: Goal | None, judged: float | None) -> str:
    """Return "met" or "missed", or "" without a goal or a number."""
    if goal is None or judged is None:
        return ""
    return "met" if goal.reached(judged) else "missed"


def compare(
    row: str,
    title: str,
    unit: str,
    samples: Samples,
    *,
    goal: Goal | None = None,
    service_goal: Goal | None = None,
    more_is_better: bool = False,
) -> Line:
    """Return a line that compares the medians of interleaved samples.

    The goal applies to the ratio of the built-in endpoints to the plugin, the service's
    goal to the ratio of the service to the limit.
    """
    values = {name: Summary.of(taken) for name, taken in samples.items()}
    ratio = _ratio(values, STOCK, PLUGIN, more_is_better)
    return Line(
        row,
        title,
        unit,
        values,
        ratio=ratio,
        ratio_quartiles=_paired_quartiles(samples, more_is_better),
        times_limit=_ratio(values, PLUGIN, LIMIT, more_is_better),
        goal=goal,
        judged=ratio,
        service_times_limit=_ratio(values, SERVICE, LIMIT, more_is_better),
        service_goal=service_goal,
    )


def state_values(
    row: str,
    title: str,
    unit: str,
    values: Mapping[str, float],
    *,
    goal: Goal | None = None,
) -> Line:
    """Return a line with a number per server; the goal applies to the plugin's."""
    return Line(
        row,
        title,
        unit,
        {name: Summary.of([value]) for name, value in values.items()},
        goal=goal,
        judged=values.get(PLUGIN),
    )


def _ratio(
    values: Mapping[str, Summary], slow: str, fast: str, more_is_better: bool
) -> float | None:
    """Return how many times better the second server's median is than the first's.

    None means that a median is missing or that the divisor is 0.
    """
    if slow not in values or fast not in values:
        return None
    if more_is_better:
        slow, fast = fast, slow
    return values[slow].median / values[fast].median if values[fast].median else None


def _paired_quartiles(
    samples: Samples, more_is_better: bool
) -> tuple[float, float] | None:
    """Return the lower and upper quartile of the ratios of paired samples.

    None means that the samples don't pair, are fewer than two, or contain a 0.
    """
    stock, plugin = samples.get(STOCK, ()), samples.get(PLUGIN, ())
    if len(stock) != len(plugin) or len(stock) < 2 or not all((*stock, *plugin)):
        return None
    pairs = zip(stock, plugin, strict=True)
    ratios = [b / a if more_is_better else a / b for a, b in pairs]
    summary = Summary.of(ratios)
    return summary.q1, summary.q3


@attrs.frozen
class Point:
    """The durations of an operation at a backup size on a server."""

    operation: str
    keys: int
    subject: str
    milliseconds: Summary


@attrs.define
class Results:
    """All results of a run.

    Keys of latencies are ``kind/server/situation``, values are milliseconds.
    """

    lines: list[Line] = attrs.Factory(list)
    points: list[Point] = attrs.Factory(list)
    latencies: dict[str, list[float]] = attrs.Factory(dict)

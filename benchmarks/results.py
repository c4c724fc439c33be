"""What a run found: lines of the table, and the points of the plots."""

from collections.abc import Callable, Mapping, Sequence

import attrs

from .sampling import Summary

TIMES = "\N{MULTIPLICATION SIGN}"
STOCK, PLUGIN, SERVICE, LIMIT = "stock", "plugin", "service", "limit"

Samples = Mapping[str, Sequence[float]]


@attrs.frozen
class Goal:
    """What a line is to reach."""

    text: str
    reached: Callable[[float], bool] = attrs.field(repr=False)


def at_least(bound: float) -> Goal:
    """Ask for so many times what the built-in endpoints do."""
    return Goal(f"\u2265 {bound:g}{TIMES}", lambda value: value >= bound)


def at_most(bound: float, unit: str = "") -> Goal:
    """Ask for no more than a bound."""
    return Goal(f"\u2264 {bound:g}{unit}", lambda value: value <= bound)


def within(bound: float) -> Goal:
    """Ask for no more than so many times what the limit takes."""
    return at_most(bound, TIMES)


def below(bound: float, unit: str = "") -> Goal:
    """Ask for less than a bound."""
    return Goal(f"< {bound:g}{unit}", lambda value: value < bound)


def counted(bound: int) -> Goal:
    """Ask for no more than a number; a stray statement in between is forgiven."""
    return Goal(f"\u2264 {bound}", lambda value: round(value) <= bound)


@attrs.frozen
class Line:
    """One line of the table.

    The ratio says how many times better the plugin is than the built-in endpoints;
    what is judged is the ratio, or a number of the plugin's alone. The service of its
    own is judged by how many times worse than the limit it is.
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
        """Tell whether the goal was met, if there is one."""
        return _verdict(self.goal, self.judged)

    @property
    def service_verdict(self) -> str:
        """Tell whether the service met its goal, if there is one."""
        return _verdict(self.service_goal, self.service_times_limit)

    def judge(self, judged: float, goal: Goal | None) -> "Line":
        """Set a goal for something else than the ratio."""
        return attrs.evolve(self, judged=judged, goal=goal)


def _verdict(goal: Goal | None, judged: float | None) -> str:
    """Tell whether a goal was met."""
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
    """Compare the medians of interleaved samples; the goal is about the ratio."""
    values = {name: Summary.of(taken) for name, taken in samples.items()}
    ratio = _ratio(values, STOCK, PLUGIN, more_is_better)
    return Line(
        row,
        title,
        unit,
        values,
        ratio=ratio,
        ratio_quartiles=_paired(samples, more_is_better),
        times_limit=_ratio(values, PLUGIN, LIMIT, more_is_better),
        goal=goal,
        judged=ratio,
        service_times_limit=_ratio(values, SERVICE, LIMIT, more_is_better),
        service_goal=service_goal,
    )


def state(
    row: str,
    title: str,
    unit: str,
    values: Mapping[str, float],
    *,
    goal: Goal | None = None,
) -> Line:
    """State one number each; the goal is about the plugin's."""
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
    """Divide medians so that more than one means that the second is better."""
    if slow not in values or fast not in values:
        return None
    if more_is_better:
        slow, fast = fast, slow
    return values[slow].median / values[fast].median if values[fast].median else None


def _paired(samples: Samples, more_is_better: bool) -> tuple[float, float] | None:
    """Return the quartiles of the ratios within each turn."""
    stock, plugin = samples.get(STOCK, ()), samples.get(PLUGIN, ())
    if len(stock) != len(plugin) or len(stock) < 2 or not all((*stock, *plugin)):
        return None
    pairs = zip(stock, plugin, strict=True)
    ratios = [b / a if more_is_better else a / b for a, b in pairs]
    summary = Summary.of(ratios)
    return summary.q1, summary.q3


@attrs.frozen
class Point:
    """What one operation costs at one size of backup."""

    operation: str
    keys: int
    subject: str
    milliseconds: Summary


@attrs.define
class Results:
    """All that a run found."""

    lines: list[Line] = attrs.Factory(list)
    points: list[Point] = attrs.Factory(list)
    latencies: dict[str, list[float]] = attrs.Factory(dict)

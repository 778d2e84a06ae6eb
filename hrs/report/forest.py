"""The differences of a comparison as a forest plot: places in percent of an axis, which the page draws."""

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

from hrs.report.rows import Comparison, Row
from hrs.report.statistics import LEVEL, Interval
from hrs.report.table import with_sign

_MARGIN = 0.04
"""Share of the axis beyond the outermost bounds, on either side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One preset's difference and its interval. Places and lengths are percent of the axis."""

    preset: str
    text: str
    """The numbers, as in the table."""
    verdict: str
    """``better`` or ``worse`` if the interval excludes 0, else ``open``."""
    left: float
    width: float
    centre: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Forest:
    """All bars on one axis, the lowest difference first."""

    bars: list[Bar]
    zero: float
    ticks: list[tuple[float, str]]
    """Place and label."""
    level: str
    """Of the intervals: ``95%``."""
    n_omitted: int
    """Presets other than the baseline that have no difference."""


def forest(comparison: Comparison) -> Forest | None:
    """Lay out the differences of the ranked rows; None if there are none."""
    pairs = ((row, row.difference) for row in comparison.above if row.difference is not None)
    compared = sorted(pairs, key=lambda pair: pair[1].value)
    if not compared:
        return None
    bounds = [0.0, *(bound for _, gap in compared for bound in (gap.low, gap.value, gap.high))]
    span = max(bounds) - min(bounds) or 1.0
    low, span = min(bounds) - _MARGIN * span, (1 + 2 * _MARGIN) * span

    def place(value: float) -> float:
        return round(100 * (value - low) / span, 2)

    ticks = [tick for tick in MaxNLocator(4).tick_values(low, low + span) if low <= tick <= low + span]
    return Forest(
        bars=[_bar(row, gap, place) for row, gap in compared],
        zero=place(0.0),
        ticks=[(place(tick), f"{tick + 0.0:+.6g}" if abs(tick) > 1e-9 else "0") for tick in ticks],
        level=f"{LEVEL:.0%}",
        n_omitted=len(comparison.rows) - len(compared) - 1,
    )


def _bar(row: Row, gap: Interval, place: Callable[[float], float]) -> Bar:
    return Bar(
        preset=row.preset,
        text=with_sign(gap).replace("  ", " "),
        verdict="open" if not gap.excludes_zero else "better" if gap.high < 0 else "worse",
        left=place(gap.low),
        width=round(place(gap.high) - place(gap.low), 2),
        centre=place(gap.value),
    )

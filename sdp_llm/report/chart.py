"""A chart as data: what is drawn, without how."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

MOST_POINTS = 600  # more than that are not told apart on a page


@dataclass(frozen=True)
class Series:
    """A line, or marked points, of one run.

    Attributes:
        name: in the legend and beside values.
        color: index of the run's colour.
        x: ascending, as long as ``y``; values that are not finite leave a gap.
        low: lower end of a band around the line; empty: there is none.
        high: upper end of it.
        has_marks: points joined by a line, for what is measured now and then.
        is_dashed: for what is predicted.
        has_end_value: its last value stands beside its end.
        extra: shown beside each value; empty: nothing.
    """

    name: str
    color: int
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    has_marks: bool = False
    is_dashed: bool = False
    has_end_value: bool = False
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chart:
    """Series over one horizontal axis.

    Attributes:
        key: names the chart in file names.
        title: what is shown.
        unit: of the vertical axis.
        x_label: what the horizontal axis shows, with its unit.
        from_zero: the vertical axis starts at 0.
        is_log: the vertical axis is logarithmic.
        marks: where something changed on the horizontal axis, and what.
        note: a sentence below.
    """

    key: str
    title: str
    unit: str
    x_label: str
    series: tuple[Series, ...]
    from_zero: bool = False
    is_log: bool = False
    marks: tuple[tuple[float, str], ...] = ()
    note: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether there is no finite value to draw."""
        return not any(math.isfinite(y) for series in self.series for y in series.y)

    @property
    def has_end_values(self) -> bool:
        """Whether a series wants room for its last value."""
        return any(series.has_end_value for series in self.series)


def thinned(series: Series, most: int = MOST_POINTS) -> Series:
    """The series with at most about ``most`` points: the lowest and the highest of each stretch."""
    if len(series.x) <= most:
        return series
    length = -(-len(series.x) * 2 // most)
    kept: list[int] = []
    for start in range(0, len(series.x), length):
        stretch = range(start, min(start + length, len(series.x)))
        finite = [i for i in stretch if math.isfinite(series.y[i])] or [start]
        ends = {min(finite, key=lambda i: series.y[i]), max(finite, key=lambda i: series.y[i])}
        kept += sorted(ends | ({stretch[-1]} if stretch[-1] == len(series.x) - 1 else set()))
    return replace(
        series,
        x=tuple(series.x[i] for i in kept),
        y=tuple(series.y[i] for i in kept),
        low=tuple(series.low[i] for i in kept if series.low),
        high=tuple(series.high[i] for i in kept if series.high),
        extra=tuple(series.extra[i] for i in kept if series.extra),
    )


def runs_of_finite(series: Series) -> list[list[int]]:
    """Indices of neighbouring points that are finite."""
    found: list[list[int]] = [[]]
    for i, value in enumerate(series.y):
        if math.isfinite(value):
            found[-1].append(i)
        elif found[-1]:
            found.append([])
    return [indices for indices in found if indices]


def is_log_better(values: Sequence[float]) -> bool:
    """Whether the values span so much that a linear axis would hide most of them."""
    positive = sorted(value for value in values if math.isfinite(value))
    if len(positive) < 3 or positive[0] <= 0:
        return False
    return positive[-1] / positive[len(positive) // 2] > 20

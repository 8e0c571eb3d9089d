"""Charts as SVG for the page, with the values that appear under the pointer."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any

from sdp_llm.report.chart import Chart, Series, runs_of_finite, thinned
from sdp_llm.report.scale import Scale, limits, tick_text, value_text
from sdp_llm.report.svg import path, tag, text

LEFT, RIGHT, TOP, BOTTOM = 54, 16, 14, 42  # pixels around the plot
END_VALUES = 50  # pixels at the right for values beside the lines' ends
LABEL_GAP = 15  # pixels between two of them
# A run's first steps fall from where it began; the axis is for what follows.
SKIPPED_SHARE, SKIPPED_FROM = 0.05, 100


@dataclass(frozen=True)
class Frame:
    """The axes of a chart of a certain size."""

    x: Scale
    y: Scale

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the plot."""
        return self.x.start, self.y.stop, self.x.stop, self.y.start


def draw(chart: Chart, width: int, height: int) -> str:
    """The chart as SVG of this size in pixels."""
    chart = replace(chart, series=tuple(thinned(series) for series in chart.series))
    frame = frame_of(chart, width, height)
    left, top, right, bottom = frame.box
    clip = f"clip-{chart.key}"
    area = tag("rect", x=left, y=top, width=right - left, height=bottom - top)
    parts = [
        tag("clipPath", area, id=clip),
        *_grid(frame),
        *_marks(chart, frame),
        tag("g", *(_line(s, frame) for s in chart.series), clip_path=f"url(#{clip})"),
        *(_dots(s, frame) for s in chart.series),
        *_end_values(chart, frame),
        text(chart.x_label, (left + right) / 2, height - 6, class_="label", text_anchor="middle"),
        tag("g", class_="pointer"),
        tag("rect", x=left, y=top, width=right - left, height=bottom - top, class_="catch"),
    ]
    return tag("svg", *parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=chart.title)


def frame_of(chart: Chart, width: int, height: int) -> Frame:
    """The axes that hold every series of a chart."""
    right = width - RIGHT - (END_VALUES if chart.has_end_values else 0)
    xs = [x for series in chart.series for x in series.x if math.isfinite(x)]
    low, high = (min(xs), max(xs)) if xs else (0.0, 1.0)
    low = 0.0 if low < 0.5 * high else low
    x = Scale(low, high if high > low else low + 1.0, LEFT, right)
    ys = [y for series in chart.series for y in _values(series)]
    y = Scale(
        *limits(ys, from_zero=chart.from_zero, is_log=chart.is_log),
        start=height - BOTTOM,
        stop=TOP,
        is_log=chart.is_log,
    )
    return Frame(x, y)


def points_json(chart: Chart, width: int, height: int) -> str:
    """What the page's script shows under the pointer: pixels and texts of every point."""
    chart = replace(chart, series=tuple(thinned(series) for series in chart.series))
    frame = frame_of(chart, width, height)
    x_ticks = frame.x.ticks(8)
    series = []
    for each in chart.series:
        indices = [i for part in _stretches(each, frame) for i in part]
        entry: dict[str, Any] = {
            "name": each.name,
            "color": each.color,
            "x": [round(frame.x(each.x[i]), 1) for i in indices],
            "y": [round(frame.y(each.y[i]), 1) for i in indices],
            "at": [_position(each.x[i], x_ticks) for i in indices],
            "value": [value_text(each.y[i]) for i in indices],
        }
        if each.extra:
            entry["extra"] = [each.extra[i] for i in indices]
        series.append(entry)
    label = chart.x_label.split(",")[0]
    content = {"box": frame.box, "label": label, "series": series}
    # In a script element nothing but "<" could end it.
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")


def _position(value: float, ticks: list[float]) -> str:
    if value == int(value):
        return f"{int(value):,}"
    return tick_text(value, [0.0, (ticks[1] - ticks[0]) / 100 if len(ticks) > 1 else 0.001])


def _values(series: Series) -> list[float]:
    """What the vertical axis must show."""
    skipped = 0
    if len(series.y) >= SKIPPED_FROM and not series.low:
        skipped = int(len(series.y) * SKIPPED_SHARE)
    return [*series.y[skipped:], *series.low, *series.high]


def _grid(frame: Frame) -> list[str]:
    left, top, right, bottom = frame.box
    parts = []
    y_ticks = frame.y.ticks(max(5, int((bottom - top) / 34)))
    for tick in y_ticks:
        y = frame.y(tick)
        parts.append(tag("line", x1=left, x2=right, y1=y, y2=y, class_="grid"))
        shown = tick_text(tick, y_ticks)
        parts.append(text(shown, left - 8, y + 4, class_="tick", text_anchor="end"))
    x_ticks = frame.x.ticks(max(5, int((right - left) / 62)))
    for tick in x_ticks:
        x = frame.x(tick)
        parts.append(tag("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="axis"))
        shown = tick_text(tick, x_ticks)
        parts.append(text(shown, x, bottom + 17, class_="tick", text_anchor="middle"))
    parts.append(tag("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis"))
    return parts


def _marks(chart: Chart, frame: Frame) -> list[str]:
    parts = []
    _, top, _, bottom = frame.box
    for value, label in chart.marks:
        if frame.x.low < value < frame.x.high:
            x = frame.x(value)
            parts.append(tag("line", x1=x, x2=x, y1=top, y2=bottom, class_="mark"))
            parts.append(text(label, x + 4, top + 10, class_="marktext"))
    return parts


def _line(series: Series, frame: Frame) -> str:
    """The band and the line of a series."""
    parts = []
    for indices in _stretches(series, frame):
        points = [(frame.x(series.x[i]), frame.y(series.y[i])) for i in indices]
        if series.low:
            upper = [(frame.x(series.x[i]), frame.y(series.high[i])) for i in indices]
            lower = [(frame.x(series.x[i]), frame.y(series.low[i])) for i in reversed(indices)]
            parts.append(tag("path", d=path([*upper, *lower]) + "Z", class_="band"))
        parts.append(tag("path", d=path(points), class_="line"))
    kind = "marked" if series.has_marks else "dashed" if series.is_dashed else "plain"
    return tag("g", *parts, class_=f"series s{series.color} {kind}")


def _dots(series: Series, frame: Frame) -> str:
    """The marked points of a series, and points without a neighbour, which have no line."""
    places = [
        (frame.x(series.x[i]), frame.y(series.y[i]))
        for indices in _stretches(series, frame)
        for i in indices
        if series.has_marks or len(indices) == 1
    ]
    dots = [tag("circle", cx=x, cy=y, r=3.5, class_="dot") for x, y in places]
    return tag("g", *dots, class_=f"s{series.color}") if dots else ""


def _stretches(series: Series, frame: Frame) -> list[list[int]]:
    """Indices of neighbouring points that can be drawn."""
    if frame.y.is_log:
        series = replace(series, y=tuple(y if y > 0 else math.nan for y in series.y))
    return runs_of_finite(series)


def _end_values(chart: Chart, frame: Frame) -> list[str]:
    """The last values beside the lines' ends, moved apart where they would overlap."""
    ends = []
    for series in chart.series:
        stretches = _stretches(series, frame)
        if stretches and series.has_end_value:
            x, y = series.x[stretches[-1][-1]], series.y[stretches[-1][-1]]
            ends.append((frame.y(y), frame.x(x), series.color, value_text(y)))
    # From the lowest upwards: the axis is below, above there is room.
    placed: list[tuple[float, float]] = []
    parts = []
    for y, x, color, shown in sorted(ends, reverse=True):
        near = [other for at, other in placed if abs(at - x) < END_VALUES]
        place = min([y, *(other - LABEL_GAP for other in near)])
        placed.append((x, place))
        parts.append(text(shown, x + 8, place + 4, class_=f"end s{color}"))
    return parts

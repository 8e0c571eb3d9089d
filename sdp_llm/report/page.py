"""The page: everything in one file, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape

from sdp_llm.report.chart import Chart
from sdp_llm.report.draw import draw, points_json
from sdp_llm.report.figures import loss_charts, step_charts
from sdp_llm.report.gradients import gradient_cards
from sdp_llm.report.picture import (
    LEGEND,
    PhasePicture,
    draw_plans,
    fits,
    phases_of_record,
)
from sdp_llm.report.record import Record
from sdp_llm.report.svg import asset, tag
from sdp_llm.report.table import table_html

COLORS = 6  # in style.css; further runs take them again
WIDE, LOW, HALF = (1130, 360), (1130, 250), (540, 250)  # pixels
# The browser itself refuses whatever is not in the file.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(records: Sequence[Record], made: str) -> str:
    """The HTML of the report.

    :param made: when, for the foot of the page.
    """
    runs = list(records)
    names = ", ".join(record.name for record in runs)
    phases = _phases(runs)
    is_half = len(runs) == 1 and bool(phases) and fits(phases, HALF[0])
    charts = [_recoloured(chart) for chart in step_charts(runs)]
    # Two stand side by side; the last has a row of its own where nothing stands beside it.
    sizes = [HALF] * len(charts)
    if (len(charts) + is_half) % 2 and charts:
        sizes[-1] = LOW
    cards = [
        _loss_card({axis: _recoloured(chart) for axis, chart in loss_charts(runs).items()}),
        *(_chart_card(c, size, len(runs) > 1) for c, size in zip(charts, sizes, strict=True)),
        _plan_card(phases, is_half),
        *(card for record in runs for card in gradient_cards(record, len(runs) > 1)),
    ]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(names)}</title>
<style>
{asset("style.css")}</style>
</head>
<body>
<main>
<header><h1>{escape(names)}</h1><p>{"Pretraining runs" if len(runs) > 1 else "Pretraining run"} \
with Subnetwork Data Parallelism</p></header>
<section class="cards">
<section class="card wide">{table_html(runs)}</section>
{"".join(cards)}
</section>
<footer>{escape(_foot(runs, made))}</footer>
</main>
<div id="tip"></div>
<script>
{asset("hover.js")}</script>
</body>
</html>
"""


def _recoloured(chart: Chart) -> Chart:
    series = tuple(replace(each, color=each.color % COLORS) for each in chart.series)
    return replace(chart, series=series)


def _foot(records: Sequence[Record], made: str) -> str:
    commits = {_short(str(record.environment.get("commit") or "unknown")) for record in records}
    return f"Made {made}. Code of the runs: commit {', '.join(sorted(commits))}."


def _short(commit: str) -> str:
    """A commit in 12 digits, with the mark of one whose files were changed."""
    name, dash, mark = commit.partition("-")
    return name[:12] + dash + mark


def _figure(chart: Chart, size: tuple[int, int]) -> str:
    return (
        f'<div class="chart">{draw(chart, *size)}'
        f'<script type="application/json">{points_json(chart, *size)}</script></div>'
    )


def _title(title: str, unit: str) -> str:
    return f"<h2>{escape(title)}<span>{escape(unit)}</span></h2>"


def _loss_card(charts: dict[str, Chart]) -> str:
    """The loss, with a choice of horizontal axes that needs no script."""
    inputs, labels, panels = [], [], []
    for i, (axis, chart) in enumerate(charts.items()):
        checked = " checked" if i == 0 else ""
        inputs.append(f'<input class="tab" type="radio" name="axis" id="tab-{i}"{checked}>')
        labels.append(f'<label for="tab-{i}">{axis}</label>')
        panels.append(f'<div class="panel panel-{i}">{_figure(chart, WIDE)}</div>')
    first = next(iter(charts.values()))
    return (
        f'<section class="card wide">{"".join(inputs)}{_title(first.title, first.unit)}'
        f'<div class="tabs">{"".join(labels)}</div>{_loss_legend(first)}{"".join(panels)}</section>'
    )


def _chart_card(chart: Chart, size: tuple[int, int], has_legend: bool) -> str:
    note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
    legend = _legend(chart) if has_legend or any(s.is_dashed for s in chart.series) else ""
    title = _title(chart.title, chart.unit)
    kind = "card" if size == HALF else "card wide"
    return f'<section class="{kind}">{title}{legend}{_figure(chart, size)}{note}</section>'


def _legend(chart: Chart) -> str:
    items = []
    for series in chart.series:
        kind = "round" if series.has_marks else "dashes" if series.is_dashed else "stroke"
        items.append(f'<span><i class="{kind} s{series.color}"></i>{escape(series.name)}</span>')
    return f'<div class="legend">{"".join(items)}</div>'


def _loss_legend(chart: Chart) -> str:
    """A colour for each run, and once which line is what."""
    if len({series.color for series in chart.series}) == 1:
        return _legend(chart)
    runs = {series.color: series.name.rpartition(",")[0] for series in chart.series}
    items = [
        f'<span><i class="stroke s{color}"></i>{escape(name)}</span>'
        for color, name in runs.items()
    ]
    items.append('<span><i class="stroke"></i>training</span>')
    if any(series.has_marks for series in chart.series):
        items.append('<span><i class="round"></i>validation</span>')
    return f'<div class="legend">{"".join(items)}</div>'


def _phases(records: Sequence[Record]) -> list[PhasePicture]:
    """The phases of all runs, with the run's name where there are several."""
    found = []
    for record in records:
        phases = phases_of_record(record.plan)
        if len(records) > 1:
            phases = [replace(phase, lines=(record.name, *phase.lines)) for phase in phases]
        found += phases
    return found


def _plan_card(phases: Sequence[PhasePicture], is_half: bool) -> str:
    """Who owns what, side by side as far as that fits."""
    if not phases:
        return ""
    width = (HALF if is_half else WIDE)[0]
    group, height = draw_plans(phases, width)
    picture = tag("svg", group, viewBox=f"0 0 {width} {height:g}", role="img")
    legend = "".join(
        f'<span><i class="box {kind}"></i>{name}</span>' for kind, name in LEGEND.items()
    )
    kind = "card" if is_half else "card wide"
    title = _title("Who trains what", "")
    return f'<section class="{kind}">{title}<div class="legend">{legend}</div>{picture}</section>'

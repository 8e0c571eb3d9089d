"""The same charts as PNG files, for which matplotlib is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdp_llm.errors import ConfigError
from sdp_llm.report.chart import Chart
from sdp_llm.report.draw import frame_of
from sdp_llm.report.figures import loss_charts, step_charts
from sdp_llm.report.picture import PhasePicture, phases_of_record
from sdp_llm.report.record import Record

COLORS = ("#1769c0", "#d9631e", "#128a6b", "#8a4fc0", "#a67c00", "#c23b6a")  # as in style.css
ABSENT, OWNED, PINNED = "#edeff2", "#5b9bd8", "#1f5f99"
DPI = 150


def write_pngs(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write a PNG for each chart and each run's plan.

    :returns: what was written.
    :raises ConfigError: without matplotlib, or when the folder cannot be written.
    """
    require_matplotlib(f"--png {folder}")
    charts = [*loss_charts(records).values(), *step_charts(records)]
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for chart in charts:
            written.append(folder / f"{chart.key}.png")
            _figure_of(chart).savefig(written[-1], dpi=DPI)
        for record in records:
            phases = phases_of_record(record.plan)
            if phases:
                written.append(folder / f"plan-{record.name.replace('/', '-')}.png")
                save_plan(phases, written[-1])
    except OSError as error:
        raise ConfigError(f"--png {folder}: cannot write: {error.strerror}") from None
    return written


def save_plan(phases: Sequence[PhasePicture], path: Path) -> None:
    """Draw phases side by side into a PNG.

    :raises ConfigError: without matplotlib.
    """
    require_matplotlib(str(path))
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    blocks, ranks = len(phases[0].owners), phases[0].world_size
    cell = min(0.32, 11 / blocks, 6 / ranks)  # inches
    width = max(cell * blocks, 3.4) + 0.9
    size = (width * len(phases), max(cell * ranks, 0.8) + 1.3)
    figure = Figure(figsize=size, layout="constrained")
    for axes, phase in zip(figure.subplots(1, len(phases), squeeze=False)[0], phases, strict=True):
        cells = [
            [
                2 if b in phase.pinned else int(rank in owners)
                for b, owners in enumerate(phase.owners)
            ]
            for rank in range(ranks)
        ]
        axes.pcolormesh(
            cells, cmap=ListedColormap([ABSENT, OWNED, PINNED]), vmin=0, vmax=2, edgecolors="white"
        )
        axes.set(xlabel="block", ylabel="rank", aspect="equal")
        axes.set_title("\n".join(phase.lines), fontsize=8)
        for axis, count in ((axes.xaxis, blocks), (axes.yaxis, ranks)):
            every = math.ceil(count / 16)
            axis.set_ticks([i + 0.5 for i in range(0, count, every)])
            axis.set_ticklabels([str(i) for i in range(0, count, every)])
        axes.invert_yaxis()
        axes.tick_params(labelsize=7, length=0)
        axes.spines[:].set_visible(False)
    names = {"owned": OWNED, "pinned": PINNED, "not owned": ABSENT}
    handles = [Patch(color=color, label=name) for name, color in names.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=DPI)


def _figure_of(chart: Chart) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    for series in chart.series:
        color = COLORS[series.color % len(COLORS)]
        style = "--" if series.is_dashed else ":" if series.has_marks else "-"
        marker = "o" if series.has_marks else None
        axes.plot(
            series.x, series.y, style, marker=marker, ms=4, lw=1.5, color=color, label=series.name
        )
        if series.low:
            axes.fill_between(series.x, series.low, series.high, color=color, alpha=0.16, lw=0)
    if chart.is_log:
        axes.set_yscale("log")
    frame = frame_of(chart, 1000, 500)
    axes.set_ylim(frame.y.low, frame.y.high)
    for value, label in chart.marks:
        axes.axvline(value, color="#b9c0c8", ls=":", lw=1)
        axes.text(value, frame.y.high, f" {label}", fontsize=7, va="top", color="#68717c")
    axes.set_title(chart.title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(chart.x_label, fontsize=9)
    axes.set_ylabel(chart.unit, fontsize=9)
    axes.grid(axis="y", color="#eceef1")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return figure


def require_matplotlib(what: str) -> None:
    """Check that pictures can be drawn.

    :param what: asks for them, for the message.
    :raises ConfigError: it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"{what}: PNG needs matplotlib, which is not installed: pip install matplotlib"
        ) from None

"""The picture of scaling.py: what a rank needs over the number of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks._predicted import BY_NODE, series
from benchmarks._record import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIB = 2**20
# Peers that coincide are drawn one over the other, the first one widest.
PEER_WIDTHS = {"DDP": 4.5, "ZeRO-2": 2.4, "ZeRO-3": 4.0}
PEER_COLORS = {
    "DDP": "#222222",
    "ZeRO-2": "#8c8c8c",
    "ZeRO-3": "#c8501e",
    "FSDP2": "#e3a02e",
    "FSDP2, no resharding": "#b08bc4",
}
SDP_COLORS = ("#1f5fa8", "#4fa3d1", "#2b8a5a", "#9ccf6b", "#7a4fbf")


def draw(
    measured_model: str,
    measured: Sequence[dict[str, Any]],
    predictions: dict[str, list[dict[str, Any]]],
    clusters: Sequence[str],
    path: Path,
) -> None:
    """One row for the measurement against its closed forms, one per predicted model.

    :param clusters: whose predicted step times are shown.
    """
    from matplotlib.figure import Figure

    rows, columns = 1 + len(predictions), 2 + len(clusters)
    figure = Figure(figsize=(3.4 * columns, 3.0 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    _draw_measured(axes[0], measured_model, measured)
    for row, (model, entries) in zip(axes[1:], predictions.items(), strict=True):
        _draw_predicted(row, model, entries, clusters)
    if predictions:
        _legend(axes[0, 3], axes[1, -2], "predicted, not measured")
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=8)
    for each in axes[0, 2:]:
        each.set_axis_off()
    figure.savefig(path, dpi=130)


def _draw_measured(row: Any, model: str, results: Sequence[dict[str, Any]]) -> None:
    by_system = series(results)
    colors = _colors(by_system)
    panels = (("state", "model state", MIB, "MiB"), ("sent", "sent per step", MIB, "MiB"))
    for axes, (name, what, unit, label) in zip(row, panels, strict=False):
        for system, found in by_system.items():
            form = {n: result["closed_form"][name] / unit for n, result in found.items()}
            dots = {n: result["measured"][name] for n, result in found.items()}
            dots = {n: value / unit for n, value in dots.items() if value is not None}
            axes.plot(list(form), list(form.values()), color=colors[system], lw=1.2)
            axes.plot(
                list(dots), list(dots.values()), "o", ms=4, color=colors[system], label=system
            )
        _dress(axes, f"{model}: {what}", f"{label} per rank", found)
        axes.set_ylim(bottom=0)
    _legend(row[2], row[0], "measured (dots), closed form (lines)")


def _draw_predicted(
    row: Any, model: str, entries: Sequence[dict[str, Any]], clusters: Sequence[str]
) -> None:
    from matplotlib.ticker import NullFormatter

    by_system = series(entries)
    colors = _colors(by_system)
    panels = [("memory", f"{model}: memory", "GiB per rank", lambda e: e["memory"] / GIB)]
    panels.append(("sent", f"{model}: sent per step", "GB per rank", lambda e: e["sent"] / 1e9))
    for c in clusters:
        what = (c, f"{model}: step, {c} cluster", "seconds", partial(_seconds, cluster=c))
        panels.append(what)
    sizes = sorted({entry["world_size"] for entry in entries})
    for axes, (name, title, label, value) in zip(row, panels, strict=True):
        for system, found in by_system.items():
            # Where the blocks are makes no difference to memory and bytes.
            if system.endswith(BY_NODE) and name in ("memory", "sent", "single"):
                continue
            style = "--" if system.endswith(BY_NODE) else "-"
            values = [value(entry) for entry in found.values()]
            color = colors[system.removesuffix(BY_NODE)]
            width = PEER_WIDTHS.get(system, 1.3)
            axes.plot(list(found), values, style, color=color, lw=width, label=system)
        _dress(axes, title, label, sizes)
        if name in clusters:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=0)


def _seconds(entry: dict[str, Any], cluster: str) -> float:
    return float(entry["seconds"][cluster]["total"])


def _colors(systems: Iterable[str]) -> dict[str, str]:
    free = cycle(SDP_COLORS)
    kinds = dict.fromkeys(system.removesuffix(BY_NODE) for system in systems)
    return {kind: PEER_COLORS.get(kind) or next(free) for kind in kinds}


def _dress(axes: Axes, title: str, label: str, sizes: Iterable[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(sizes), [f"{n:,}" for n in sizes], rotation=45)
    axes.set_xlabel("ranks", fontsize=8)
    axes.set_ylabel(label, fontsize=8)
    axes.set_title(title, fontsize=9)


def _legend(axes: Axes, source: Axes, title: str) -> None:
    """Use a free place of the grid for the legend of another."""
    handles, labels = source.get_legend_handles_labels()
    axes.legend(handles, labels, frameon=False, fontsize=8, loc="center left", title=title)

"""The pictures of the study."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks._study_cases import DENSE, HALF, KINDS
from benchmarks._study_plan import BASE, STEPS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from benchmarks._study_rows import Row

COLORS = {
    "dense": "#222222",
    "forward": "#1f5fa8",
    "backward": "#c8501e",
    "changing": "#2c8c57",  # the plan or the masking does
}
FLOPS = "TFLOPs of a rank in the whole run"
LOSS = "whole-model validation loss, nats per token"


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.savefig(path, dpi=130)


def _color(row: Row) -> str:
    sdp = KINDS[row.case.kind]
    is_changing = "schedule" in sdp or "rotate_every" in sdp
    return COLORS["changing" if is_changing else row.case.kind.split()[0].rstrip(",")]


def dots(rows: Sequence[Row], path: Path) -> None:
    """The loss of each row, best at the top; small dots are single seeds."""
    ordered = sorted(rows, key=lambda row: -row.loss.value)
    figure = _figure(6.5, 1.1 + 0.26 * len(ordered))
    axes = figure.add_subplot()
    for y, row in enumerate(ordered):
        seeds = [result["loss"] for result in row.by_seed.values()]
        axes.plot(seeds, [y] * len(seeds), ".", ms=3, color="#aaaaaa", zorder=1)
        axes.errorbar(
            row.loss.value, y, xerr=row.loss.error, fmt="o", ms=5, capsize=2, color=_color(row)
        )
        if row.case.kind == DENSE and row.case.model == BASE:
            axes.axvline(row.loss.value, color=COLORS["dense"], lw=0.7, ls=":")
    axes.set_yticks(range(len(ordered)), [row.label for row in ordered])
    axes.set_xlabel(LOSS, fontsize=8)
    _save(figure, path)


def curves(rows: Sequence[Row], path: Path) -> None:
    """The loss over the budget, a line for each kind of training."""
    by_label: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_label[row.label].append(row)
    figure = _figure(8.0, 4.2)
    axes = figure.add_subplot()
    styles = ("-o", "--s", ":^", "-.v", "-D")
    counts: dict[str, int] = defaultdict(int)
    for name, found in by_label.items():
        found.sort(key=lambda row: row.flops)
        color = _color(found[0])
        style = styles[counts[color] % len(styles)]
        counts[color] += 1
        axes.errorbar(
            [row.flops / 1e12 for row in found],
            [row.loss.value for row in found],
            yerr=[row.loss.error or 0.0 for row in found],
            fmt=style,
            ms=4,
            lw=1.1,
            capsize=2,
            color=color,
            label=name,
        )
    _log_scale(axes)
    axes.set_xlabel(FLOPS, fontsize=8)
    axes.set_ylabel(LOSS, fontsize=8)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    _save(figure, path)


def fronts(rows: Sequence[Row], path: Path) -> None:
    """Loss against operations, memory and bytes sent.

    Operations over all budgets; the others at one budget, since time buys loss in all of them.
    """
    panels: tuple[tuple[str, Callable[[Row], float]], ...] = (
        (FLOPS, lambda row: row.flops / 1e12),
        ("MiB of a rank at its peak, stage 0", lambda row: row.memory(0)),
        ("MiB of model state of a rank, stage 0", lambda row: row.state(0)),
        ("MiB that a rank sends in the whole run", lambda row: row.sent(0)),
    )
    numbered = sorted(rows, key=lambda row: row.loss.value)
    figure = _figure(11.0, 5.5 + 0.12 * len(numbered))
    all_axes = figure.subplots(2, 2)
    for axes, (name, value) in zip(all_axes.flat, panels, strict=True):
        is_shown = [name == FLOPS or row.case.dense_steps == STEPS for row in numbered]
        _front(axes, numbered, is_shown, value)
        axes.set_xlabel(name, fontsize=8)
    _log_scale(all_axes[0, 0])
    for axes in all_axes[:, 0]:
        axes.set_ylabel(LOSS, fontsize=8)
    names = [f"{i} {row.label}{_budget(row)}" for i, row in enumerate(numbered, 1)]
    handles = [axes.plot([], [], "o", ms=4, color=_color(row))[0] for row in numbered]
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    _save(figure, path)


def _front(
    axes: Axes, rows: Sequence[Row], is_shown: Sequence[bool], value: Callable[[Row], float]
) -> None:
    """Numbered dots, and a line along those that no other beats in both coordinates."""
    shown = [(i, row) for i, row in enumerate(rows, 1) if is_shown[i - 1]]
    best = float("inf")
    front = []
    for _, row in sorted(shown, key=lambda entry: (value(entry[1]), entry[1].loss.value)):
        if row.loss.value < best:
            best = row.loss.value
            front.append(row)
    axes.step(
        [value(row) for row in front],
        [row.loss.value for row in front],
        where="post",
        color="#bbbbbb",
        lw=1.0,
        zorder=1,
    )
    for i, row in shown:
        x, y = value(row), row.loss.value
        axes.errorbar(x, y, yerr=row.loss.error, fmt="o", ms=4, capsize=2, color=_color(row))
        axes.annotate(str(i), (x, y), xytext=(3, 3), textcoords="offset points", fontsize=6)


def _budget(row: Row) -> str:
    if row.case.dense_steps != STEPS:
        return f", {row.case.dense_steps / STEPS:g} x the budget"
    return "" if row.case.is_equal_flops or row.case.kind == DENSE else ", equal steps"


def _log_scale(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def alignments(rows: Sequence[Row], path: Path) -> None:
    """The cosine of each block over training, for both masks, a column for each row."""
    figure = _figure(3.4 * len(rows), 5.4)
    all_axes = figure.subplots(2, len(rows), sharex="col", sharey=True, squeeze=False)
    from matplotlib import colormaps

    for column, row in zip(all_axes.T, rows, strict=True):
        probes = [result["alignment"] for result in row.by_seed.values()]
        for axes, masking in zip(column, ("forward", "backward"), strict=True):
            points = range(min(map(len, probes)))
            steps = [probes[0][at]["step"] for at in points]
            names = [unit for unit in probes[0][0][masking]["units"] if unit.startswith("block")]
            for b, name in enumerate(names):
                found = [[probe[at][masking]["units"][name] for probe in probes] for at in points]
                line = [sum(values) / len(values) for values in found]
                color = colormaps["viridis"](b / max(1, len(names) - 1))
                axes.plot(steps, line, color=color, lw=1.2, label=str(b))
            axes.set_title(f"trained {row.label}; {masking} masks", fontsize=8)
    for axes in all_axes[-1]:
        axes.set_xlabel("step", fontsize=8)
    for axes in all_axes[:, 0]:
        axes.set_ylabel("cosine to the full gradient", fontsize=8)
    handles, names = all_axes[0, -1].get_legend_handles_labels()
    figure.legend(
        handles, names, title="block", loc="outside right upper", fontsize=7, frameon=False
    )
    _save(figure, path)


def gaps(rows: Sequence[Row], path: Path) -> None:
    """The gap of forward masking to the dense model over tokens, a line for each model."""
    by_model: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.gap is not None and row.case.kind == HALF:
            batch = f", batch x {row.case.samples}" if row.case.samples > 1 else ""
            by_model[f"{row.case.model}{batch}"].append(row)
    figure = _figure(6.0, 4.0)
    axes = figure.add_subplot()
    for name, found in by_model.items():
        found.sort(key=lambda row: row.case.dense_steps)
        axes.errorbar(
            [_dense_tokens(row) / row.cost.parameters for row in found],
            [row.gap.value for row in found if row.gap],
            yerr=[row.gap.error or 0.0 for row in found if row.gap],
            fmt="-o",
            ms=4,
            lw=1.1,
            capsize=2,
            label=name,
        )
    axes.axhline(0.0, color="black", lw=0.7)
    _log_scale(axes)
    axes.set_xlabel("tokens of the dense run per parameter", fontsize=8)
    axes.set_ylabel("loss of forward 1/2 minus dense, equal FLOPs", fontsize=8)
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def _dense_tokens(row: Row) -> int:
    return row.case.dense_steps * row.case.tokens_per_step

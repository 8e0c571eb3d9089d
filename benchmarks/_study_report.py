"""The tables of the study, one page per question, from the results that are there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks import _study_pictures as pictures
from benchmarks._record import markdown_table
from benchmarks._study_cases import DENSE, HALF, Case, Run, size_of
from benchmarks._study_numbers import Fit, fit, mean
from benchmarks._study_plan import BASE, GRIDS, QUESTIONS, STEPS, TUNED, own_sweep, sweep
from benchmarks._study_results import TOGETHER, Results, write_together
from benchmarks._study_rows import RATE, Row, dense_of, label, rows_at_best, rows_of, table

# Of the dense run per parameter, in the trend of longer runs: with fewer, it has hardly begun.
FEWEST_TOKENS = 2
FRONT = 9  # the question that all runs of the base model answer together
_ABOUT = (
    "Whole-model validation loss in nats per token, mean and standard error over seeds; the gap "
    "is paired by seed with the dense model at the same budget; whole - trained is the loss minus "
    "the training loss of the last fifth of the run, that of subnetworks where blocks are skipped, "
    "where it was kept. FLOPs in those of the dense base "
    "model's run. Memory of one rank and bytes that it sends in the whole run are closed forms "
    "(fp32, AdamW; state and total at ZeRO stage 0, then the total at stage 2; bytes with those of "
    "changes of plan), with the loss 64 tokens at a time. λ is that of the first phase."
)


def write_report(results: Results, folder: Path) -> list[Path]:
    """Write a page and a picture for every question that has results, and all runs in one file.

    :returns: the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = [_write(folder / "learning_rates.md", _rates_page(results))]
    for question in sorted(QUESTIONS.keys() - {FRONT}):
        cases = QUESTIONS[question]
        rows = rows_of(cases, results)
        if not rows:
            continue
        page = [_ABOUT, *_SECTIONS.get(question, _plain)(rows, folder, question)]
        written.append(_write(folder / f"question_{question}.md", "\n\n".join(page)))
    every = dict.fromkeys((*chain.from_iterable(QUESTIONS.values()), *TUNED))
    rows = rows_at_best((case for case in every if _is_on_front(case)), results)
    if rows:
        name = f"question_{FRONT}"
        pictures.fronts(rows, folder / f"{name}.png")
        rows = sorted(rows, key=lambda row: row.loss.value)
        about = f"{_ABOUT} Learning rates are their own where those were swept."
        page = [about, f"![front]({name}.png)", table(rows, RATE)]
        written.append(_write(folder / f"{name}.md", "\n\n".join(page)))
    write_together(results, folder / TOGETHER)
    return [*written, *sorted(folder.glob("*.png")), folder / TOGETHER]


def _write(path: Path, text: str) -> Path:
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _is_on_front(case: Case) -> bool:
    # Dropout takes another attention kernel, whose memory would stretch the axis; so would the loss
    # of a whole model that is of no use.
    is_stretching = case.model.dropout or case.kind == "forward 1/4, no pins"
    return dense_of(case).model == BASE and case.samples == 1 and not is_stretching


def _rates_page(results: Results) -> str:
    rows = []
    sweeps: list[tuple[str, Any, list[Run]]] = [
        (f"{model}, {family}", (model, family), sweep(model, family)) for model, family in GRIDS
    ]
    sweeps += [
        (f"{dense_of(case).model}, {label(case)}, alone", case, own_sweep(case)) for case in TUNED
    ]
    for name, key, runs in sweeps:
        losses = [results.by_run.get(run, {}).get("loss") for run in runs]
        cells = [
            f"{run.rate:g}: {loss:.3f}"
            for run, loss in zip(runs, losses, strict=True)
            if loss is not None
        ]
        best = results.rates.get(key)
        steps = runs[0].case.dense_steps
        is_edge = best in (runs[0].rate, runs[-1].rate)
        chosen = "-" if best is None else f"{best:g}" + (" (edge of the grid)" * is_edge)
        rows.append([name, str(steps), ", ".join(cells), chosen])
    return markdown_table(["model", "dense steps", "rate: loss", "chosen"], rows)


def _plain(rows: Sequence[Row], folder: Path, question: int) -> list[str]:
    name = f"question_{question}.png"
    pictures.dots(rows, folder / name)
    return [f"![loss]({name})", table(rows)]


def _budgets(rows: Sequence[Row], folder: Path, question: int) -> list[str]:
    parts = []
    for is_equal, title in ((True, "Equal FLOPs"), (False, "Equal steps")):
        chosen = [r for r in rows if r.case.is_equal_flops == is_equal or r.case.kind == DENSE]
        name = f"question_{question}_{'flops' if is_equal else 'steps'}.png"
        pictures.dots(chosen, folder / name)
        parts += [f"### {title}", f"![loss]({name})", table(chosen)]
    return parts


def _smaller(rows: Sequence[Row], folder: Path, question: int) -> list[str]:
    name = f"question_{question}.png"
    pictures.curves(rows, folder / name)
    return [f"![loss]({name})", table(rows)]


def _alignments(rows: Sequence[Row], folder: Path, question: int) -> list[str]:
    name = f"question_{question}.png"
    pictures.alignments(rows, folder / name)
    cells = []
    for row in rows:
        probes = [result["alignment"] for result in row.by_seed.values()]
        for masking in ("forward", "backward"):
            for at in range(min(map(len, probes))):
                found = [probe[at][masking] for probe in probes]
                units = {
                    unit: mean([f["units"][unit] for f in found]) for unit in found[0]["units"]
                }
                blocks = [m.value for unit, m in units.items() if unit.startswith("block")]
                ranks = mean([sum(f["ranks"]) / len(f["ranks"]) for f in found])
                low = mean([min(f["ranks"]) for f in found])
                cells.append(
                    [
                        row.label,
                        f"{probes[0][at]['step']:,}",
                        masking,
                        str(ranks),
                        str(low),
                        *(f"{value:.2f}" for value in blocks),
                    ]
                )
    header = ["trained with", "step", "masks", "ranks, mean", "ranks, lowest"]
    header += [f"b{b}" for b in range(len(blocks))]
    about = (
        "Cosine between the masked-averaged gradient and the whole model's, of the same 64 "
        "held-out samples dealt to 8 workers: over all that a rank owns, and by block. A masking "
        "that drops nothing but samples (backward) shows what sampling alone costs."
    )
    return [about, f"![cosine]({name})", markdown_table(header, cells)]


def gap_trend(rows: Sequence[Row], is_per_parameter: bool = True) -> Fit | None:
    """The gap of forward masking at 1/2, linear in the logarithms of size, depth and tokens.

    Size is the parameters of the model; both and the depth are over those of the base model, so
    that the constant is the gap there. Every seed is a point.

    :param is_per_parameter: tokens are those of the dense run per parameter, so that size changes
        at as many tokens per parameter; otherwise they are its tokens, and size changes at as many.
    """
    columns: dict[str, list[float]] = {"at the base": [], "size": [], "depth": [], "tokens": []}
    gaps = []
    dense = {row.case: row for row in rows if row.case.kind == DENSE}
    base = _scales(Case(BASE, DENSE, STEPS), is_per_parameter)
    for row in rows:
        other = dense.get(dense_of(row.case))
        if row.case.kind != HALF or row.case.samples != 1 or other is None:
            continue
        scales = zip(_scales(other.case, is_per_parameter), base, strict=True)
        point = (1.0, *(math.log2(value / at_base) for value, at_base in scales))
        for seed in row.by_seed.keys() & other.by_seed.keys():
            gaps.append(row.by_seed[seed]["loss"] - other.by_seed[seed]["loss"])
            for column, value in zip(columns.values(), point, strict=True):
                column.append(value)
    return fit(columns, gaps) if gaps else None


def _scales(case: Case, is_per_parameter: bool) -> tuple[float, float, float]:
    """Parameters, blocks, and tokens."""
    size = size_of(case.model).numel
    return size, case.model.blocks, case.tokens() / (size if is_per_parameter else 1)


def _trend(rows: Sequence[Row], folder: Path, question: int) -> list[str]:
    name = f"question_{question}.png"
    parts = []
    if any(row.gap for row in rows):
        pictures.gaps(rows, folder / name)
        parts.append(f"![gap]({name})")
    extra: dict[str, Callable[[Row], str]] = {
        "model": lambda row: str(row.case.model),
        "batch": lambda row: f"{row.case.tokens_per_step:,}",
        "tokens per parameter": lambda row: f"{row.case.tokens() / row.cost.parameters:.1f}",
    }
    parts.append(table(rows, extra))
    trained = [row for row in rows if _scales(dense_of(row.case), True)[2] >= FEWEST_TOKENS]
    fits = {"all pairs": _terms(rows), "longer runs": _terms(trained)}
    columns = [fit for fit in fits.values() if fit]
    if columns:
        parts.append(
            "The gap in nats per token at the base model, and how each doubling of parameters, "
            "depth and tokens per parameter changes it, by least squares with standard errors. "
            "Size changes at as many tokens per parameter, but for the row that says otherwise. "
            f"Longer runs have at least {FEWEST_TOKENS} tokens per parameter; the scatter is that "
            "of the residuals."
        )
        cells = [[name, *(column[name] for column in columns)] for name in columns[0]]
        parts.append(markdown_table(["term", *(name for name, fit in fits.items() if fit)], cells))
    return parts


def _terms(rows: Sequence[Row]) -> dict[str, str]:
    """The coefficients of :func:`gap_trend`, by name; empty where there are too few pairs."""
    found, at_equal_tokens = gap_trend(rows), gap_trend(rows, is_per_parameter=False)
    if found is None or at_equal_tokens is None:
        return {}
    size = found.names.index("size")
    terms = [*zip(found.names, found.values, found.errors, strict=True)]
    terms.append(
        ("size, as many tokens", at_equal_tokens.values[size], at_equal_tokens.errors[size])
    )
    return {
        **{name: f"{value:+.4f} ± {error:.4f}" for name, value, error in terms},
        "scatter": f"{found.scatter:.4f}",
        "pairs": str(found.count),
    }


_Section = Callable[[Sequence[Row], Path, int], list[str]]
_SECTIONS: Mapping[int, _Section] = {
    1: _budgets,
    2: _smaller,
    7: _alignments,
    8: _trend,
}

"""The tables that the written page of the study quotes: filled in from the results."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from benchmarks._record import markdown_table
from benchmarks._study_cases import DENSE, HALF, Case, Model
from benchmarks._study_numbers import difference
from benchmarks._study_plan import (
    AS_MANY_TOKENS,
    BASE,
    COMPARED,
    FEWER_RANKS,
    LARGER_START,
    PRESETS,
    QUESTIONS,
    STEPS,
    TUNED,
    WIDE,
    WIDEST,
)
from benchmarks._study_results import Results
from benchmarks._study_rows import RATE, Row, dense_of, label, rows_at_best, rows_of, table

# A table stands between `<!-- table NAME -->` and `<!-- end -->`.
_TABLE = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_SHOWN = (
    *("training", "λ", "steps", "loss", "gap to dense", "whole - trained", "seeds"),
    *("stage 2, MiB", "sent, MiB"),
)
_BUDGET: Mapping[str, Callable[[Row], str]] = {
    "budget": lambda row: f"{row.case.dense_steps:,}",
}
_MODEL: Mapping[str, Callable[[Row], str]] = {
    "model": lambda row: str(row.case.model),
    **_BUDGET,
    "tokens per parameter": lambda row: f"{row.case.tokens() / row.cost.parameters:.0f}",
}


def fill(text: str, results: Results) -> str:
    """The page with its tables made anew.

    :raises KeyError: a table has a name that is not known.
    """
    return _TABLE.sub(lambda found: found[1] + _tables()[found[2]](results) + found[3], text)


def _tables() -> dict[str, Callable[[Results], str]]:
    first = QUESTIONS[1]
    flops = [c for c in first if c.is_equal_flops]
    steps = [c for c in first if not c.is_equal_flops or c.kind == DENSE]
    smaller = [c for c in QUESTIONS[2] if c.kind == DENSE and c.dense_steps == STEPS]
    half = [
        case
        for case in dict.fromkeys(QUESTIONS[8])
        if case.kind in (DENSE, HALF) and case.reference is None and case.model != LARGER_START
    ]
    wide = [c for c in QUESTIONS[8] if dense_of(c).model == WIDE]
    widest = [c for c in QUESTIONS[8] if dense_of(c).model == WIDEST]
    start = [c for c in QUESTIONS[8] if dense_of(c).model == LARGER_START]
    return {
        "flops": lambda results: _by_loss([*flops, *smaller], results),
        "steps": lambda results: _by_loss(steps, results),
        "budgets": lambda results: _by_budget(QUESTIONS[2], results),
        "tuned": lambda results: _tuned(BASE, results),
        "tuned-wide": lambda results: _tuned(WIDE, results),
        "depth": _depth,
        "drops": lambda results: _by_loss(QUESTIONS[3], results),
        "pins": lambda results: _by_loss(QUESTIONS[4], results),
        "schedules": lambda results: _by_loss(QUESTIONS[5], results),
        "plans": lambda results: _by_loss(QUESTIONS[6], results),
        "sizes": lambda results: _rows(rows_of(half, results), _MODEL),
        "wide": lambda results: _by_loss(wide, results),
        "widest": lambda results: _by_loss(widest, results),
        "start": lambda results: _by_loss(start, results),
        "presets": _presets,
    }


def _presets(results: Results) -> str:
    """The gap of every preset, and of the dense models that need what its ranks do.

    Of what has a learning rate of its own, with that.
    """

    def case(kind: str, blocks: int, model: Model, steps: int) -> Case:
        if kind != DENSE:
            return Case(model, kind, steps)
        return Case(replace(model, blocks=blocks), DENSE, steps, reference=model)

    rows = [
        *((name, kind, 0) for name, kind in PRESETS.items()),
        ("-", FEWER_RANKS, 0),
        *(("-", DENSE, blocks) for blocks in (5, 4, 3)),
    ]
    cells = []
    for name, kind, blocks in rows:
        compared = [case(kind, blocks, *setting) for setting in COMPARED.values()]
        found = [rows_at_best([each], results) for each in compared]
        gaps = [row[0].gap.text("+") if row and row[0].gap else "-" for row in found]
        cells.append([name, label(compared[0]), *gaps])
    return markdown_table(["preset", "training", *COMPARED], cells) + "\n"


def _by_loss(
    cases: Sequence[Case],
    results: Results,
    extra: Mapping[str, Callable[[Row], str]] | None = None,
) -> str:
    rows = rows_of(dict.fromkeys(cases), results)
    return _rows(sorted(rows, key=lambda row: row.loss.value), extra)


def _tuned(model: Model, results: Results) -> str:
    cases = [case for case in TUNED if dense_of(case).model == model]
    rows = rows_of(cases, results, are_tuned=True)
    return _rows(
        sorted(rows, key=lambda row: (row.case.dense_steps, row.loss.value)), {**_BUDGET, **RATE}
    )


def _depth(results: Results) -> str:
    """What depth is worth on as many tokens, and what SDP makes of it, beside 3 blocks."""
    rows: list[Row] = []
    few: dict[int, Row] = {}  # by width
    for deep in AS_MANY_TOKENS:
        tuned = [c for c in TUNED if c.dense_steps == STEPS and dense_of(c).model == deep.model]
        compared = [c for c in tuned if c.model.blocks == 3 or c.kind == PRESETS["memory"]]
        found = [*rows_of(compared, results, are_tuned=True), *rows_of([deep], results)]
        shallow = next((row for row in found if row.case.model.blocks == 3), None)
        if shallow is not None:
            few[deep.model.hidden] = shallow
            rows += sorted(found, key=lambda row: row.flops)

    def gap(row: Row) -> str:
        other = few[row.case.model.hidden]
        found = difference(_losses(row), _losses(other))
        return "-" if row is other or found is None else found.text("+")

    extra: dict[str, Callable[[Row], str]] = {
        "width": lambda row: str(row.case.model.hidden),
        **RATE,
        "FLOPs of 3 blocks": lambda row: f"{row.flops / few[row.case.model.hidden].flops:.2f}",
        "gap to 3 blocks": gap,
    }
    return table(rows, extra, ("training", "steps", "loss", "seeds")) + "\n"


def _losses(row: Row) -> dict[int, float]:
    return {seed: result["loss"] for seed, result in row.by_seed.items()}


def _by_budget(cases: Sequence[Case], results: Results) -> str:
    rows = rows_of(dict.fromkeys(cases), results)
    return _rows(sorted(rows, key=lambda row: (row.case.dense_steps, row.loss.value)), _BUDGET)


def _rows(rows: Sequence[Row], extra: Mapping[str, Callable[[Row], str]] | None = None) -> str:
    return table(rows, extra, _SHOWN) + "\n"

"""The tables that the written page of the study quotes: filled in from the results."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from benchmarks._study_cases import DENSE, HALF, Case
from benchmarks._study_plan import LARGER_START, QUESTIONS, STEPS, WIDE
from benchmarks._study_results import Results
from benchmarks._study_rows import Row, dense_of, rows_of, table

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
        for case in QUESTIONS[8]
        if case.kind in (DENSE, HALF) and case.reference is None and case.model != LARGER_START
    ]
    wide = [c for c in QUESTIONS[8] if dense_of(c).model == WIDE]
    start = [c for c in QUESTIONS[8] if dense_of(c).model == LARGER_START]
    return {
        "flops": lambda results: _by_loss([*flops, *smaller], results),
        "steps": lambda results: _by_loss(steps, results),
        "budgets": lambda results: _by_budget(QUESTIONS[2], results),
        "drops": lambda results: _by_loss(QUESTIONS[3], results),
        "pins": lambda results: _by_loss(QUESTIONS[4], results),
        "schedules": lambda results: _by_loss(QUESTIONS[5], results),
        "plans": lambda results: _by_loss(QUESTIONS[6], results),
        "sizes": lambda results: _rows(rows_of(half, results), _MODEL),
        "wide": lambda results: _by_loss(wide, results),
        "start": lambda results: _by_loss(start, results),
    }


def _by_loss(
    cases: Sequence[Case],
    results: Results,
    extra: Mapping[str, Callable[[Row], str]] | None = None,
) -> str:
    rows = rows_of(dict.fromkeys(cases), results)
    return _rows(sorted(rows, key=lambda row: row.loss.value), extra)


def _by_budget(cases: Sequence[Case], results: Results) -> str:
    rows = rows_of(dict.fromkeys(cases), results)
    return _rows(sorted(rows, key=lambda row: (row.case.dense_steps, row.loss.value)), _BUDGET)


def _rows(rows: Sequence[Row], extra: Mapping[str, Callable[[Row], str]] | None = None) -> str:
    return table(rows, extra, _SHOWN) + "\n"

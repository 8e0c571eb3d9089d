"""One row per case of the study: its loss, its gap to the dense model, and its cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks._record import markdown_table
from benchmarks._study_cases import DENSE, Case, Run
from benchmarks._study_cost import RunCost, run_cost
from benchmarks._study_numbers import Mean, difference, mean
from benchmarks._study_plan import BASE, STEPS
from benchmarks._study_results import Results

MIB = 2**20


@dataclass(frozen=True)
class Row:
    """What is known about one case.

    ``gap`` is the loss minus that of the dense model with the same budget, paired by seed; None
    where there is no common seed. ``excess`` is the loss of the whole model minus the training loss
    of the last fifth of the run, which is that of the subnetworks where a rank skips blocks; None
    where no run has it. ``cost`` is that of one rank and of the whole run; ``lam`` is λ of the
    first phase's plan.
    """

    case: Case
    label: str
    loss: Mean
    gap: Mean | None
    excess: Mean | None
    steps: int
    cost: RunCost
    lam: float
    by_seed: Mapping[int, Mapping[str, Any]]

    @property
    def rate(self) -> float:
        """The learning rate."""
        rate: float = next(iter(self.by_seed.values()))["rate"]
        return rate

    @property
    def flops(self) -> float:
        """Operations of a rank in the whole run."""
        return self.cost.flops

    def memory(self, stage: int) -> float:
        """MiB of the rank that needs most, at its peak."""
        return self.cost.memory[stage].total / MIB

    def state(self, stage: int) -> float:
        """MiB of weights, gradients and optimizer of that rank."""
        return self.cost.memory[stage].model_state / MIB

    def sent(self, stage: int) -> float:
        """MiB that a rank sends in the whole run."""
        return self.cost.sent[stage] / MIB


RATE: Mapping[str, Callable[[Row], str]] = {"rate": lambda row: f"{row.rate:g}"}  # a column


def label(case: Case) -> str:
    """What a case is called in tables and pictures."""
    blocks = f"{case.model.blocks} block{'s' * (case.model.blocks > 1)}"
    if case.kind != DENSE:
        return case.kind if case.reference is None else f"{case.kind}, of {blocks}"
    text = f"dense, {blocks}"
    return f"{text}, attention dropout {case.model.dropout:g}" if case.model.dropout else text


def dense_of(case: Case) -> Case:
    """The dense model that a case is compared with: the same budget, all blocks."""
    model = case.reference or replace(case.model, dropout=0.0)
    return Case(model, DENSE, case.dense_steps, samples=case.samples)


def rows_of(cases: Iterable[Case], results: Results, *, are_tuned: bool = False) -> list[Row]:
    """A row for each case that has results.

    :param are_tuned: those with a learning rate of its own.
    """
    find = results.tuned if are_tuned else results.of
    rows = []
    for case in cases:
        found = find(case)
        if not found:
            continue
        losses = {seed: result["loss"] for seed, result in found.items()}
        dense = {seed: result["loss"] for seed, result in find(dense_of(case)).items()}
        first = next(iter(found.values()))
        rows.append(
            Row(
                case,
                label(case),
                mean(list(losses.values())),
                None if case == dense_of(case) else difference(losses, dense),
                difference(losses, _training_losses(found)),
                first["steps"],
                run_cost(Run.from_json(first)),
                first["lam"],
                found,
            )
        )
    return rows


def rows_at_best(cases: Iterable[Case], results: Results) -> list[Row]:
    """The rows of the cases, each with a learning rate of its own where that is known."""
    rows = []
    for case in cases:
        rows += rows_of([case], results, are_tuned=case in results.rates)
    return rows


def _training_losses(found: Mapping[int, Mapping[str, Any]]) -> dict[int, float]:
    key = "training_loss"  # younger than the study
    return {seed: result[key] for seed, result in found.items() if key in result}


def table(
    rows: Sequence[Row],
    extra: Mapping[str, Callable[[Row], str]] | None = None,
    shown: Sequence[str] | None = None,
) -> str:
    """Loss and cost of each row.

    :param extra: columns after the first one.
    :param shown: the other columns that are printed; None: all.
    """
    dense = next((row.flops for row in rows if row.case == Case(BASE, DENSE, STEPS)), None)
    columns: dict[str, Callable[[Row], str]] = {
        "training": lambda row: row.label,
        **(extra or {}),
        "λ": lambda row: f"{row.lam:.2f}" if row.case.kind != DENSE else "-",
        "steps": lambda row: f"{row.steps:,}",
        "FLOPs": lambda row: "-" if dense is None else f"{row.flops / dense:.2f}",
        "loss": lambda row: str(row.loss),
        "gap to dense": lambda row: row.gap.text("+") if row.gap else "-",
        "whole - trained": lambda row: row.excess.text("+") if row.excess else "-",
        "seeds": lambda row: str(row.loss.count),
        "state, MiB": lambda row: f"{row.state(0):.2f}",
        "total, MiB": lambda row: f"{row.memory(0):.2f}",
        "stage 2, MiB": lambda row: f"{row.memory(2):.2f}",
        "sent, MiB": lambda row: f"{row.sent(0):,.0f}",
    }
    if shown is not None:
        columns = {name: f for name, f in columns.items() if name in shown or name in (extra or {})}
    return markdown_table(list(columns), [[f(row) for f in columns.values()] for row in rows])

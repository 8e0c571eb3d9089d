"""The results of the study that are there: by run, by case, and what the sweeps have chosen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._study_cases import DENSE, HALF, KINDS, Case, Run
from benchmarks._study_plan import GRIDS, Rates, learning_rate, sweep


def result_path(output: Path, run: Run) -> Path:
    """Where the result of a run is."""
    return output / "results" / f"{run.id}.json"


@dataclass(frozen=True)
class Results:
    """What was trained so far.

    Attributes:
        by_run: the content of the JSON files.
        rates: the learning rate with the lowest loss, of every sweep that is complete.
    """

    by_run: Mapping[Run, Mapping[str, Any]]
    rates: Rates

    def of(self, case: Case) -> dict[int, Mapping[str, Any]]:
        """The results of a case, by seed."""
        rate = learning_rate(case, self.rates)
        found = ((run, result) for run, result in self.by_run.items() if run.case == case)
        return {run.seed: result for run, result in found if run.rate == rate}


def read_results(output: Path) -> Results:
    """Read the results in the folder of a study; what is of other runs than today's is left out."""
    by_run = {}
    for path in sorted(output.glob("results/*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        run = Run.from_json(result)
        if run.case.kind in KINDS and run.id == result["id"]:
            by_run[run] = result
    return Results(by_run, best_rates(by_run))


def best_rates(by_run: Mapping[Run, Mapping[str, Any]]) -> Rates:
    """The rate of the lowest loss, of every sweep that is complete."""
    rates = {}
    for model in GRIDS:
        for family in (DENSE, HALF):
            runs = sweep(model, family)
            if all(run in by_run for run in runs):
                best = min(runs, key=lambda run: by_run[run]["loss"])
                rates[model, family] = best.rate
    return rates

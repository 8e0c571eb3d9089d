"""The results of the study that are there: by run, by case, and what the sweeps have chosen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._study_cases import DENSE, HALF, Case, Run
from benchmarks._study_plan import GRIDS, Rates, learning_rate, sweep

MOST_SEEDS = 100


def result_path(output: Path, run: Run) -> Path:
    """Where the result of a run is."""
    return output / "results" / f"{run.id}.json"


@dataclass(frozen=True)
class Results:
    """What was trained so far.

    Attributes:
        by_id: the content of the JSON files.
        rates: the learning rate with the lowest loss, of every sweep that is complete.
    """

    by_id: Mapping[str, Mapping[str, Any]]
    rates: Rates

    def of(self, case: Case) -> dict[int, Mapping[str, Any]]:
        """The results of a case, by seed."""
        rate = learning_rate(case, self.rates)
        if rate is None:
            return {}
        runs = {seed: Run(case, rate, seed).id for seed in range(MOST_SEEDS)}
        return {seed: self.by_id[key] for seed, key in runs.items() if key in self.by_id}


def read_results(output: Path) -> Results:
    """Read all results in the folder of a study."""
    files = sorted(output.glob("results/*.json"))
    found = (json.loads(path.read_text(encoding="utf-8")) for path in files)
    by_id = {result["id"]: result for result in found}
    return Results(by_id, best_rates(by_id))


def best_rates(by_id: Mapping[str, Mapping[str, Any]]) -> Rates:
    """The rate of the lowest loss, of every sweep that is complete."""
    rates = {}
    for model in GRIDS:
        for family in (DENSE, HALF):
            runs = [run for run in sweep(model, family) if run.id in by_id]
            if len(runs) == len(sweep(model, family)):
                best = min(runs, key=lambda run: by_id[run.id]["loss"])
                rates[model, family] = best.rate
    return rates

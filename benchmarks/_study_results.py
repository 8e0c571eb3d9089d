"""The results of the study that are there: by run, by case, and what the sweeps have chosen."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._study_cases import KINDS, Case, Model, Run
from benchmarks._study_plan import GRIDS, TUNED, Rates, learning_rate, own_sweep, sweep

TOGETHER = "runs.jsonl"


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
        return self._at(case, learning_rate(case, self.rates))

    def tuned(self, case: Case) -> dict[int, Mapping[str, Any]]:
        """The results of a case with the learning rate of its own, by seed."""
        return self._at(case, self.rates.get(case))

    def _at(self, case: Case, rate: float | None) -> dict[int, Mapping[str, Any]]:
        found = ((run, result) for run, result in self.by_run.items() if run.case == case)
        return {run.seed: result for run, result in found if run.rate == rate}


def read_results(output: Path) -> Results:
    """Read the results in the folder of a study; what is of other runs than today's is left out.

    They are in files of their own, or together in a ``runs.jsonl``; the former count where a run
    is in both.
    """
    texts: list[str] = []
    if (output / TOGETHER).exists():
        texts += (output / TOGETHER).read_text(encoding="utf-8").splitlines()
    texts += [path.read_text(encoding="utf-8") for path in sorted(output.glob("results/*.json"))]
    by_run = {}
    for text in texts:
        result = json.loads(text)
        run = Run.from_json(result)
        if run.case.kind in KINDS and run.id == result["id"]:
            by_run[run] = result
    return Results(by_run, best_rates(by_run))


def write_together(results: Results, path: Path) -> None:
    """Write the results into one file, a line each, without the paths of where they were made."""
    lines = []
    for run, result in sorted(results.by_run.items(), key=lambda entry: entry[0].id):
        command = "python benchmarks/study.py one --data DATA --output OUTPUT --run "
        kept = {key: value for key, value in result.items() if key not in ("config", "cost")}
        kept["command"] = command + shlex.quote(json.dumps(run.to_json()))
        lines.append(json.dumps(kept) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def best_rates(by_run: Mapping[Run, Mapping[str, Any]]) -> Rates:
    """The rate of the lowest loss, of every sweep that is complete."""
    sweeps: dict[tuple[Model, str] | Case, list[Run]] = {key: sweep(*key) for key in GRIDS}
    sweeps |= {case: own_sweep(case) for case in TUNED}
    return {
        key: min(runs, key=lambda run: by_run[run]["loss"]).rate
        for key, runs in sweeps.items()
        if all(run in by_run for run in runs)
    }

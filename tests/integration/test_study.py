"""The queue of the study, killed and started again, and its runs with the library's commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdp_llm.data import IndexedDatasetWriter
from tests.conftest import ROOT
from tests.integration.conftest import command_environment, execute, python, with_deepspeed

# `study.py run` with a list of its own: three runs of six steps.
STUDY = """
import sys
from pathlib import Path
from benchmarks import _study_plan as plan
from benchmarks._study_cases import DENSE, HALF, SEQUENCE_LENGTH, Case, Model
from benchmarks._study_queue import Settings, train_missing
MODEL = Model(16, 4)
plan.QUESTIONS.clear()
plan.QUESTIONS[1] = tuple(Case(MODEL, kind, 6) for kind in (DENSE, HALF, "forward 1/2, scale eval"))
plan.GRIDS.clear()
plan.GRIDS.update({(MODEL, DENSE): ((0.004,), 6), (MODEL, HALF): ((0.004,), 6)})
folder = Path(sys.argv[1])
assert not train_missing(Settings(folder / "data", folder / "out", [1], 1, 1))
"""


@pytest.mark.slow
def test_a_killed_study_goes_on_and_its_runs_are_those_of_the_library(tmp_path: Path) -> None:
    """The simulation and 8 ranks come to the losses that all workers in one pass came to."""
    (tmp_path / "data").mkdir()
    for split, samples in (("train", 150), ("validation", 10)):
        with IndexedDatasetWriter(tmp_path / "data" / f"{split}_text_document", "uint16") as writer:
            writer.add_document([3 + i * i % 97 for i in range(samples * 256)])
    study = [sys.executable, "-c", STUDY, str(tmp_path)]
    results = tmp_path / "out" / "results"
    environment = command_environment() | {"PYTHONPATH": str(ROOT)}

    first = subprocess.Popen(study, env=environment, cwd=ROOT, start_new_session=True)
    end = time.monotonic() + 300
    while not [*results.glob("*.json")]:
        assert first.poll() is None
        assert time.monotonic() < end
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)  # with the run that was under way
    first.wait()
    kept = {path: path.stat().st_mtime_ns for path in results.glob("*.json")}
    assert len(kept) < 3
    subprocess.run(study, env=environment, cwd=ROOT, check=True, timeout=300)
    assert len([*results.glob("*.json")]) == 3
    assert {path: path.stat().st_mtime_ns for path in kept} == kept

    chosen = next(path for path in results.glob("*.json") if "scale-eval" in path.name)
    expected = json.loads(chosen.read_text())
    config = tmp_path / "out" / "runs" / expected["id"] / "config.json"
    options = ["--set", "training.export=false"]
    simulate = python("launch/simulate.py", "--deepspeed_config", config, "--world_size", "8")
    for name, command in {
        "simulated": [*simulate, *options],
        "trained": with_deepspeed(config, *options, ranks=8),
    }.items():
        done = execute(*command, f"training.run_dir={tmp_path / name}", timeout=600)
        assert done.status == 0, done.output
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        found = [
            entry["validation/loss"]
            for entry in map(json.loads, lines)
            if "validation/loss" in entry
        ]
        assert found[-1] == pytest.approx(expected["loss"], rel=1e-5), name

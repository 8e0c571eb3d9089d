"""The commands with a run in phases, in this process."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from launch.simulate import simulate
from sdp_llm.errors import ConfigError
from sdp_llm.plan import make_plan
from tests.integration.conftest import Tiny

PHASES = 'sdp.schedule=[{"until": 0.5, "rotate_every": 1}, {"until": 1, "coverage": 1}]'


def arguments(tiny: Tiny, folder: Path, *overrides: str) -> argparse.Namespace:
    given = [f"training.run_dir={folder}", "steps_per_print=2", *overrides]
    return argparse.Namespace(deepspeed_config=str(tiny.config), set=given, world_size=2)


def entries(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command sets for its process is gone after the test."""
    values = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    for name, value in (values | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"}).items():
        monkeypatch.setenv(name, value)


def test_a_simulation_in_two_phases(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    simulate(arguments(tiny, tmp_path / "run", PHASES, "sdp.memory_limit_gib=1"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if " to " in line and line[0] in "12"] == ["1", "2"]
    assert any(line.startswith("limit         1 GiB on a rank") for line in lines)
    first = lines.index("phase 1 of 2, steps 1 to 3: coverage 1/2, forward masking, rotating "
                        "every step")  # fmt: skip
    second = lines.index("phase 2 of 2, steps 4 to 6: coverage 1, forward masking")
    # Two lines about the first phase under the header, then the second one.
    assert [line.split()[0] for line in lines[first + 1 : second]] == ["step", "2/6", "3/6"]
    logged = entries(tmp_path / "run")
    assert [(e["step"], e["phase"]) for e in logged] == [(2, 1), (3, 1), (4, 2), (6, 2)]
    saved = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert saved["world_size"] == 2
    assert [(p["start"], p["stop"], p["rotate_every"]) for p in saved["phases"]] == [
        (0, 3, 1),
        (3, 6, 0),
    ]
    half, full = (make_plan(2, 4, owners_per_block=p) for p in (1, 2))
    assert [p["owners"] for p in saved["phases"]] == [
        [list(owners) for owners in plan.owner_sets] for plan in (half, full)
    ]
    # The folder's config starts the same run again.
    again = argparse.Namespace(
        deepspeed_config=str(tmp_path / "run" / "config.json"),
        set=[f"training.run_dir={tmp_path / 'again'}"],
        world_size=2,
    )
    simulate(again)
    assert [e["loss"] for e in entries(tmp_path / "again")] == [e["loss"] for e in logged]
    one, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict()
        for name in ("run", "again")
    )
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    # And the phases matter.
    simulate(arguments(tiny, tmp_path / "half"))
    by_step = {e["step"]: e["loss"] for e in entries(tmp_path / "half")}
    assert by_step[2] != logged[0]["loss"]
    assert by_step[6] != logged[-1]["loss"]


def test_a_phase_that_does_not_fit_leaves_no_folder(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        simulate(arguments(tiny, tmp_path / "run", PHASES, "sdp.memory_limit_gib=0.0011"))
    message = str(caught.value)
    assert message.startswith("sdp.memory_limit_gib = 0.0011: phase 2 of 2 (coverage 1, forward")
    assert not (tmp_path / "run").exists()

"""The systems that are compared train the same, and the comparison runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import Tensor
from transformers import PretrainedConfig

from benchmarks import compare, overlap, step_time
from benchmarks._case import tokens_of_step
from benchmarks._ranks import run_ranks
from benchmarks._start import start
from benchmarks._systems import PEERS, Workload, parse_system
from sdp_llm.subnetwork.measure import load_model_config
from tests.conftest import ROOT

MODEL = ROOT / "configs" / "model" / "llama_3m.json"
STEPS = 3

pytestmark = pytest.mark.slow


def losses(name: str, workload: Workload, model: PretrainedConfig) -> list[float]:
    """Run on a rank: its loss, nats per token, in each forward pass."""
    system = parse_system(name)
    running = start(system, workload, model)
    found = []

    def forward(sample: Tensor, is_last: bool) -> Tensor:
        loss = running.forward(sample, is_last)
        found.append(loss.item() / (sample.shape[1] - 1))
        return loss

    noting = replace(running, forward=forward)
    for step in range(STEPS):
        noting.train_step(tokens_of_step(workload.case(system), model.vocab_size, step))
    running.close()
    return found


@pytest.mark.parametrize("accumulation", [1, 2])
def test_all_peers_train_the_same(accumulation: int) -> None:
    model, workload = load_model_config(MODEL), Workload(2, 32, accumulation=accumulation)
    found = {name: run_ranks(2, losses, name, workload, model) for name in PEERS}
    for name, ranks in found.items():
        for ours, plain in zip(ranks, found["ddp"], strict=True):
            assert ours == pytest.approx(plain, rel=1e-4), name


def test_compare(tmp_path: Path) -> None:
    output = tmp_path / "compare.json"
    options = ["--model", str(MODEL), "--world_size", "2", "--output", str(output)]
    assert compare.main([*options, "--systems", "ddp", "fsdp2", "sdp:1/2"]) == 0
    results = json.loads(output.read_text())["results"]
    assert [r["system"] for r in results] == ["DDP", "FSDP2", "SDP, C = 1/2, forward, stage 2"]
    for result in results:
        for rank in result["ranks"]:
            assert rank["peak"] >= sum(rank["state"].values()) + rank["activations"]
    ours = results[-1]
    memory = ours["closed_form"]["memory"]
    case = Workload(2, 128).case(parse_system("sdp:1/2"))
    size, *_ = case.closed_form(load_model_config(MODEL))
    saved = memory["activations"] - size.passing_activations  # not there yet after the forward pass
    for rank in ours["ranks"]:
        for name in ("weights", "gradients", "optimizer"):
            assert rank["state"][name] == pytest.approx(memory[name], rel=0.03)
        assert rank["activations"] == pytest.approx(saved, rel=0.05)
        assert rank["collectives"] / 2 == pytest.approx(ours["closed_form"]["traffic"]["mean"])
    assert "| SDP, C = 1/2, forward, stage 2" in output.with_suffix(".md").read_text()


def test_step_time_and_overlap(tmp_path: Path) -> None:
    options = ["--model", str(MODEL), "--world_size", "2", "--sequence_length", "32"]
    times, trace = tmp_path / "step_time.json", tmp_path / "overlap.json"
    more = ["--rounds", "2", "--steps", "1", "--systems", "ddp", "sdp:1", "sdp:1/2"]
    assert step_time.main([*options, *more, "--output", str(times)]) == 0
    results = json.loads(times.read_text())["results"]
    assert [len(result["seconds"]) for result in results] == [2, 2, 2]
    assert results[2]["flops"] < results[1]["flops"] == results[0]["flops"]
    assert overlap.main([*options, "--steps", "2", "--output", str(trace)]) == 0
    for steps in json.loads(trace.read_text())["waiting"]:
        for step in steps:
            assert 0 <= sum(step.values()) < 1


def test_a_wrong_system_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "x.json"
    for command in (compare, step_time, overlap):
        option = "--system" if command is overlap else "--systems"
        assert command.main([option, "zero4", "--output", str(output)]) == 2
        assert "system 'zero4': unknown; give ddp" in capsys.readouterr().err
    assert not output.exists()
    assert not dist.is_initialized()

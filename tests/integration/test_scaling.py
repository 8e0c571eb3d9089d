"""benchmarks/scaling.py on tiny models: measured memory and bytes are the closed forms'."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from benchmarks._predicted import Subnetworks
from benchmarks._scaled import at_world_size
from benchmarks._systems import parse_system
from tests.conftest import ROOT

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "vocab_size": 1024,
}


@pytest.mark.slow
def test_measured_memory_and_bytes_are_the_closed_forms(tmp_path: Path) -> None:
    model, output = tmp_path / "tiny.json", tmp_path / "scaling.json"
    model.write_text(json.dumps(MODEL))
    command = [sys.executable, "benchmarks/scaling.py", "--model", str(model)]
    command += ["--world_sizes", "1", "2", "--systems", "ddp", "fsdp2", "sdp:1/2:backward:2"]
    command += ["--sequence_length", "16", "--steps", "1", "--predict", str(model)]
    command += ["--predicted_world_sizes", "8", "16", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert len(result["measured"]) == 6
    for entry in result["measured"]:
        case = (entry["system"], entry["world_size"])
        assert entry["ratios"]["state"] == pytest.approx(1, abs=0.01), case
        assert entry["measured"]["live"] >= entry["measured"]["state"]
        if entry["world_size"] == 1:
            assert entry["ratios"]["sent"] is None
        elif entry["system"].startswith("SDP"):
            sent = entry["measured"]["collectives"] / entry["closed_form"]["sent"]
            assert sent == pytest.approx(1, abs=0.001)
    assert {entry["world_size"] for entry in result["predicted"]["tiny"]} == {8, 16}
    assert output.with_suffix(".png").stat().st_size > 10_000
    page = output.with_suffix(".md").read_text()
    assert "Nothing here was measured" in page


def test_the_same_system_with_fewer_ranks() -> None:
    half, ddp = parse_system("sdp:1/2:backward:1"), parse_system("ddp")
    assert at_world_size(half, 1) == parse_system("sdp:1:backward:1")
    assert at_world_size(half, 2) == half
    assert at_world_size(half, 3) is None
    assert at_world_size(ddp, 3) == ddp


def test_plans_by_node_give_a_nodes_ranks_the_same_blocks() -> None:
    plan = Subnetworks(Fraction(1, 2), by_node=True).plan(16, 8, ranks_per_node=4)
    assert plan is not None
    assert plan.coverage == Fraction(1, 2)
    for rank in range(16):
        assert plan.owned_blocks(rank) == plan.owned_blocks(rank - rank % 4)
    of_two = Subnetworks(owners=2).plan(8, 8, ranks_per_node=4)
    assert of_two is not None
    assert all(len(of_two.owner_sets[block]) == 2 for block in of_two.free_blocks)


def test_no_plan_where_owners_are_not_whole_or_ranks_go_without_a_free_block() -> None:
    assert Subnetworks(Fraction(1, 8)).plan(4, 24, ranks_per_node=4) is None
    assert Subnetworks(Fraction(1, 2), by_node=True).plan(4, 24, ranks_per_node=4) is None
    assert Subnetworks(owners=2, by_node=True).plan(8, 24, ranks_per_node=4) is None
    assert Subnetworks(owners=8).plan(64, 8, ranks_per_node=8) is None  # 6 free blocks x 8 < 64
    assert Subnetworks(owners=8).plan(4, 24, ranks_per_node=4) is None

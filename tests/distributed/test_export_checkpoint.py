"""From a training checkpoint to a HuggingFace one, and from that to the start of another run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from sdp_llm.checkpoint.convert import export_checkpoint
from sdp_llm.checkpoint.find import find_checkpoint
from sdp_llm.initialization import initialize
from tests.distributed.compare import assembled, whole
from tests.distributed.pool import Pool
from tests.distributed.test_families import _config
from tests.distributed.test_init_from import start_from
from tests.distributed.tiny import Case, forward_backward, llama, run_config, weights

Pools = Callable[[int], Pool]
FAMILIES = ["llama-tied", "gemma2", "gpt2-untied", "gpt-neox"]
MORE_FAMILIES = ["llama", "qwen2", "gpt2", "mistral", "qwen3", "gemma3", "olmo2", "phi3", "granite"]


def train_and_save(config: PretrainedConfig, case: Case, folder: str) -> dict[str, np.ndarray]:
    """Run on a rank: one step, the checkpoint, and the export that all ranks write."""
    engine = initialize(config, run_config(case))[0]
    forward_backward(engine, 0)
    engine.step()
    engine.save_checkpoint(f"{folder}/checkpoints")
    engine.save_pretrained(f"{folder}/together")
    return weights(engine)


def exported(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor that a user's model has after loading a folder, whose files must fit it."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert {name: found for name, found in info.items() if found} == {}
    return dict(model.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_FAMILIES)]
)
def test_round_trip(family: str, pools: Pools, tmp_path: Path) -> None:
    """Checkpoint, export, start: the same bits, and what one process exports is what all do."""
    config = _config(family)
    trained = whole(pools(2).run(train_and_save, config, Case(2), str(tmp_path)))
    export_checkpoint(find_checkpoint(tmp_path / "checkpoints"), tmp_path / "alone")
    alone, together = exported(tmp_path / "alone"), exported(tmp_path / "together")
    assert alone.keys() == together.keys()
    assert all(torch.equal(value, together[name]) for name, value in alone.items())
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "alone" / name).read_text() == (tmp_path / "together" / name).read_text()
    case = Case(2, owners_per_block=1)
    results = pools(2).run(start_from, case, config, str(tmp_path / "alone"))
    start = whole([found["start"] for found in results])
    assert start.keys() == trained.keys()
    for name, value in trained.items():
        np.testing.assert_array_equal(start[name], value, err_msg=name)


def test_a_bf16_run_exports_bf16_and_keeps_fp32_masters(pools: Pools, tmp_path: Path) -> None:
    case = Case(2, stage=1, is_bf16=True)
    trained = whole(pools(2).run(train_and_save, llama(), case, str(tmp_path)))
    checkpoint = find_checkpoint(tmp_path / "checkpoints")
    export_checkpoint(checkpoint, tmp_path / "default")
    export_checkpoint(checkpoint, tmp_path / "fp32", dtype=torch.float32)
    default, full = exported(tmp_path / "default"), exported(tmp_path / "fp32")
    assert json.loads((tmp_path / "default" / "config.json").read_text())["dtype"] == "bfloat16"
    for name, value in trained.items():
        assert default[name].dtype == torch.bfloat16
        assert full[name].dtype == torch.float32
        assert torch.equal(default[name].float(), torch.from_numpy(value)), name
        assert torch.equal(full[name].bfloat16(), default[name]), name
    assert any(not torch.equal(full[n], default[n].float()) for n in trained), "masters are finer"
    results = pools(2).run(start_from, case, llama(), str(tmp_path / "fp32"))
    like = {name: torch.from_numpy(value) for name, value in trained.items()}
    found, _ = assembled([entry["masters"] for entry in results], like)
    for name, value in full.items():
        np.testing.assert_array_equal(found[name], value.detach().flatten().numpy(), err_msg=name)

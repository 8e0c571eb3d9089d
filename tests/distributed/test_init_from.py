"""Starting from a HuggingFace checkpoint, of which each rank reads what it holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sdp_llm.config import parse_config
from sdp_llm.errors import ConfigError
from sdp_llm.initialization import initialize
from sdp_llm.optim import build_optimizer
from sdp_llm.plan import plan_from_config
from sdp_llm.simulation import Simulation
from sdp_llm.subnetwork import pretrained
from tests.distributed.compare import distance, to_numpy, whole
from tests.distributed.pool import Pool
from tests.distributed.tiny import (
    Case,
    batch,
    forward_backward,
    llama,
    masters,
    run_config,
    weights,
)

Pools = Callable[[int], Pool]


def saved(config: PretrainedConfig, folder: Path, seed: int = 5) -> PreTrainedModel:
    """A checkpoint with values that no run's seed draws."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder, max_shard_size="20KB")
    return model


class CountedFile:
    """safetensors' open file, which notes the bytes of every slice that is taken."""

    def __init__(self, file: Any, read: list[tuple[str, int]]) -> None:
        self.file = file
        self.read = read

    def __enter__(self) -> CountedFile:
        self.file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.file.__exit__(*error)

    def get_slice(self, key: str) -> Any:
        outer, part = self, self.file.get_slice(key)

        class Part:
            def __getitem__(self, index: slice) -> torch.Tensor:
                value = part[index]
                outer.read.append((key, value.nbytes))
                return value

        return Part()


def start_from(case: Case, config: PretrainedConfig, folder: str, steps: int = 1) -> dict[str, Any]:
    """Run on a rank: start from a HuggingFace checkpoint; what it read, and steps."""
    read: list[tuple[str, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        original = pretrained.safe_open
        patch.setattr(
            pretrained, "safe_open", lambda *args, **kw: CountedFile(original(*args, **kw), read)
        )
        run = run_config(case) | {"model": {"init_from": folder, "attn_implementation": "eager"}}
        engine = initialize(config, run)[0]
    found = {"read": read, "start": weights(engine), "masters": masters(engine.sharded.owned)}
    losses = []
    for step in range(steps):
        losses.append(forward_backward(engine, step))
        engine.step()
    return found | {"losses": losses, "end": weights(engine)}


def simulated(case: Case, config: PretrainedConfig, folder: Path, steps: int) -> Simulation:
    run = parse_config(run_config(case))
    plan = plan_from_config(run.sdp, case.world_size, config.num_hidden_layers)
    simulation = Simulation(
        config,
        plan,
        lambda groups: build_optimizer(run, groups),
        masking=case.masking,
        init_from=str(folder),
        max_norm=case.clip,
        attn_implementation="eager",
    )
    for step in range(steps):
        simulation.step(batch(step, case.world_size))
    return simulation


@pytest.mark.parametrize(
    "case",
    [
        Case(4, stage=1, is_tied=True),
        Case(4, "backward", stage=2),
        pytest.param(Case(4, stage=0, bucket=2000), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_run_from_a_checkpoint_equals_simulation(case: Case, pools: Pools, tmp_path: Path) -> None:
    config = llama(case.is_tied)
    model = saved(config, tmp_path / "model")
    results = pools(4).run(start_from, case, config, str(tmp_path / "model"), 3)
    start = whole([found["start"] for found in results])
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(start[name], parameter.detach().numpy(), err_msg=name)
    simulation = simulated(case, llama(case.is_tied), tmp_path / "model", 3)
    end = whole([found["end"] for found in results])
    assert distance(end, to_numpy(simulation.masters)) < 1e-5
    assert distance(end, start) > 1e-4


@pytest.mark.parametrize("masking", ["forward", "backward"])
def test_a_rank_reads_what_it_holds(masking: str, pools: Pools, tmp_path: Path) -> None:
    case = Case(4, masking, owners_per_block=1)
    total = sum(parameter.nbytes for parameter in saved(llama(), tmp_path).parameters())
    for found in pools(4).run(start_from, case, llama(), str(tmp_path)):
        held = {name: value.nbytes for name, value in found["start"].items()}
        assert (sum(held.values()) < total) == (masking == "forward")
        whole_reads = [(name, size) for name, size in found["read"] if size == held[name]]
        assert dict(whole_reads) == held, "every tensor it holds, and no other"
        # Whether all ranks have the same checkpoint is seen in 8 rows of what all of them own.
        rows = {"model.embed_tokens.weight": 1024, "model.norm.weight": 32, "lm_head.weight": 1024}
        assert {name: size for name, size in found["read"] if size < held[name]} == rows
        assert len(found["read"]) == len(held) + len(rows), "each once"


def start_error(folders: list[str], case: Case) -> str:
    """Run on a rank: the ConfigError of starting from this rank's folder."""
    run = run_config(case) | {"model": {"init_from": folders[dist.get_rank()]}}
    try:
        initialize(llama(), run)
    except ConfigError as error:
        return str(error)
    return ""


def test_every_rank_raises_when_one_cannot_read(pools: Pools, tmp_path: Path) -> None:
    saved(llama(), tmp_path / "first")
    saved(llama(), tmp_path / "second", seed=6)
    for other, words in [
        ("none", f'rank 1: model.init_from = "{tmp_path / "none"}": no such folder'),
        ("second", "the checkpoint of model.init_from = "),
    ]:
        folders = [str(tmp_path / "first"), str(tmp_path / other)]
        for message in pools(2).run(start_error, folders, Case(2)):
            assert message.startswith(words)
            assert "\n" not in message


def given_error(folder: str) -> str:
    """Run on a rank: the ConfigError of a model with weights beside ``init_from``."""
    model = AutoModelForCausalLM.from_config(llama(), dtype=torch.float32)
    try:
        initialize(model, run_config(Case(2)) | {"model": {"init_from": folder}})
    except ConfigError as error:
        return str(error)
    return ""


def test_a_model_with_weights_is_refused(pools: Pools, tmp_path: Path) -> None:
    for message in pools(2).run(given_error, str(tmp_path)):
        assert message.endswith("has weights already; pass its config, or remove the key")

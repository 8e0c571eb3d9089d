"""Residual scaling on ranks: training, the whole model's loss, and both ways to export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from sdp_llm.checkpoint.convert import export_checkpoint
from sdp_llm.checkpoint.find import find_checkpoint
from sdp_llm.initialization import initialize
from sdp_llm.loss import summed_loss, target_count
from sdp_llm.plan import make_plan
from sdp_llm.simulation import Simulation
from tests.distributed.compare import whole
from tests.distributed.pool import Pool
from tests.distributed.test_export_checkpoint import exported
from tests.distributed.test_families import FAMILIES, _config
from tests.distributed.test_oracle import check_against_simulation
from tests.distributed.tiny import (
    Case,
    batch,
    forward_backward,
    llama,
    my_slice,
    run_config,
    weights,
)

Pools = Callable[[int], Pool]
CHECKPOINTING = (("model", {"config": "given", "gradient_checkpointing": True}),)
TRAINING = [
    Case(residual_scale="inverse_coverage", owners_per_block=3, accumulation=3, extra=CHECKPOINTING)
]
MORE_TRAINING = [
    Case(4, "forward", stage, owners, residual_scale=scale)
    for stage in (0, 1, 2)
    for owners in (1, 3)
    for scale in ("inverse_coverage", "eval")
]


@pytest.mark.parametrize(
    "case", [*TRAINING, *(pytest.param(c, marks=pytest.mark.slow) for c in MORE_TRAINING)], ids=str
)
def test_a_scaled_run_equals_its_simulation(case: Case, pools: Pools) -> None:
    check_against_simulation(case, pools(case.world_size))


def train_and_export(config: PretrainedConfig, case: Case, folder: str) -> dict[str, Any]:
    """Run on a rank: one step, the whole model's loss, the checkpoint, and the ranks' export."""
    engine = initialize(config, run_config(case))[0]
    forward_backward(engine, 0)
    engine.step()
    found = {"weights": weights(engine), "loss": engine.evaluate(my_slice(1), micro_batch=2).loss}
    engine.save_checkpoint(f"{folder}/checkpoints")
    engine.save_pretrained(f"{folder}/together")
    after = weights(engine)
    assert all(np.array_equal(value, after[name]) for name, value in found["weights"].items())
    return found


def whole_models(
    config: PretrainedConfig, case: Case, pool: Pool, folder: Path
) -> tuple[Simulation, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The simulation that has the ranks' weights, and the parameters of the two exports.

    Their losses are compared.
    """
    results = pool.run(train_and_export, config, case, str(folder))
    export_checkpoint(find_checkpoint(folder / "checkpoints"), folder / "alone")
    depth = config.num_hidden_layers
    simulation = Simulation(
        config,
        make_plan(case.world_size, depth, owners_per_block=case.owners_per_block),
        lambda groups: torch.optim.SGD(groups, 0.1),
        dtype=torch.bfloat16 if case.is_bf16 else torch.float32,
        attn_implementation=AutoModelForCausalLM.from_config(config).config._attn_implementation,
        residual_scale=case.residual_scale,
    )
    with torch.no_grad():
        for name, value in whole([found["weights"] for found in results]).items():
            simulation.masters[name].copy_(torch.from_numpy(value))
            simulation.model.get_parameter(name).copy_(torch.from_numpy(value))
    expected = simulation.evaluate([batch(1, case.world_size)])
    for found in results:
        assert found["loss"] == pytest.approx(expected, abs=1e-2 if case.is_bf16 else 1e-5)
    return simulation, exported(folder / "together"), exported(folder / "alone")


@pytest.mark.parametrize(
    "family",
    [
        f if f in ("gemma2", "gpt2-untied") else pytest.param(f, marks=pytest.mark.slow)
        for f in FAMILIES
    ],
)
@torch.no_grad()
def test_exports_are_the_scaled_whole_model(family: str, pools: Pools, tmp_path: Path) -> None:
    case = Case(residual_scale="eval", owners_per_block=3)
    simulation, together, alone = whole_models(_config(family), case, pools(4), tmp_path)
    assert together.keys() == alone.keys()
    assert all(torch.equal(value, alone[name]) for name, value in together.items())
    tokens = batch(1, 4)[:, :-1]
    with simulation.residual_scale.whole_model():
        expected = simulation.model.eval()(input_ids=tokens).logits
    for folder in ("together", "alone"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)
        found = model.eval()(input_ids=tokens).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    unscaled = simulation.model(input_ids=tokens).logits
    assert not torch.allclose(unscaled, expected, atol=1e-4), "the scale makes a difference"


def start_and_export(case: Case, source: str, folder: str) -> float:
    """Run on a rank: the loss of the whole model before the first step, and its export."""
    model = {"init_from": source, "attn_implementation": "eager"}
    engine = initialize(AutoConfig.from_pretrained(source), run_config(case) | {"model": model})[0]
    engine.save_pretrained(folder)
    return engine.evaluate(my_slice(1), micro_batch=2).loss


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_a_run_starts_with_the_whole_model_it_was_given(
    family: str, pools: Pools, tmp_path: Path
) -> None:
    """Also where that is an export, into which the scale is folded."""
    case, source, tokens = Case(residual_scale="eval"), tmp_path / "model", batch(1, 4)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_config(family), attn_implementation="eager").eval()
    model.save_pretrained(source)
    with torch.no_grad():
        expected = summed_loss(model, tokens).item() / target_count(tokens)
    losses = pools(4).run(start_and_export, case, str(source), str(tmp_path / "export"))
    assert losses == pytest.approx([expected] * 4, abs=1e-5)
    written = exported(tmp_path / "export")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(written[name], parameter, rtol=1e-6, atol=1e-7)
    simulation = Simulation(
        _config(family),
        make_plan(4, _config(family).num_hidden_layers, owners_per_block=2),
        lambda groups: torch.optim.SGD(groups, 0.1),
        init_from=str(source),
        attn_implementation="eager",
        residual_scale="eval",
    )
    assert simulation.evaluate([tokens]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_inverse_coverage_leaves_the_whole_model_alone(pools: Pools, tmp_path: Path) -> None:
    case = Case(residual_scale="inverse_coverage", owners_per_block=3)
    simulation, together, alone = whole_models(llama(), case, pools(4), tmp_path)
    for name, master in simulation.masters.items():
        assert torch.equal(together[name], master), name
        assert torch.equal(alone[name], master), name


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_bf16_weights_are_folded_in_fp32(stage: int, pools: Pools, tmp_path: Path) -> None:
    """From the masters at stage 0, as from a checkpoint; else from the weights: one rounding more.

    The share is 3/4: a power of two would round nothing.
    """
    case = Case(residual_scale="eval", owners_per_block=3, stage=stage, is_bf16=True)
    simulation, together, alone = whole_models(llama(), case, pools(4), tmp_path)
    folds = simulation.residual_scale.folds()
    assert folds
    for name, value in together.items():
        assert value.dtype == torch.bfloat16
        if stage == 0 or name not in folds:
            assert torch.equal(value, alone[name]), name
            continue
        torch.testing.assert_close(value, alone[name], rtol=2**-7, atol=0)
        weight = simulation.model.get_parameter(name)
        assert torch.equal(value, folds[name](weight).bfloat16()), name
    same = [torch.equal(together[name], alone[name]) for name in folds]
    assert all(same) if stage == 0 else not all(same)

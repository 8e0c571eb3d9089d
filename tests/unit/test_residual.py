"""Residual scaling: where branches end, what multiplies them, and what an export folds."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.llama import modeling_llama
from transformers.models.olmo2 import modeling_olmo2

from sdp_llm.checkpoint.convert import _folds
from sdp_llm.config import parse_config, resolve_batch
from sdp_llm.config.residual import check_residual_scale
from sdp_llm.errors import ConfigError
from sdp_llm.loss import summed_loss, target_count
from sdp_llm.plan import Plan, make_plan, schedule_from_config
from sdp_llm.simulation import Simulation
from sdp_llm.subnetwork.branches import find_branches
from sdp_llm.subnetwork.residual import Fold, ResidualScale
from sdp_llm.training.backends import SimulationBackend
from sdp_llm.training.inputs import Inputs
from tests.distributed.test_families import COMMON, FAMILIES, GROUPED, LAYERS, _config
from tests.distributed.tiny import VOCABULARY, llama

PLAN = make_plan(4, LAYERS, owners_per_block=3)
EVERY_RANK = make_plan(4, LAYERS, owners_per_block=4)
TOKENS = torch.arange(24).view(2, 12) * 7 % VOCABULARY

MATRICES = (("self_attn.o_proj", 0), ("mlp.down_proj", 0))
NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
ENDS = {
    "gemma2": ((NORMS[0], 1), (NORMS[1], 1)),
    "gemma3": ((NORMS[0], 1), (NORMS[1], 1)),
    "olmo2": ((NORMS[0], 0), (NORMS[1], 0)),
    "gpt2": (("attn.c_proj", 0), ("mlp.c_proj", 0)),
    "gpt2-untied": (("attn.c_proj", 0), ("mlp.c_proj", 0)),
    "gpt-neox": (("attention.dense", 0), ("mlp.dense_4h_to_h", 0)),
    "gpt-neox-sequential": (("attention.dense", 0), ("mlp.dense_4h_to_h", 0)),
}
EVERY_FAMILY = [*FAMILIES, "gpt-neox-sequential"]


def config_of(family: str) -> PretrainedConfig:
    if family == "gpt-neox-sequential":
        return transformers.GPTNeoXConfig(**COMMON, use_parallel_residual=False)
    return _config(family)


def simulation_of(
    config: PretrainedConfig, scale: str, plan: Plan = PLAN, masking: str = "forward"
) -> Simulation:
    """One whose parameters are all away from the zeros and ones that some start with."""
    simulation = Simulation(
        config,
        plan,
        lambda groups: torch.optim.SGD(groups, 0.1),
        masking=masking,
        attn_implementation="eager",
        residual_scale=scale,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for master in simulation.masters.values():
            master += 0.1 * torch.randn(master.shape, generator=generator)
    return simulation


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=TOKENS).logits


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_branches_end_where_they_enter_the_stream(family: str) -> None:
    found = find_branches(config_of(family))
    assert len(found) == LAYERS
    for in_block in found:
        ends = tuple((branch.path, branch.offset) for branch in in_block)
        assert ends == ENDS.get(family, MATRICES)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_export_equals_the_scaled_whole_model(family: str) -> None:
    config = config_of(family)
    simulation = simulation_of(config, "eval")
    before = {name: master.detach().clone() for name, master in simulation.masters.items()}
    with simulation.residual_scale.whole_model():
        expected = logits(simulation.model)
    exported = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    exported.load_state_dict(simulation.exported())
    torch.testing.assert_close(logits(exported), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(simulation.model), expected, atol=1e-2), "a difference"
    assert all(torch.equal(master, before[name]) for name, master in simulation.masters.items())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_only_the_ends_of_free_blocks_are_folded(family: str) -> None:
    simulation = simulation_of(config_of(family), "eval")
    state, exported = simulation.model.state_dict(), simulation.exported()
    changed = {name for name, value in exported.items() if not torch.equal(value, state[name])}
    path = {"gpt2": "transformer.h"}.get(family, "model.layers")
    ends = {f"{path}.{b}.{end}" for b in PLAN.free_blocks for end, _ in ENDS.get(family, MATRICES)}
    assert {name.rpartition(".")[0] for name in changed} == ends
    for scale in ("none", "inverse_coverage"):
        assert simulation_of(config_of(family), scale).residual_scale.folds() == {}


def test_llama_block_by_hand() -> None:
    """x + s attn(norm x) + s mlp(norm(x + s attn(norm x))), and 1/s in a subnetwork."""
    config = llama(layers=LAYERS)
    b = PLAN.free_blocks[0]
    for scale, subnetwork, whole in (("eval", 1, 3 / 4), ("inverse_coverage", 4 / 3, 1)):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain = copy.deepcopy(model.model.layers[b])
        residual_scale = ResidualScale(scale, model, PLAN, "forward")
        x = torch.randn(2, 12, config.hidden_size)
        positions = model.model.rotary_emb(x, torch.arange(12)[None])
        for s in (subnetwork, whole):
            normed = plain.input_layernorm(x)
            attended, _ = plain.self_attn(normed, positions, None)
            y = x + s * attended
            expected = y + s * plain.mlp(plain.post_attention_layernorm(y))
            if s == whole:
                with residual_scale.whole_model():
                    found = model.model.layers[b](x, position_embeddings=positions)
            else:
                found = model.model.layers[b](x, position_embeddings=positions)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def outputs_of_blocks(model: PreTrainedModel) -> list[Tensor]:
    with torch.no_grad():
        return list(model(input_ids=TOKENS, output_hidden_states=True).hidden_states)


@pytest.mark.parametrize("scale", ["inverse_coverage", "eval"])
def test_nothing_changes_where_every_rank_is_an_owner(scale: str) -> None:
    plain = outputs_of_blocks(simulation_of(llama(layers=LAYERS), "none").model)
    simulation = simulation_of(llama(layers=LAYERS), scale)
    with simulation.residual_scale.whole_model():
        whole = outputs_of_blocks(simulation.model)
    changed = whole if scale == "eval" else outputs_of_blocks(simulation.model)
    assert torch.equal(changed[1], plain[1]), "the first block is pinned"
    assert not torch.equal(changed[2], plain[2])
    everywhere = simulation_of(llama(layers=LAYERS), scale, EVERY_RANK)
    with everywhere.residual_scale.whole_model():
        whole = outputs_of_blocks(everywhere.model)
    for found in (outputs_of_blocks(everywhere.model), whole):
        assert all(torch.equal(f, p) for f, p in zip(found, plain, strict=True))
    assert everywhere.residual_scale.folds() == {}


def losses_and_gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    model.train().zero_grad()
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize("how", [pytest.param("compiled", marks=pytest.mark.slow), "checkpointed"])
def test_a_change_of_plan_changes_the_factors_in_place(how: str) -> None:
    config = llama(layers=LAYERS)
    simulation = simulation_of(config, "inverse_coverage")
    if how == "checkpointed":
        simulation.model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        for block in simulation.model.model.layers:
            block.compile(backend="aot_eager", fullgraph=True)
    other = make_plan(4, LAYERS, owners_per_block=1, pinned_first=0)
    for plan in (PLAN, other, PLAN):
        simulation.change_plan(plan, "forward")
        fresh = simulation_of(config, "inverse_coverage", plan)
        expected = losses_and_gradients(fresh.model)
        found = losses_and_gradients(simulation.model)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        with simulation.residual_scale.whole_model():
            assert losses_and_gradients(simulation.model)["loss"] != expected["loss"]
    simulation.change_plan(other, "backward")
    unscaled = losses_and_gradients(simulation_of(config, "none", other).model)
    torch.testing.assert_close(losses_and_gradients(simulation.model), unscaled)


def test_the_simulations_export_is_what_it_evaluates(tmp_path: Path) -> None:
    run = parse_config(
        {
            "train_batch_size": 4,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
            "sdp": {"owners_per_block": 3, "residual_scale": "eval"},
            "model": {"config": "given"},
        }
    )
    no_data: Any = None
    schedule = schedule_from_config(run.sdp, 4, LAYERS, 1)
    inputs = Inputs(llama(layers=LAYERS), schedule, resolve_batch(run, 4), no_data, None, {})
    backend = SimulationBackend(run, inputs, torch.device("cpu"))
    tokens = torch.arange(4 * 13).view(4, 13) * 7 % VOCABULARY
    backend.step(tokens)
    expected = backend.evaluate(tokens, 4).loss
    backend.export(tmp_path, None)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        loss = summed_loss(exported, tokens).item() / target_count(tokens)
    assert loss == pytest.approx(expected, rel=1e-6)
    unscaled = replace(run, sdp=replace(run.sdp, residual_scale="none"))
    plain = SimulationBackend(unscaled, inputs, torch.device("cpu"))
    plain.step(tokens)
    assert plain.evaluate(tokens, 4).loss != pytest.approx(expected, rel=1e-6)


def test_gemmas_norms_multiply_by_one_plus_their_weight() -> None:
    weight = torch.tensor([0.0, 0.5, -3.0])
    torch.testing.assert_close(1 + Fold(0.75, 1)(weight), 0.75 * (1 + weight))
    torch.testing.assert_close(Fold(0.75, 0)(weight.bfloat16()), 0.75 * weight)


MIXTRAL = transformers.MixtralConfig(**GROUPED, num_local_experts=4)
FALCON = transformers.FalconConfig(
    hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4, vocab_size=VOCABULARY
)
OPT = {
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "word_embed_proj_dim": 32,
}


@pytest.mark.parametrize(
    ("config", "masking", "reason"),
    [
        (MIXTRAL, "forward", "mlp.gate returns more than a tensor"),
        # Under forward masking it is refused before.
        (FALCON, "backward", "they return more than a tensor"),
        # Norms stand behind the sums.
        (
            transformers.OPTConfig(**OPT, do_layer_norm_before=False),
            "forward",
            "does not pass by them",
        ),
    ],
    ids=["mixtral", "falcon", "opt"],
)
@pytest.mark.parametrize("scale", ["inverse_coverage", "eval"])
def test_a_family_that_is_not_exact_is_refused(
    config: PretrainedConfig, masking: str, reason: str, scale: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        simulation_of(config, scale, masking=masking)
    message = str(raised.value)
    assert "\n" not in message
    for part in ("sdp.residual_scale", repr(config.model_type), reason, 'use "none"'):
        assert part in message


def test_what_a_factor_cannot_scale_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def squared(norm: Any, x: Tensor) -> Tensor:
        return norm.weight**2 * x

    monkeypatch.setattr(modeling_olmo2.Olmo2RMSNorm, "forward", squared)
    with pytest.raises(ConfigError, match="no factor in the parameters of post_"):
        find_branches(config_of("olmo2"))
    linear = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(
        modeling_llama.LlamaMLP, "forward", lambda mlp, x: torch.tanh(linear(mlp, x))
    )
    with pytest.raises(ConfigError, match="down_proj does not enter it linearly"):
        find_branches(config_of("llama"))


@pytest.mark.parametrize("scale", ["inverse_coverage", "eval"])
def test_backward_masking_has_nothing_to_scale(scale: str) -> None:
    check_residual_scale("forward", scale)
    check_residual_scale("backward", "none")
    with pytest.raises(ConfigError, match=f'sdp.residual_scale = "{scale}".*every rank runs'):
        check_residual_scale("backward", scale)


def test_a_checkpoint_older_than_the_key_is_not_scaled() -> None:
    sdp = {"masking": "forward"}
    state = {"plan": {"world_size": 4, "owners": PLAN.owner_sets}, "config": {"sdp": sdp}}
    assert _folds(state, llama(layers=LAYERS), "model.layers") == {}
    sdp["residual_scale"] = "eval"
    assert len(_folds(state, llama(layers=LAYERS), "model.layers")) == 2 * len(PLAN.free_blocks)
    state["plan"]["masking"] = "backward"  # of the phase in which it was saved
    assert _folds(state, llama(layers=LAYERS), "model.layers") == {}

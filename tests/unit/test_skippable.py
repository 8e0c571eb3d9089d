"""Families whose blocks can be skipped, and those that are refused before they fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig

from sdp_llm.errors import ConfigError
from sdp_llm.initialization import initialize
from sdp_llm.plan import Plan, make_plan
from sdp_llm.simulation import Simulation
from sdp_llm.subnetwork.skippable import check_skippable, skips_blocks
from tests.distributed.pool import Pool
from tests.distributed.test_families import FAMILIES, LAYERS, _config
from tests.distributed.tiny import VOCABULARY, Case, run_config

PLAN, WHOLE = make_plan(2, LAYERS, owners_per_block=1), make_plan(2, LAYERS, owners_per_block=2)
TUPLES: dict[str, dict[str, Any]] = {
    "falcon": {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4},
    "bloom": {"hidden_size": 32, "n_layer": LAYERS, "n_head": 4},
    "gptj": {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": LAYERS,
        "num_heads": 4,
        "attention_types": [[["global"], LAYERS]],
        "max_position_embeddings": 64,
    },
    "mpt": {"d_model": 32, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 64},
}


def tuples(family: str) -> PretrainedConfig:
    return transformers.AutoConfig.for_model(family, vocab_size=VOCABULARY, **TUPLES[family])


def refusal(family: str) -> str:
    return (
        f"sdp.masking = \"forward\": blocks of model type '{family}' cannot be skipped: they "
        'return a tuple, not the residual stream alone; use "backward", or another family of models'
    )


def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.1)


def simulation(config: PretrainedConfig, plan: Plan, masking: str) -> Simulation:
    return Simulation(config, plan, sgd, masking=masking, seed=7, attn_implementation="eager")


@pytest.mark.parametrize("family", TUPLES)
def test_blocks_that_return_a_tuple(family: str) -> None:
    """Refused where a block would be skipped, and trained where none is."""
    with pytest.raises(ConfigError) as caught:
        simulation(tuples(family), PLAN, "forward")
    assert str(caught.value) == refusal(family)
    simulated = simulation(tuples(family), PLAN, "backward")
    simulated.step(torch.arange(40).view(4, 10))
    simulated.change_plan(WHOLE, "forward")
    simulated.step(torch.arange(40).view(4, 10))
    with pytest.raises(ConfigError) as caught:
        simulated.change_plan(PLAN, "forward")
    assert str(caught.value) == refusal(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_that_can_be_skipped(family: str) -> None:
    before = torch.get_rng_state()
    check_skippable(_config(family))
    assert torch.equal(torch.get_rng_state(), before), "it draws no random number of training"


class Own(LlamaForCausalLM):
    """A model of one's own, of which transformers knows no config."""

    class OwnConfig(LlamaConfig):
        model_type = "own"

    config_class = OwnConfig


def test_a_model_of_ones_own() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    check_skippable(Own(Own.OwnConfig(vocab_size=VOCABULARY, num_hidden_layers=2, **sizes)))


def test_a_model_that_cannot_be_run_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise KeyError("lang\nids")

    monkeypatch.setattr(transformers.LlamaModel, "forward", broken)
    check_skippable(_config("llama"))


class NotOfItsConfigAlone(transformers.LlamaForCausalLM):
    def __init__(self, config: LlamaConfig, extra: int) -> None:
        super().__init__(config)


def test_a_model_that_cannot_be_made_anew() -> None:
    check_skippable(NotOfItsConfigAlone(_config("llama"), 3))


def test_where_blocks_are_skipped() -> None:
    assert skips_blocks(PLAN, "forward")
    assert not skips_blocks(PLAN, "backward")
    assert not skips_blocks(WHOLE, "forward")


def errors_of(changes: dict[str, Any]) -> tuple[str, str]:
    """Run on a rank: the ConfigError of making an engine of Falcon, and of a change of its plan."""
    try:
        engine = initialize(tuples("falcon"), run_config(Case(2)) | changes, total_num_steps=8)[0]
    except ConfigError as error:
        return str(error), ""
    try:
        engine.change_plan(PLAN, "forward")
    except ConfigError as error:
        return "", str(error)
    return "", ""


def test_the_engine_refuses_at_the_start(pools: Callable[[int], Pool]) -> None:
    """On every rank; also where only a later phase would skip blocks."""
    forward = {"owners_per_block": 1}
    backward = {**forward, "masking": "backward"}
    later = {**backward, "schedule": [{"until": 0.5}, {"until": 1, "masking": "forward"}]}
    for sdp in (forward, later):
        assert pools(2).run(errors_of, {"sdp": sdp}) == [(refusal("falcon"), "")] * 2
    expected = ("", f"rank 0: {refusal('falcon')}")
    assert pools(2).run(errors_of, {"sdp": backward}) == [expected] * 2

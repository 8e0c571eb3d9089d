"""Sizes of models without weights, against models with weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
)

from benchmarks.allocations import AllocationTracker
from sdp_llm.errors import ConfigError
from sdp_llm.loss import NextTokenLoss
from sdp_llm.subnetwork.masking import freeze_blocks, skip_blocks
from sdp_llm.subnetwork.measure import load_model_config, model_size, saved_bytes
from tests.conftest import ROOT

MODELS = ROOT / "configs" / "model"


def _config(name: str, layers: int | None = None) -> PretrainedConfig:
    config = load_model_config(MODELS / f"llama_{name}.json")
    if layers:
        config.num_hidden_layers = layers
    return config


def _tiny(**changes: object) -> LlamaConfig:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
    }
    return LlamaConfig(**(sizes | changes))


def _real(config: PretrainedConfig, dtype: torch.dtype, checkpointing: bool) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.config.use_cache = False
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "layers"), [("10m", 8), ("60m", 2)])
def test_activations_are_what_a_real_forward_saves(
    name: str, layers: int, dtype: torch.dtype, checkpointing: bool
) -> None:
    config = _config(name, layers)
    size = model_size(config, 2, 64, gradient_checkpointing=checkpointing, dtype=dtype)
    real = saved_bytes(_real(config, dtype, checkpointing), torch.randint(0, 100, (2, 65)))
    predicted = size.shared_activations + sum(block.activations for block in size.blocks)
    assert predicted == pytest.approx(real.shared + sum(real.blocks.values()), rel=0.01)
    assert size.blocks[-1].activations == pytest.approx(real.blocks[layers - 1], rel=0.01)


def test_a_loss_in_pieces_saves_no_logits() -> None:
    config = _config("10m", 4)
    tokens, dtype = torch.randint(0, 100, (2, 65)), torch.bfloat16
    whole, pieces = (model_size(config, 2, 64, dtype=dtype, loss_chunk=c) for c in (None, 32))
    real = saved_bytes(_real(config, dtype, False), tokens, NextTokenLoss(chunk=32))
    predicted = pieces.shared_activations + sum(block.activations for block in pieces.blocks)
    assert predicted == pytest.approx(real.shared + sum(real.blocks.values()), rel=0.01)
    assert pieces.blocks == whole.blocks
    logits = 2 * 64 * config.vocab_size * 4
    gradient = config.vocab_size * config.hidden_size * 2  # of the head, until it is collected
    saved = whole.shared_activations - pieces.shared_activations
    assert saved - (logits - gradient) == pytest.approx(0, abs=2 * 64 * 16)  # the targets


@pytest.mark.parametrize("chunk", [None, 8, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_while_the_loss_is_computed(dtype: torch.dtype, chunk: int | None) -> None:
    """What torch allocates, in a model whose blocks are small beside its logits."""
    config = _tiny(vocab_size=8000)
    size = model_size(config, 2, 64, dtype=dtype, loss_chunk=chunk)
    model = _real(config, dtype, False)
    with AllocationTracker() as tracker:
        NextTokenLoss(chunk=chunk)(model, torch.randint(0, 100, (2, 65))).backward()
    predicted = size.shared_activations + sum(block.activations for block in size.blocks)
    predicted += size.passing_activations
    assert tracker.total_peak == pytest.approx(predicted, rel=0.02)


@pytest.mark.parametrize("masking", ["forward", "backward"])
def test_activations_of_a_subnetwork(masking: str) -> None:
    config, owned = _config("10m"), {0, 2, 3, 7}
    size = model_size(config, 2, 64)
    model = _real(config, torch.float32, False)
    expected = size.shared_activations + sum(size.blocks[b].activations for b in owned)
    if masking == "forward":
        skip_blocks(model.model.layers, owned)
    else:
        freeze_blocks(model.model.layers, owned)
        expected += 4 * size.blocks[1].frozen_activations
        assert size.blocks[1].frozen_activations < size.blocks[1].activations
    real = saved_bytes(model, torch.randint(0, 100, (2, 65)))
    assert expected == pytest.approx(real.shared + sum(real.blocks.values()), rel=0.01)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
def test_a_checkpointed_block_is_recomputed_after_the_head() -> None:
    """Long vocabulary: the head needs more than a block; short: the block does."""
    for vocabulary, is_larger in ((96, True), (4096, False)):
        config = _tiny(vocab_size=vocabulary)
        whole = model_size(config, 2, 16)
        stored = model_size(config, 2, 16, gradient_checkpointing=True)
        again = whole.blocks[0].activations - stored.blocks[0].activations
        assert stored.blocks[0].activations == 2 * 16 * 32 * 4  # its input
        assert (stored.recomputed_activations > 0) == is_larger
        assert stored.recomputed_activations < again


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_of_a_llama(tied: bool) -> None:
    size = model_size(_tiny(tie_word_embeddings=tied), 1, 8)
    # q and o of 32 x 32, k and v of 32 x 16, three of 32 x 48.
    matrices = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    assert [block.matmul_numel for block in size.blocks] == [matrices] * 3
    assert size.block_numel == (matrices + 2 * 32,) * 3
    assert size.shared_matmul_numel == 32 * 96  # the head, tied or not
    assert size.numel == 3 * (matrices + 64) + (1 if tied else 2) * 32 * 96 + 32
    assert size.attention_width == 32
    assert max(unit.largest_parameter for unit in size.units) == 32 * 96


def test_conv1d_of_gpt2_counts_and_its_embeddings_do_not() -> None:
    size = model_size(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96), 1, 8)
    assert [block.matmul_numel for block in size.blocks] == [12 * 32 * 32] * 2
    assert size.shared_matmul_numel == 32 * 96


def test_split_units_and_the_caller_s_config() -> None:
    config = _tiny()
    before = json.dumps(config.to_dict(), default=str)
    size = model_size(config, 1, 8, max_unit_numel=2000)
    assert json.dumps(config.to_dict(), default=str) == before
    assert size.numel == model_size(config, 1, 8).numel
    assert len(size.units) > 5
    # A parameter that is larger stays whole.
    assert all(unit.numel <= max(2000, unit.largest_parameter) for unit in size.units)


def test_seven_billion_parameters_without_memory() -> None:
    size = model_size(_config("7b"), 1, 4096, dtype=torch.bfloat16)
    assert size.numel == 6_738_415_616
    assert len({block.activations for block in size.blocks}) == 1


def test_experts_are_an_error() -> None:
    from transformers import MixtralConfig

    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        num_local_experts=2,
    )
    with pytest.raises(ConfigError, match="only the cost of dense decoders"):
        model_size(config, 1, 8)


def test_blocks_that_cannot_be_skipped_are_an_error() -> None:
    config = FalconConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, vocab_size=96)
    with pytest.raises(ConfigError, match="does not run where blocks are skipped: too many"):
        model_size(config, 1, 8)


def test_model_config_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file, nor a folder"):
        load_model_config(tmp_path / "absent.json")
    with pytest.raises(ConfigError, match=rf"config.json \(looked for in {Path.cwd()}\); give a"):
        load_model_config("absent.json")
    wrong = tmp_path / "config.json"
    wrong.write_text('{"model_type": "no_such_type"}')
    for path in (wrong, tmp_path):
        with pytest.raises(ConfigError, match="transformers cannot read it"):
            load_model_config(path)
    wrong.write_text("{")
    with pytest.raises(ConfigError, match="transformers cannot read it"):
        load_model_config(wrong)

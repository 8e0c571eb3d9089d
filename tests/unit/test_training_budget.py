"""How many steps a budget is."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

from sdp_llm.config import RunConfig, parse_config, resolve_batch
from sdp_llm.training.budget import total_steps

BLOCKS, HIDDEN, INTERMEDIATE, VOCABULARY, SEQUENCE, BATCH = 8, 32, 48, 96, 16, 8


def steps(budget: dict[str, int], world_size: int = 4, **sdp: Any) -> int:
    run: RunConfig = parse_config(
        {
            "train_batch_size": BATCH,
            "sdp": sdp,
            "model": {"config": "unused.json"},
            "data": {"train": "unused", "sequence_length": SEQUENCE},
            "training": budget,
        }
    )
    model = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=SEQUENCE,
    )
    return total_steps(run, model, resolve_batch(run, world_size), world_size)


def test_steps_are_steps() -> None:
    assert steps({"steps": 17}) == 17


@pytest.mark.parametrize(
    ("tokens", "expected"), [(1, 1), (127, 1), (128, 1), (129, 2), (1280, 10), (1281, 11)]
)
def test_tokens_are_steps_rounded_up(tokens: int, expected: int) -> None:
    assert BATCH * SEQUENCE == 128
    assert steps({"tokens": tokens}) == expected
    # However many ranks share the batch.
    assert steps({"tokens": tokens}, world_size=2) == expected


def flops(owned: float) -> float:
    """Per token, forward and backward: 6 per matrix weight, and attention over the sequence."""
    block = 6 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE) + 12 * HIDDEN * SEQUENCE
    return 6 * HIDDEN * VOCABULARY + owned * block


@pytest.mark.parametrize(
    ("sdp", "owned"),
    [
        ({"coverage": 1}, 8),
        ({"coverage": "1/2"}, 5),  # 2 pinned, half of 6 free ones
        ({"coverage": "1/4"}, 3.5),
        ({"coverage": "1/2", "pinned_first": 0, "pinned_last": 0}, 4),
    ],
)
def test_flops_of_dense_steps(sdp: dict[str, Any], owned: float) -> None:
    expected = round(1000 * flops(BLOCKS) / flops(owned))
    assert steps({"flops_of_dense_steps": 1000}, **sdp) == expected
    assert (expected == 1000) == (owned == BLOCKS)


def test_backward_masking_saves_less() -> None:
    # Every block runs forward, and backward for the activations: 4 of 6 for what is not owned.
    frozen = 3 * 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE)
    expected = round(1000 * flops(BLOCKS) / (flops(BLOCKS) - frozen))
    sdp = {"coverage": "1/2", "masking": "backward"}
    assert steps({"flops_of_dense_steps": 1000}, **sdp) == expected

"""The model configs are plain HuggingFace configs of the sizes in their names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

MODELS = Path(__file__).parents[2] / "configs" / "model"


# Millions of parameters, untied head. 60m to 1b: GaLore's sizes; 7b: Llama 2's.
MILLIONS = {
    "3m": 2.6,
    "10m": 10.5,
    "60m": 58.1,
    "134m": 134.1,
    "134m_7_blocks": 98.7,
    "350m": 368.0,
    "1b": 1339.1,
    "7b": 6738.4,
}


@pytest.mark.parametrize(("name", "millions"), MILLIONS.items())
def test_parameter_counts(name: str, millions: float) -> None:
    config = AutoConfig.from_pretrained(MODELS / f"llama_{name}.json")
    assert isinstance(config, LlamaConfig)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert round(model.num_parameters() / 1e6, 1) == millions
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert not config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)


def test_every_model_config_is_tested() -> None:
    names = {path.stem for path in MODELS.glob("*.json")}
    assert names == {f"llama_{name}" for name in MILLIONS}

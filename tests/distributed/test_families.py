"""HuggingFace decoder families: one step, the whole model's loss, and the export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sdp_llm.checkpoint.export import export_pretrained
from sdp_llm.errors import ConfigError
from sdp_llm.initialization import initialize
from sdp_llm.loss import summed_loss, target_count
from tests.distributed.compare import whole
from tests.distributed.pool import Pool
from tests.distributed.tiny import (
    VOCABULARY,
    Case,
    batch,
    forward_backward,
    llama,
    my_slice,
    run_config,
    weights,
)

LAYERS = 5
COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
HEAD = {"head_dim": 8}
GPT2 = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

# The config's class, its arguments, and whether the head is the embedding's storage.
FAMILIES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("LlamaConfig", {**GROUPED, "attention_bias": True}, False),
    "llama-tied": ("LlamaConfig", {**GROUPED, "tie_word_embeddings": True}, True),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 6}, False),
    "qwen2": ("Qwen2Config", GROUPED, False),
    "qwen3": ("Qwen3Config", {**GROUPED, **HEAD, "tie_word_embeddings": True}, True),
    "gemma2": ("Gemma2Config", {**GROUPED, **HEAD, "sliding_window": 6}, True),
    "gemma3": ("Gemma3TextConfig", {**GROUPED, **HEAD, "sliding_window": 6}, True),
    "olmo2": ("Olmo2Config", GROUPED, False),
    "phi3": ("Phi3Config", GROUPED, False),
    "gpt2": ("GPT2Config", {**GPT2, **NO_DROPOUT}, True),
    "gpt2-untied": ("GPT2Config", {**GPT2, **NO_DROPOUT, "tie_word_embeddings": False}, False),
    "gpt-neox": ("GPTNeoXConfig", COMMON, False),
    "granite": ("GraniteConfig", {**GROUPED, "logits_scaling": 2.0}, False),
}


def _config(family: str) -> PretrainedConfig:
    name, arguments, _ = FAMILIES[family]
    return getattr(transformers, name)(**arguments)


def train_and_export(
    config: PretrainedConfig, folder: str, max_file_bytes: int | None
) -> dict[str, Any]:
    """Run on a rank: one step, the whole model's loss, the export; what the rank stores."""
    engine, *_ = initialize(config, run_config(Case()))
    start = weights(engine)
    forward_backward(engine, 0)
    engine.step()
    evaluation = engine.evaluate(my_slice(1), micro_batch=2)
    if max_file_bytes is None:
        engine.save_pretrained(folder)
    else:
        export_pretrained(engine.sharded, folder, max_file_bytes=max_file_bytes)
    end = weights(engine)
    return {
        "moved": [name for name, value in end.items() if not np.array_equal(value, start[name])],
        "evaluation": evaluation,
        "weights": end,
        "aliases": engine.sharded.subnetwork.layout.aliases,
    }


def _load(folder: Path) -> PreTrainedModel:
    """The export as a user loads it; nothing may be missing, left over or newly initialised."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert {name: found for name, found in info.items() if found} == {}
    return model.eval()


def _assembled_model(config: PretrainedConfig, results: list[dict[str, Any]]) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    together = whole([found["weights"] for found in results])
    with torch.no_grad():
        for alias, name in results[0]["aliases"].items():
            parameters.pop(alias).copy_(torch.from_numpy(together[name]))
        for name, value in together.items():
            parameters.pop(name).copy_(torch.from_numpy(value))
    assert not parameters, "every parameter is on a rank"
    return model.eval()


def _check_folder(folder: Path, architecture: str) -> list[str]:
    """The files of an export, whose index must describe them."""
    files = sorted(path.name for path in folder.iterdir())
    shards = [name for name in files if name.endswith(".safetensors")]
    others = {"config.json", "generation_config.json", "model.safetensors.index.json"}
    assert {*files} == {*shards, *others}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == {*shards}
    stored: dict[str, int] = {}
    for name in shards:
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                assert index["weight_map"][key] == name
                stored[key] = file.get_tensor(key).nbytes
    assert stored.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(stored.values())
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert config["architectures"] == [architecture]
    assert config.get("use_cache", True), "the training's own setting stays out"
    transformers.GenerationConfig.from_pretrained(folder)
    return shards


@torch.no_grad()
def _check_export(config: PretrainedConfig, folder: Path, results: list[dict[str, Any]]) -> None:
    exported, assembled = _load(folder), _assembled_model(config, results)
    tokens = batch(1, len(results))
    logits = [model(input_ids=tokens[:, :-1]).logits for model in (exported, assembled)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-6, atol=1e-6)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    once = whole([found["weights"] for found in results])
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in once.values())
    loss = summed_loss(exported, tokens).item() / target_count(tokens)
    for found in results:
        assert found["evaluation"].tokens == target_count(tokens)
        assert found["evaluation"].loss == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, pools: Callable[[int], Pool], tmp_path: Path) -> None:
    config, is_tied = _config(family), FAMILIES[family][2]
    results = pools(4).run(train_and_export, config, str(tmp_path / "export"), None)
    for found in results:
        assert bool(found["aliases"]) == is_tied
        assert found["moved"] == list(found["weights"]), "one step moves every weight"
    every = {name for found in results for name in found["weights"]}
    assert all(len(found["weights"]) < len(every) for found in results), "no rank has all"
    _check_folder(tmp_path / "export", _load(tmp_path / "export").__class__.__name__)
    _check_export(config, tmp_path / "export", results)


def test_small_files(pools: Callable[[int], Pool], tmp_path: Path) -> None:
    """Files of at most 8 KiB: several per rank, and the same model."""
    results = pools(4).run(train_and_export, llama(), str(tmp_path / "export"), 8192)
    shards = _check_folder(tmp_path / "export", _load(tmp_path / "export").__class__.__name__)
    for rank in range(4):
        own = [name for name in shards if name.startswith(f"model-{rank:05d}-")]
        assert len(own) > 1
    largest = max(value.nbytes for found in results for value in found["weights"].values())
    headers = 4096
    for name in shards:
        size = (tmp_path / "export" / name).stat().st_size
        assert size <= max(8192, largest) + headers
    _check_export(llama(), tmp_path / "export", results)


def test_an_export_replaces_an_older_one(pools: Callable[[int], Pool], tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "model-00000-00009.safetensors").write_bytes(b"stale")
    pools(2).run(train_and_export, llama(), str(folder), None)
    assert "model-00000-00009.safetensors" not in _check_folder(folder, "LlamaForCausalLM")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    _load(folder)


def export_with(folder: str, tokenizers: list[str]) -> list[str]:
    """Run on a rank: the ConfigError of an export with each tokenizer, "" where there is none."""
    engine, messages = initialize(llama(), run_config(Case(2)))[0], []
    for tokenizer in tokenizers:
        try:
            engine.save_pretrained(folder, tokenizer)
            messages.append("")
        except ConfigError as error:
            messages.append(str(error))
    return messages


def test_a_tokenizer_that_is_not_there(pools: Callable[[int], Pool], tmp_path: Path) -> None:
    nowhere, empty, sound = (tmp_path / name for name in ("nowhere", "empty", "sound"))
    empty.mkdir()
    sound.mkdir()
    (sound / "tokenizer.json").write_text("{}")
    folder, tried = tmp_path / "export", [str(nowhere), str(empty), str(sound)]
    for *messages, without in pools(2).run(export_with, str(folder), tried):
        for message, path in zip(messages, tried, strict=False):
            assert message == (
                f'rank 0: tokenizer = "{path}": has no tokenizer; name the folder of one'
            )
        assert without == ""
    assert (folder / "tokenizer.json").read_text() == "{}"

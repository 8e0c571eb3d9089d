"""Finding a model's parameters in a HuggingFace checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from sdp_llm.errors import ConfigError
from sdp_llm.subnetwork.adapter import empty_model
from sdp_llm.subnetwork.measure import load_model_config
from sdp_llm.subnetwork.pretrained import PretrainedWeights, open_pretrained

COMMON = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**COMMON, "num_key_value_heads": 1}
GPT2 = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 16, "vocab_size": 40}


def llama(**changes: object) -> LlamaConfig:
    return LlamaConfig(**{**GROUPED, **changes})


def config_of(family: str, is_tied: bool) -> PretrainedConfig:
    tied = {"tie_word_embeddings": is_tied}
    configs: dict[str, Callable[[], PretrainedConfig]] = {
        "llama": lambda: llama(**tied),
        "qwen2": lambda: Qwen2Config(**GROUPED, **tied),
        "gemma2": lambda: Gemma2Config(**GROUPED, head_dim=8, **tied),
        "gpt2": lambda: GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2, **tied),
        "gpt-neox": lambda: GPTNeoXConfig(**COMMON, **tied),
    }
    return configs[family]()


def saved(config: PretrainedConfig, folder: Path, size: str = "5GB") -> PreTrainedModel:
    """A model with random values, as transformers saves it."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(folder, max_shard_size=size)
    return model


def opened(source: Path | str, config: PretrainedConfig) -> PretrainedWeights:
    return open_pretrained(str(source), empty_model(config, None))


def check_equal(found: PretrainedWeights, model: PreTrainedModel) -> None:
    names = {name for name, _ in model.named_parameters()}
    assert found.tensors.keys() == names
    for name in names:
        assert torch.equal(found.read(name), model.get_parameter(name)), name


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2", "gpt-neox"])
def test_what_transformers_saves(family: str, is_tied: bool, tmp_path: Path) -> None:
    """In one file; in several; of the base model; and under the model's own names."""
    config = config_of(family, is_tied)
    model = saved(config, tmp_path / "one")
    check_equal(opened(tmp_path / "one", config), model)
    model.save_pretrained(tmp_path / "many", max_shard_size="4KB")
    assert (tmp_path / "many" / "model.safetensors.index.json").exists()
    check_equal(opened(tmp_path / "many", config), model)
    model.save_pretrained(tmp_path / "own", save_original_format=False)
    check_equal(opened(tmp_path / "own", config), model)
    prefix = model.base_model_prefix + "."

    def without_prefix(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(prefix)]:
            tensors[name.removeprefix(prefix)] = tensors.pop(name)

    rewrite(tmp_path / "one", without_prefix)
    check_equal(opened(tmp_path / "one", config), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_values_become_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = saved(llama(), tmp_path).to(dtype)
    model.save_pretrained(tmp_path)
    found = opened(tmp_path, llama())
    for name, parameter in model.named_parameters():
        value = found.read(name)
        assert value.dtype == torch.float32
        assert torch.equal(value, parameter.float())


def test_values_are_in_memory_of_their_own(tmp_path: Path) -> None:
    """The file must not change what was read from it, nor the other way round."""
    model = saved(llama(), tmp_path)
    found = opened(tmp_path, llama())
    file = tmp_path / "model.safetensors"
    before = file.read_bytes()
    first, second = found.read("lm_head.weight"), found.read("lm_head.weight")
    first.zero_()
    assert file.read_bytes() == before
    with file.open("r+b") as writable:  # in place
        writable.write(b"\0" * len(before))
    assert torch.equal(second, model.get_parameter("lm_head.weight"))


def test_buffers_of_older_versions_are_left_out(tmp_path: Path) -> None:
    model = saved(config_of("gpt2", True), tmp_path)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
        tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)

    rewrite(tmp_path, add)
    check_equal(opened(tmp_path, config_of("gpt2", True)), model)


def test_a_tied_weight_may_be_stored_twice_if_equal(tmp_path: Path) -> None:
    config = llama(tie_word_embeddings=True)
    model = saved(config, tmp_path)
    embedding = model.get_parameter("model.embed_tokens.weight").detach()
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    check_equal(opened(tmp_path, config), model)
    rewrite(tmp_path, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    check_equal(opened(tmp_path, config), model)
    rewrite(tmp_path, lambda t: t.update({"model.embed_tokens.weight": embedding + 1}))
    found = opened(tmp_path, config)
    with pytest.raises(ConfigError, match=r"different values.*tie_word_embeddings to false"):
        found.read("model.embed_tokens.weight")


def test_fingerprint_sees_shapes_and_values(tmp_path: Path) -> None:
    saved(llama(), tmp_path)
    first = opened(tmp_path, llama()).fingerprint(["lm_head.weight"])
    assert opened(tmp_path, llama()).fingerprint(["lm_head.weight"]) == first
    rewrite(tmp_path, lambda tensors: tensors["lm_head.weight"][0].zero_())
    assert opened(tmp_path, llama()).fingerprint(["lm_head.weight"]) != first
    rewrite(tmp_path, lambda t: t.update({n: v.bfloat16() for n, v in t.items()}))
    assert opened(tmp_path, llama()).fingerprint([]) != first


# -- the hub's local cache ------------------------------------------------------------------------


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds one model under the name ``someone/tiny``."""
    repository = tmp_path / "hub" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_OFFLINE", True)
    return repository / "snapshots" / ("0" * 40)


def test_a_name_in_the_local_cache(cached: Path) -> None:
    model = saved(llama(), cached)
    check_equal(opened("someone/tiny", load_model_config("someone/tiny")), model)
    with pytest.raises(ConfigError, match="hf download someone/other"):
        opened("someone/other", llama())


# -- what is refused ------------------------------------------------------------------------------


def pickled(folder: Path) -> None:
    os.remove(folder / "model.safetensors")
    torch.save({}, folder / "pytorch_model.bin")


def checkpoint(folder: Path) -> None:
    os.remove(folder / "model.safetensors")
    (folder / "latest").write_text("global_step1")


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def without_a_file(folder: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def bad_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')


def quantised(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.int8)}))


def missing(folder: Path) -> None:
    rewrite(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))


def doubled(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"norm.weight": t["model.norm.weight"].clone()}))


WRONG: list[tuple[Callable[[Path], None], dict[str, object], str]] = [
    (pickled, {}, "has pytorch_model.bin and no safetensors; unpickling runs"),
    (checkpoint, {}, "a training checkpoint, not a HuggingFace one; export it before: python"),
    (lambda folder: os.remove(folder / "model.safetensors"), {}, "has no model.safetensors or"),
    (cut, {}, "model.safetensors cannot be read: "),
    (without_a_file, {}, "model-1.safetensors is missing (2 of 2 files); download it again"),
    (bad_index, {}, "model.safetensors.index.json is not an index of safetensors"),
    (quantised, {}, "lm_head.weight is stored as I8; only F64, F32, F16, BF16 can be trained"),
    (missing, {}, "model.layers.1.mlp.up_proj.weight is missing (1 parameters are); set model."),
    (doubled, {}, " are both model.norm.weight; keep one of them"),
    (
        lambda folder: None,
        {"num_hidden_layers": 2},
        "the model has no model.layers.2.input_layernorm.weight (9 tensors are left over); set",
    ),
    (
        lambda folder: None,
        {"hidden_size": 32},
        "model.embed_tokens.weight has shape [40, 16] there and [40, 32] in the model (30 shapes",
    ),
    (
        lambda folder: None,
        {"attention_bias": True},
        "model.layers.0.self_attn.q_proj.bias is missing (12 parameters are); set model.config",
    ),
]


@pytest.mark.parametrize(("damage", "changes", "words"), WRONG)
def test_the_message(
    damage: Callable[[Path], None], changes: dict[str, object], words: str, tmp_path: Path
) -> None:
    saved(llama(), tmp_path)
    damage(tmp_path)
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path, llama(**changes))
    message = str(caught.value)
    assert message.startswith(f'model.init_from = "{tmp_path}": ')
    assert words in message
    assert "\n" not in message

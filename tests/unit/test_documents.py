"""``data.document_mask``: each document of a packed sample is computed as if it were alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from sdp_llm.config import DataConfig, parse_config
from sdp_llm.data import IndexedDataset, IndexedDatasetWriter, PackedDataset
from sdp_llm.errors import ConfigError
from sdp_llm.loss import NextTokenLoss, document_positions, summed_loss
from sdp_llm.subnetwork import packing
from sdp_llm.subnetwork.measure import load_model_config, model_size, saved_bytes
from sdp_llm.subnetwork.packing import check_documents_apart
from sdp_llm.training.documents import other_end, separator
from tests.conftest import ROOT
from tests.distributed.test_families import FAMILIES, _config

EOS = 2
# Documents per sample, in tokens: with empty ones, one that began in another sample, and one that
# goes on in another.
LENGTHS = ((4, 1, 1, 9, 5), (12, 8), (20,))
CASES = [
    (family, attention)
    for family in FAMILIES
    for attention in ("sdpa", "eager")
    if (family, attention) != ("gemma2", "sdpa")  # transformers has no such model
]


def packed(vocabulary: int = 96) -> Tensor:
    """Samples ``[3, 20]`` of documents of ``LENGTHS`` tokens, of which the last has no end."""
    ids = torch.randint(3, vocabulary, (3, 20), generator=torch.Generator().manual_seed(5))
    for row, lengths in zip(ids, LENGTHS, strict=True):
        row[torch.tensor(lengths).cumsum(0)[:-1] - 1] = EOS
    return ids


def documents(rows: Tensor) -> list[Tensor]:
    """What belongs to each document."""
    return [part for row, n in zip(rows, LENGTHS, strict=True) for part in row.split(n)]


def build(family: str, attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = _config(family)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()


def test_positions_restart_after_every_end() -> None:
    ids = torch.tensor([[5, 2, 2, 7, 8, 2, 9], [2, 5, 6, 7, 8, 9, 5], [5, 6, 7, 8, 9, 5, 2]])
    assert document_positions(ids, EOS).tolist() == [
        [0, 1, 0, 0, 1, 2, 0],
        [0, 0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 5, 6],
    ]
    assert document_positions(ids[:, :1], EOS).tolist() == [[0], [0], [0]]


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_logits_are_those_of_each_document_alone(family: str, attention: str) -> None:
    model, ids = build(family, attention), packed()
    positions = document_positions(ids, EOS)
    with torch.no_grad():
        # The model has its cache on, as a loaded one does.
        masked = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        across = model(input_ids=ids).logits
        alone = [model(input_ids=document[None]).logits[0] for document in documents(ids)]
    for found, expected in zip(documents(masked), alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    # And the comparison can tell: without the mask, all but the first documents differ.
    differ = [(f - e).abs().max() > 1e-2 for f, e in zip(documents(across), alone, strict=True)]
    assert differ == [False, True, True, True, True, False, True, False]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_loss_and_gradients_are_those_of_documents_alone(family: str, checkpointing: bool) -> None:
    model = build(family, "eager").train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = packed()
    targets = torch.randint(0, 96, (3, 1), generator=torch.Generator().manual_seed(6))
    tokens = torch.cat([ids, targets], 1)

    loss = NextTokenLoss(EOS)(model, tokens)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    # Every target counts, also the first token of a document after the end of the one before.
    total = torch.zeros(())
    for document, target in zip(documents(tokens[:, :-1]), documents(tokens[:, 1:]), strict=True):
        logits = model(input_ids=document[None], use_cache=False).logits[0]
        total = total + F.cross_entropy(logits, target, reduction="sum")
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4, msg=name)
    with torch.no_grad():
        assert abs(summed_loss(model, tokens).item() - loss.item()) > 1e-2


# -- which models it works with -------------------------------------------------------------------


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_families_pass_the_check(family: str, attention: str) -> None:
    config = _config(family)
    before = config.to_dict()
    check_documents_apart(config, attention, EOS)
    assert config.to_dict() == before


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt-neox"])
def test_the_check_can_fail(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def across(ids: Tensor, _: int) -> Tensor:
        return torch.arange(ids.shape[1]).expand_as(ids)

    monkeypatch.setattr(packing, "document_positions", across)
    with pytest.raises(ConfigError, match="does not keep the documents of a sample apart"):
        check_documents_apart(_config(family), "eager", EOS)


SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 96}
HEADS = {**SMALL, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("BloomConfig", {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 96}),
        ("FalconConfig", HEADS),  # takes positions, but attends across documents
        ("MambaConfig", {**SMALL, "state_size": 4}),
    ],
)
def test_families_that_cannot_are_refused(name: str, arguments: dict[str, Any]) -> None:
    config = getattr(transformers, name)(**arguments)
    with pytest.raises(ConfigError) as caught:
        check_documents_apart(config, "eager", EOS)
    message = str(caught.value)
    assert message.startswith(f"data.document_mask = true: {name.removesuffix('Config')}ForCausal")
    assert "set data.document_mask = false" in message
    assert "\n" not in message


def test_experts_and_other_attentions() -> None:
    experts = {**HEADS, "intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4}
    check_documents_apart(transformers.MixtralConfig(**experts), "sdpa", EOS)
    with pytest.raises(ConfigError, match=r"'flash_attention_2' does not .* use 'sdpa' or 'eager'"):
        check_documents_apart(_config("llama"), "flash_attention_2", EOS)


def test_a_model_that_takes_no_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise TypeError("forward() got an unexpected keyword argument\n 'position_ids'")

    monkeypatch.setattr(transformers.LlamaModel, "forward", refuse)
    with pytest.raises(ConfigError, match="cannot be run with position_ids: forward") as caught:
        check_documents_apart(_config("llama"), "sdpa", EOS)
    assert "\n" not in str(caught.value)


def test_the_check_needs_no_memory_for_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def run(model: nn.Module, _: int) -> float:
        sizes.append(sum(p.untyped_storage().nbytes() for p in model.parameters() if not p.is_meta))
        return 0.0

    monkeypatch.setattr(packing, "_distance", run)
    check_documents_apart(load_model_config(ROOT / "configs/model/llama_7b.json"), "sdpa", EOS)
    assert 0 < sizes[0] < 2**20


def test_the_mask_counts_among_the_activations() -> None:
    config = _config("llama")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    model.config.use_cache = False
    tokens = torch.zeros(2, 33, dtype=torch.int64)
    for document_mask in (False, True):
        size = model_size(config, 2, 32, document_mask=document_mask)
        real = saved_bytes(model, tokens, NextTokenLoss(0 if document_mask else None))
        predicted = size.shared_activations + sum(block.activations for block in size.blocks)
        assert predicted == real.shared + sum(real.blocks.values())
    assert predicted > model_size(config, 2, 32).shared_activations + sum(
        block.activations for block in model_size(config, 2, 32).blocks
    )


# -- which id ends a document ---------------------------------------------------------------------

Make = Callable[..., int | None]


@pytest.fixture
def find(tmp_path: Path) -> Make:
    """Makes a corpus of documents that end with ``end``, and asks for the separator."""

    def make(
        end: int = EOS, tokenizer: int | None = None, note: Any = None, model: Any = EOS
    ) -> int | None:
        prefix = tmp_path / "train_text_document"
        with IndexedDatasetWriter(prefix, "uint16") as writer:
            writer.add_document([])
            for i in range(40):
                writer.add_document([5] * i + [end])
        if note is not None:
            (tmp_path / "manifest.json").write_text(json.dumps({"tokenizer": {"eos_id": note}}))
        corpus = PackedDataset(IndexedDataset(prefix), 4)
        loaded = SimpleNamespace(eos_token_id=tokenizer)
        config = LlamaConfig(**HEADS, intermediate_size=48, eos_token_id=model)
        data = DataConfig(str(prefix), 4, tokenizer="folder", document_mask=True)
        return separator(data, config, "sdpa", loaded, {"data.train = 1": corpus})

    return make


def test_the_tokenizer_names_the_end(find: Make) -> None:
    assert find(end=7, tokenizer=7, note=8, model=9) == 7


def test_else_the_manifest_does(find: Make) -> None:
    assert find(end=8, note=8, model=9) == 8


@pytest.mark.parametrize("note", [None, "8", True])
def test_else_the_config_of_the_model_does(find: Make, note: Any) -> None:
    assert find(end=9, note=note, model=9) == 9


@pytest.mark.parametrize("model", [None, [2, 3]])
def test_else_it_is_an_error(find: Make, model: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        find(model=model)
    message = str(caught.value)
    for part in ("data.document_mask = true: no end", json.dumps(model), "set data.tokenizer to"):
        assert part in message


@pytest.mark.parametrize("ends", [8, [3, 8], None, []])
def test_a_model_that_knows_the_end(tmp_path: Path, ends: Any) -> None:
    assert _warning(tmp_path, ends, tokenizer=8) is None
    assert _warning(tmp_path, ends, note=8) is None
    assert _warning(tmp_path, ends) is None  # nobody knows


@pytest.mark.parametrize("ends", [2, [2, 3], 0])
def test_a_model_that_would_stop_elsewhere(tmp_path: Path, ends: Any) -> None:
    for known, origin in (
        ({"tokenizer": 8, "note": 2}, 'data.tokenizer = "folder"'),
        ({"note": 8}, "the manifest of data.train = 1"),
    ):
        assert _warning(tmp_path, ends, **known) == (
            f'warning: model.config = "model.json": its eos_token_id is {json.dumps(ends)}, but '
            f"the end-of-sequence id of {origin} is 8, at which generation with the export would "
            "not stop; set eos_token_id to 8"
        )


def test_a_model_from_a_checkpoint_keeps_its_own_end(tmp_path: Path) -> None:
    assert _warning(tmp_path, 2, tokenizer=8, init_from="folder") is None


def _warning(
    folder: Path,
    ends: Any,
    tokenizer: int | None = None,
    note: int | None = None,
    **model: str,
) -> str | None:
    prefix = folder / "train_text_document"
    if not Path(f"{prefix}.bin").exists():
        with IndexedDatasetWriter(prefix, "uint16") as writer:
            writer.add_document([5] * 10)
    (folder / "manifest.json").write_text(json.dumps({"tokenizer": {"eos_id": note}}))
    data = {"train": str(prefix), "sequence_length": 4, "tokenizer": "folder"}
    run = parse_config({"model": {"config": "model.json", **model}, "data": data})
    corpus = PackedDataset(IndexedDataset(prefix), 4)
    loaded = SimpleNamespace(eos_token_id=tokenizer)
    return other_end(run, ends, loaded, {"data.train = 1": corpus})


def test_documents_that_end_otherwise_are_an_error(find: Make) -> None:
    with pytest.raises(ConfigError) as caught:
        find(end=6, tokenizer=7)
    assert (
        "document 1 of data.train = 1 does not end with the end-of-sequence id 7 of data.tok"
        in (str(caught.value))
    )
    assert "but with 6; make the corpus" in str(caught.value)


def test_an_end_outside_the_vocabulary_is_an_error(find: Make) -> None:
    with pytest.raises(ConfigError, match=r"id 96 of data.tokenizer .* vocab_size = 96; use"):
        find(tokenizer=96)


def test_manifests_that_differ_are_an_error(tmp_path: Path) -> None:
    corpora = {}
    for i in (3, 4):
        folder = tmp_path / str(i)
        folder.mkdir()
        with IndexedDatasetWriter(folder / "c", "uint16") as writer:
            writer.add_document([5] * 10 + [i])
        (folder / "manifest.json").write_text(json.dumps({"tokenizer": {"eos_id": i}}))
        corpora[f"data.train[{i}]"] = PackedDataset(IndexedDataset(folder / "c"), 4)
    data = DataConfig({"a": 1, "b": 1}, 4, document_mask=True)
    with pytest.raises(ConfigError, match=r"3 of the manifest of data.train\[3\], 4 of the"):
        separator(data, LlamaConfig(**HEADS), "sdpa", None, corpora)


def test_nothing_is_asked_of_a_run_without_the_mask() -> None:
    assert separator(DataConfig("a", 4), LlamaConfig(), "flash_attention_2", None, {}) is None

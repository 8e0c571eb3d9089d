"""Where a document ends: for ``data.document_mask``, and for the model that is exported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from sdp_llm.config import DataConfig, RunConfig
from sdp_llm.data import IndexedDataset, PackedDataset
from sdp_llm.data.manifest import read_manifest
from sdp_llm.errors import ConfigError
from sdp_llm.subnetwork.packing import check_documents_apart

_KEY = "data.document_mask = true"
_DOCUMENTS_CHECKED = 64  # per corpus, spread evenly


def other_end(
    run: RunConfig,
    ends: int | list[int] | None,
    tokenizer: Any,
    corpora: Mapping[str, PackedDataset],
) -> str | None:
    """A warning where the model's config names another id than the one that ends the documents.

    Generation with the exported model stops there: at another id it would stop in the midst of a
    text, or never. That is mended in the export as well, so that no run need end for it. A model
    that begins from a checkpoint keeps the end that it has learnt.

    :param ends: ``eos_token_id`` of the model's config.
    """
    assert run.model is not None
    assert run.data is not None
    if run.model.init_from is not None:
        return None
    known = [ends] if isinstance(ends, int) else ends
    for origin, eos_id in _ends(run.data, tokenizer, corpora).items():
        if known and eos_id not in known:
            return (
                f"warning: model.config = {json.dumps(run.model.config)}: its eos_token_id is "
                f"{json.dumps(ends)}, but the end-of-sequence id of {origin} is {eos_id}, at which "
                f"generation with the export would not stop; set eos_token_id to {eos_id}"
            )
    return None


def separator(
    data: DataConfig,
    model: PretrainedConfig,
    attn_implementation: str,
    tokenizer: Any,
    corpora: Mapping[str, PackedDataset],
) -> int | None:
    """The id that ends every document; None where documents are not kept apart.

    It is that of ``data.tokenizer``, else that of the manifests beside the corpora, else that of
    the model's config. The model is checked to keep documents apart, and the corpora to end their
    documents with this id.

    :param attn_implementation: transformers' name of the attention.
    :param tokenizer: what ``data.tokenizer`` names, loaded, or None.
    :param corpora: the corpora by their keys in the config.
    :raises ConfigError: there is no such id, or model or corpora are not made for it.
    """
    if not data.document_mask:
        return None
    eos_id, origin = _eos_id(data, model, tokenizer, corpora)
    vocab_size = model.get_text_config().vocab_size
    if not 0 <= eos_id < vocab_size:
        raise ConfigError(
            f"{_KEY}: the end-of-sequence id {eos_id} of {origin} is not below the model's "
            f"vocab_size = {vocab_size}; use a tokenizer and a model that fit"
        )
    for key, corpus in corpora.items():
        _check_ends(key, corpus.dataset, eos_id, origin)
    check_documents_apart(model, attn_implementation, eos_id)
    return eos_id


def _eos_id(
    data: DataConfig, model: PretrainedConfig, tokenizer: Any, corpora: Mapping[str, PackedDataset]
) -> tuple[int, str]:
    """The id, and where it is from."""
    found = _ends(data, tokenizer, corpora)
    if len(set(found.values())) > 1:
        ids = ", ".join(f"{eos_id} of {origin}" for origin, eos_id in found.items())
        raise ConfigError(
            f"{_KEY}: the manifests name different end-of-sequence ids ({ids}); use corpora that "
            "were made with one tokenizer"
        )
    for origin, eos_id in found.items():
        return eos_id, origin
    eos = model.get_text_config().eos_token_id
    if not isinstance(eos, int):
        raise ConfigError(
            f"{_KEY}: no end-of-sequence id: data.tokenizer names none, no manifest.json beside "
            f"the corpora does, and eos_token_id of the model's config is {json.dumps(eos)}; set "
            "data.tokenizer to the tokenizer that the corpora were made with"
        )
    return eos, "the model's config"


def _ends(data: DataConfig, tokenizer: Any, corpora: Mapping[str, PackedDataset]) -> dict[str, int]:
    """The ids that end a document by who names them: the tokenizer alone, else the manifests."""
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        return {f"data.tokenizer = {json.dumps(data.tokenizer)}": int(tokenizer.eos_token_id)}
    noted = {
        f"the manifest of {key}": read_manifest(corpus.dataset.prefix).eos_id
        for key, corpus in corpora.items()
    }
    return {origin: eos_id for origin, eos_id in noted.items() if eos_id is not None}


def _check_ends(key: str, dataset: IndexedDataset, eos_id: int, origin: str) -> None:
    """Look at a spread of documents: another separator would keep nothing apart, in silence."""
    count = min(_DOCUMENTS_CHECKED, dataset.num_documents)
    for i in range(count):
        index = i * dataset.num_documents // count
        ids = dataset.document(index)
        if len(ids) and ids[-1] != eos_id:
            raise ConfigError(
                f"{_KEY}: document {index} of {key} does not end with the end-of-sequence id "
                f"{eos_id} of {origin} but with {ids[-1]}; make the corpus with the end of each "
                "document marked, or name the tokenizer that it was made with in data.tokenizer"
            )

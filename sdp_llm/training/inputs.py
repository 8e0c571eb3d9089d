"""Everything a run reads, opened and checked before any process group or model exists."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from sdp_llm.config import BatchSizes, DataConfig, RunConfig, require_pretraining, resolve_batch
from sdp_llm.data import BlendedDataset, IndexedDataset, PackedDataset, TrainingData
from sdp_llm.data.sampler import validation_samples
from sdp_llm.errors import ConfigError
from sdp_llm.plan import Plan, plan_from_config
from sdp_llm.subnetwork.measure import load_model_config


@dataclass(frozen=True)
class Inputs:
    """What a run config names: its model's config, its plan and its data."""

    model: PretrainedConfig
    plan: Plan
    batch: BatchSizes
    train: TrainingData
    validation: PackedDataset | None


def load_inputs(run: RunConfig, world_size: int) -> Inputs:
    """Open and check all that a pretraining run reads.

    :raises ConfigError: naming the key, its value and the fix, for the first thing that is wrong.
    """
    require_pretraining(run)
    assert run.model is not None
    assert run.data is not None
    batch = resolve_batch(run, world_size)
    model = load_model_config(run.model.config)
    text = model.get_text_config()
    plan = plan_from_config(run.sdp, world_size, text.num_hidden_layers)
    length = run.data.sequence_length
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ConfigError(
            f"data.sequence_length = {length}: longer than the model's "
            f"max_position_embeddings = {positions} in {run.model.config}; use at most {positions}"
        )
    corpora = _open_training(run.data)
    train = _blend(run.data, list(corpora.values()), batch.global_batch)
    validation = None
    if run.data.validation is not None:
        key = f"data.validation = {json.dumps(run.data.validation)}"
        validation = corpora[key] = _open(key, run.data.validation, length)
    for key, corpus in corpora.items():
        _check_ids(key, corpus, text.vocab_size, run.model.config)
    if run.data.tokenizer is not None:
        _check_tokenizer(run.data.tokenizer, text.vocab_size, run.model.config)
    return Inputs(model, plan, batch, train, validation)


def _open_training(data: DataConfig) -> dict[str, PackedDataset]:
    """The training corpora, by how the config names each."""
    if isinstance(data.train, str):
        named = {f"data.train = {json.dumps(data.train)}": data.train}
    else:
        named = {f"data.train[{json.dumps(prefix)}]": prefix for prefix in data.train}
    return {key: _open(key, prefix, data.sequence_length) for key, prefix in named.items()}


def _open(key: str, prefix: str, length: int) -> PackedDataset:
    try:
        return PackedDataset(IndexedDataset(prefix), length)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


def _blend(data: DataConfig, corpora: list[PackedDataset], global_batch: int) -> TrainingData:
    """What the corpora are read as.

    :raises ConfigError: a corpus is too small for its part of a global batch.
    """
    try:
        train: TrainingData = corpora[0]
        if not isinstance(data.train, str):
            train = BlendedDataset(corpora, list(data.train.values()))
        train.require_batch(global_batch)
    except ConfigError as error:
        raise ConfigError(f"data.train = {json.dumps(data.train)}: {error}") from None
    return train


def _check_ids(key: str, dataset: PackedDataset, vocab_size: int, config: str) -> None:
    """Look at a spread of samples: an id outside the vocabulary is an index error hours later."""
    largest = int(dataset.batch(validation_samples(dataset, 64)).max())
    if largest >= vocab_size:
        raise ConfigError(
            f"{key}: has token id {largest}, but vocab_size = {vocab_size} in {config}; use the "
            "tokenizer that the corpus was made with, and a model with as many ids"
        )


def _check_tokenizer(folder: str, vocab_size: int, config: str) -> None:
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > vocab_size:
        raise ConfigError(
            f"data.tokenizer = {json.dumps(folder)}: has {len(tokenizer)} ids, more than "
            f"vocab_size = {vocab_size} in {config}; set vocab_size to at least {len(tokenizer)}"
        )


def load_tokenizer(folder: str) -> Any:
    """The tokenizer in a local folder; nothing is fetched.

    :raises ConfigError: when there is none.
    """
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise ConfigError(
            f"data.tokenizer = {json.dumps(folder)}: no such folder; "
            "make one with python data_prep/train_tokenizer.py"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and more
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"data.tokenizer = {json.dumps(folder)}: not a tokenizer: {reason}; "
            "make one with python data_prep/train_tokenizer.py"
        ) from error


def target_bytes(tokenizer: Any, samples: Any) -> int:
    """The UTF-8 bytes of the text that the targets of ``[samples, sequence + 1]`` stand for."""

    def size(tokens: Any) -> int:
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return sum(len(text.encode()) for text in texts)

    # Not the targets alone: at the start of a text, sentencepiece drops the space of a word.
    return size(samples) - size(samples[:, :1])

"""Everything a run reads, opened and checked before any process group or model exists."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from transformers import PretrainedConfig

from sdp_llm.config import BatchSizes, RunConfig, require_pretraining, resolve_batch
from sdp_llm.data import PackedDataset, TrainingData
from sdp_llm.errors import ConfigError
from sdp_llm.loss import NextTokenLoss, summed_loss
from sdp_llm.plan import Schedule
from sdp_llm.subnetwork.adapter import empty_model, model_layout
from sdp_llm.subnetwork.cheap import cheap_model
from sdp_llm.subnetwork.measure import run_model_config
from sdp_llm.subnetwork.pretrained import open_pretrained
from sdp_llm.tokenizer import largest_id, read_tokenizer
from sdp_llm.training.budget import check_memory, run_schedule
from sdp_llm.training.corpora import (
    blend,
    check_ids,
    check_tokenizer_of,
    fingerprints,
    open_training,
    open_validation,
)
from sdp_llm.training.documents import other_end, separator


@dataclass(frozen=True)
class Inputs:
    """What a run config names: its model's config, its phases, its data and its loss.

    ``fingerprints`` tell every corpus, by its path in the config, from one with other content.
    """

    model: PretrainedConfig
    schedule: Schedule
    batch: BatchSizes
    train: TrainingData
    validation: PackedDataset | None
    fingerprints: Mapping[str, str]
    loss: NextTokenLoss = summed_loss


def load_inputs(run: RunConfig, world_size: int, rank: int | None = None) -> Inputs:
    """Open and check all that a pretraining run reads.

    :param rank: this process of ``world_size`` that call this function and share what takes long;
        None: it is alone.
    :raises ConfigError: naming the key, its value and the fix, for the first thing that is wrong.
    """
    require_pretraining(run)
    _check_monitors(run)
    assert run.model is not None
    assert run.data is not None
    batch = resolve_batch(run, world_size)
    model = run_model_config(run.model)
    text = model.get_text_config()
    whole = empty_model(model, run.model.attn_implementation)
    model_layout(whole)
    if run.model.init_from is not None:
        open_pretrained(run.model.init_from, whole)
    schedule = run_schedule(run, model, batch, world_size)
    training, validation = open_training(run.data), open_validation(run.data)
    corpora = training | validation
    train = blend(run.data, list(training.values()), batch.global_batch)
    check_ids(corpora, text.vocab_size, run.model.config, rank, world_size)
    tokenizer = None
    if run.data.tokenizer is not None:
        tokenizer = load_tokenizer(run.data.tokenizer)
        _check_tokenizer(run.data.tokenizer, tokenizer, text.vocab_size, run.model.config)
        check_tokenizer_of(corpora, run.data.tokenizer, tokenizer.eos_token_id)
    warning = other_end(run, text.eos_token_id, tokenizer, corpora)
    if warning is not None and rank in (None, 0):
        print(warning, flush=True)
    eos_id = separator(run.data, model, run.model.attn_implementation, tokenizer, corpora)
    loss = NextTokenLoss(eos_id, run.training.loss_chunk)
    if loss.chunk is not None:
        # The attention does not matter, and that of the run may need a GPU.
        loss.check(cheap_model(model, "eager")[0])
    check_memory(run, model, batch, schedule)
    return Inputs(
        model,
        schedule,
        batch,
        train,
        next(iter(validation.values()), None),
        fingerprints(run.data),
        loss,
    )


def _check_monitors(run: RunConfig) -> None:
    """DeepSpeed would import a monitor's package when the model is built, on one rank."""
    for name in ("tensorboard", "wandb"):
        section = getattr(run, name)
        if section is not None and section.enabled and find_spec(name) is None:
            raise ConfigError(
                f"{name}.enabled = true: the package {name} is not installed; install it, or use "
                "csv_monitor, which needs none"
            )


def _check_tokenizer(folder: str, tokenizer: Any, vocab_size: int, config: str) -> None:
    needed = largest_id(tokenizer)[1] + 1
    if needed > vocab_size:
        raise ConfigError(
            f"data.tokenizer = {json.dumps(folder)}: has {needed} ids, more than "
            f"vocab_size = {vocab_size} in {config}; set vocab_size to at least {needed}"
        )


def load_tokenizer(folder: str) -> Any:
    """The tokenizer in a local folder; nothing is fetched.

    :raises ConfigError: when there is none.
    """
    key = f"data.tokenizer = {json.dumps(folder)}"
    return read_tokenizer(folder, key, "make one with python data_prep/train_tokenizer.py")


def target_bytes(tokenizer: Any, samples: Any) -> int:
    """The UTF-8 bytes of the text that the targets of ``[samples, sequence + 1]`` stand for."""

    def size(tokens: Any) -> int:
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return sum(len(text.encode()) for text in texts)

    # Not the targets alone: at the start of a text, sentencepiece drops the space of a word.
    return size(samples) - size(samples[:, :1])

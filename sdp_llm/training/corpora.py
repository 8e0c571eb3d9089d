"""The corpora that a run config names, opened and checked from the first token to the last."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from sdp_llm.config import DataConfig
from sdp_llm.data import BlendedDataset, IndexedDataset, PackedDataset, TrainingData
from sdp_llm.data.manifest import read_manifest
from sdp_llm.data.vocabulary import id_outside
from sdp_llm.errors import ConfigError
from sdp_llm.files import sha256_of

_EDGE_BYTES = 1 << 20
_LONG = 1 << 30  # bytes; reading fewer takes less time than importing torch


def open_training(data: DataConfig) -> dict[str, PackedDataset]:
    """The training corpora, each by its key and value in the config.

    :raises ConfigError: for files that are missing, damaged, or shorter than one sample.
    """
    key = "data.train = {}" if isinstance(data.train, str) else "data.train[{}]"
    named = {key.format(json.dumps(prefix)): prefix for prefix in weights(data)}
    return {key: _open(key, prefix, data.sequence_length) for key, prefix in named.items()}


def weights(data: DataConfig) -> dict[str, float]:
    """The weight of each training corpus by its path, in the order in which they are blended."""
    return {data.train: 1.0} if isinstance(data.train, str) else dict(data.train)


def open_validation(data: DataConfig) -> dict[str, PackedDataset]:
    """The validation corpus by its key and value in the config; empty where there is none.

    :raises ConfigError: for files that are missing, damaged, or shorter than one sample.
    """
    if data.validation is None:
        return {}
    key = f"data.validation = {json.dumps(data.validation)}"
    return {key: _open(key, data.validation, data.sequence_length)}


def _open(key: str, prefix: str, length: int) -> PackedDataset:
    try:
        return PackedDataset(IndexedDataset(prefix), length)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


def blend(data: DataConfig, corpora: list[PackedDataset], global_batch: int) -> TrainingData:
    """What the training corpora are read as.

    :raises ConfigError: there are too many, or one is too small for its part of a global batch.
    """
    key = "data.train"
    train: TrainingData = corpora[0]
    try:
        if isinstance(data.train, str):
            key = f"{key} = {json.dumps(data.train)}"
        else:
            train = BlendedDataset(corpora, list(weights(data).values()))
        train.require_batch(global_batch)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None
    return train


def fingerprints(data: DataConfig) -> dict[str, str]:
    """What :func:`fingerprint` says of every corpus, by its path in the config."""
    validation = [] if data.validation is None else [data.validation]
    return {prefix: fingerprint(prefix) for prefix in [*weights(data), *validation]}


def fingerprint(prefix: str) -> str:
    """Of a corpus's two files: their sizes, and the SHA-256 of the first and last MiB of each."""
    digest, sizes = hashlib.sha256(), []
    for suffix in (".bin", ".idx"):
        with Path(prefix + suffix).open("rb") as file:
            digest.update(file.read(_EDGE_BYTES))
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _EDGE_BYTES))
            digest.update(file.read())
            sizes.append(size)
    return f"{sizes[0]} + {sizes[1]} bytes, SHA-256 {digest.hexdigest()[:16]}"


def check_ids(
    corpora: Mapping[str, PackedDataset],
    vocab_size: int,
    config: str,
    rank: int | None,
    world_size: int,
) -> None:
    """Check that every token id of the corpora is in the model's vocabulary.

    The manifest beside a corpus knows its largest id; without one that fits the files, all tokens
    are read, each rank reading its part: then only the rank that finds an id raises.

    :param config: path of the model's config, for the message.
    :param rank: the part to read; None: all.
    :raises ConfigError: names the corpus and the id.
    """
    for key, corpus in corpora.items():
        dataset = corpus.dataset
        outside = read_manifest(dataset.prefix).largest_id
        if outside is None:
            size = dataset.num_tokens
            start, stop = (0, size) if rank is None else _part(size, rank, world_size)
            if size * dataset.dtype.itemsize > _LONG and start == 0:
                print(
                    f"{key}: has no manifest.json that fits it; reading all {size:,} tokens to "
                    "check their ids",
                    flush=True,
                )
            outside = id_outside(dataset, vocab_size, start, stop)
        if outside is not None and not 0 <= outside < vocab_size:
            raise ConfigError(
                f"{key}: has token id {outside}, but vocab_size = {vocab_size} in {config}; use "
                "the tokenizer that the corpus was made with, and a model with as many ids"
            )


def _part(size: int, rank: int, world_size: int) -> tuple[int, int]:
    return size * rank // world_size, size * (rank + 1) // world_size


def check_tokenizer_of(
    corpora: Mapping[str, PackedDataset], folder: str, eos_id: int | None
) -> None:
    """Check that ``data.tokenizer`` is what the corpora were made with, as far as both say.

    An error and not a warning: the export would hold a tokenizer whose ids mean other text than
    the model has learnt, and the bits per byte would count the bytes of such text.

    :param folder: of the tokenizer.
    :param eos_id: the tokenizer's id of the end of a text.
    :raises ConfigError: a manifest has another SHA-256 than the tokenizer.json, or another eos_id.
    """
    file = Path(folder) / "tokenizer.json"
    own = sha256_of(file)[:12] + "…" if file.is_file() else None
    for key, corpus in corpora.items():
        manifest = read_manifest(corpus.dataset.prefix)
        noted = manifest.tokenizer_sha256
        for what, has, made_with in (
            ("its tokenizer.json has SHA-256", own, noted and f"{noted[:12]}…"),
            ("its end-of-sequence id is", eos_id, manifest.eos_id),
        ):
            if None not in (has, made_with) and has != made_with:
                raise ConfigError(
                    f"data.tokenizer = {json.dumps(folder)}: {what} {has}, but {key} was made with "
                    f"{made_with}; name the tokenizer that the corpus was made with"
                )

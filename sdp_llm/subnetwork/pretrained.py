"""Initial values from a HuggingFace checkpoint, of which a rank reads the tensors it holds."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from sdp_llm.errors import ConfigError
from sdp_llm.subnetwork.adapter import ModelLayout, model_layout
from sdp_llm.subnetwork.stored import StoredTensor, named, stored_tensors

SAMPLE_ROWS = 8


@dataclass(frozen=True)
class PretrainedWeights:
    """The parameters of one model as a checkpoint stores them, none of them read yet.

    :param source: what ``model.init_from`` says.
    :param tensors: every parameter of the whole model, by global name.
    :param twins: where a tied parameter is stored under its further names too: those, by its name.
    """

    source: str
    tensors: Mapping[str, StoredTensor]
    twins: Mapping[str, list[StoredTensor]]

    def read(self, name: str) -> Tensor:
        """One parameter, fp32 on the CPU, in memory of its own.

        :raises ConfigError: when a tied parameter is stored twice with different values.
        """
        value = _read(self.tensors[name])
        for twin in self.twins.get(name, []):
            if not torch.equal(value, _read(twin)):
                raise ConfigError(
                    f"{named(self.source)}: {name} and {twin.key} have different values, but the "
                    "model ties them; set tie_word_embeddings to false in model.config"
                )
        return value

    def fingerprint(self, names: Iterable[str]) -> str:
        """16 hex digits over all shapes and dtypes and over the first rows of ``names``."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.shape} {tensor.dtype}\n".encode())
        for name in sorted(names):
            digest.update(_read(self.tensors[name], SAMPLE_ROWS).numpy().tobytes())
        return digest.hexdigest()[:16]


def open_pretrained(source: str, model: PreTrainedModel) -> PretrainedWeights:
    """Find every parameter of ``model`` in a checkpoint; no weight is read.

    Checkpoints with or without the prefix of the base model, and with the names of older versions
    of transformers, are understood: the names are translated by transformers' own rules.

    :param source: a folder, or a name in the hub's local cache.
    :param model: the whole model; its weights do not matter and may be on the meta device.
    :raises ConfigError: when the checkpoint cannot be read or is of another model, naming the
        first parameter that is missing, left over or of another shape.
    """
    layout = model_layout(model)
    by_name, unexpected = _by_model_name(source, stored_tensors(source), model, layout)
    further = _further_names(layout)
    tensors: dict[str, StoredTensor] = {}
    twins: dict[str, list[StoredTensor]] = {}
    missing, mismatched = [], []
    for spec in layout.parameters:
        found = [by_name[n] for n in (spec.name, *further.get(spec.name, [])) if n in by_name]
        if not found:
            missing.append(spec.name)
            continue
        tensors[spec.name] = found[0]
        twins[spec.name] = found[1:]
        if found[0].shape != spec.shape:
            mismatched.append(
                f"{spec.name} has shape {list(found[0].shape)} there and {list(spec.shape)} in "
                "the model"
            )
    fix = "set model.config to the config.json that it was saved with, or use another checkpoint"
    if missing:
        raise ConfigError(
            f"{named(source)}: {missing[0]} is missing ({len(missing)} parameters are); {fix}"
        )
    if unexpected:
        raise ConfigError(
            f"{named(source)}: the model has no {unexpected[0]} ({len(unexpected)} tensors are "
            f"left over); {fix}"
        )
    if mismatched:
        raise ConfigError(
            f"{named(source)}: {mismatched[0]} ({len(mismatched)} shapes differ); {fix}"
        )
    return PretrainedWeights(source, tensors, twins)


def _further_names(layout: ModelLayout) -> dict[str, list[str]]:
    further: dict[str, list[str]] = {}
    for alias, name in layout.aliases.items():
        further.setdefault(name, []).append(alias)
    return further


def _by_model_name(
    source: str, stored: Mapping[str, StoredTensor], model: PreTrainedModel, layout: ModelLayout
) -> tuple[dict[str, StoredTensor], list[str]]:
    """The stored tensors by the model's names, and the keys that the model has no place for."""
    expected = dict.fromkeys([*(spec.name for spec in layout.parameters), *layout.aliases], True)
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix = model.base_model_prefix
    ignored = _ignored(model)
    found: dict[str, StoredTensor] = {}
    unexpected = []
    for key, tensor in stored.items():
        name, conversion = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:
            name, conversion = key, None
        if name in expected and conversion is not None:
            raise ConfigError(
                f"{named(source)}: {key} is a part of {name}, which transformers puts together "
                "as it loads; write it again with transformers' from_pretrained and the option "
                "save_original_format=False of save_pretrained"
            )
        if name in found:
            raise ConfigError(
                f"{named(source)}: {key} and {found[name].key} are both {name}; keep one of them"
            )
        if name in expected:
            found[name] = tensor
        elif not any(pattern.search(name) for pattern in ignored):
            unexpected.append(key)
    return found, unexpected


def _ignored(model: PreTrainedModel) -> Collection[re.Pattern[str]]:
    """Names of buffers that older versions of transformers stored and that models compute now."""
    patterns = {*(model._keys_to_ignore_on_load_unexpected or ())}
    older = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$", r"attn\.masked_bias$")
    return [re.compile(pattern) for pattern in (*patterns, *older)]


def _read(tensor: StoredTensor, rows: int | None = None) -> Tensor:
    """A tensor, or its first rows, as fp32; nothing else of the file is read."""
    # A copy, because what safetensors hands out is the mapped file.
    with safe_open(tensor.file, framework="pt") as file:
        if not tensor.shape:
            return file.get_tensor(tensor.key).to(torch.float32, copy=True)
        return file.get_slice(tensor.key)[:rows].to(torch.float32, copy=True)

"""A HuggingFace checkpoint of the whole model, written by its owners in parallel."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from sdp_llm.agree import agree
from sdp_llm.checkpoint.shared_folder import WrittenFile, write_json, write_together
from sdp_llm.checkpoint.stream import Entry, read_header, split_files, write_stream
from sdp_llm.errors import ConfigError
from sdp_llm.sharding.materialize import ShardedModel
from sdp_llm.sharding.unit import Unit
from sdp_llm.subnetwork.adapter import ModelLayout
from sdp_llm.subnetwork.residual import Fold

FOR_TORCH = {"format": "pt"}  # which transformers asks of a file
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


def is_of_export(name: str) -> bool:
    """Whether a file of this name is of an exported model."""
    return name.endswith((".safetensors", ".safetensors.index.json")) or name in (
        "config.json",
        "generation_config.json",
        *TOKENIZER_FILES,
    )


def writers(units: list[tuple[tuple[int, ...], int]]) -> list[int]:
    """Which owner writes each unit, so that the most that one rank writes is small.

    :param units: the owner set and the size of each unit, the same list on every rank.
    """
    load: dict[int, int] = {}
    chosen = [0] * len(units)
    for i in sorted(range(len(units)), key=lambda i: (-units[i][1], i)):
        owners, size = units[i]
        chosen[i] = min(owners, key=lambda rank: (load.get(rank, 0), rank))
        load[chosen[i]] = load.get(chosen[i], 0) + size
    return chosen


def export_pretrained(
    sharded: ShardedModel,
    folder: str | Path,
    *,
    tokenizer: str | Path | None = None,
    max_file_bytes: int = 5 * 10**9,
) -> None:
    """Write the whole model for ``AutoModelForCausalLM.from_pretrained``, in the weights' dtype.

    Collective over the world; a rank holds one tensor beside its subnetwork. Sharded safetensors
    with an index, ``config.json``, ``generation_config.json`` and the tokenizer's files. They
    replace those of an export that is there in one step; other files of the folder stay.

    ``sdp.residual_scale`` "eval" is folded into the weights, in fp32: of the masters where the
    writer has all of them (stage 0, and blocks of one owner), else of the weights.

    :param tokenizer: a folder whose tokenizer files are copied, by rank 0.
    :param max_file_bytes: begin a new file before one grows larger (a single tensor may).
    :raises ConfigError: on every rank, when one of them cannot write, or there is no tokenizer.
    """
    subnetwork = sharded.subnetwork

    def check() -> None:
        if tokenizer is not None and subnetwork.rank == 0:
            check_tokenizer(f"tokenizer = {json.dumps(str(tokenizer))}", Path(tokenizer))

    agree(check)

    def write(partial: Path) -> list[WrittenFile]:
        tensors = dict(_own_tensors(sharded))
        files = []
        for i, entries in enumerate(split_files(tensors, max_file_bytes)):
            path = partial / f"model-{subnetwork.rank:05d}-{i:05d}.safetensors"
            contents = (tensors[entry]() for entry in entries)
            files.append(write_stream(path, entries, contents, FOR_TORCH))
        return files

    def finish(partial: Path, files: list[WrittenFile]) -> None:
        describe_model(partial, subnetwork.config, subnetwork.model, sharded.dtype)
        write_index(partial, files)
        copy_tokenizer(tokenizer, partial)

    write_together(Path(folder), write, finish, is_of_export)


def describe_model(
    folder: Path, config: PretrainedConfig, model: PreTrainedModel, dtype: torch.dtype
) -> None:
    """Write ``config.json`` and ``generation_config.json`` of weights of type ``dtype``.

    :param config: of ``model`` as the user gave it, without what training changed.
    """
    config = type(config).from_dict(config.to_dict())
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)


def written_aliases(layout: ModelLayout, config: PretrainedConfig) -> dict[str, str]:
    """The further names under which tied parameters are written too, with their own name.

    ``from_pretrained`` ties again where the config says so; else it wants both names.
    """
    is_tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
    return {} if is_tied else layout.aliases


def check_tokenizer(key: str, folder: Path) -> None:
    """Check that a folder has files that :func:`copy_tokenizer` copies.

    :param key: what names the folder, and its value, for the message.
    :raises ConfigError: it has none, or is not there.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(f"{key}: has no tokenizer; name the folder of one")


def copy_tokenizer(source: str | Path | None, folder: Path) -> None:
    """Copy the tokenizer's files from one folder to another; nothing for None."""
    for name in TOKENIZER_FILES if source is not None else ():
        if (Path(source or "") / name).is_file():
            shutil.copyfile(Path(source or "") / name, folder / name)


def _own_tensors(sharded: ShardedModel) -> Iterator[tuple[Entry, Callable[[], Tensor]]]:
    """This rank's part of the model, and what makes each tensor."""
    subnetwork = sharded.subnetwork
    layout = subnetwork.layout
    chosen = writers([(subnetwork.owners(unit), unit.numel) for unit in layout.units])
    by_name = {unit.layout.name: unit for unit in sharded.units}
    aliases = written_aliases(layout, subnetwork.config)
    folds = subnetwork.residual_scale.folds()
    for unit, writer in zip(layout.units, chosen, strict=True):
        if writer != subnetwork.rank:
            continue
        yield from _unit_tensors(by_name[unit.name], folds)
        views = by_name[unit.name].views()
        for alias, name in aliases.items():
            if name in views:
                yield _as_it_is(alias, views[name])
    yield from _persistent_buffers(sharded)


def _unit_tensors(
    unit: Unit, folds: Mapping[str, Fold]
) -> Iterator[tuple[Entry, Callable[[], Tensor]]]:
    finest = unit.master if unit.master.numel() == unit.flat.numel() else unit.flat
    views = unit.views()
    for spec, start in zip(unit.layout.parameters, unit.offsets, strict=True):
        entry, content = _as_it_is(spec.name, views[spec.name])
        if spec.name in folds:
            here = finest[start : start + spec.numel]
            content = functools.partial(_folded, folds[spec.name], here, entry.dtype)
        yield entry, content


def _as_it_is(name: str, tensor: Tensor) -> tuple[Entry, Callable[[], Tensor]]:
    return Entry(name, tensor.dtype, tuple(tensor.shape)), lambda: tensor


def _folded(fold: Fold, values: Tensor, dtype: torch.dtype) -> Tensor:
    return fold(values.detach().cpu()).to(dtype)


def _persistent_buffers(sharded: ShardedModel) -> Iterator[tuple[Entry, Callable[[], Tensor]]]:
    """The buffers that ``from_pretrained`` expects, each from the lowest rank that has it."""
    subnetwork = sharded.subnetwork
    prefix = subnetwork.layout.blocks_path + "."
    parameters = {name for name, _ in subnetwork.model.named_parameters(remove_duplicate=False)}
    for name, value in subnetwork.model.state_dict().items():
        if name in parameters:
            continue
        lowest = 0
        if name.startswith(prefix) and subnetwork.masking == "forward":
            block = int(name[len(prefix) :].split(".", 1)[0])
            lowest = subnetwork.plan.owner_sets[block][0]
        if subnetwork.rank == lowest:
            yield _as_it_is(name, value)


def write_index(partial: Path, files: list[WrittenFile]) -> None:
    """Write which file has which tensor, from the headers of the files."""
    weight_map: dict[str, str] = {}
    total = 0
    for file in sorted(files, key=lambda file: file.name):
        for name, entry in read_header(partial / file.name).items():
            weight_map[name] = file.name
            begin, end = entry["data_offsets"]
            total += end - begin
    write_json(
        partial / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )

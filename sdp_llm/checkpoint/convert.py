"""A HuggingFace checkpoint made from a training checkpoint, by one process in little memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from sdp_llm.checkpoint.export import (
    FOR_TORCH,
    check_tokenizer,
    copy_tokenizer,
    describe_model,
    is_of_export,
    write_index,
    written_aliases,
)
from sdp_llm.checkpoint.load import CheckpointReader
from sdp_llm.checkpoint.shared_folder import WrittenFile, write_together
from sdp_llm.checkpoint.stream import Entry, read_part, split_files, write_stream
from sdp_llm.errors import ConfigError
from sdp_llm.sharding.unit import MASTER
from sdp_llm.subnetwork.adapter import empty_model, model_layout
from sdp_llm.subnetwork.residual import Fold, exported_folds, running_shares

# Elements in memory at a time: 8 MiB of fp32, whatever the largest tensor is.
CHUNK = 1 << 21


def export_checkpoint(
    checkpoint: Path,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    config: PretrainedConfig | None = None,
    tokenizer: Path | None = None,
    max_file_bytes: int = 5 * 10**9,
) -> None:
    """Write the whole model of ``checkpoint`` for ``AutoModelForCausalLM.from_pretrained``.

    One process, on the CPU. ``output`` appears complete or not at all. ``sdp.residual_scale``
    "eval" is folded into the weights, in fp32 from the masters, under the plan of the checkpoint.

    :param checkpoint: a step's folder.
    :param dtype: of the weights (default: that in which they were trained).
    :param config: of the model (default: the one that was saved).
    :param tokenizer: a folder whose tokenizer files are copied (default: that of the run, where it
        still is).
    :param max_file_bytes: begin a new file before one grows larger (a single tensor may).
    :raises DamagedCheckpoint: when a file is not what was saved.
    :raises ConfigError: when ``output`` exists or cannot be written, or the config is missing or
        that of another model.
    """
    if output.exists():
        raise ConfigError(f"--output {output}: exists; name a new folder, or remove it")
    if tokenizer is not None:
        check_tokenizer(f"--tokenizer {tokenizer}", tokenizer)
    with ExitStack() as stack:
        reader = CheckpointReader(checkpoint, stack)
        config = config or _saved_config(reader)
        # The attention does not matter, and a saved config may name one that is not here.
        model = empty_model(config, "eager")
        tensors = _ModelTensors(reader, model, config, dtype or _trained_dtype(reader.state))
        files = split_files(tensors.entries, max_file_bytes)
        _check_space(output, sum(entry.nbytes for entry in tensors.entries))
        reader.verify()

        def write(partial: Path) -> list[WrittenFile]:
            names = (
                f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
            )
            return [
                write_stream(partial / name, entries, tensors.values(entries), FOR_TORCH)
                for name, entries in zip(names, files, strict=True)
            ]

        def finish(partial: Path, files: list[WrittenFile]) -> None:
            describe_model(partial, config, model, tensors.dtype)
            write_index(partial, files)
            copy_tokenizer(tokenizer or _trained_tokenizer(reader.state), partial)

        write_together(output, write, finish, is_of_export)


class _ModelTensors:
    """What an export holds: every parameter, aliases where they are not tied, and buffers.

    :raises ConfigError: when the parameters of ``model`` are not those of the checkpoint.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        model: PreTrainedModel,
        config: PretrainedConfig,
        dtype: torch.dtype,
    ) -> None:
        layout = model_layout(model)
        here = {spec.name: list(spec.shape) for spec in layout.parameters}
        reader.check_parameters(here, "give the config it was trained with as --model_config")
        self.dtype = dtype
        self._reader = reader
        self._folds = _folds(reader.state, config, layout.blocks_path)
        aliases = written_aliases(layout, config)
        self._sources = {s.name: s.name for s in layout.parameters} | aliases
        shapes = {spec.name: spec.shape for spec in layout.parameters}
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._buffers = {k: v for k, v in model.state_dict().items() if k not in parameters}
        self.entries = [Entry(n, dtype, shapes[source]) for n, source in self._sources.items()]
        self.entries += [Entry(n, b.dtype, tuple(b.shape)) for n, b in self._buffers.items()]

    def values(self, entries: list[Entry]) -> Iterator[Tensor]:
        """The elements of ``entries``, at most ``CHUNK`` at a time."""
        for entry in entries:
            if entry.key in self._buffers:
                yield self._buffers[entry.key]
                continue
            fold = self._folds.get(entry.key, Tensor.float)
            for part in self._reader.ranges[MASTER, self._sources[entry.key]]:
                file, numel = self._reader.folder / part.file, part.stop - part.start
                for start in range(0, numel, CHUNK):
                    stop = min(start + CHUNK, numel)
                    yield fold(read_part(file, part.key, start, stop)).to(self.dtype)


def _saved_config(reader: CheckpointReader) -> PretrainedConfig:
    saved: dict[str, Any] = reader.state["model"]
    if saved["model_type"] not in CONFIG_MAPPING:
        raise ConfigError(
            f"{reader.folder}: this version of transformers does not know the model_type "
            f"{saved['model_type']!r}; install the one that trained it, "
            f"{reader.state['versions']['transformers']}, or give --model_config"
        )
    return CONFIG_MAPPING[saved["model_type"]].from_dict(saved)


def _folds(state: dict[str, Any], config: PretrainedConfig, blocks_path: str) -> dict[str, Fold]:
    """What ``sdp.residual_scale`` changes in the weights, under the plan that was saved."""
    scale = state["config"]["sdp"].get("residual_scale", "none")  # younger than the format
    if scale == "none":
        return {}
    plan = state["plan"]
    masking = plan.get("masking", state["config"]["sdp"]["masking"])  # younger than the format
    shares = running_shares(plan["world_size"], plan["owners"], masking)
    return exported_folds(scale, config, blocks_path, shares)


def _trained_dtype(state: dict[str, Any]) -> torch.dtype:
    is_bf16 = state["config"]["bf16"]["enabled"]
    return torch.bfloat16 if is_bf16 else torch.float32


def _trained_tokenizer(state: dict[str, Any]) -> str | None:
    return state["config"].get("data", {}).get("tokenizer")


def _check_space(output: Path, needed: int) -> None:
    existing = next(folder for folder in output.absolute().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ConfigError(
            f"--output {output}: needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; "
            "name a folder on another disk, or export with --dtype bf16"
        )

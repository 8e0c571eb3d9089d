"""Reading a checkpoint, written by any number of ranks under any plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdp_llm.checkpoint.save import FORMAT_VERSION, MANIFEST, RNG, STATE, parse_key
from sdp_llm.checkpoint.together import sha256_of
from sdp_llm.errors import ConfigError
from sdp_llm.sharding.materialize import ShardedModel
from sdp_llm.sharding.unit import ParameterSlice


@dataclass(frozen=True)
class _Range:
    """Where elements ``start`` to ``stop`` of a flattened tensor are stored."""

    start: int
    stop: int
    file: str
    key: str


class CheckpointReader:
    """The tensors of one checkpoint folder, by kind and global name.

    :raises ConfigError: when the folder is not a complete checkpoint of this format.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.manifest = _read_json(folder / MANIFEST)
        if self.manifest.get("format_version") != FORMAT_VERSION:
            raise ConfigError(
                f"{folder / MANIFEST}: format version {self.manifest.get('format_version')!r}; "
                f"this version reads {FORMAT_VERSION}: load it with the version that wrote it"
            )
        self.state = _read_json(folder / STATE)
        self.ranges: dict[tuple[str, str], list[_Range]] = {}
        self._files: dict[str, Any] = {}
        for name in self.manifest["files"]:
            if name.endswith(".safetensors"):
                self._open(name, stack)

    def _open(self, name: str, stack: ExitStack) -> None:
        try:
            self._files[name] = stack.enter_context(safe_open(self.folder / name, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{self.folder / name}: {error}; take another checkpoint") from error
        for key in self._files[name].keys():  # noqa: SIM118 - not a dict
            kind, tensor, start, stop = parse_key(key)
            self.ranges.setdefault((kind, tensor), []).append(_Range(start, stop, name, key))

    def verify(self) -> None:
        """Check every file's size and SHA-256, and that the masters cover each parameter once.

        :raises ConfigError: naming the file or the parameter.
        """
        for name, expected in self.manifest["files"].items():
            path = self.folder / name
            size = path.stat().st_size if path.exists() else None
            if size != expected["bytes"] or sha256_of(path) != expected["sha256"]:
                raise ConfigError(
                    f"{path}: not the file that was saved (size {size}, saved "
                    f"{expected['bytes']}, or another SHA-256); take another checkpoint"
                )
        for name, shape in self.manifest["parameters"].items():
            end = 0
            for part in sorted(self.ranges.get(("master", name), []), key=lambda r: r.start):
                if part.start != end:
                    break
                end = part.stop
            if end != torch.Size(shape).numel():
                raise ConfigError(
                    f"{self.folder}: {name} is stored up to element {end} of "
                    f"{torch.Size(shape).numel()}; take another checkpoint"
                )

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of a flattened tensor, 1-D; or its one value, 0-D."""
        parts = []
        for part in sorted(self.ranges[kind, name], key=lambda r: r.start):
            low, high = max(start, part.start), min(stop, part.stop)
            if low >= high:
                continue
            stored = self._files[part.file].get_slice(part.key)
            if not stored.get_shape():
                return self._files[part.file].get_tensor(part.key)
            parts.append(stored[low - part.start : high - part.start])
        return torch.cat(parts)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: not there; name a folder that engine.save_checkpoint wrote"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}; take another checkpoint") from error
    return content


def load_checkpoint(
    sharded: ShardedModel,
    optimizer: torch.optim.Optimizer,
    folder: Path,
    *,
    load_optimizer_state: bool = True,
) -> dict[str, Any]:
    """Read the masters, and the optimizer state, of this rank's shards from any plan's files.

    The caller distributes the weights afterwards.

    :returns: the ``state`` that was saved.
    :raises ConfigError: when a file is not what was saved, or is of another model.
    """
    with ExitStack() as stack, torch.no_grad():
        reader = CheckpointReader(folder, stack)
        reader.verify()
        _check_same_model(sharded, reader.manifest["parameters"], folder)
        slices = [piece for unit in sharded.owned for piece in unit.slices]
        for piece in slices:
            piece.tensor.copy_(reader.read("master", piece.name, piece.start, piece.stop))
        if load_optimizer_state:
            _load_optimizer(optimizer, slices, reader)
        rng_key = (RNG, str(sharded.subnetwork.rank))
        if rng_key in reader.ranges:
            numel = reader.ranges[rng_key][0].stop
            torch.set_rng_state(reader.read(*rng_key, 0, numel))
        return reader.state


def _check_same_model(sharded: ShardedModel, saved: Mapping[str, list[int]], folder: Path) -> None:
    here = {spec.name: list(spec.shape) for spec in sharded.subnetwork.layout.parameters}
    different = [name for name in {**here, **saved} if here.get(name) != saved.get(name)]
    if different:
        name = different[0]
        raise ConfigError(
            f"{folder}: {name} has shape {saved.get(name)} there and {here.get(name)} in this "
            f"model ({len(different)} parameters differ); use the config it was trained with"
        )


def _load_optimizer(
    optimizer: torch.optim.Optimizer, slices: list[ParameterSlice], reader: CheckpointReader
) -> None:
    by_tensor = {piece.tensor: piece for piece in slices}
    kinds = {kind for kind, _ in reader.ranges} - {"master", RNG}
    content = optimizer.state_dict()
    index = 0
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            piece = by_tensor[tensor]
            content["state"][index] = {
                kind: reader.read(kind, piece.name, piece.start, piece.stop)
                for kind in kinds
                if (kind, piece.name) in reader.ranges
            }
            index += 1
    # torch's own loading puts each value on the device, and in the type, that it must have.
    optimizer.load_state_dict(content)

"""Reading a checkpoint, written by any number of ranks under any plan."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdp_llm.activity import ACTIVITY
from sdp_llm.agree import agree
from sdp_llm.checkpoint.coverage import (
    CUDA_RNG,
    RNG,
    Ranges,
    coverage_error,
    stored_ranges,
)
from sdp_llm.checkpoint.find import is_plain_name, named_by
from sdp_llm.checkpoint.save import FORMAT_VERSION, LATEST, MANIFEST, STATE, seal
from sdp_llm.errors import ConfigError, DamagedCheckpoint
from sdp_llm.files import sha256_of
from sdp_llm.sharding.materialize import ShardedModel
from sdp_llm.sharding.unit import MASTER, ParameterSlice
from sdp_llm.subnetwork.build import Subnetwork

# What of a model's config does not change what its weights compute.
_NOT_THE_MODEL = (
    "_name_or_path",
    "architectures",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a model's config that must stay the same when a run goes on."""
    return {
        key: value
        for key, value in json.loads(json.dumps(config)).items()
        if key not in _NOT_THE_MODEL and "drop" not in key
    }


class CheckpointReader:
    """The tensors of one checkpoint folder, by kind and global name.

    :raises DamagedCheckpoint: when the folder is not a complete checkpoint of this format.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.manifest = _read_json(folder / MANIFEST)
        if self.manifest.get("sha256") != seal(self.manifest):
            raise _damaged(folder / MANIFEST, "not the file that was saved (another SHA-256)")
        version = self.manifest.get("format_version")
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"{folder / MANIFEST}: format version {version!r}; this version reads "
                f"{FORMAT_VERSION}: load it with the version that wrote it"
            )
        if not _is_well_formed(self.manifest):
            raise _damaged(folder / MANIFEST, "does not describe files and parameters")
        self.state = read_state(folder)
        self._files: dict[str, Any] = {}
        for name in self.manifest["files"]:
            if name.endswith(".safetensors"):
                try:
                    self._files[name] = stack.enter_context(safe_open(folder / name, "pt"))
                except (OSError, SafetensorError) as error:
                    raise _damaged(folder / name, error) from error
        try:
            self.ranges: Ranges = stored_ranges(
                (name, key)
                for name, file in self._files.items()
                for key in file.keys()  # noqa: SIM118 - not a dict
            )
        except ValueError as error:
            raise _damaged(folder, f"a tensor's key cannot be read: {error}") from error

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Check size and SHA-256 of the files, and that they cover each parameter once.

        :param part: read only the ``part``-th of ``parts`` equal shares of the files.
        :raises DamagedCheckpoint: naming the file or the parameter.
        """
        problem = coverage_error(self.ranges, self.manifest["parameters"])
        if problem is not None:
            raise _damaged(self.folder, problem)
        files = self.manifest["files"]
        for name in sorted(files, key=lambda name: (-files[name]["bytes"], name))[part::parts]:
            ACTIVITY.beat()
            path = self.folder / name
            try:
                size = path.stat().st_size
                is_same = size == files[name]["bytes"] and sha256_of(path) == files[name]["sha256"]
            except OSError as error:
                raise _damaged(path, error) from error
            if not is_same:
                raise _damaged(
                    path,
                    f"not the file that was saved (size {size}, saved {files[name]['bytes']}, or "
                    "another SHA-256)",
                )

    def check_parameters(self, here: Mapping[str, list[int]], fix: str) -> None:
        """Check that the checkpoint is of a model with these parameters.

        :param here: the shape of every parameter, by global name.
        :param fix: what to do otherwise, for the message.
        :raises ConfigError: naming the first parameter that differs.
        """
        saved = self.manifest["parameters"]
        different = [name for name in {**here, **saved} if here.get(name) != saved.get(name)]
        if different:
            name = different[0]
            there, this = saved.get(name, "absent"), here.get(name, "absent")
            raise ConfigError(
                f"{self.folder}: {name} is {there} there and {this} in this model "
                f"({len(different)} parameters differ); {fix}"
            )

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of a flattened tensor, 1-D; or its one value, 0-D."""
        ACTIVITY.beat()
        parts = []
        for part in self.ranges[kind, name]:
            low, high = max(start, part.start), min(stop, part.stop)
            if low >= high:
                continue
            try:
                stored = self._files[part.file].get_slice(part.key)
                if not stored.get_shape():
                    # A copy: what is handed out would keep the file, and its place on the disk.
                    return self._files[part.file].get_tensor(part.key).clone()
                parts.append(stored[low - part.start : high - part.start])
            except (OSError, SafetensorError) as error:
                raise _damaged(self.folder / part.file, error) from error
        return torch.cat(parts)


def _is_well_formed(manifest: Mapping[str, Any]) -> bool:
    """Whether the manifest names files of its own folder, and shapes."""
    files, parameters = manifest.get("files"), manifest.get("parameters")
    if not isinstance(files, dict) or not isinstance(parameters, dict):
        return False
    are_files = all(
        is_plain_name(name)
        and isinstance(entry, dict)
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("sha256"), str)
        for name, entry in files.items()
    )
    return are_files and all(
        isinstance(shape, list) and all(isinstance(size, int) and size >= 0 for size in shape)
        for shape in parameters.values()
    )


def _damaged(path: Path, reason: object) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"{path}: {reason}; take another checkpoint")


def read_state(folder: Path) -> dict[str, Any]:
    """The ``state`` that a checkpoint was saved with."""
    return _read_json(folder / STATE)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedCheckpoint(
            f"{path}: not there; name a folder that engine.save_checkpoint wrote"
        ) from None
    except (ValueError, OSError, RecursionError) as error:
        raise _damaged(path, error) from error
    if not isinstance(content, dict):
        raise _damaged(path, "not a JSON object")
    return content


def latest_tag(folder: Path) -> str:
    """The checkpoint in ``folder`` that was saved last.

    :raises ConfigError: when there is none.
    """
    latest = folder / LATEST
    if not latest.is_file():
        raise ConfigError(f"{latest}: not there; save a checkpoint first or name a tag")
    return named_by(latest)


@contextmanager
def open_checkpoint(subnetwork: Subnetwork, folder: Path) -> Iterator[CheckpointReader]:
    """Open and verify a checkpoint of this model. Collective: the ranks share the verification.

    :raises DamagedCheckpoint: on every rank, when a file is not what was saved.
    :raises ConfigError: on every rank, when it is of another model.
    """
    with ExitStack() as stack:
        readers: list[CheckpointReader] = []

        def open_and_verify() -> None:
            readers.append(CheckpointReader(folder, stack))
            readers[0].verify(dist.get_rank(), dist.get_world_size())

        agree(open_and_verify)
        _check_same_model(subnetwork, readers[0], folder)
        yield readers[0]


@torch.no_grad()
def load_tensors(
    sharded: ShardedModel, optimizer: torch.optim.Optimizer | None, reader: CheckpointReader
) -> None:
    """Read the masters, and the optimizer's state, of this rank's shards from any plan's files.

    The caller distributes the weights afterwards.

    :raises DamagedCheckpoint: on this rank, when a file cannot be read.
    """
    slices = [piece for unit in sharded.owned for piece in unit.slices]
    for piece in slices:
        piece.tensor.copy_(reader.read(MASTER, piece.name, piece.start, piece.stop))
    if optimizer is not None:
        _load_optimizer(optimizer, slices, reader)


def restore_random(sharded: ShardedModel, reader: CheckpointReader) -> None:
    """Go on with this rank's random numbers, where there was such a rank, on such a device."""
    rank, device = dist.get_rank(), sharded.device

    def saved(kind: str) -> Tensor | None:
        parts = reader.ranges.get((kind, str(rank)))
        return reader.read(kind, str(rank), 0, parts[-1].stop) if parts else None

    state = saved(RNG)
    if state is not None:
        torch.set_rng_state(state)
    state = saved(CUDA_RNG)
    if state is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state, device)


def _check_same_model(subnetwork: Subnetwork, reader: CheckpointReader, folder: Path) -> None:
    here = {spec.name: list(spec.shape) for spec in subnetwork.layout.parameters}
    reader.check_parameters(here, "use the config it was trained with")
    if "model" not in reader.state:
        return
    there = architecture(reader.state["model"])
    ours = architecture(subnetwork.config.to_dict())
    for key in {**there, **ours}:
        if there.get(key) != ours.get(key):
            raise ConfigError(
                f"{folder}: the model has {key} = {json.dumps(there.get(key))} there and "
                f"{json.dumps(ours.get(key))} here; use the config it was trained with"
            )


def _load_optimizer(
    optimizer: torch.optim.Optimizer, slices: list[ParameterSlice], reader: CheckpointReader
) -> None:
    by_tensor = {piece.tensor: piece for piece in slices}
    kinds = {kind for kind, _ in reader.ranges} - {MASTER, RNG, CUDA_RNG}
    content = optimizer.state_dict()
    content["state"] = {}
    optimizer.state.clear()  # so that there are never two states
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

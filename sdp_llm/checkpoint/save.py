"""Training state, each range of each tensor once, under global names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sdp_llm.checkpoint.together import (
    WrittenFile,
    agree,
    replace_text,
    write_json,
    write_together,
    written,
)
from sdp_llm.errors import ConfigError
from sdp_llm.sharding.materialize import ShardedModel

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.json"
RNG = "rng"


def tensor_key(kind: str, name: str, start: int, stop: int) -> str:
    """The key of elements ``start`` to ``stop`` of the flattened tensor ``name``.

    :param kind: ``master`` or the name of an optimizer state tensor, such as ``exp_avg``.
    """
    return f"{kind}|{name}|{start}|{stop}"


def parse_key(key: str) -> tuple[str, str, int, int]:
    """The parts of a :func:`tensor_key`."""
    kind, name, start, stop = key.split("|")
    return kind, name, int(start), int(stop)


def save_checkpoint(
    sharded: ShardedModel,
    optimizer: torch.optim.Optimizer,
    folder: Path,
    tag: str,
    state: dict[str, Any],
    *,
    save_latest: bool = True,
) -> None:
    """Write ``folder/tag``, which appears complete or not at all, then ``folder/latest``.

    Collective over the world. Each owner writes the fp32 masters and the optimizer state of its
    shard; together they cover every parameter once, which is what lets another number of ranks
    or another plan read it.

    :param state: what else is needed to go on, JSON only; rank 0's is written.
    :raises ConfigError: on every rank, when one cannot write; or when ``state`` is not JSON.
    """
    rank = sharded.subnetwork.rank

    def check() -> None:
        try:
            json.dumps(state)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"client_state: {error}; checkpoints hold JSON and tensors only: use plain values"
            ) from error

    def write(partial: Path) -> list[WrittenFile]:
        path = partial / f"rank-{rank:05d}.safetensors"
        save_file(dict(_own_ranges(sharded, optimizer)), path)
        return [written(path)]

    def finish(partial: Path, files: list[WrittenFile]) -> None:
        files = [*files, write_json(partial / STATE, state)]
        parameters = {s.name: list(s.shape) for s in sharded.subnetwork.layout.parameters}
        manifest = {
            "format_version": FORMAT_VERSION,
            "files": {f.name: {"bytes": f.size, "sha256": f.sha256} for f in files},
            "parameters": parameters,
        }
        write_json(partial / MANIFEST, manifest)

    def name_latest() -> None:
        if save_latest and rank == 0:
            replace_text(folder / "latest", tag)

    agree(check)
    write_together(folder / tag, write, finish)
    # Together: no rank goes on, and perhaps loads, before ``latest`` is there.
    agree(name_latest)


def _own_ranges(
    sharded: ShardedModel, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, Tensor]]:
    for unit in sharded.owned:
        for piece in unit.slices:
            # At stage 0 a slice is the whole parameter on every owner; each writes its shard.
            start = max(piece.start, unit.shard.start - piece.offset)
            stop = min(piece.stop, unit.shard.stop - piece.offset)
            if start >= stop:
                continue
            own = slice(start - piece.start, stop - piece.start)
            yield tensor_key("master", piece.name, start, stop), _copy(piece.tensor[own])
            for kind, value in optimizer.state.get(piece.tensor, {}).items():
                value = value if isinstance(value, Tensor) else torch.tensor(float(value))
                part = value[own] if value.dim() else value
                yield tensor_key(kind, piece.name, start, stop), _copy(part)
    rng = torch.get_rng_state()
    yield tensor_key(RNG, str(sharded.subnetwork.rank), 0, rng.numel()), rng


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()

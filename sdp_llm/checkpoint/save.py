"""Training state, each range of each tensor once, under global names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdp_llm.agree import agree
from sdp_llm.checkpoint.coverage import (
    CUDA_RNG,
    RNG,
    coverage_error,
    stored_ranges,
    tensor_key,
)
from sdp_llm.checkpoint.shared_folder import SharedFolder, WrittenFile, write_json
from sdp_llm.checkpoint.stream import read_header, write_tensors
from sdp_llm.errors import ConfigError, UnnamedCheckpoint
from sdp_llm.files import replace_text
from sdp_llm.sharding.materialize import ShardedModel
from sdp_llm.sharding.unit import MASTER

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.json"
LATEST = "latest"


def seal(manifest: dict[str, Any]) -> str:
    """The SHA-256 of a manifest's other entries, which it carries itself."""
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_tag(folder: Path, tag: str) -> None:
    shown = f"tag = {json.dumps(tag)}"
    if tag in ("", LATEST) or tag.startswith(".") or Path(tag).name != tag:
        raise ConfigError(
            f'{shown}: expected the name of a folder, other than "{LATEST}"; take for instance '
            '"best"'
        )
    if (folder / tag).exists() and not (folder / tag / MANIFEST).exists():
        raise ConfigError(
            f"{shown}: {folder / tag} is there and no checkpoint, it would be lost; take another "
            "tag, or move it"
        )


def _as_json(part: str, value: Any) -> Any:
    """What the JSON of a value is read as."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{part}: {error}; checkpoints hold JSON and tensors only: use plain values"
        ) from error


class CheckpointWriting:
    """A checkpoint on its way to ``folder/tag``, which appears complete or not at all.

    Each owner writes the fp32 masters and the optimizer state of its shard, tensor by tensor;
    together they cover every parameter once, which is checked, and lets another number of ranks or
    another plan read it. :meth:`begin`, :meth:`write` and :meth:`finish` come in this order.

    :param state: what else is needed to go on, JSON only; rank 0's is written.
    :param rank: which of the ranks this is.
    :param shapes: of all parameters of the whole model, by name.
    :param save_latest: whether ``folder/latest`` names it in the end.
    """

    def __init__(
        self,
        folder: Path,
        tag: str,
        state: dict[str, Any],
        *,
        rank: int,
        shapes: Mapping[str, Sequence[int]],
        save_latest: bool = True,
    ) -> None:
        self._folder = folder
        self._tag = tag
        self._state = state
        self._rank = rank
        self._shapes = {name: list(shape) for name, shape in shapes.items()}
        self._save_latest = save_latest
        self._shared = SharedFolder(folder / tag)

    def begin(self) -> None:
        """Check the tag and the state, and make place. Collective over the world.

        :raises ConfigError: on every rank, when the tag is no name for a checkpoint, ``state`` is
            not JSON or one cannot write.
        """

        def check() -> None:
            _check_tag(self._folder, self._tag)
            # A copy: the caller may change it while a background save writes.
            self._state = {part: _as_json(part, value) for part, value in self._state.items()}

        agree(check)
        self._shared.prepare()

    def write(self, tensors: Sequence[tuple[str, Tensor]]) -> list[WrittenFile]:
        """Write this rank's tensors, in any thread; :func:`own_ranges` or a copy of them."""
        path = self._shared.partial / f"rank-{self._rank:05d}.safetensors"
        return [write_tensors(path, tensors)]

    def finish(self, write: Callable[[], list[WrittenFile]]) -> None:
        """Check that all is there and give it its name. Collective over the world.

        :param write: what :meth:`write` did or does.
        :raises ConfigError: on every rank, when one could not write. What was saved before is then
            as it was, and what was written is gone.
        :raises UnnamedCheckpoint: on every rank, when only ``latest`` could not be written.
        """
        self._shared.complete(write, self._describe)
        # Together: no rank goes on, and perhaps loads, before ``latest`` is there.
        agree(self._name_latest)

    def _describe(self, partial: Path, files: list[WrittenFile]) -> None:
        keys = ((file.name, key) for file in files for key in read_header(partial / file.name))
        problem = coverage_error(stored_ranges(keys), self._shapes)
        if problem is not None:
            raise ConfigError(
                f"{self._folder / self._tag}: {problem}; not saved, as it could not be loaded"
            )
        files = [*files, write_json(partial / STATE, self._state)]
        manifest = {
            "format_version": FORMAT_VERSION,
            "files": {f.name: {"bytes": f.size, "sha256": f.sha256} for f in files},
            "parameters": self._shapes,
        }
        write_json(partial / MANIFEST, manifest | {"sha256": seal(manifest)})

    def _name_latest(self) -> None:
        if not self._save_latest or self._rank != 0:
            return
        latest = self._folder / LATEST
        try:
            replace_text(latest, self._tag)
        except OSError as error:
            raise UnnamedCheckpoint(
                f"{latest}: cannot be written, so it does not name the checkpoint {self._tag}, "
                f"which is complete: {error}; make it a file that can be written, or load with "
                f"tag={json.dumps(self._tag)}"
            ) from error


def own_ranges(
    sharded: ShardedModel, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, Tensor]]:
    """Views of what this rank writes: nothing is copied yet."""
    for unit in sharded.owned:
        for piece in unit.slices:
            # At stage 0 a slice is the whole parameter on every owner; each writes its shard.
            start = max(piece.start, unit.shard.start - piece.offset)
            stop = min(piece.stop, unit.shard.stop - piece.offset)
            if start >= stop:
                continue
            own = slice(start - piece.start, stop - piece.start)
            yield tensor_key(MASTER, piece.name, start, stop), piece.tensor[own]
            # Sorted: equal states are equal files, also after a load.
            for kind, value in sorted(optimizer.state.get(piece.tensor, {}).items()):
                value = value if isinstance(value, Tensor) else torch.tensor(float(value))
                part = value[own] if value.dim() else value
                yield tensor_key(kind, piece.name, start, stop), part
    # Last, because their sizes need not be a multiple of what the others are aligned to.
    for kind, states in random_states(sharded.device).items():
        yield tensor_key(kind, str(sharded.subnetwork.rank), 0, states.numel()), states


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The states of this rank's random generators, by kind."""
    states = {RNG: torch.get_rng_state()}
    if device.type == "cuda":
        states[CUDA_RNG] = torch.cuda.get_rng_state(device)
    return states

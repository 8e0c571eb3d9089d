"""All live tensor storages of this process, found from outside and sorted.

Nothing is taken from the library's own accounting: the garbage collector lists every Python
object, tensors lead to further tensors (gradients, bases of views), and each storage counts once
and whole, by its data pointer.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sdp_llm.engine import SDPEngine

MODEL_STATE = ("weights", "gradients", "optimizer")

StorageKey = tuple[str, int]  # device and data pointer


@dataclass(frozen=True)
class SortedStorages:
    """Bytes by category, and what is in none: bytes, shape and dtype, largest first."""

    weights: int
    gradients: int
    optimizer: int
    other: int
    others: tuple[tuple[int, tuple[int, ...], str], ...]

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.other


def live_storages() -> dict[StorageKey, Tensor]:
    """Every live storage that has memory, with a tensor that uses it."""
    gc.collect()
    found: dict[StorageKey, Tensor] = {}
    for tensor in _live_tensors():
        key = _key(tensor)
        if key is not None:
            found.setdefault(key, tensor)
    return found


def sort_storages(members: Mapping[str, Iterable[Tensor]]) -> SortedStorages:
    """Sort what :func:`live_storages` finds between steps.

    :param members: tensors of each of :data:`MODEL_STATE`. A storage that belongs to several
        counts for the first: where masters are views of the weights, as weights.
    """
    remaining = {key: (t.untyped_storage().nbytes(), t) for key, t in live_storages().items()}
    counts = dict.fromkeys(MODEL_STATE, 0)
    for category in MODEL_STATE:
        for tensor in members[category]:
            key = _key(tensor)
            if key in remaining:
                counts[category] += remaining.pop(key)[0]
    others = sorted(
        ((size, tuple(t.shape), str(t.dtype)) for size, t in remaining.values()), reverse=True
    )
    return SortedStorages(**counts, other=sum(size for size, *_ in others), others=tuple(others))


def engine_members(engine: SDPEngine) -> dict[str, list[Tensor]]:
    """Weights are the units' ``flat``, gradients their ``grad``, optimizer masters and moments."""
    units = engine.sharded.units
    owned = [unit for unit in units if unit.is_owner]
    return {
        "weights": [unit.flat for unit in units],
        "gradients": [unit.grad for unit in owned],
        "optimizer": [*(unit.master for unit in owned), *state_tensors(engine.basic_optimizer)],
    }


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors in an optimizer's state."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return [value for value in values if isinstance(value, Tensor)]


def _live_tensors() -> Iterator[Tensor]:
    for thing in gc.get_objects():
        # isinstance would ask proxies for their class, which may run code.
        if not issubclass(type(thing), Tensor):
            continue
        yield thing
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the gradient of a tensor that has none
            related = (thing.grad, thing._base)
        yield from (tensor for tensor in related if tensor is not None)


def _key(tensor: Tensor) -> StorageKey | None:
    """None for a tensor without memory: on the meta device, fake or empty."""
    if tensor.is_meta or tensor.layout != torch.strided:
        return None
    try:
        storage = tensor.untyped_storage()
        pointer = storage.data_ptr()
    except (NotImplementedError, RuntimeError):
        return None
    return (str(tensor.device), pointer) if storage.nbytes() and pointer else None

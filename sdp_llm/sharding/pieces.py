"""What an owner optimises of a unit, taken out of it, so that it can travel to another owner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sdp_llm.activity import ACTIVITY
from sdp_llm.plan.move import Move, optimised_bounds, transfers
from sdp_llm.sharding.collectives import Communicator
from sdp_llm.sharding.unit import MASTER, Unit
from sdp_llm.subnetwork.adapter import ParameterSpec, UnitLayout


@dataclass(frozen=True)
class Piece:
    """Elements ``start`` to ``stop`` of one flattened parameter: master and optimizer state.

    ``tensors`` has them by kind, 1-D.
    """

    start: int
    stop: int
    tensors: dict[str, Tensor]

    def part(self, kind: str, start: int, stop: int) -> Tensor:
        """A view of elements ``start`` to ``stop`` of the parameter."""
        return self.tensors[kind][start - self.start : stop - self.start]


Pieces = dict[str, Piece]  # by the parameter's global name


@dataclass(frozen=True)
class Scalar:
    """A value that the optimizer keeps for a whole parameter, such as its count of steps.

    ``dtype`` is None where it is no tensor.
    """

    value: Any
    dtype: torch.dtype | None = None
    is_on_device: bool = False

    def copy(self, device: torch.device) -> Any:
        """The value as it was found: each piece of a parameter counts for itself."""
        if self.dtype is None:
            return self.value
        where = device if self.is_on_device else "cpu"
        return torch.tensor(self.value, dtype=self.dtype, device=where)


# What the optimizer keeps for each parameter, by kind: the type of a tensor as long as the
# parameter, or the value that all of it has.
Description = Mapping[str, Mapping[str, torch.dtype | Scalar]]


def describe(units: Sequence[Unit], inner: torch.optim.Optimizer) -> Description:
    """What this rank knows about the optimizer's state: of parameters that begin in its shards."""
    return {
        piece.name: {
            kind: _described(value, piece.tensor)
            for kind, value in inner.state.get(piece.tensor, {}).items()
        }
        for unit in units
        for piece in unit.slices
        if piece.start == 0
    }


def _described(value: Any, parameter: Tensor) -> torch.dtype | Scalar:
    if not isinstance(value, Tensor):
        return Scalar(value)
    if value.dim() > 0:
        return value.dtype
    return Scalar(value.item(), value.dtype, value.device == parameter.device)


def take(unit: Unit, inner: torch.optim.Optimizer) -> Pieces:
    """Take out what this rank optimises; nothing is left that needs the rest of the unit."""
    taken = {}
    for piece in unit.slices:
        master = piece.tensor.detach()
        if unit.is_master_part_of_weights:
            master = master.clone()
        state = inner.state.pop(piece.tensor, {})
        moments = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.dim() > 0}
        taken[piece.name] = Piece(piece.start, piece.stop, {MASTER: master, **moments})
    return taken


@torch.no_grad()
def put(unit: Unit, pieces: Pieces, inner: torch.optim.Optimizer, known: Description) -> None:
    """Put into an owner's new unit, and under its slices, what was moved here; empties ``pieces``.

    :param known: what the owners before had, of every parameter of the unit.
    """
    for piece in unit.slices:
        tensors = pieces.pop(piece.name).tensors
        piece.tensor.copy_(tensors.pop(MASTER))
        if known[piece.name]:
            inner.state[piece.tensor] = {
                kind: entry.copy(piece.tensor.device)
                if isinstance(entry, Scalar)
                else tensors[kind]
                for kind, entry in known[piece.name].items()
            }


def exchange(
    layout: UnitLayout,
    move: Move,
    held: Pieces,
    known: Description,
    communicator: Communicator,
    *,
    rank: int,
    stage: int,
    device: torch.device,
) -> Pieces:
    """Give the new owners of a unit what the old ones hold. Collective over both.

    :param held: this rank's pieces; none where it was no owner.
    :returns: this rank's pieces afterwards; where one stays the same, its tensors do too.
    """
    bounds = optimised_bounds(move.numel, move.new, rank, stage)
    new = {
        spec.name: _place(spec.name, start, stop, held, known, device)
        for spec, start, stop in _cut(layout, *bounds)
    }
    operations = []
    for transfer in transfers(move, stage):
        if rank not in (transfer.source, transfer.target):
            continue
        for spec, start, stop in _cut(layout, transfer.start, transfer.stop):
            for kind in _kinds(known[spec.name]):
                if rank != transfer.source:
                    target = new[spec.name].part(kind, start, stop)
                    operations.append(dist.P2POp(dist.irecv, target, transfer.source))
                elif rank != transfer.target:
                    source = held[spec.name].part(kind, start, stop)
                    operations.append(dist.P2POp(dist.isend, source, transfer.target))
                elif new[spec.name] is not held[spec.name]:
                    source = held[spec.name].part(kind, start, stop)
                    new[spec.name].part(kind, start, stop).copy_(source)
    with ACTIVITY.waiting(f"new owners of {layout.name}", sorted({*move.old, *move.new})):
        communicator.transfer(operations).wait()
    ACTIVITY.beat()
    return new


def _place(
    name: str, start: int, stop: int, held: Pieces, known: Description, device: torch.device
) -> Piece:
    """Where elements ``start`` to ``stop`` of a parameter are to be."""
    if name in held and (held[name].start, held[name].stop) == (start, stop):
        return held[name]
    tensors = {
        kind: torch.empty(stop - start, dtype=dtype, device=device)
        for kind, dtype in _kinds(known[name]).items()
    }
    return Piece(start, stop, tensors)


def _kinds(state: Mapping[str, torch.dtype | Scalar]) -> dict[str, torch.dtype]:
    """What travels of a parameter, in one order on all ranks, and its types."""
    moments = {k: entry for k, entry in state.items() if isinstance(entry, torch.dtype)}
    return {MASTER: torch.float32, **moments}


def _cut(layout: UnitLayout, start: int, stop: int) -> Iterator[tuple[ParameterSpec, int, int]]:
    """The parameters in elements ``start`` to ``stop`` of a unit, and which elements of each."""
    offset = 0
    for spec in layout.parameters:
        low, high = max(start, offset), min(stop, offset + spec.numel)
        if low < high:
            yield spec, low - offset, high - offset
        offset += spec.numel

"""The storage of one unit on one rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sdp_llm.activity import ACTIVITY
from sdp_llm.sharding.collectives import Pending
from sdp_llm.subnetwork.adapter import UnitLayout

MASTER = "master"  # beside the names that an optimizer gives the tensors of its state


@dataclass(frozen=True)
class ParameterSlice:
    """A contiguous range of one parameter, which this rank optimises.

    ``tensor`` (1-D, fp32) is a view into the unit's master; its ``grad`` a view into the unit's
    gradient. ``start`` and ``stop`` count elements of the flattened parameter ``name``, whose
    first element stands at ``offset`` in the unit.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    start: int
    stop: int
    tensor: nn.Parameter


class Unit:
    """The weights of one unit, and on an owner its shard of gradient and optimizer state.

    ``flat`` (1-D, weights' dtype) holds the unit's parameters one after the other, zero-padded to
    a multiple of ``p``; whoever asks for it gets it when all of it has arrived. An owner has
    besides

    - ``master`` (1-D, fp32): what the optimizer updates: all of ``flat`` at stage 0, this rank's
      shard of it otherwise. Where the weights are fp32 it is a view of ``flat``.
    - ``grad`` (1-D, fp32): the accumulated gradient, of all of ``flat`` at stages 0 and 1, of
      the shard at stage 2.
    - ``shard_grad``: the part of ``grad`` that only this owner counts: the owners' are disjoint.
    - ``optimised_grad``: the part of ``grad`` that belongs to ``master``.
    - ``is_averaged``: whether at stages 0 and 1 ``shard_grad`` is the owners' average already.

    :param values: the fp32 initial value of every parameter, by global name. The masters are
        taken from them, before anything is cast. None: all zeros.
    :param group: the owner set's process group, None where the owner set is one rank.
    """

    def __init__(
        self,
        layout: UnitLayout,
        values: Mapping[str, Tensor] | None,
        *,
        owners: Sequence[int],
        group: dist.ProcessGroup | None,
        rank: int,
        stage: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layout = layout
        self.owners = tuple(owners)
        self.group = group
        self.is_owner = rank in self.owners
        self.offsets: list[int] = []
        offset = 0
        for spec in layout.parameters:
            self.offsets.append(offset)
            offset += spec.numel
        p = len(self.owners)
        shard_numel = -(-layout.numel // p)
        whole = slice(0, shard_numel * p)
        self._arriving: list[Pending] = []
        self._flat = self._filled(values, whole, dtype, device)
        if not self.is_owner:
            return
        first = self.owners.index(rank) * shard_numel
        self.shard = slice(first, first + shard_numel)
        self._optimised = whole if stage == 0 else self.shard
        self.master = self._flat[self._optimised]
        if dtype != torch.float32:
            self.master = self._filled(values, self._optimised, torch.float32, device)
        kept = self.master if stage == 2 else self._flat
        self.grad = torch.zeros_like(kept, dtype=torch.float32)
        self.shard_grad = self.grad if stage == 2 else self.grad[self.shard]
        self.optimised_grad = self.grad if stage == 0 else self.shard_grad
        self.is_averaged = False
        self.slices = tuple(self._parameter_slices())

    @property
    def flat(self) -> Tensor:
        self.wait()
        return self._flat

    def expect(self, pending: Pending) -> None:
        """Note that a collective under way fills ``flat``."""
        self._arriving.append(pending)

    def wait(self) -> None:
        """Return when the weights may be used by what is computed next."""
        while self._arriving:
            with ACTIVITY.waiting(f"weights of {self.layout.name}", self.owners):
                self._arriving.pop(0).wait()

    def release(self) -> None:
        """Give up the storage, whoever still knows this unit; it is of no use any more."""
        self.wait()
        for name in ("_flat", "master", "grad", "shard_grad", "optimised_grad", "slices"):
            self.__dict__.pop(name, None)

    def views(self) -> dict[str, Tensor]:
        """Each parameter's view into ``flat``, by global name."""
        return {
            spec.name: self.flat[start : start + spec.numel].view(spec.shape)
            for spec, start in zip(self.layout.parameters, self.offsets, strict=True)
        }

    @property
    def is_master_part_of_weights(self) -> bool:
        """Whether ``master`` is a view of a part of ``flat``, and keeps all of it alive."""
        return self.dtype == torch.float32 and self.master.numel() < self._flat.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self._flat.dtype

    @property
    def device(self) -> torch.device:
        """Of everything."""
        return self._flat.device

    def reopen(self) -> None:
        """Let ``grad`` take more at stage 1 after it was averaged.

        The other owners' slices of it are spent, and the average must come out of the next
        reduction, which divides by ``p``, as it is.
        """
        average = self.shard_grad * len(self.owners)
        self.grad.zero_()
        self.shard_grad.copy_(average)
        self.is_averaged = False

    def cast_masters(self) -> None:
        """Write the updated masters into the weights; nothing to do where they are a view."""
        if self.dtype != torch.float32:
            self.flat[self._optimised] = self.master

    def _filled(
        self,
        values: Mapping[str, Tensor] | None,
        part: slice,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """The elements ``part`` of the unit, without a copy of the whole unit on the way."""
        filled = torch.zeros(part.stop - part.start, dtype=dtype, device=device)
        if values is None:
            return filled
        for spec, offset in zip(self.layout.parameters, self.offsets, strict=True):
            start, stop = max(part.start, offset), min(part.stop, offset + spec.numel)
            if start < stop:
                value = values[spec.name].flatten()[start - offset : stop - offset]
                filled[start - part.start : stop - part.start] = value
        return filled

    def _parameter_slices(self) -> list[ParameterSlice]:
        first, last = self._optimised.start, self._optimised.stop
        found = []
        for spec, offset in zip(self.layout.parameters, self.offsets, strict=True):
            start, stop = max(first, offset), min(last, offset + spec.numel)
            if start >= stop:
                continue
            tensor = nn.Parameter(self.master[start - first : stop - first])
            tensor.grad = self.optimised_grad[start - first : stop - first]
            inside = (start - offset, stop - offset)
            found.append(ParameterSlice(spec.name, spec.shape, offset, *inside, tensor))
        return found

"""How alike the owners' gradients of a unit are, measured while they are reduced.

Owners of a unit see different samples through different subnetworks. The mean cosine similarity
over the pairs of its ``p`` owners says how much of what they learn they agree on. It is had
without any owner seeing another's gradient: for ``u_i = g_i / |g_i|``,

    mean over i != j of u_i . u_j  =  (|sum_i u_i|^2 - sum_i |u_i|^2) / (p (p - 1))

and the sum is reduce-scattered like the gradient itself, in fp32. A step that is measured reduces
each unit twice, one after the other, and needs two more fp32 buffers of at most a unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdp_llm.activity import ACTIVITY
from sdp_llm.sharding.materialize import ShardedModel
from sdp_llm.sharding.norm import squared_norm
from sdp_llm.sharding.unit import Unit
from sdp_llm.world import all_reduce


class GradientProbe:
    """Measures the pass in whose reductions :meth:`see` is called; then :meth:`results`.

    A piece of a unit that was split counts as a unit of its own.
    """

    def __init__(self, sharded: ShardedModel) -> None:
        self._sharded = sharded
        names = [unit.name for unit in sharded.subnetwork.layout.units]
        self._places = {name: i for i, name in enumerate(names)}
        # By unit: |sum of u_i|^2, sum of |u_i|^2, |averaged gradient|^2.
        shape = (len(names), 3)
        self._sums = torch.zeros(shape, dtype=torch.float64, device=sharded.device)

    def see(self, unit: Unit, gradient: Tensor) -> None:
        """Take part in the sum of the owners' directions. Collective over the owners.

        :param gradient: what this owner adds to the unit's average, 1-D, up to a factor.
        """
        assert unit.group is not None
        direction = gradient.to(torch.float32, copy=True)
        norm = squared_norm(direction).sqrt().to(torch.float32)
        # A gradient of zeros has no direction: it is like none of the others.
        direction /= norm.clamp_min(torch.finfo(torch.float32).tiny)
        communicator = self._sharded.communicator
        numel = communicator.received_numel(direction.numel(), unit.group)
        summands, pending = communicator.reduce_scatter(
            direction, direction.new_empty(numel), unit.group
        )
        with ACTIVITY.waiting(f"likeness of the gradients of {unit.layout.name}", unit.owners):
            pending.wait()
        total = summands[0]
        for summand in summands[1:]:
            total += summand
        sums = self._sums[self._places[unit.layout.name]]
        sums[0] += squared_norm(total)
        sums[1] += (norm > 0).double()

    def results(self) -> dict[str, tuple[float, float | None]]:
        """By unit, in forward order: the norm of the averaged gradient, and the mean cosine.

        The cosine is None where a unit has one owner. Collective over the world, when the
        reductions are over and before the optimizer's step.
        """
        for unit in self._sharded.owned:
            place = self._places[unit.layout.name]
            self._sums[place, 2] += squared_norm(unit.shard_grad)
        all_reduce(self._sums, "norms of the gradients")
        plan, found = self._sharded.subnetwork.plan, {}
        layouts = self._sharded.subnetwork.layout.units
        for layout, row in zip(layouts, self._sums.tolist(), strict=True):
            directions, count, square = row
            p = len(plan.owners(layout.block))
            cosine = (directions - count) / (p * (p - 1)) if p > 1 else None
            found[layout.name] = (square**0.5, cosine)
        return found

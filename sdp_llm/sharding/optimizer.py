"""The optimizer of one rank: a torch optimizer on the slices of this rank's shards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sdp_llm.activity import ACTIVITY, OPTIMIZER
from sdp_llm.sharding.materialize import ShardedModel
from sdp_llm.sharding.norm import global_norm
from sdp_llm.sharding.unit import Unit


def parameter_groups(units: Sequence[Unit], decay_all: bool) -> list[dict[str, Any]]:
    """Two groups of parameter slices: with weight decay, and without.

    One-dimensional parameters (norms, biases) get no weight decay unless ``decay_all``. Both
    groups exist on every rank, also where one is empty, so that the state of learning-rate
    schedulers has the same form everywhere.
    """
    slices = [piece for unit in units for piece in unit.slices]
    decayed = [s.tensor for s in slices if decay_all or len(s.shape) > 1]
    others = [s.tensor for s in slices if not decay_all and len(s.shape) <= 1]
    return [{"params": decayed}, {"params": others, "weight_decay": 0.0}]


class ShardedOptimizer:
    """Steps ``inner`` on this rank's shards and brings the updated weights to their ranks.

    DeepSpeed's engine drives it through ``step``, ``zero_grad``, ``param_groups``, ``overflow``
    and ``_global_grad_norm``. After each step ``flag_counts`` says, on all ranks alike, on how
    many of them each of ``flags()`` (settable) was true.

    :param inner: on the groups of :func:`parameter_groups` of the units that this rank owns.
    :param max_norm: clip the global gradient norm to this (0: never).
    :param overlap: False waits for the weights at the end of each step (``overlap_comm``).
    """

    def __init__(
        self,
        sharded: ShardedModel,
        inner: torch.optim.Optimizer,
        *,
        max_norm: float,
        overlap: bool = True,
    ) -> None:
        self.adopt(sharded)
        self.inner = inner
        self.overflow = False
        self._global_grad_norm: float | None = None
        self.flags: Callable[[], Sequence[bool]] = tuple
        self.flag_counts: list[int] = []
        self._doubt: Tensor | None = None
        self._max_norm = max_norm
        self._overlap = overlap
        self._world = dist.group.WORLD if dist.get_world_size() > 1 else None

    def adopt(self, sharded: ShardedModel) -> None:
        """Go on with another subnetwork, whose slices ``inner`` has already."""
        self._sharded = sharded
        self._owned = sharded.owned

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @property
    def state(self) -> dict[Tensor, Any]:
        return self.inner.state

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Zero the accumulated gradients; their storage stays."""
        self._doubt = None
        for unit in self._owned:
            unit.grad.zero_()
            unit.is_averaged = False

    def watch(self, loss: Tensor) -> None:
        """Skip the next step where this loss is not finite, even if its gradient is."""
        # Decided on the device, with the norm: asking here would wait for the backward pass.
        doubt = (loss.detach() - loss.detach()).double().sum()
        self._doubt = doubt if self._doubt is None else self._doubt + doubt

    @torch.no_grad()
    def step(self) -> None:
        """Clip, update and distribute; or, on all ranks together, skip the step.

        It is skipped where the gradient, or a loss that was watched, is not finite on a rank;
        ``overflow`` says whether it was, ``_global_grad_norm`` is the norm before clipping.
        """
        ACTIVITY.enter(OPTIMIZER)
        shards = [unit.shard_grad for unit in self._owned]
        with ACTIVITY.waiting("gradient norm"):
            norm, self.flag_counts = global_norm(shards, self._world, self.flags(), self._doubt)
        self._doubt = None
        self._global_grad_norm = norm
        self.overflow = not math.isfinite(norm)
        if self.overflow:
            return
        # torch.nn.utils.clip_grad_norm_'s formula.
        scale = self._max_norm / (norm + 1e-6) if self._max_norm > 0 else 1.0
        if scale < 1.0:
            for unit in self._owned:
                unit.optimised_grad.mul_(scale)
        self.inner.step()
        self.distribute_weights()

    @torch.no_grad()
    def distribute_weights(self, units: Sequence[Unit] | None = None) -> None:
        """Bring the masters of all owners into the weights of every rank that stores them.

        With ``overlap`` they are under way when this returns: who reads a unit waits for it.

        :param units: only these (default: all); the same ones on every rank that stores them.
        """
        sharded = self._sharded
        # Under backward masking ranks store units that they do not own.
        world = self._world if sharded.subnetwork.masking == "backward" else None
        units = sharded.units if units is None else units
        for unit in units:
            if unit.is_owner:
                unit.cast_masters()
        for unit in units:
            weights = unit.flat
            if sharded.stage > 0 and unit.is_owner and unit.group is not None:
                unit.expect(sharded.communicator.all_gather(weights, unit.group))
            if world is not None:
                unit.expect(sharded.communicator.deliver(weights, unit.owners, world))
        if not self._overlap:
            for unit in units:
                unit.wait()

    def state_dict(self) -> dict[str, Any]:
        raise RuntimeError(
            "optimizer.state_dict(): a rank holds only its shards; engine.save_checkpoint(dir) "
            "writes the state of all ranks under global names"
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise RuntimeError(
            "optimizer.load_state_dict(): a rank holds only its shards; "
            "engine.load_checkpoint(dir) reads what engine.save_checkpoint(dir) wrote"
        )

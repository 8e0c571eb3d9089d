"""Residual scaling: by what a subnetwork, or the whole model, multiplies what its blocks add.

A subnetwork lacks blocks that the whole model has, so fewer of them add to its residual stream.
With the owner share ``s_b = p_b / n`` of a block, ``sdp.residual_scale`` "inverse_coverage"
multiplies what the block adds in a subnetwork by ``1 / s_b`` and leaves the whole model as it is,
as inverted dropout does; "eval" leaves the subnetworks as they are and multiplies by ``s_b`` in the
whole model. A model that training starts from is taken for the whole one: what "eval" will multiply
is divided as it is read, so that the whole model is at first what was given, also when it is an
export that the scale was folded into. Nothing is multiplied where ``s_b`` is 1, or with backward
masking, where every rank runs every block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from sdp_llm.plan import Plan
from sdp_llm.subnetwork.adapter import find_blocks
from sdp_llm.subnetwork.branches import Branch, find_branches


@dataclass(frozen=True)
class Fold:
    """What a parameter becomes so that its module's output is multiplied by ``factor``.

    ``offset`` is what the module adds to it; see :class:`~sdp_llm.subnetwork.branches.Branch`.
    """

    factor: float
    offset: int

    def __call__(self, value: Tensor) -> Tensor:
        """The new value, in fp32, of the parameter or of any part of it."""
        return value.float() * self.factor + self.offset * (self.factor - 1)

    def undo(self, value: Tensor) -> Tensor:
        """The value, in fp32, that becomes ``value``."""
        return (value.float() - self.offset * (self.factor - 1)) / self.factor


def running_shares(
    world_size: int, owner_sets: Sequence[Sequence[int]], masking: str
) -> tuple[float, ...]:
    """The share of the ranks that run each block, by global index."""
    if masking == "backward":
        return (1.0,) * len(owner_sets)
    return tuple(len(owners) / world_size for owners in owner_sets)


def exported_folds(
    scale: str, config: PretrainedConfig, blocks_path: str, shares: Sequence[float]
) -> dict[str, Fold]:
    """The parameters that an export must fold the scale into, by global name.

    :param scale: ``sdp.residual_scale``; there are some only with "eval".
    :raises ConfigError: when the scale is not exact for this model.
    """
    return _folds(find_branches(config), blocks_path, shares) if scale == "eval" else {}


def _folds(
    branches: Sequence[Sequence[Branch]], blocks_path: str, shares: Sequence[float]
) -> dict[str, Fold]:
    return {
        f"{blocks_path}.{b}.{branch.path}.{name}": Fold(share, branch.offset)
        for b, (in_block, share) in enumerate(zip(branches, shares, strict=True))
        for branch in in_block
        for name in branch.parameters
        if share != 1
    }


class ResidualScale:
    """Multiplies what the blocks of a model add to the residual stream, by hooks in them.

    The hooks stay in the blocks, also in those that a rank skips, and read factors that change in
    place. Outside of :meth:`whole_model` the model that runs is taken for a subnetwork, whether
    it is in training mode or not.

    :param scale: ``sdp.residual_scale``; with "none" nothing is hooked.
    :param model: with all of its blocks.
    :raises ConfigError: when the scale is not exact for this model.
    """

    def __init__(self, scale: str, model: PreTrainedModel, plan: Plan, masking: str) -> None:
        self._scale = scale
        self._blocks_path, blocks = find_blocks(model)
        self._branches = () if scale == "none" else find_branches(model.config)
        self._factors = [_Factor() for _ in blocks]
        for b, branches in enumerate(self._branches):
            for branch in branches:
                blocks[b].get_submodule(branch.path).register_forward_hook(self._factors[b])
        self._is_whole = False
        self.set(plan, masking)

    def set(self, plan: Plan, masking: str) -> None:
        """Take the shares of another plan and masking."""
        self._shares = running_shares(plan.world_size, plan.owner_sets, masking)
        self._update()

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """Within, the model that runs is the whole one."""
        self._is_whole = True
        self._update()
        try:
            yield
        finally:
            self._is_whole = False
            self._update()

    def folds(self) -> dict[str, Fold]:
        """The parameters that an export must fold the scale into now, by global name."""
        is_folded = self._scale == "eval"
        return _folds(self._branches, self._blocks_path, self._shares) if is_folded else {}

    def _update(self) -> None:
        for factor, share in zip(self._factors, self._shares, strict=True):
            factor.value = 1.0
            if self._scale == "inverse_coverage" and not self._is_whole:
                factor.value = 1 / share
            elif self._scale == "eval" and self._is_whole:
                factor.value = share


class _Factor:
    """A forward hook that multiplies the output of a module by ``value``."""

    def __init__(self) -> None:
        self.value = 1.0

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output if self.value == 1.0 else output * self.value

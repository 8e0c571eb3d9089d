"""Forward and backward masking of the blocks that a rank does not own."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn


class SkippedBlock(nn.Module):
    """Takes the place of a block that this rank does not own: the residual stream passes by."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


def skip_blocks(blocks: nn.ModuleList, owned: Collection[int]) -> dict[int, nn.Module]:
    """Forward masking: replace every block not in ``owned`` by a :class:`SkippedBlock`.

    :returns: the removed blocks by global index.
    """
    removed = {b: blocks[b] for b in range(len(blocks)) if b not in owned}
    for b in removed:
        blocks[b] = SkippedBlock()
    return removed


def freeze_blocks(blocks: nn.ModuleList, owned: Collection[int]) -> None:
    """Backward masking: freeze every block not in ``owned``; it still runs in both directions."""
    for b, block in enumerate(blocks):
        block.requires_grad_(b in owned)

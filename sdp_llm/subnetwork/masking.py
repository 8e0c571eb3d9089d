"""Forward and backward masking of the blocks that a rank does not own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn


class SkippedBlock(nn.Module):
    """Takes the place of a block that this rank does not own: the residual stream passes by."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


def mask_blocks(
    blocks: nn.ModuleList, owned: Collection[int], masking: str
) -> dict[int, nn.Module]:
    """Skip (``"forward"``) or freeze (``"backward"``) every block that is not in ``owned``.

    :returns: the blocks that were taken out, by global index.
    """
    if masking == "backward":
        freeze_blocks(blocks, owned)
        return {}
    blocks.requires_grad_(True)  # also of those that are taken out
    return skip_blocks(blocks, owned)


def skip_blocks(blocks: nn.ModuleList, owned: Collection[int]) -> dict[int, nn.Module]:
    """Forward masking: replace every block not in ``owned`` by a :class:`SkippedBlock`.

    :returns: the removed blocks by global index.
    """
    removed = {b: blocks[b] for b in range(len(blocks)) if b not in owned}
    for b in removed:
        blocks[b] = SkippedBlock()
    return removed


def restore_blocks(blocks: nn.ModuleList, removed: Mapping[int, nn.Module]) -> None:
    """Put back what :func:`skip_blocks` removed, in the mode that the other blocks are in."""
    for b, block in removed.items():
        blocks[b] = block.train(blocks.training)


def freeze_blocks(blocks: nn.ModuleList, owned: Collection[int]) -> None:
    """Backward masking: freeze every block not in ``owned``; it still runs in both directions."""
    for b, block in enumerate(blocks):
        block.requires_grad_(b in owned)

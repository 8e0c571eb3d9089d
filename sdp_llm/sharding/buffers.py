"""Scratch memory of the reductions, used again from unit to unit."""

from __future__ import annotations

import torch
from torch import Tensor


class Buffers:
    """Hands out what was given back, where it has the size that is asked for.

    Memory that is fresh from the system costs a page fault per page. Blocks are of one size, so
    that theirs go round. At a request of another size all others are freed: nothing is kept beside
    what the largest unit needs anyway.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, numel: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor with arbitrary values, 1-D, on the device of ``like``."""
        fits = [t.numel() == numel and t.dtype == dtype for t in self._free]
        if True in fits:
            return self._free.pop(fits.index(True))
        self._free.clear()
        return torch.empty(numel, dtype=dtype, device=like.device)

    def give(self, tensor: Tensor) -> None:
        """Take back a tensor that nobody uses any more."""
        self._free.append(tensor)

    def clear(self) -> None:
        """Free everything that was given back."""
        self._free.clear()

"""Norms of what is spread over ranks, in fp64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

_CHUNK = 1 << 20  # elements at a time: their fp64 copies take 8 MiB
# Counts up to this stay apart in the sum of fp64 words with two of them.
_MOST_RANKS = 2**20


def squared_norm(values: Tensor) -> Tensor:
    """The sum of the squares of a 1-D tensor: fp64, 0-D, on its device.

    Added up in fp64: in fp32 torch's CPU kernel loses 1e-3 of the norm at 25 million elements, and
    more the larger the shard, so that clipping would depend on the number of ranks.
    """
    squares = [
        torch.linalg.vector_norm(part, dtype=torch.float64).square()
        for part in values.split(_CHUNK)
    ]
    return torch.stack(squares).sum()


def global_norm(
    shards: Sequence[Tensor],
    world: dist.ProcessGroup | None,
    flags: Sequence[bool] = (),
    doubt: Tensor | None = None,
) -> tuple[float, list[int]]:
    """The 2-norm over all ranks' shards, in fp64; the shards of all ranks must be disjoint.

    :param doubt: 0-D, 0 or NaN; where it is NaN on one rank, the norm is NaN on all.
    :returns: the norm, and for each of ``flags`` on how many ranks it holds: they travel along.
    """
    total = torch.stack([squared_norm(shard) for shard in shards]).sum()
    if doubt is not None:
        total = total + doubt
    # One number for all flags: each element more would be a message more on gloo.
    word = sum(_MOST_RANKS**i for i, flag in enumerate(flags) if flag)
    sums = torch.stack([total, torch.full_like(total, float(word))])
    if world is not None:
        dist.all_reduce(sums, group=world)
    square, words = sums.tolist()
    counts = [int(words) // _MOST_RANKS**i % _MOST_RANKS for i in range(len(flags))]
    return math.sqrt(square), counts

"""Collectives over all ranks, each noted for the watchdog; none where a rank is alone.

For a few numbers that the host reads at once: on a GPU, too, they are there on return.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from sdp_llm.activity import ACTIVITY


def all_reduce(
    values: Tensor, what: str, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Tensor:
    """Reduce over all ranks in place, and return it. Collective.

    :param what: what a rank that waits here waits for.
    """
    if not _is_alone():
        with ACTIVITY.waiting(what):
            dist.all_reduce(values, op)
            _wait_for(values)
    return values


def all_gather(row: Tensor, what: str) -> Tensor:
    """The 1-D tensors of all ranks, equally long, as rows ``[ranks, length]``. Collective.

    :param what: what a rank that waits here waits for.
    """
    if _is_alone():
        return row[None]
    rows = row.new_empty(dist.get_world_size(), len(row))
    with ACTIVITY.waiting(what):
        dist.all_gather_single(rows.view(-1), row)
        _wait_for(rows)
    return rows


def _wait_for(values: Tensor) -> None:
    # NCCL only enqueues: otherwise the host would wait later, where nothing notes it.
    if values.is_cuda:
        torch.cuda.current_stream(values.device).synchronize()


def _is_alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1

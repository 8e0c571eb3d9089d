"""The collectives of owner sets, on gloo and on NCCL.

gloo has no reduce-scatter of its own (torch emulates it by an all-reduce, twice the traffic), so
there an all-to-all brings every owner the slices of its shard and they are summed locally in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Pending:
    """A collective under way; its buffers must stay alive until ``wait`` was called."""

    def __init__(self, wait: Callable[[], object]) -> None:
        self._wait = wait

    def wait(self) -> None:
        """Return when the result may be used by what is computed next."""
        self._wait()


class Communicator:
    """Issues the collectives of this rank's units.

    On CUDA all of them are issued on one stream: NCCL can deadlock when two ranks run two
    communicators that they share in different orders, and one stream keeps the order of issue.

    :param device: where the units live.
    :param dtype: what reductions travel in (``communication_data_type``).
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.bytes_sent = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def _issue(self, launch: Callable[[], Sequence[dist.Work]]) -> Pending:
        if self._stream is None:
            works = launch()
            return Pending(lambda: [work.wait() for work in works])
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for work in launch():
                work.wait()  # our stream waits, not the host: the next collective starts after
            done = self._stream.record_event()
        return Pending(lambda: torch.cuda.current_stream().wait_event(done))

    def reduce_scatter(self, send: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Pending]:
        """Start to sum ``send`` over the group, each rank getting its slice of the sum.

        :param send: 1-D in ``self.dtype``; its length is a multiple of the group's size.
        :returns: what is received, for :func:`fp32_sum` after the wait.
        """
        size = group.size()
        self._count(send, group)
        if self._stream is None:
            slices = torch.empty_like(send)
            pending = self._issue(
                lambda: [dist.all_to_all_single(slices, send, group=group, async_op=True)]
            )
            return slices.view(size, -1), pending
        total = send.new_empty(send.numel() // size)
        pending = self._issue(
            lambda: [dist.reduce_scatter_single(total, send, group=group, async_op=True)]
        )
        return total.view(1, -1), pending

    def all_gather(self, full: Tensor, group: dist.ProcessGroup) -> Pending:
        """Start to fill ``full`` with every rank's slice; this rank's is already in place."""
        self._count(full, group)
        own = full.view(group.size(), -1)[group.rank()]
        return self._issue(lambda: [dist.all_gather_single(full, own, group=group, async_op=True)])

    def deliver(self, full: Tensor, owners: Sequence[int], world: dist.ProcessGroup) -> Pending:
        """Start to bring ``full`` from its owners to all other ranks, a slice from each owner.

        :param full: equal on all owners; filled on the others. Its length is a multiple of the
            number of owners.
        """
        rank = world.rank()
        slices = full.view(len(owners), -1)
        if rank in owners:
            own = slices[owners.index(rank)]
            others = [r for r in range(world.size()) if r not in owners]
            operations = [dist.P2POp(dist.isend, own, r, world) for r in others]
            self.bytes_sent += own.numel() * own.element_size() * len(others)
        else:
            operations = [
                dist.P2POp(dist.irecv, part, owner, world)
                for part, owner in zip(slices, owners, strict=True)
            ]
        if not operations:
            return Pending(lambda: None)
        return self._issue(lambda: dist.batch_isend_irecv(operations))

    def _count(self, tensor: Tensor, group: dist.ProcessGroup) -> None:
        # Both collectives send (p-1)/p of their tensor from every rank.
        size = group.size()
        self.bytes_sent += tensor.numel() * tensor.element_size() * (size - 1) // size


def fp32_sum(received: Tensor) -> Tensor:
    """The sum over the first dimension of what :meth:`Communicator.reduce_scatter` received.

    :returns: 1-D, fp32, also where reductions travel in a narrower type.
    """
    return received.sum(0, dtype=torch.float32)

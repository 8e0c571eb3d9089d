"""The collectives of owner sets, on gloo and on NCCL.

gloo has no reduce-scatter of its own (torch emulates it by an all-reduce, twice the traffic), so
there each rank sends every owner its slice and adds up what it receives, in fp32. Its all-gather
copies on the way; slices sent straight into their place take less time (docs/results.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

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

    def received_numel(self, numel: int, group: dist.ProcessGroup) -> int:
        """The elements that a rank receives when ``numel`` are reduce-scattered over the group."""
        shard = numel // group.size()
        return shard * (group.size() - 1) if self._stream is None else shard

    def reduce_scatter(
        self, send: Tensor, received: Tensor, group: dist.ProcessGroup
    ) -> tuple[Sequence[Tensor], Pending]:
        """Start to sum ``send`` over the group, each rank getting its slice of the sum.

        :param send: 1-D in ``self.dtype``; its length is a multiple of the group's size.
        :param received: of :meth:`received_numel` elements, filled. Both must live, and ``send``
            not change, until the wait.
        :returns: the summands of this rank's slice, 1-D, to be added up after the wait: on gloo
            the first is a view of ``send``, the others of ``received``.
        """
        size = group.size()
        self._count(send, group)
        if self._stream is None:
            slices, parts = send.view(size, -1), received.view(size - 1, -1)
            others = [rank for rank in range(size) if rank != group.rank()]
            pending = self._exchange([*slices], dict(zip(others, parts, strict=True)), group)
            return [slices[group.rank()], *parts], pending
        pending = self._issue(
            lambda: [dist.reduce_scatter_single(received, send, group=group, async_op=True)]
        )
        return [received], pending

    def all_gather(self, full: Tensor, group: dist.ProcessGroup) -> Pending:
        """Start to fill ``full`` with every rank's slice; this rank's is already in place."""
        self._count(full, group)
        slices = full.view(group.size(), -1)
        own = slices[group.rank()]
        if self._stream is None:
            return self._exchange([own] * group.size(), dict(enumerate(slices)), group)
        return self._issue(lambda: [dist.all_gather_single(full, own, group=group, async_op=True)])

    def _exchange(
        self, send: Sequence[Tensor], receive: Mapping[int, Tensor], group: dist.ProcessGroup
    ) -> Pending:
        """Start to send each other rank of the group its tensor and to receive one from it.

        :param send: by rank in the group, as ``receive``.
        """
        ranks = dist.get_process_group_ranks(group)
        here, size = group.rank(), group.size()
        operations = []
        for i in range(1, size):
            to, source = (here + i) % size, (here - i) % size
            operations += [
                dist.P2POp(dist.isend, send[to], ranks[to], group),
                dist.P2POp(dist.irecv, receive[source], ranks[source], group),
            ]
        return self._issue(lambda: dist.batch_isend_irecv(operations))

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

    def transfer(self, operations: Sequence[dist.P2POp]) -> Pending:
        """Start to send and to receive; two ranks name what they exchange in the same order."""
        for operation in operations:
            if operation.op is dist.isend:
                self.bytes_sent += operation.tensor.nbytes
        if not operations:
            return Pending(lambda: None)
        return self._issue(lambda: dist.batch_isend_irecv([*operations]))

    def _count(self, tensor: Tensor, group: dist.ProcessGroup) -> None:
        # Both collectives send (p-1)/p of their tensor from every rank.
        size = group.size()
        self.bytes_sent += tensor.numel() * tensor.element_size() * (size - 1) // size

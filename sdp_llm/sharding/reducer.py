"""Masked averaging: gradients leave the backward pass into the units and are reduced meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sdp_llm.activity import ACTIVITY, REDUCE
from sdp_llm.sharding.buffers import Buffers
from sdp_llm.sharding.collectives import Communicator, Pending
from sdp_llm.sharding.cursor import LaunchCursor
from sdp_llm.sharding.probe import GradientProbe
from sdp_llm.sharding.unit import Unit


class GradientReducer:
    """Accumulates this rank's gradients and averages each unit's over its owners.

    Between :meth:`begin` and :meth:`finish` a hook on every parameter moves its gradient into its
    unit in fp32, or at stage 2 into what will be sent, in the type of that. In a pass that reduces,
    a unit's reduction starts as soon as it is complete and its turn has come; the backward pass
    goes on meanwhile.

    ``probe`` (settable) is shown what this rank sends of each unit, while it is on its way.

    :param units: the units that this rank owns, in forward order.
    :param model: its parameters are views into the units.
    :param stage: at 2 every pass must reduce; at 0 and 1 only the last of a step.
    :param overlap: False waits for each reduction at once (``overlap_comm``).
    :param under_way: how many reductions may be under way, each with its send and receive buffers,
        beside the unit being collected. With one, a link stands idle while an owner waits for
        another that is busy with a third; with more there is something to send meanwhile. At stage
        0 always one: each is followed by a gather, and with several under way ranks that own
        different units would issue these in different orders, which deadlocks on NCCL. The gather
        may be under way beside the next reduction.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        model: nn.Module,
        communicator: Communicator,
        *,
        stage: int,
        overlap: bool = True,
        under_way: int = 1,
    ) -> None:
        self.probe: GradientProbe | None = None
        self._units = units
        self._communicator = communicator
        self._stage = stage
        self._overlap = overlap
        self._cursor = LaunchCursor([len(unit.layout.parameters) for unit in units])
        self._buffers = Buffers()
        self._collected: dict[int, Tensor] = {}
        self._under_way: deque[Callable[[], None]] = deque()
        self._gather: Callable[[], None] | None = None
        self._most_under_way = under_way if stage else 1
        self._is_active = self._is_reducing = self._has_failed = False
        self._hooks: list[RemovableHandle] = []
        for u, unit in enumerate(units):
            for i, spec in enumerate(unit.layout.parameters):
                hook = partial(self._on_gradient, u, i)
                parameter = model.get_parameter(spec.name)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))

    def close(self) -> None:
        """Let go of the parameters: another reducer takes this one's place."""
        for hook in self._hooks:
            hook.remove()

    def begin(self, *, reduce: bool) -> None:
        """Announce a backward pass; ``reduce`` says whether it ends in averaged gradients."""
        if self._stage == 2 and not reduce:
            raise RuntimeError("stage 2 keeps no unreduced gradients: every pass must reduce")
        if self._has_failed:
            raise RuntimeError(
                "backward: the pass before failed and left gradients; call engine.zero_grad() on "
                "all ranks and begin the step anew"
            )
        for unit in self._units:
            if self._stage == 1 and unit.is_averaged:
                unit.reopen()
        self._cursor.reset()
        self._is_active, self._is_reducing = True, reduce

    def finish(self) -> None:
        """End the backward pass; missing gradients count as zeros."""
        if self._is_active and self._is_reducing:
            ACTIVITY.enter(REDUCE)
            for u in self._cursor.finish():
                self._launch(u)
            self._drain()
            self._buffers.clear()
        self._is_active = False

    def stop(self) -> None:
        """Note that a backward pass failed. It waits for nobody: other ranks may not be there."""
        self._is_active, self._has_failed = False, True

    def abandon(self) -> None:
        """Forget what a backward pass left that failed; all ranks must have come equally far."""
        self._drain()
        self._collected.clear()
        self._buffers.clear()
        self._has_failed = False

    def _on_gradient(self, u: int, i: int, parameter: Tensor) -> None:
        unit = self._units[u]
        name = unit.layout.parameters[i].name
        assert parameter.grad is not None
        gradient = parameter.grad.flatten()
        # Also before an error: what stays there would be added to the next pass.
        parameter.grad = None
        if not self._is_active:
            raise RuntimeError(f"{name}: a backward pass outside engine.backward(loss); call that")
        try:
            ready = self._cursor.arrive(u, i)
        except RuntimeError as error:
            raise RuntimeError(f"{name}: {error}; run the model once per backward pass") from None
        target = slice(unit.offsets[i], unit.offsets[i] + gradient.numel())
        if self._is_staged(unit):
            self._staging(u)[target] = gradient
        else:
            unit.grad[target] += gradient
        if self._is_reducing:
            for index in ready:
                self._launch(index)

    def _is_staged(self, unit: Unit) -> bool:
        # Stage 2 has no place for a whole gradient: it is collected in a buffer for sending.
        return self._stage == 2 and unit.group is not None

    def _staging(self, u: int) -> Tensor:
        if u not in self._collected:
            flat = self._units[u].flat
            staging = self._buffers.take(flat.numel(), flat, self._communicator.dtype)
            staging[self._units[u].layout.numel :] = 0
            self._collected[u] = staging
        return self._collected[u]

    def _launch(self, u: int) -> None:
        unit = self._units[u]
        if unit.group is None:
            return
        self._leave_under_way(self._most_under_way - 1)
        if self._is_staged(unit):
            send = self._staging(u)
            for i in self._cursor.missing(u):
                start = unit.offsets[i]
                send[start : start + unit.layout.parameters[i].numel] = 0
            del self._collected[u]
        else:
            send = unit.grad.to(self._communicator.dtype)
        numel = self._communicator.received_numel(send.numel(), unit.group)
        received = self._buffers.take(numel, send, send.dtype)
        summands, pending = self._communicator.reduce_scatter(send, received, unit.group)
        self._under_way.append(partial(self._receive, unit, send, received, summands, pending))
        if self.probe is not None:
            self.probe.see(unit, send)
        if not self._overlap:
            self._drain()

    def _leave_under_way(self, count: int) -> None:
        """Wait until at most so many reductions are under way; the oldest come first."""
        while len(self._under_way) > count:
            self._under_way.popleft()()

    def _drain(self) -> None:
        """Wait for everything that is under way."""
        self._leave_under_way(0)
        self._finish_gather()

    def _finish_gather(self) -> None:
        if self._gather is not None:
            self._gather()
            self._gather = None

    def _receive(
        self,
        unit: Unit,
        send: Tensor,
        received: Tensor,
        summands: Sequence[Tensor],
        pending: Pending,
    ) -> None:
        self._finish_gather()  # of the unit before, which began before this reduction
        with ACTIVITY.waiting(f"gradient of {unit.layout.name}", unit.owners):
            pending.wait()
        own, share = unit.shard_grad, 1 / len(unit.owners)
        if self._stage == 2:
            for summand in summands:
                own.add_(summand.to(torch.float32), alpha=share)
            self._buffers.give(send)
            self._buffers.give(received)
            return
        own.copy_(summands[0])
        for summand in summands[1:]:
            own += summand.to(torch.float32)
        own *= share
        self._buffers.give(received)
        unit.is_averaged = True
        if self._stage == 0:
            assert unit.group is not None
            full = unit.grad.to(self._communicator.dtype)
            gathered = self._communicator.all_gather(full, unit.group)
            self._gather = partial(self._receive_all, unit, full, gathered)

    @staticmethod
    def _receive_all(unit: Unit, full: Tensor, pending: Pending) -> None:
        with ACTIVITY.waiting(f"gradient of {unit.layout.name}", unit.owners):
            pending.wait()
        unit.grad.copy_(full)

"""The simulation of n workers in one pass: each block runs on the samples of its owners only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sdp_llm.loss import target_count
from sdp_llm.simulation import Simulation
from sdp_llm.subnetwork.adapter import find_blocks


class RoutedBlock(nn.Module):
    """A block that trains on its owners' samples; the others' pass by, or run through it frozen.

    :param own: rows of the batch that belong to owners, int64.
    :param others: the rest; they pass by.
    :param is_backward: they run through the block, which gets no gradient from them.
    """

    def __init__(self, block: nn.Module, own: Tensor, others: Tensor, is_backward: bool) -> None:
        super().__init__()
        self.block = block
        self.own = own
        self.others = others
        self.is_backward = is_backward

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        own = self.block(hidden_states.index_select(0, self.own), *args, **kwargs)
        if not self.is_backward:
            return hidden_states.index_copy(0, self.own, own)
        frozen = {name: weight.detach() for name, weight in self.block.named_parameters()}
        passing = (hidden_states.index_select(0, self.others), *args)
        rest = torch.func.functional_call(self.block, frozen, passing, kwargs)
        return hidden_states.index_copy(0, self.own, own).index_copy(0, self.others, rest)


@contextmanager
def routed(simulation: Simulation, samples: int) -> Iterator[None]:
    """Within, the model takes ``samples`` samples of each worker at once, in the workers' order."""
    _, blocks = find_blocks(simulation.model)
    whole = list(blocks)
    world = range(simulation.plan.world_size)
    is_backward = simulation.masking == "backward"
    device = next(simulation.model.parameters()).device
    for b, owners in enumerate(simulation.plan.owner_sets):
        if len(owners) < len(world):
            own = _rows(owners, samples, device)
            absent = [rank for rank in world if rank not in owners]
            others = _rows(absent, samples, device)
            blocks[b] = RoutedBlock(whole[b], own, others, is_backward)
    try:
        yield
    finally:
        for b, block in enumerate(whole):
            blocks[b] = block


def _rows(ranks: Sequence[int], samples: int, device: torch.device) -> Tensor:
    rows = [rank * samples + i for rank in ranks for i in range(samples)]
    return torch.tensor(rows, device=device)


def accumulate(
    simulation: Simulation, batch: Tensor, micro_batch: int | None = None
) -> list[float]:
    """What ``Simulation.accumulate`` does, in one pass for all workers. For fp32 weights.

    Only the order of summation differs: every worker's samples count equally, so that the sum over
    the owners' samples, divided by their number, is the mean of their gradients.

    :param batch: token ids ``[global batch, sequence + 1]``; worker r takes the r-th slice.
    :param micro_batch: samples of each worker that go through the model at once.
    :returns: the mean loss of all workers in nats per token, alone in a list.
    """
    assert simulation.loss.eos_id is None, "positions would have to be routed too"
    n = simulation.plan.world_size
    slices = batch.view(n, len(batch) // n, -1)
    targets = target_count(slices[0])
    total = 0.0
    for part in slices.split(micro_batch or slices.shape[1], dim=1):
        with routed(simulation, part.shape[1]):
            loss = simulation.loss(simulation.model, part.flatten(0, 1)) / targets
            loss.backward()
        total += loss.item()
    for unit in simulation.layout.units:
        owners = len(simulation.plan.owners(unit.block))
        for spec in unit.parameters:
            weight = simulation.model.get_parameter(spec.name)
            assert weight.grad is not None
            assert weight.dtype == torch.float32
            simulation.masters[spec.name].grad = weight.grad.div_(owners)
            weight.grad = None
    return [total / n]

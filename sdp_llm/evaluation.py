"""The whole model's loss in the memory of a subnetwork.

Under forward masking no rank holds the whole model. Here the model's own forward runs on each
rank's samples, and each block travels from its owners to the ranks that lack it when its turn
comes, is run there and freed: at any moment a rank holds its subnetwork and one block more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sdp_llm.activity import ACTIVITY
from sdp_llm.errors import Interrupted
from sdp_llm.loss import NextTokenLoss, summed_loss, target_count
from sdp_llm.sharding.collectives import Communicator
from sdp_llm.sharding.materialize import ShardedModel
from sdp_llm.sharding.unit import Unit
from sdp_llm.subnetwork.adapter import UnitLayout, find_blocks
from sdp_llm.world import all_reduce


@dataclass(frozen=True)
class Evaluation:
    """The mean loss in nats per token over ``tokens`` targets of all ranks."""

    loss: float
    tokens: int

    def bits_per_byte(self, text_bytes: int) -> float:
        """The loss per byte of the text that the targets stand for."""
        return self.loss * self.tokens / math.log(2) / text_bytes


class StreamedBlock(nn.Module):
    """Stands where a block is absent: receives its weights, runs it, forgets them.

    :param block: the absent block, its parameters on the meta device.
    """

    def __init__(
        self,
        block: nn.Module,
        prefix: str,
        units: list[tuple[UnitLayout, tuple[int, ...]]],
        communicator: Communicator,
        like: Tensor,
    ) -> None:
        super().__init__()
        # Kept out of the module tree: its parameters must not be seen as the model's.
        self.__dict__["block"] = block.eval()
        self._prefix = prefix
        self._units = units
        self._communicator = communicator
        self._like = like

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        block: nn.Module = self.__dict__["block"]
        values = {name: b.to(self._like.device) for name, b in block.named_buffers()}
        for layout, owners in self._units:
            numel = -(-layout.numel // len(owners)) * len(owners)
            flat = self._like.new_empty(numel)
            assert dist.group.WORLD is not None
            with ACTIVITY.waiting(f"weights of {layout.name}", owners):
                self._communicator.deliver(flat, owners, dist.group.WORLD).wait()
            start = 0
            for spec in layout.parameters:
                local_name = spec.name.removeprefix(self._prefix)
                values[local_name] = flat[start : start + spec.numel].view(spec.shape)
                start += spec.numel
        return torch.func.functional_call(block, values, args, kwargs)


@contextmanager
def whole_model(sharded: ShardedModel) -> Iterator[nn.Module]:
    """Within, the model's forward runs every block, and is collective over the world.

    Every rank must run it equally often, without gradients.
    """
    subnetwork = sharded.subnetwork
    model = subnetwork.model
    path, blocks = find_blocks(model)
    by_block: dict[int, list[UnitLayout]] = {}
    for layout in subnetwork.layout.units:
        if layout.block is not None:
            by_block.setdefault(layout.block, []).append(layout)
    held: dict[int, list[Unit]] = {}
    for unit in sharded.units:
        if unit.layout.block is not None:
            held.setdefault(unit.layout.block, []).append(unit)

    hooks = []
    skipped = {b: blocks[b] for b in subnetwork.absent}
    was_training = model.training
    model.eval()
    for b, layouts in by_block.items():
        if b in subnetwork.absent:
            units = [(layout, subnetwork.owners(layout)) for layout in layouts]
            blocks[b] = StreamedBlock(
                subnetwork.absent[b],
                f"{path}.{b}.",
                units,
                sharded.communicator,
                sharded.units[0].flat,
            )
        elif subnetwork.masking == "forward":
            send = _Sender(held[b], sharded.communicator)
            hooks.append(blocks[b].register_forward_pre_hook(send))
    try:
        with subnetwork.residual_scale.whole_model():
            yield model
    finally:
        for hook in hooks:
            hook.remove()
        for b, block in skipped.items():
            blocks[b] = block
        model.train(was_training)


class _Sender:
    """Before an owner runs its block, it sends its slice to the ranks that lack it."""

    def __init__(self, units: list[Unit], communicator: Communicator) -> None:
        self._units = units
        self._communicator = communicator

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        world = dist.group.WORLD
        for unit in self._units:
            if world is not None and len(unit.owners) < world.size():
                with ACTIVITY.waiting(f"the ranks without {unit.layout.name}"):
                    self._communicator.deliver(unit.flat, unit.owners, world).wait()


@torch.no_grad()
def evaluate(
    sharded: ShardedModel,
    samples: Tensor,
    micro_batch: int,
    loss: NextTokenLoss = summed_loss,
    must_stop: Callable[[], bool] | None = None,
) -> Evaluation:
    """The whole model's loss over the samples of all ranks. Collective over the world.

    :param samples: this rank's token ids ``[samples, sequence + 1]``; ranks may have different
        numbers of them, also none.
    :param micro_batch: samples per forward. Each forward makes every block travel once, so take
        as many as memory allows; the activations of one block and the logits exist at a time.
    :param loss: what is computed; with its ``chunk`` the logits exist in pieces.
    :param must_stop: asked before each forward, and collective like it.
    :raises Interrupted: on every rank, when ``must_stop`` says so.
    :raises ValueError: on every rank, when none has a sample, or on one there is no target in one
        or ``micro_batch`` is below 1.
    """
    device = sharded.device
    rounds = _agreed_rounds(samples, micro_batch, device)
    total = torch.zeros(2, dtype=torch.float64, device=device)
    with whole_model(sharded) as model:
        for i in range(rounds):
            ACTIVITY.beat()
            if must_stop is not None and must_stop():
                raise Interrupted("evaluation")
            part = samples[i * micro_batch : (i + 1) * micro_batch].to(device)
            if len(part) == 0:
                # Blocks travel in every rank's forward: run one that does not count.
                loss(model, samples.new_zeros(1, samples.shape[1]).to(device))
                continue
            total[0] += loss(model, part).double()
            total[1] += target_count(part)
    value, tokens = all_reduce(total, "validation loss").tolist()
    return Evaluation(value / tokens, int(tokens))


def _agreed_rounds(samples: Tensor, micro_batch: int, device: torch.device) -> int:
    """How often every rank runs the model; what one of them cannot do, none begins."""
    length = samples.shape[1] if samples.dim() == 2 else 0
    own = [-(-len(samples) // max(micro_batch, 1)), -micro_batch, -length]
    most = torch.tensor(own, device=device)
    all_reduce(most, "start of the validation", dist.ReduceOp.MAX)
    rounds, *negated = most.tolist()
    smallest, shortest = (-value for value in negated)
    if smallest < 1:
        raise ValueError(f"evaluate: micro_batch = {smallest}: must be at least 1 on every rank")
    if shortest < 2:
        raise ValueError(
            f"evaluate: samples of {shortest} tokens on a rank: they have no target; give "
            "[samples, sequence + 1] tokens"
        )
    if rounds == 0:
        raise ValueError("evaluate: samples: no rank has any; give at least one rank one")
    return int(rounds)

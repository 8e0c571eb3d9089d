"""What a plan costs one rank: bytes of memory, bytes sent, floating-point operations.

The closed forms of the design, section 3. Symbols: `n` ranks; `S` shared parameters, pinned blocks
included; `K` free parameters that a rank owns and `K/p` the sum of their shards; `w`, `r` bytes
per element of weights and of reductions; `f = (n-1)/n` and `q = (p-1)/p`; `A` micro-batches per
step. What is left out is small: the padding of a unit to a multiple of `p`, the model's buffers,
and the 8 bytes of the gradient norm. On CUDA, what the kernels and NCCL take beside torch's
allocator is left out too: NCCL has buffers for each group, and a rank is in one per owner set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from sdp_llm.plan.assignment import Plan
from sdp_llm.plan.size import FP32_BYTES, CostSetup, ModelSize, UnitSize
from sdp_llm.plan.transient import transient_bytes


@dataclass(frozen=True)
class MemoryCost:
    """Bytes on one rank.

    `transient` and `activations` are the peaks of their own, which need not coincide: the total
    is an upper bound.
    """

    weights: int
    gradients: int
    optimizer: int
    transient: int
    activations: int

    @property
    def model_state(self) -> int:
        """What is there at any time: weights, gradients and optimizer."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.model_state + self.transient + self.activations


@dataclass(frozen=True)
class TrafficCost:
    """Bytes that a rank sends per optimizer step."""

    mean: int
    maximum: int


@dataclass(frozen=True)
class ComputeCost:
    """Floating-point operations per token of a rank, forward and backward."""

    mean: float
    maximum: float


@dataclass(frozen=True)
class Cost:
    """What one kind of training costs a rank.

    Attributes:
        memory: of the rank that needs most.
        least_memory: of the rank that needs least.
    """

    memory: MemoryCost
    least_memory: MemoryCost
    traffic: TrafficCost
    compute: ComputeCost


def sdp_cost(size: ModelSize, plan: Plan, setup: CostSetup) -> Cost:
    """The cost of training under a plan, from the costs of all its ranks.

    :raises ValueError: the model and the plan differ in depth, or the stage is not supported.
    """
    if len(size.blocks) != plan.num_blocks:
        raise ValueError(
            f"size.blocks = {len(size.blocks)} blocks: the plan has {plan.num_blocks}; "
            "make both from one model config"
        )
    if setup.stage not in (0, 1, 2):
        raise ValueError(f"stage = {setup.stage}: expected 0, 1 or 2")
    ranks = range(plan.world_size)
    memory = sorted((rank_memory(size, plan, setup, rank) for rank in ranks), key=_total)
    traffic = [rank_traffic(size, plan, setup, rank) for rank in ranks]
    compute = [rank_flops_per_token(size, plan, setup, rank) for rank in ranks]
    return Cost(
        memory[-1],
        memory[0],
        TrafficCost(round(sum(traffic) / len(traffic)), round(max(traffic))),
        ComputeCost(sum(compute) / len(compute), max(compute)),
    )


def trained_numel(size: ModelSize, plan: Plan, rank: int) -> int:
    """The parameters that one rank trains: the shared ones and those of its blocks."""
    return sum(unit.numel for unit in size.units if rank in plan.owners(unit.block))


def rank_memory(size: ModelSize, plan: Plan, setup: CostSetup, rank: int) -> MemoryCost:
    """The bytes that one rank holds."""
    owned = [unit for unit in size.units if rank in plan.owners(unit.block)]
    whole = sum(unit.numel for unit in owned)
    shards = sum(unit.numel / len(plan.owners(unit.block)) for unit in owned)
    stored = size.numel if setup.masking == "backward" else whole
    return MemoryCost(
        weights=setup.weight_bytes * stored,
        gradients=round(FP32_BYTES * (shards if setup.stage == 2 else whole)),
        optimizer=round(setup.optimizer_bytes * (shards if setup.stage > 0 else whole)),
        transient=_transient(owned, plan, setup),
        activations=_activations(size, plan, setup, rank),
    )


def rank_traffic(size: ModelSize, plan: Plan, setup: CostSetup, rank: int) -> float:
    """The bytes that one rank sends per optimizer step.

    Stage 0 reduce-scatters and gathers gradients; stages 1 and 2 gather weights instead, stage 2
    after a reduction in every micro-batch. Under backward masking each of a block's owners sends
    its shard of the updated block to all other ranks, (n-p)/p of the block.
    """
    w, r, n = setup.weight_bytes, setup.reduction_bytes, plan.world_size
    per_element = {0: 2 * r, 1: r + w, 2: setup.accumulation * r + w}[setup.stage]
    sent = 0.0
    for unit in size.units:
        owners = plan.owners(unit.block)
        if rank not in owners:
            continue
        p = len(owners)
        sent += per_element * (p - 1) / p * unit.numel
        if setup.masking == "backward":
            sent += w * (n - p) / p * unit.numel
    return sent


def rank_flops_per_token(size: ModelSize, plan: Plan, setup: CostSetup, rank: int) -> float:
    """Operations of one rank per token of its own, forward and backward.

    2 per matrix parameter in the forward pass, 2 for the gradient of the activations and 2 for
    the gradient of the weight (Kaplan et al., arXiv 2001.08361); attention adds 4, 4 and 4 times
    width times sequence length, counted in full as if it were not causal (PaLM, arXiv 2204.02311,
    appendix B). A frozen block has no gradient of the weights; checkpointing runs each block
    forward once more.
    """
    return _flops_per_token(size, setup, plan.owned_blocks(rank))


def dense_flops_per_token(size: ModelSize, setup: CostSetup) -> float:
    """Operations per token of the whole model, counted as for :func:`rank_flops_per_token`."""
    return _flops_per_token(size, setup, range(len(size.blocks)))


def _flops_per_token(size: ModelSize, setup: CostSetup, owned: Sequence[int]) -> float:
    attention = 4.0 * size.attention_width * size.sequence_length
    again = 1 if setup.gradient_checkpointing else 0
    flops = 6.0 * size.shared_matmul_numel
    for b, block in enumerate(size.blocks):
        is_owned = b in owned
        if not is_owned and setup.masking == "forward":
            continue
        matmul_passes = again + (3 if is_owned else 2)
        flops += 2.0 * matmul_passes * block.matmul_numel + (3 + again) * attention
    return flops


def steps_for_dense_flops(
    dense_steps: int, flops_per_token_sdp: float, flops_per_token_dense: float
) -> int:
    """How many steps with SDP spend the operations of `dense_steps` steps without (same tokens).

    Both per token and, for SDP, in the mean over the ranks: the FLOP-matched setting of arXiv
    2507.09029. Rounded to the nearest, at least 1.

    :raises ValueError: an argument is not positive.
    """
    if min(dense_steps, flops_per_token_sdp, flops_per_token_dense) <= 0:
        raise ValueError(
            f"dense_steps = {dense_steps}, flops_per_token_sdp = {flops_per_token_sdp}, "
            f"flops_per_token_dense = {flops_per_token_dense}: must all be positive"
        )
    return max(1, round(dense_steps * flops_per_token_dense / flops_per_token_sdp))


def _total(memory: MemoryCost) -> int:
    return memory.total


def _activations(size: ModelSize, plan: Plan, setup: CostSetup, rank: int) -> int:
    total = size.shared_activations + size.passing_activations
    for b, block in enumerate(size.blocks):
        if plan.owns(rank, b):
            total += block.activations
        elif setup.masking == "backward":
            total += block.frozen_activations
    return total


def _transient(owned: Sequence[UnitSize], plan: Plan, setup: CostSetup) -> int:
    groups = [list(pieces) for _, pieces in groupby(owned, key=lambda unit: unit.block)]
    return transient_bytes(
        [(len(plan.owners(pieces[0].block)), pieces) for pieces in groups], setup
    )

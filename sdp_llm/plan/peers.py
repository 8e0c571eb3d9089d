"""What the usual kinds of data parallelism would cost a rank, for the same model and batch.

They get every benefit of the doubt: the same fp32 accumulation, optimizer state and activations
as ours, reductions at the least possible traffic (DeepSpeed's ZeRO-1 and 2 all-reduce buckets,
which sends twice as much), and buffers no larger than a unit (DeepSpeed allocates whole buckets).
"""

from __future__ import annotations

from sdp_llm.plan.cost import ComputeCost, Cost, MemoryCost, TrafficCost, dense_flops_per_token
from sdp_llm.plan.size import FP32_BYTES, CostSetup, ModelSize

# FSDP2 with reshard_after_forward=False: gathered weights stay until the backward pass.
UNSHARDED = "FSDP2, no resharding"
PEERS = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2", UNSHARDED)


def peer_cost(size: ModelSize, world_size: int, setup: CostSetup, peer: str) -> Cost:
    """The cost of training the whole model on every rank.

    :param size: the model, its activations for one micro-batch.
    :param world_size: number of ranks `n`.
    :param setup: dtypes, accumulation, checkpointing and optimizer; masking and stage are ignored.
    :param peer: one of `PEERS`.
    :raises ValueError: `peer` is not one of them.
    """
    check_peer(peer)
    weights, gradients, optimizer = _state_per_parameter(world_size, setup, peer)
    activations = size.shared_activations + size.passing_activations
    memory = MemoryCost(
        weights=round(weights * size.numel),
        gradients=round(gradients * size.numel),
        optimizer=round(optimizer * size.numel),
        transient=_transient(size, setup, peer),
        activations=activations + sum(block.activations for block in size.blocks),
    )
    sent = round(_sent_per_parameter(setup, peer) * (world_size - 1) / world_size * size.numel)
    flops = dense_flops_per_token(size, setup)
    return Cost(memory, memory, TrafficCost(sent, sent), ComputeCost(flops, flops))


def check_peer(peer: str) -> None:
    """Check a name of the usual kinds of data parallelism.

    :raises ValueError: `peer` is not one of `PEERS`.
    """
    if peer not in PEERS:
        raise ValueError(f"peer = {peer!r}: expected one of {'; '.join(PEERS)}")


def _state_per_parameter(n: int, setup: CostSetup, peer: str) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer state per parameter of the model.

    ZeRO: Rajbhandari et al., arXiv 1910.02054, with fp32 gradients. FSDP2 (mixed precision) keeps
    its sharded parameters in fp32, which are the masters, and casts what it gathers.
    """
    w, g, opt = setup.weight_bytes, FP32_BYTES, setup.optimizer_bytes
    return {
        "DDP": (w, g, opt),
        "ZeRO-1": (w, g, opt / n),
        "ZeRO-2": (w, g / n, opt / n),
        "ZeRO-3": (w / n, g / n, opt / n),
        "FSDP2": (FP32_BYTES / n, g / n, setup.moment_bytes / n),
        UNSHARDED: (FP32_BYTES / n, g / n, setup.moment_bytes / n),
    }[peer]


def _transient(size: ModelSize, setup: CostSetup, peer: str) -> int:
    """Two buffers of the largest unit for reductions; where parameters are sharded two more.

    The latter are the weights of the unit in use and of the one that is fetched meanwhile; without
    resharding, all gathered weights, as between the forward and the backward pass. DDP in fp32
    reduces its gradients in place.
    """
    largest = max(unit.numel for unit in size.units)
    if peer == "DDP" and setup.reduction_bytes == FP32_BYTES:
        return 0
    per_element = 2 * setup.reduction_bytes
    if peer == UNSHARDED:
        return per_element * largest + setup.weight_bytes * size.numel
    if peer in ("ZeRO-3", "FSDP2"):
        per_element += 2 * setup.weight_bytes
    return per_element * largest


def _sent_per_parameter(setup: CostSetup, peer: str) -> float:
    """Bytes sent per step and parameter, to be multiplied by (n-1)/n.

    Sharded parameters are gathered for the forward and for the backward pass of each micro-batch,
    or once for both.
    """
    w, r, micro_batches = setup.weight_bytes, setup.reduction_bytes, setup.accumulation
    return {
        "DDP": 2 * r,
        "ZeRO-1": r + w,
        "ZeRO-2": micro_batches * r + w,
        "ZeRO-3": micro_batches * (r + 2 * w),
        "FSDP2": micro_batches * (r + 2 * w),
        UNSHARDED: micro_batches * (r + w),
    }[peer]

"""How long a step would take on a cluster: the closed forms over the speeds of compute and links.

A step's compute is FLOPs per token times tokens over sustained FLOP/s. Every collective of a unit
of `N` elements among `p` owners makes each of them send `N (p-1)/p` elements (rings), which takes
that many bytes over the rate of the slowest link on its way, see :meth:`Cluster.rate`. With `h`
the cluster's `overlap`, `F` and `B` the seconds of the forward and the backward pass of one of `A`
micro-batches, and seconds of communication by the phase that can hide them,

    exposed = max(0, c_F + c_first - h F) + (A-1) max(0, c_F - h F)
              + (A-1) max(0, c_B - h B) + max(0, c_B + c_last - h B) + c_after
    step    = A (F + B) + exposed

| what is sent, bytes per element   | c_F | c_first | c_B   | c_last | c_after |
|-----------------------------------|-----|---------|-------|--------|---------|
| DDP, SDP at stage 0               |     |         |       | 2r     |         |
| ZeRO-1                            |     |         |       | r      | w       |
| ZeRO-2                            |     |         | r     |        | w       |
| SDP at stage 1                    |     | w       |       | r      |         |
| SDP at stage 2                    |     | w       | r     |        |         |
| ZeRO-3, FSDP2                     | w   |         | r + w |        |         |
| FSDP2, no resharding              | w   |         | r     |        |         |

Backward masking adds to `c_first` what the owners deliver to all others, over the world's links.
All gathers wait for the optimizer. ZeRO's are over before the next step starts, and hide behind
nothing; SDP's go on while the next step's first forward pass runs (`sdp_llm/sharding/arrival.py`).

A rank has one collective under way, as NCCL's on one stream have it, and each begins when all of
its ranks are done with those before. So a rank's seconds include those in which it waits for owners
that are busy with another block (:func:`~sdp_llm.plan.analysis.in_turn`).

Left out, for all alike: latency of messages, the optimizer's own time, and ranks whose passes take
longer than those of others. A step lasts as long as that of its slowest rank. These are predictions
from assumed speeds, not measurements.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace

from sdp_llm.plan.analysis import in_turn
from sdp_llm.plan.assignment import Plan
from sdp_llm.plan.cost import dense_flops_per_token, rank_flops_per_token
from sdp_llm.plan.peers import UNSHARDED, check_peer
from sdp_llm.plan.size import CostSetup, ModelSize


@dataclass(frozen=True)
class Cluster:
    """The speeds of a cluster whose nodes hold `ranks_per_node` consecutive ranks each.

    Attributes:
        ranks_per_node: ranks of one node.
        inner_bandwidth: bytes per second that a rank sends within its node.
        outer_bandwidth: bytes per second that a rank sends to other nodes while all ranks of its
            node do: where a node has one link, that link over its ranks.
        flops: sustained operations per second of a rank.
        overlap: the share of a pass's compute, 0 to 1, during which communication goes on.
        shares_links: whether the members that an owner set has in one node use all their links
            together, as NCCL's rings over several rails do. Without, a set that spans nodes goes
            at the speed of one link: simple and conservative, but unfair to sets of whole nodes,
            and so to plain data parallelism.
    """

    ranks_per_node: int
    inner_bandwidth: float
    outer_bandwidth: float
    flops: float
    overlap: float = 1.0
    shares_links: bool = True

    def __post_init__(self) -> None:
        for name in ("ranks_per_node", "inner_bandwidth", "outer_bandwidth", "flops"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be positive")
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"overlap = {self.overlap}: must be a share from 0 to 1")

    def rate(self, owners: Sequence[int]) -> float:
        """Bytes per second that each rank of an owner set sends in the set's collectives.

        Inside one node the inner bandwidth. In a set that spans nodes a ring crosses each node's
        border once, at the outer bandwidth of one rank; with `shares_links` there are as many
        rings as the set has members in the node where it has fewest.
        """
        members = Counter(rank // self.ranks_per_node for rank in owners)
        if len(members) <= 1:
            return self.inner_bandwidth
        rings = min(members.values()) if self.shares_links else 1
        return min(self.inner_bandwidth, rings * self.outer_bandwidth)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step.

    Attributes:
        compute: forward and backward passes.
        communication: all of it, hidden or not.
        exposed: the part of it that compute does not hide.
    """

    compute: float
    communication: float
    exposed: float

    @property
    def total(self) -> float:
        return self.compute + self.exposed


@dataclass(frozen=True)
class _Phases:
    """Bytes or seconds of communication by the phase of a step that can hide them."""

    forward: float = 0.0
    first_forward: float = 0.0
    backward: float = 0.0
    last_backward: float = 0.0
    after: float = 0.0

    def __mul__(self, factor: float) -> _Phases:
        return _Phases(*(factor * value for value in astuple(self)))

    def __add__(self, other: _Phases) -> _Phases:
        return _Phases(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def sdp_step_time(size: ModelSize, plan: Plan, setup: CostSetup, cluster: Cluster) -> StepTime:
    """A step under a plan: that of the rank that takes longest.

    :raises ValueError: the model and the plan differ in depth, or the stage is not supported.
    """
    if len(size.blocks) != plan.num_blocks:
        raise ValueError(f"size.blocks = {len(size.blocks)} blocks: the plan has {plan.num_blocks}")
    if setup.stage not in (0, 1, 2):
        raise ValueError(f"stage = {setup.stage}: expected 0, 1 or 2")
    communication = _communication(size, plan, setup, cluster)
    times = []
    for rank in range(plan.world_size):
        runs = range(plan.num_blocks)
        if setup.masking == "forward":
            runs = plan.owned_blocks(rank)
        flops = rank_flops_per_token(size, plan, setup, rank)
        matmul = sum(size.blocks[b].matmul_numel for b in runs)
        forward = _forward_flops(size, matmul, len(runs))
        backward = flops - forward
        times.append(_step_time(size, setup, cluster, forward, backward, communication[rank]))
    return max(times, key=_total)


def _communication(
    size: ModelSize, plan: Plan, setup: CostSetup, cluster: Cluster
) -> list[_Phases]:
    """The seconds of each rank, waiting for other owners included."""
    world = tuple(range(plan.world_size))
    numel = size.block_numel
    # In the order of the forward pass, as weights travel; backwards it makes the same chains. Most
    # of what is shared is the embedding.
    turns = [(world, _reduced(world, setup, cluster) * (size.numel - sum(numel)))]
    for owners, elements in zip(plan.owner_sets, numel, strict=True):
        turns.append((owners, _reduced(owners, setup, cluster) * elements))
        if setup.masking == "backward":
            turns.append((world, _delivered(owners, world, setup, cluster) * elements))
    by_phase = [
        in_turn([(owners, getattr(seconds, field.name)) for owners, seconds in turns], len(world))
        for field in fields(_Phases)
    ]
    return [_Phases(*of_rank) for of_rank in zip(*by_phase, strict=True)]


def peer_step_time(
    size: ModelSize, world_size: int, setup: CostSetup, cluster: Cluster, peer: str
) -> StepTime:
    """A step of training the whole model on every rank.

    :param peer: one of `sdp_llm.plan.peers.PEERS`.
    :raises ValueError: `peer` is not one of them.
    """
    check_peer(peer)
    world = range(world_size)
    sent = _bytes_per_element(setup, peer) * ((world_size - 1) / world_size * size.numel)
    matmul = sum(block.matmul_numel for block in size.blocks)
    forward = _forward_flops(size, matmul, len(size.blocks))
    backward = dense_flops_per_token(size, setup) - forward
    return _step_time(size, setup, cluster, forward, backward, sent * (1 / cluster.rate(world)))


def _step_time(
    size: ModelSize,
    setup: CostSetup,
    cluster: Cluster,
    forward_flops: float,
    backward_flops: float,
    communication: _Phases,
) -> StepTime:
    """The formula at the top, from operations per token and seconds."""
    c, again = communication, setup.accumulation
    tokens = size.micro_batch * size.sequence_length
    forward, backward = (f * tokens / cluster.flops for f in (forward_flops, backward_flops))
    room = cluster.overlap * backward
    ahead = cluster.overlap * forward
    exposed = max(0.0, c.forward + c.first_forward - ahead)
    exposed += (again - 1) * max(0.0, c.forward - ahead)
    exposed += (again - 1) * max(0.0, c.backward - room)
    exposed += max(0.0, c.backward + c.last_backward - room) + c.after
    everything = again * (c.forward + c.backward) + c.last_backward + c.first_forward + c.after
    return StepTime(again * (forward + backward), everything, exposed)


def _bytes_per_element(setup: CostSetup, peer: str) -> _Phases:
    """The table at the top."""
    w, r = setup.weight_bytes, setup.reduction_bytes
    return {
        "DDP": _Phases(last_backward=2 * r),
        "ZeRO-1": _Phases(last_backward=r, after=w),
        "ZeRO-2": _Phases(backward=r, after=w),
        "ZeRO-3": _Phases(forward=w, backward=r + w),
        "FSDP2": _Phases(forward=w, backward=r + w),
        UNSHARDED: _Phases(forward=w, backward=r),
    }[peer]


def _reduced(owners: Sequence[int], setup: CostSetup, cluster: Cluster) -> _Phases:
    """Seconds per element of a unit for its owners, who reduce and gather it."""
    peer = ("DDP", "ZeRO-1", "ZeRO-2")[setup.stage]  # which sends the same, not hiding gathers
    sent = _bytes_per_element(setup, peer)
    sent = replace(sent, first_forward=sent.after, after=0.0)
    p = len(owners)
    return sent * ((p - 1) / p / cluster.rate(owners))


def _delivered(
    owners: Sequence[int], world: Sequence[int], setup: CostSetup, cluster: Cluster
) -> _Phases:
    """Seconds per element of a block that its owners send to all others."""
    n, p = len(world), len(owners)
    return _Phases(first_forward=setup.weight_bytes * (n - p) / p / cluster.rate(world))


def _forward_flops(size: ModelSize, matmul_numel: int, num_blocks: int) -> float:
    """Per token; see `cost.rank_flops_per_token`."""
    attention = 4.0 * size.attention_width * size.sequence_length
    return 2.0 * (size.shared_matmul_numel + matmul_numel) + num_blocks * attention


def _total(time: StepTime) -> float:
    return time.total

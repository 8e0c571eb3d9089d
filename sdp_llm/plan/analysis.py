"""What a plan does to the averages: disagreement factor, connectivity, load.

The formulas are the project's own normalisation of Proposition 1 of arXiv 2507.09029.

Symbols, over the free blocks `b`: `n` ranks, owner set `O_b` of `p_b` ranks, `omega_b` the
block's share of the free parameters (they sum to 1), `w_b[i] = 1{i in O_b}/p_b - 1/n`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sdp_llm.plan.assignment import Plan  # assignment imports this module


@dataclass(frozen=True)
class PlanAnalysis:
    """What is computed from a plan; every quantity but the owned shares is over the free blocks.

    Attributes:
        lam: disagreement factor `n * eigmax(sum_b omega_b w_b w_b^T)`: in the mean over the blocks,
            the squared distance of the masked average from the full average is at most `lam` times
            the mean squared deviation of the ranks, when these deviations have the same Gram
            matrix in every block up to `omega_b`. 0 means plain data parallelism.
        lam_lower_bound: `sum_b omega_b (n/p_b - 1)/(n - 1)`, which no owner sets can beat; also the
            exact factor for independent noise.
        spectral_gap: `1 - lam`, the gap of the walk rank -> block -> rank; None unless every free
            block has equally many owners and every rank equally many free parameters.
        connected: whether the free blocks link all ranks, directly or through other ranks.
        load: number of free blocks per rank.
        turns: how many blocks, pinned ones included, are in the longest chain of collectives that
            wait for each other, if a rank takes part in one at a time, in the order of the blocks:
            at least the most that a rank owns, at most all, as in plain data parallelism.
        distinct_owner_sets: how many different owner sets the free blocks have (the world set of
            the shared parameters is not counted).
        coverage: mean of `p_b / n`.
        owned_share_min: smallest share of all blocks, pinned ones included, that a rank owns.
        owned_share_max: largest such share.
        worst_case_factor: `max_b (n/p_b - 1)`, the tight factor for arbitrary gradients.
    """

    lam: float
    lam_lower_bound: float
    spectral_gap: float | None
    connected: bool
    load: tuple[int, ...]
    turns: int
    distinct_owner_sets: int
    coverage: Fraction
    owned_share_min: Fraction
    owned_share_max: Fraction
    worst_case_factor: float


def disagreement(
    owner_sets: Sequence[Sequence[int]], world_size: int, weights: Sequence[float]
) -> float:
    """The factor `lam = n * eigmax(sum_b omega_b w_b w_b^T)` of the module's formulas.

    :param owner_sets: one set of ranks per free block.
    :param world_size: number of ranks `n`.
    :param weights: one positive number per block, in any unit; they are normalised to sum 1.
    :returns: 0.0 without blocks and when every block is owned by all ranks.
    """
    if not owner_sets:
        return 0.0
    share = np.asarray(weights, dtype=np.float64)
    vectors_BN = np.full((len(owner_sets), world_size), -1.0 / world_size)
    for row, owners in zip(vectors_BN, owner_sets, strict=True):
        row[list(owners)] += 1.0 / len(owners)
    vectors_BN *= np.sqrt(world_size * share / share.sum())[:, None]
    # W W^T and W^T W have the same largest eigenvalue: take the smaller matrix.
    half = vectors_BN if len(owner_sets) <= world_size else vectors_BN.T
    return max(0.0, float(np.linalg.eigvalsh(half @ half.T)[-1]))


def is_connected(owner_sets: Sequence[Sequence[int]], world_size: int) -> bool:
    """Whether the graph of ranks and blocks, an edge per ownership, joins all ranks."""
    components = [1 << rank for rank in range(world_size)]  # bit r: rank r
    for owners in owner_sets:
        block = sum(1 << rank for rank in owners)
        joined, apart = block, []
        for component in components:
            if component & block:
                joined |= component
            else:
                apart.append(component)
        components = [*apart, joined]
    return len(components) == 1


def in_turn(turns: Iterable[tuple[Sequence[int], float]], world_size: int) -> list[float]:
    """When each rank is done, if it has one turn at a time and a turn waits for all of its ranks.

    :param turns: ranks and seconds, in the order in which every rank begins its own.
    """
    done = [0.0] * world_size
    for ranks, seconds in turns:
        if seconds:
            end = max(done[rank] for rank in ranks) + seconds
            for rank in ranks:
                done[rank] = end
    return done


def analyze(plan: Plan, block_numel: Sequence[int] | None = None) -> PlanAnalysis:
    """Compute what a plan does to the averages.

    :param plan: any plan.
    :param block_numel: number of parameters of each block, indexed by global block index, pinned
        blocks included. None: all blocks are equally large.
    :raises ValueError: `block_numel` has another length than the plan has blocks, or a size below
        1.
    """
    numel = [1] * plan.num_blocks if block_numel is None else list(block_numel)
    if len(numel) != plan.num_blocks or min(numel) < 1:
        raise ValueError(
            f"block_numel = {numel}: needs a positive size for each of {plan.num_blocks} blocks"
        )
    n, free = plan.world_size, plan.free_blocks
    owner_sets = [plan.owner_sets[block] for block in free]
    weights = [numel[block] for block in free]
    lam = disagreement(owner_sets, n, weights)
    load = _load(owner_sets, [1] * len(free), n)
    owned = [len(plan.pinned) + count for count in load]
    exact_coverage = len({len(owners) for owners in owner_sets}) == 1
    equal_load = len(set(_load(owner_sets, weights, n))) == 1
    return PlanAnalysis(
        lam=lam,
        lam_lower_bound=_lower_bound(owner_sets, n, weights),
        spectral_gap=1.0 - lam if exact_coverage and equal_load else None,
        # Without free blocks every rank shares everything with every other.
        connected=not free or is_connected(owner_sets, n),
        load=load,
        turns=int(max(in_turn(((owners, 1.0) for owners in plan.owner_sets), n))),
        distinct_owner_sets=len(set(owner_sets)),
        coverage=plan.coverage,
        owned_share_min=Fraction(min(owned), plan.num_blocks),
        owned_share_max=Fraction(max(owned), plan.num_blocks),
        worst_case_factor=max((n / len(owners) - 1.0 for owners in owner_sets), default=0.0),
    )


def _load(
    owner_sets: Sequence[Sequence[int]], weights: Sequence[int], world_size: int
) -> tuple[int, ...]:
    """Sum of the weights of the blocks that each rank owns."""
    load: Counter[int] = Counter()
    for owners, weight in zip(owner_sets, weights, strict=True):
        for rank in owners:
            load[rank] += weight
    return tuple(load[rank] for rank in range(world_size))


def _lower_bound(
    owner_sets: Sequence[Sequence[int]], world_size: int, weights: Sequence[int]
) -> float:
    """`sum_b omega_b (n/p_b - 1)/(n - 1)`: the trace over n - 1 directions."""
    if world_size == 1 or not owner_sets:
        return 0.0
    excess = [world_size / len(owners) - 1.0 for owners in owner_sets]
    weighted = sum(w * e for w, e in zip(weights, excess, strict=True))
    return weighted / sum(weights) / (world_size - 1)

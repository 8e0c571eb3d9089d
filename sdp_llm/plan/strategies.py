"""How the free blocks are dealt to the ranks.

Every strategy gives each block exactly `p` owners, keeps the loads of the ranks within one block
of each other, and uses at most `n` distinct owner sets: with more than `n` blocks the first `n`
sets repeat. This keeps the loads within one, because `n` balanced sets load every rank with `p`.

Where `p` divides `n`, all of them deal the ranks out like cards: every `n/p` blocks in a row, a
deal, have disjoint owner sets, so that their collectives run at the same time though a rank has
one under way. Blocks in a row that share a rank would wait for each other, and a chain of them
takes as long as plain data parallelism.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

from sdp_llm.plan.analysis import disagreement, is_connected

OwnerSets = tuple[tuple[int, ...], ...]

RESTARTS = 4
# Swaps tried per restart: the smallest of three, so that small plans are instant and large ones
# (n = 1024) take seconds.
MAX_SWAPS = 20_000
SWAPS_PER_OWNERSHIP = 150  # times the sum of the sizes of the owner sets
SWAP_WORK = 1_500_000  # divided by the owner sets that each swap looks at
TIE = 1e-9  # smaller differences of lambda are rounding, which may differ between machines


def cyclic_sets(world_size: int, num_blocks: int, owners: int) -> OwnerSets:
    """Sliding windows of `p` ranks, dealt around the ring of ranks.

    Free block i starts at `i * p + i // lap` modulo n, where a lap of `n / gcd(n, p)` blocks loads
    every rank equally. The shift by one rank per lap links the windows when p divides n. There are
    only n windows, so no more owner sets either.
    """
    lap = world_size // math.gcd(world_size, owners)
    starts = (i * owners + i // lap for i in range(num_blocks))
    return tuple(tuple(sorted((start + k) % world_size for k in range(owners))) for start in starts)


def random_sets(world_size: int, num_blocks: int, owners: int, seed: int) -> OwnerSets:
    """Each block goes to the `p` least loaded ranks; the seed breaks the ties."""
    # A string seed is hashed with SHA-512, the same in every process.
    generator = random.Random(f"owner sets {seed}")
    load = [0] * world_size
    sets = []
    for _ in range(min(world_size, num_blocks)):
        order = sorted(range(world_size), key=lambda rank: (load[rank], generator.random()))
        for rank in order[:owners]:
            load[rank] += 1
        sets.append(tuple(sorted(order[:owners])))
    return _repeat(sets, num_blocks)


def balanced_sets(world_size: int, num_blocks: int, owners: int, seed: int) -> OwnerSets:
    """The best of several candidates: connected if possible, then the smallest lambda.

    Candidates are the cyclic sets and seeded random sets, the latter improved by swaps inside deals
    of disjoint sets; only to link ranks that fall apart are deals broken. Nothing
    depends on time, so that all ranks find the same sets. On a tie the first candidate wins.
    """
    n, distinct = world_size, min(world_size, num_blocks)
    best = cyclic_sets(n, num_blocks, owners)
    if num_blocks == 0 or owners in (1, n):
        return best  # all balanced choices are equally good
    # The trace of the matrix behind lambda is n/p - 1, its rank at most min(n - 1, distinct).
    bound = (n / owners - 1) / min(n - 1, distinct)
    best_key = _key(best, n)
    for candidate in _candidates(n, num_blocks, owners, seed):
        if best_key[0] == 0 and best_key[1] <= bound + TIE:
            break
        key = _key(candidate, n)
        if (key[0], key[1] + TIE) < best_key:
            best, best_key = candidate, key
    return best


def _key(sets: OwnerSets, world_size: int) -> tuple[int, float]:
    """Smaller is better: disconnection, then lambda."""
    apart = int(not is_connected(sets, world_size))
    return apart, disagreement(sets, world_size, [1.0] * len(sets))


def _candidates(world_size: int, num_blocks: int, owners: int, seed: int) -> Iterator[OwnerSets]:
    distinct = min(world_size, num_blocks)
    if num_blocks <= world_size:
        yield _connect(cyclic_sets(world_size, num_blocks, owners), world_size)
    repeats = [len(range(i, num_blocks, distinct)) for i in range(distinct)]
    for restart in range(RESTARTS):
        sets = random_sets(world_size, distinct, owners, seed * RESTARTS + restart)
        sets = _spread_pairs(sets, repeats, world_size, random.Random(f"swaps {seed} {restart}"))
        if num_blocks <= world_size:  # with more blocks the cyclic sets are connected already
            sets = _connect(sets, world_size)
        yield _repeat(sets, num_blocks)


def _repeat(sets: Sequence[tuple[int, ...]], num_blocks: int) -> OwnerSets:
    return tuple(sets[i % len(sets)] for i in range(num_blocks))


def _spread_pairs(
    sets: OwnerSets, repeats: Sequence[int], world_size: int, generator: random.Random
) -> OwnerSets:
    """Try a fixed number of swaps of two ranks between two owner sets; keep what is no worse.

    The two sets are of one deal, which stays one; where `p` does not divide `n`, they are any.

    The measure is the sum over pairs of blocks of the squared number of common owners. Up to
    constants it is the sum of the squared eigenvalues behind lambda, it pushes the largest down
    together with the others, and it is an integer: no rounding decides a swap.

    :param sets: the distinct owner sets, at most one per rank.
    :param repeats: how many blocks have each set; any two differ by one at most.
    """
    members = [list(owners) for owners in sets]
    masks = [sum(1 << rank for rank in owners) for owners in sets]
    load = [0] * world_size
    for owners, count in zip(sets, repeats, strict=True):
        for rank in owners:
            load[rank] += count
    p = len(sets[0])
    deal = len(sets) if world_size % p else world_size // p
    swaps = min(MAX_SWAPS, SWAPS_PER_OWNERSHIP * len(sets) * p, SWAP_WORK // len(sets))
    for _ in range(swaps):
        a = generator.randrange(len(sets))
        first = a - a % deal
        b = generator.randrange(first, min(first + deal, len(sets)))
        slot_a, slot_b = generator.randrange(len(sets[a])), generator.randrange(len(sets[b]))
        i, j = members[a][slot_a], members[b][slot_b]
        if masks[b] >> i & 1 or masks[a] >> j & 1:
            continue  # the other set has this rank already, or a == b
        moved = repeats[a] - repeats[b]
        if moved and load[i] - load[j] != moved:
            continue  # the loads would move apart instead of changing places
        if _swap_cost(masks, repeats, (a, b), (i, j)) > 0:
            continue
        members[a][slot_a], members[b][slot_b] = j, i
        flip = 1 << i | 1 << j
        masks[a], masks[b] = masks[a] ^ flip, masks[b] ^ flip
        load[i], load[j] = load[i] - moved, load[j] + moved
    return tuple(tuple(sorted(owners)) for owners in members)


def _swap_cost(
    masks: Sequence[int], repeats: Sequence[int], blocks: tuple[int, int], ranks: tuple[int, int]
) -> int:
    """Change of the measure of `_spread_pairs` when rank i leaves set a for b, and j b for a."""
    (a, b), (i, j) = blocks, ranks
    cost = 0
    for c, mask in enumerate(masks):
        step = (mask >> j & 1) - (mask >> i & 1)
        if step and c not in blocks:
            common_a, common_b = (masks[a] & mask).bit_count(), (masks[b] & mask).bit_count()
            grown = repeats[a] * (2 * step * common_a + 1)
            shrunk = repeats[b] * (1 - 2 * step * common_b)
            cost += repeats[c] * (grown + shrunk)
    return cost


def _connect(sets: OwnerSets, world_size: int) -> OwnerSets:
    """Join the components of the rank-block graph by swaps that keep every load.

    An edge on a cycle can be exchanged with any edge of another component: both components stay
    whole and become one. Such edges last until the graph is connected if (p-1) * L >= n - 1.
    """
    members = [list(owners) for owners in sets]
    while True:
        root, cycle_edges = _components(members, world_size)
        exchange = next(
            (
                (i, a, b)
                for i, a in cycle_edges
                for b, owners in enumerate(members)
                if root[owners[0]] != root[i]
            ),
            None,
        )
        if exchange is None:
            return tuple(tuple(sorted(owners)) for owners in members)
        i, a, b = exchange
        members[a][members[a].index(i)], members[b][0] = members[b][0], i


def _components(
    members: Sequence[Sequence[int]], world_size: int
) -> tuple[list[int], list[tuple[int, int]]]:
    """A root for each rank, the same inside a component, and edges (rank, block) on cycles.

    Each of the edges alone can be taken away without disconnecting anything.
    """
    parent = list(range(world_size + len(members)))  # ranks, then blocks

    def find(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    cycle_edges = []
    for block, owners in enumerate(members):
        for rank in owners:
            rank_root, block_root = find(rank), find(world_size + block)
            if rank_root == block_root:
                cycle_edges.append((rank, block))
            parent[rank_root] = block_root
    return [find(rank) for rank in range(world_size)], cycle_edges

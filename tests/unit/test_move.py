"""The routing of a change of owners, and the order of the moves, without processes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from sdp_llm.plan import Plan, make_plan
from sdp_llm.plan.move import Move, optimised_bounds, order, shard_bounds, transfers

NUMEL = 840  # of a unit
WORLDS = [(2, 6), (3, 7), (4, 6), (5, 20), (8, 34)]


def plans(world_size: int, blocks: int, seed: int) -> Iterator[Plan]:
    """Plans of all kinds, then one with owner sets at random."""
    for owners in sorted({1, 2, world_size // 2, world_size - 1, world_size} - {0}):
        if owners <= world_size:
            yield make_plan(world_size, blocks, owners_per_block=owners, seed=seed)
            yield make_plan(
                world_size, blocks, owners_per_block=owners, strategy="random", seed=seed
            )
    draw = random.Random(seed)
    sets = [draw.sample(range(world_size), draw.randint(1, world_size)) for _ in range(blocks)]
    yield make_plan(world_size, blocks, owner_sets=[[*range(world_size)], *sets[1:]])


def rotated(plan: Plan, seed: int) -> tuple[tuple[int, ...], ...]:
    """The owner sets with those of the free blocks permuted."""
    sets = list(plan.owner_sets)
    free = list(plan.free_blocks)
    shuffled = random.Random(seed).sample(free, len(free))
    for block, other in zip(free, shuffled, strict=True):
        sets[block] = plan.owner_sets[other]
    return tuple(sets)


def held(numel: int, owners: tuple[int, ...], rank: int, stage: int) -> set[int]:
    return set(range(*optimised_bounds(numel, owners, rank, stage)))


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize(("world_size", "blocks"), WORLDS)
def test_every_new_owner_gets_each_element_once(world_size: int, blocks: int, stage: int) -> None:
    """From a rank that held it; and nobody else gets anything."""
    found = list(plans(world_size, blocks, seed=blocks))
    pairs = {
        (old, new)
        for before in found
        for after in found
        for old, new in zip(before.owner_sets, after.owner_sets, strict=True)
        if old != new
    }
    assert len(pairs) > 5
    for i, (old, new) in enumerate(sorted(pairs)):
        numel = (1, 2, 7, 60, 61)[i % 5]
        received: dict[int, Counter[int]] = {rank: Counter() for rank in range(world_size)}
        for transfer in transfers(Move(numel, old, new), stage):
            elements = range(transfer.start, transfer.stop)
            assert elements
            assert set(elements) <= held(numel, old, transfer.source, stage)
            received[transfer.target].update(elements)
        for rank, elements in received.items():
            assert elements == Counter(held(numel, new, rank, stage)), (old, new, rank)


def test_what_is_there_already_is_not_sent() -> None:
    for stage in (0, 1):
        sent = Counter[tuple[int, int]]()
        for transfer in transfers(Move(12, (0, 1), (0, 2)), stage):
            sent[transfer.source, transfer.target] += transfer.stop - transfer.start
        # At stage 0 both owners have all of it, and share the work.
        assert sent == (
            {(0, 0): 12, (0, 2): 6, (1, 2): 6} if stage == 0 else {(0, 0): 6, (1, 2): 6}
        )


def test_shards_are_disjoint_and_cover_the_unit() -> None:
    for numel in (1, 3, 4, 7):
        bounds = [shard_bounds(numel, (3, 5, 6, 9), rank) for rank in (3, 5, 6, 9)]
        assert [element for first, last in bounds for element in range(first, last)] == [
            *range(numel)
        ]


@dataclass(frozen=True)
class Sizes:
    """Bytes of one unit on a rank, as the design's table of memory has them."""

    stage: int
    weight_bytes: int

    def state(self, numel: int, owners: tuple[int, ...], rank: int) -> int:
        """fp32 master and two moments."""
        first, last = optimised_bounds(numel, owners, rank, self.stage)
        return 12 * (last - first)

    def whole(self, numel: int, owners: tuple[int, ...], rank: int) -> int:
        """Weights, gradient and state; where weights are fp32 the master is a part of them."""
        if rank not in owners:
            return 0
        state = self.state(numel, owners, rank)
        gradient = state // 3 if self.stage == 2 else 4 * numel
        shared = state // 3 if self.weight_bytes == 4 else 0
        return self.weight_bytes * numel + gradient + state - shared

    def most_beyond(self, moves: list[Move], ordered: list[int], rank: int) -> float:
        """The most that a rank holds beyond the larger of before and after, in its units."""
        # Weights and gradients are given up before anything moves.
        now = most = sum(self.state(move.numel, move.old, rank) for move in moves)
        for i in ordered:
            numel = moves[i].numel
            old, new = (
                optimised_bounds(numel, owners, rank, self.stage)
                for owners in (moves[i].old, moves[i].new)
            )
            if old != new:
                added = self.state(numel, moves[i].new, rank)
                most = max(most, now + added)
                now += added - self.state(numel, moves[i].old, rank)
        before = [self.whole(move.numel, move.old, rank) for move in moves]
        after = [self.whole(move.numel, move.new, rank) for move in moves]
        return (most - max(sum(before), sum(after))) / max([1, *before, *after])


# Of the parts of a block, one after the other: whole, or split by the bucket sizes.
PARTS = [(NUMEL,), (NUMEL, NUMEL, NUMEL // 3)]


def check_memory(world_size: int, blocks: int, sizes: Sizes, parts: tuple[int, ...]) -> None:
    found = list(plans(world_size, blocks, seed=blocks))
    pairs = [(before.owner_sets, after.owner_sets) for before in found for after in found]
    pairs += [(plan.owner_sets, rotated(plan, seed)) for plan in found for seed in range(3)]
    for before, after in pairs:
        sets = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
        moves = [Move(numel, old, new) for old, new in sets for numel in parts]
        ordered = order(moves, world_size, sizes.stage)
        assert sorted(ordered) == list(range(len(moves)))
        for rank in range(world_size):
            assert sizes.most_beyond(moves, ordered, rank) <= 1, (before, after, rank)


SIZES = [Sizes(stage, weight_bytes) for stage in (0, 1, 2) for weight_bytes in (2, 4)]


@pytest.mark.parametrize("parts", PARTS, ids=len)
@pytest.mark.parametrize("sizes", [Sizes(0, 4), Sizes(2, 2)], ids=str)
@pytest.mark.parametrize(("world_size", "blocks"), WORLDS[:-1])
def test_no_rank_holds_a_unit_more_meanwhile(
    world_size: int, blocks: int, sizes: Sizes, parts: tuple[int, ...]
) -> None:
    check_memory(world_size, blocks, sizes, parts)


@pytest.mark.slow
@pytest.mark.parametrize("parts", PARTS, ids=len)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("world_size", "blocks"), [*WORLDS, (16, 66)])
def test_no_rank_of_many_holds_more(
    world_size: int, blocks: int, sizes: Sizes, parts: tuple[int, ...]
) -> None:
    check_memory(world_size, blocks, sizes, parts)


def test_the_order_matters() -> None:
    """In the order of the blocks a rank would get all its new units before it gives one."""
    count, sizes = 6, Sizes(0, 4)
    swapped = [Move(NUMEL, (0,), (1,))] * count + [Move(NUMEL, (1,), (0,))] * count
    assert sizes.most_beyond(swapped, [*range(2 * count)], 1) > 2
    assert sizes.most_beyond(swapped, order(swapped, 2, 0), 1) <= 0

"""Which rank sends what to whom when units change their owners: arithmetic without processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Move:
    """A unit of ``numel`` elements goes from its old owners to its new ones."""

    numel: int
    old: tuple[int, ...]
    new: tuple[int, ...]


@dataclass(frozen=True)
class Transfer:
    """Elements ``start`` to ``stop`` of a unit go from one rank to another, or stay on one."""

    source: int
    target: int
    start: int
    stop: int


def shard_bounds(numel: int, owners: Sequence[int], rank: int) -> tuple[int, int]:
    """First and last-plus-one element of an owner's shard, without padding."""
    size = -(-numel // len(owners))
    first = owners.index(rank) * size
    return min(first, numel), min(first + size, numel)


def optimised_bounds(numel: int, owners: Sequence[int], rank: int, stage: int) -> tuple[int, int]:
    """The elements whose master and optimizer state a rank holds: none unless it is an owner."""
    if rank not in owners:
        return 0, 0
    return (0, numel) if stage == 0 else shard_bounds(numel, owners, rank)


def transfers(move: Move, stage: int) -> list[Transfer]:
    """What brings every new owner what it optimises, each element once, from one that held it.

    At stage 0, where every old owner holds everything, each of them sends a new one its shard. In
    this order two ranks agree on what they send each other.
    """
    found = []
    numel, had = move.numel, set(move.old)
    old_size, new_size = (max(1, -(-numel // len(owners))) for owners in (move.old, move.new))
    for place, target in enumerate(move.new):
        first, last = place * new_size, min((place + 1) * new_size, numel)
        if stage == 0:
            first, last = 0, numel
            if target in had:
                found.append(Transfer(target, target, first, last))
                continue
        # Only the owners whose shards overlap: owner sets may have hundreds of ranks.
        for at in range(first // old_size, -(-last // old_size) if first < last else 0):
            start, stop = max(first, at * old_size), min(last, (at + 1) * old_size)
            found.append(Transfer(move.old[at], target, start, stop))
    return found


def order(moves: Sequence[Move], world_size: int, stage: int) -> list[int]:
    """In which order to move, one after the other, so that no rank gets all before it gives any.

    Always the move that fills the fullest of its ranks least, and of these the one after which the
    ranks are filled most evenly. For whole owner sets that move at once no order keeps the excess
    within one shard for certain; with this one it was about that in all plans that were tried, and
    weights and gradients, given up before, are more (tests/unit/test_move.py).

    :returns: indices of ``moves``; the same on every rank, as only integers are compared.
    """
    gained, lost = _changes(moves, world_size, stage)
    # What a rank holds beyond the larger of what it holds before and after all moves.
    excess = -np.maximum(0, (gained - lost).sum(0))
    rest = list(range(len(moves)))
    ordered = []
    while rest:
        during, after = excess + gained[rest], excess + gained[rest] - lost[rest]
        peaks = np.where(gained[rest] > 0, np.maximum(during, 0), 0).max(1)
        keys = zip(peaks.tolist(), np.square(after).sum(1).tolist(), rest, strict=True)
        chosen = min(keys)[2]
        excess = excess + gained[chosen] - lost[chosen]
        rest.remove(chosen)
        ordered.append(chosen)
    return ordered


def _changes(moves: Sequence[Move], world_size: int, stage: int) -> tuple[np.ndarray, np.ndarray]:
    """What each move adds to each rank and what it frees there afterwards, ``[moves, ranks]``.

    In thousandths of the largest unit, so that their squares are small numbers too.
    """
    shape = (len(moves), world_size)
    gained, lost = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    largest = max((move.numel for move in moves), default=1)
    for i, move in enumerate(moves):
        for rank in {*move.old, *move.new}:
            before = optimised_bounds(move.numel, move.old, rank, stage)
            after = optimised_bounds(move.numel, move.new, rank, stage)
            if before != after:  # otherwise it stays where it is
                gained[i, rank] = (after[1] - after[0]) * 1000 // largest
                lost[i, rank] = (before[1] - before[0]) * 1000 // largest
    return gained, lost

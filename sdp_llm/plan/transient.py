"""The buffers of the reductions in a backward pass, as `sharding/reducer.py` makes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sdp_llm.plan.size import FP32_BYTES, CostSetup, UnitSize


@dataclass(frozen=True)
class _Reduction:
    """Bytes of a unit under way: at any time, and on top of it while it is summed at the end.

    ``gathered`` stay while the sum is gathered, until the next reduction ends.
    """

    held: float
    added: float
    gathered: float


def transient_bytes(groups: Sequence[tuple[int, Sequence[UnitSize]]], setup: CostSetup) -> int:
    """The largest sum of buffers in a backward pass.

    While a unit's gradients come in, the last parameter's is still there as autograd made it, in
    `w` bytes. Of a unit under way there are what is received (the other owners' slices of a shard
    on gloo, the shard on NCCL), in fp32 while it is added where it is narrower, and what is sent:

    - Stages 0 and 1: the fp32 gradient itself, or a copy of it in a narrower type; stage 0 gathers
      in a second copy, which stays while the next unit is under way.
    - Stage 2: the buffer of `r` bytes in which the gradients were collected. The pieces of a split
      unit are collected together, since the first parameter of a block completes last.

    With overlap a unit under way keeps its buffers until one too many would be under way, at stage
    0 until the next is. An upper bound, reached but for the order in which a unit's parameters
    complete (a few percent at stage 2).

    :param groups: the units that a rank owns, in forward order: the number of owners, and the
        pieces of the unit (one, unless it was split).
    """
    collected = setup.reduction_bytes if setup.stage == 2 else 0
    most = setup.under_way if setup.overlap and setup.stage else 1
    under_way: deque[_Reduction] = deque()
    peak = gathered = 0.0

    def leave_under_way(count: int, here: float) -> None:
        nonlocal peak, gathered
        while len(under_way) > count:
            peak = max(peak, here + _held(under_way) + under_way[0].added)
            ended = under_way.popleft()
            gathered = ended.gathered if setup.overlap else 0.0

    for owners, pieces in reversed(groups):
        here = float(setup.weight_bytes * max(unit.largest_parameter for unit in pieces))
        if owners == 1:  # nothing to reduce
            peak = max(peak, here + _held(under_way) + gathered)
            continue
        here += collected * sum(unit.numel for unit in pieces)
        for unit in reversed(pieces):
            leave_under_way(most - 1, here)
            under_way.append(_reduction(unit, owners, setup))
            peak = max(peak, here + _held(under_way) + gathered)
            if not setup.overlap:
                leave_under_way(0, here)
        # What was collected of the last pieces stays as long as they are under way.
        for i, unit in enumerate(pieces[: len(under_way)]):
            last = under_way[-1 - i]
            under_way[-1 - i] = replace(last, held=last.held + collected * unit.numel)
    leave_under_way(0, 0.0)
    return round(peak)


def _held(under_way: deque[_Reduction]) -> float:
    return sum(reduction.held for reduction in under_way)


def _reduction(unit: UnitSize, owners: int, setup: CostSetup) -> _Reduction:
    r = setup.reduction_bytes
    copies = 0 if setup.stage == 2 or r == FP32_BYTES else 2 - setup.stage
    received = unit.numel * r * (owners - 1 if setup.backend == "gloo" else 1) / owners
    summand = 0 if r == FP32_BYTES else FP32_BYTES / owners
    # The second copy is made when all summands have been added.
    gathered = max(copies - 1, 0) * unit.numel * r
    added = max(gathered, unit.numel * summand)
    return _Reduction(received + unit.numel * min(copies, 1) * r, added, gathered)

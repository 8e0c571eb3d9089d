"""What ranks send each other when the plan or the masking of a run changes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from sdp_llm.plan.assignment import Plan
from sdp_llm.plan.move import Move, transfers
from sdp_llm.plan.schedule import Phase, Schedule
from sdp_llm.plan.size import FP32_BYTES, CostSetup, ModelSize

# Rotations are drawn alike: after so many of a phase their mean is known well enough.
_ROTATIONS = 64


def change_traffic(
    size: ModelSize, old: tuple[Plan, str], new: tuple[Plan, str], setup: CostSetup
) -> list[float]:
    """The bytes that each rank sends when one plan and masking follow another.

    The fp32 masters and moments of units with other owners go from the old owners to the new ones
    (:func:`~sdp_llm.plan.move.transfers`). The weights of all units that ranks store elsewhere
    than before are then gathered as after a step.

    :param setup: its masking is of no account.
    """
    (before, old_masking), (after, new_masking) = old, new
    n, w = after.world_size, setup.weight_bytes
    sent = [0.0] * n
    for unit in size.units:
        if unit.block is None:
            continue
        move = Move(unit.numel, before.owner_sets[unit.block], after.owner_sets[unit.block])
        p = len(move.new)
        if move.old != move.new:
            for transfer in transfers(move, setup.stage):
                if transfer.source != transfer.target:
                    elements = transfer.stop - transfer.start
                    sent[transfer.source] += (FP32_BYTES + setup.moment_bytes) * elements
        elif old_masking == new_masking or p == n:
            continue
        gathered = (p - 1) / p if setup.stage > 0 else 0.0
        delivered = (n - p) / p if new_masking == "backward" else 0.0
        for rank in move.new:
            sent[rank] += w * (gathered + delivered) * unit.numel
    return sent


def changes_per_step(
    size: ModelSize, schedule: Schedule, phase: Phase, setup: CostSetup
) -> list[float]:
    """The bytes that each rank sends for changes of plan, spread over the steps of a phase.

    These are its rotations, by the mean of the first 64, and the change at its beginning.
    """
    steps, every = phase.stop - phase.start, phase.rotate_every
    sent = [0.0] * schedule.world_size
    if phase.start > 0:
        sent = change_traffic(size, schedule.at(phase.start - 1), schedule.at(phase.start), setup)
    count = (steps - 1) // every if every else 0
    at = [schedule.at(phase.start + every * i) for i in range(min(count, _ROTATIONS) + 1)]
    rotations = [change_traffic(size, old, new, setup) for old, new in pairwise(at)]
    return [
        (at_start + count * _mean([rotation[rank] for rotation in rotations])) / steps
        for rank, at_start in enumerate(sent)
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0

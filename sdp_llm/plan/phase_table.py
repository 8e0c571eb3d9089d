"""The phases of a run as a table for a terminal."""

from __future__ import annotations

from sdp_llm.plan.cost import Cost
from sdp_llm.plan.schedule import Phase, Schedule
from sdp_llm.plan.schedule_cost import ScheduleCost
from sdp_llm.plan.tables import number, unit_for

_TEXTS = ("phase", "steps", "coverage", "masking", "rotates")
_NUMBERS = ("memory", "sent per step", "FLOPs per token")


def phase_table(schedule: Schedule, cost: ScheduleCost) -> str:
    """A row for each phase, then the most memory of all and the mean over the steps.

    Memory is that of the rank that needs most, traffic and FLOPs are means over the ranks.
    """
    memory_unit, memory_divisor = unit_for(max(c.memory.total for c in cost.phases))
    sent_unit, sent_divisor = unit_for(max(c.traffic.mean for c in cost.phases))
    most_flops = max(c.compute.mean for c in cost.phases)
    flops_unit, flops_divisor = ("G", 1e9) if most_flops >= 1e9 else ("M", 1e6)

    def numbers(of: Cost) -> list[str]:
        return [
            number(of.memory.total / memory_divisor),
            number(of.traffic.mean / sent_divisor),
            number(of.compute.mean / flops_divisor),
        ]

    rows = [
        [*_texts(i, phase), *numbers(of_phase)]
        for i, (phase, of_phase) in enumerate(zip(schedule.phases, cost.phases, strict=True), 1)
    ]
    memory, *means = numbers(cost.whole)
    empty = [""] * (len(_TEXTS) - 1)
    rows += [["most", *empty, memory, "", ""], ["mean", *empty, "", *means]]
    header = [[*_TEXTS, *_NUMBERS], [""] * len(_TEXTS) + [memory_unit, sent_unit, flops_unit]]
    lines = _aligned([*header, *rows])
    lines.insert(len(header), "-" * max(len(line) for line in lines))
    sets = len(schedule.owner_sets)
    note = f"{sets} owner sets in all phases, the world included, each with a process group"
    return "\n".join([*lines, note])


def _texts(i: int, phase: Phase) -> list[str]:
    rotates = f"every {phase.rotate_every:,}" if phase.rotate_every else "never"
    steps = f"{phase.start + 1:,} to {phase.stop:,}"
    return [str(i), steps, str(phase.plan.coverage), phase.masking, rotates]


def _aligned(rows: list[list[str]]) -> list[str]:
    """The texts to the left, the numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < len(_TEXTS) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]

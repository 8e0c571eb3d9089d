"""How well the gradients that masks leave agree with those of the whole model."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from benchmarks._study_merged import accumulate
from sdp_llm.plan import Plan
from sdp_llm.simulation import Simulation
from sdp_llm.subnetwork.adapter import UnitLayout

MASKINGS = ("forward", "backward")
Dots = tuple[float, float, float]  # of masked and full: <m, f>, <m, m>, <f, f>


def alignment(simulation: Simulation, tokens: Tensor, micro_batch: int) -> dict[str, Any]:
    """Compare the gradients under both maskings with the full one, at the weights of now.

    All are of the same samples, dealt to the workers as in training: the full gradient is what
    workers with the whole model would average.

    :param tokens: ids ``[samples, sequence + 1]``, a multiple of the world size.
    :returns: by masking, the cosine for each unit and for each rank (over all that it owns), and
        the norm of the masked gradient over that of the full one, by unit.
    """
    plan = simulation.plan
    world = tuple(range(plan.world_size))
    whole = replace(plan, owner_sets=(world,) * plan.num_blocks)
    full = _gradients(simulation, tokens, micro_batch, whole, "forward")
    result = {}
    for masking in MASKINGS:
        masked = _gradients(simulation, tokens, micro_batch, plan, masking)
        dots = {unit: _dots(unit, masked, full) for unit in simulation.layout.units}
        result[masking] = {
            "units": {unit.name: cosine([dots[unit]]) for unit in dots},
            "norms": {unit.name: math.sqrt(m / f) for unit, (_, m, f) in dots.items()},
            "ranks": [
                cosine([dots[u] for u in dots if u.block is None or plan.owns(rank, u.block)])
                for rank in world
            ],
        }
    return result


def cosine(dots: list[Dots]) -> float:
    """Of two vectors that consist of several parts."""
    product, masked, full = (sum(values) for values in zip(*dots, strict=True))
    return product / math.sqrt(masked * full)


def _gradients(
    simulation: Simulation, tokens: Tensor, micro_batch: int, plan: Plan, masking: str
) -> dict[str, Tensor]:
    """By global name, under another plan for once."""
    before = simulation.plan, simulation.masking
    simulation.change_plan(plan, masking)
    accumulate(simulation, tokens, micro_batch)
    simulation.change_plan(*before)
    found = {}
    for name, master in simulation.masters.items():
        assert master.grad is not None
        found[name], master.grad = master.grad, None
    return found


def _dots(unit: UnitLayout, masked: dict[str, Tensor], full: dict[str, Tensor]) -> Dots:
    def dot(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return sum(float(a[s.name].flatten().dot(b[s.name].flatten())) for s in unit.parameters)

    return dot(masked, full), dot(masked, masked), dot(full, full)

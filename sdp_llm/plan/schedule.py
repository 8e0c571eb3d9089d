"""How the plan changes in the course of a run: phases, and rotations inside them."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from sdp_llm.config import SDPConfig
from sdp_llm.errors import ConfigError
from sdp_llm.plan.assignment import Plan, plan_from_config

ENDLESS = sys.maxsize


@dataclass(frozen=True)
class Phase:
    """A stretch of a run, from step ``start`` up to, not including, step ``stop``.

    Attributes:
        start: optimizer steps before it.
        stop: optimizer steps after it; ``ENDLESS`` where nobody knows.
        plan: before any rotation.
        masking: "forward" or "backward".
        rotate_every: steps between rotations; 0: none.
        seed: of the rotations.
    """

    start: int
    stop: int
    plan: Plan
    masking: str
    rotate_every: int
    seed: int

    def plan_at(self, step: int) -> Plan:
        """The plan of a step: the free blocks permuted among the plan's owner sets.

        Rotation ``(step - start) // rotate_every`` is a permutation of its own, drawn from the seed
        and its number; number 0 is the plan itself. Pinned blocks stay, and every rank keeps its
        number of blocks. The plan of the phase's last step stays in force after it: what is
        validated, saved and exported in the end is what was trained.
        """
        step = min(step, self.stop - 1)
        number = (step - self.start) // self.rotate_every if self.rotate_every else 0
        if number <= 0:
            return self.plan
        free = self.plan.free_blocks
        rotated = [self.plan.owner_sets[block] for block in free]
        # A string seed is hashed with SHA-512, the same in every process.
        random.Random(f"rotation {self.seed} {number}").shuffle(rotated)
        sets = list(self.plan.owner_sets)
        for block, owners in zip(free, rotated, strict=True):
            sets[block] = owners
        return replace(self.plan, owner_sets=tuple(sets))

    def as_dict(self) -> dict[str, Any]:
        """What ``plan.json`` has of it; the owner sets are those before any rotation."""
        return {
            "start": self.start,
            "stop": self.stop,
            "masking": self.masking,
            "rotate_every": self.rotate_every,
            "seed": self.seed,
            "owners": self.plan.owner_sets,
            "pinned": self.plan.pinned,
        }

    def __str__(self) -> str:
        text = f"coverage {self.plan.coverage}, {self.masking} masking"
        if self.rotate_every == 1:
            text += ", rotating every step"
        elif self.rotate_every:
            text += f", rotating every {self.rotate_every:,} steps"
        return text


@dataclass(frozen=True)
class Schedule:
    """The phases of a run, in order and without gaps, from step 0; at least one."""

    phases: tuple[Phase, ...]

    @property
    def world_size(self) -> int:
        """Number of ranks ``n``, the same in all phases."""
        return self.phases[0].plan.world_size

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the budget; ``ENDLESS`` where nobody knows."""
        return self.phases[-1].stop

    def number_at(self, step: int) -> int:
        """The number of a step's phase, as people count: from 1."""
        return self.phases.index(self.phase_at(step)) + 1

    def phase_at(self, step: int) -> Phase:
        """The phase of a step; past the end the last one goes on."""
        return next((phase for phase in self.phases if step < phase.stop), self.phases[-1])

    def at(self, step: int) -> tuple[Plan, str]:
        """Plan and masking of a step."""
        phase = self.phase_at(step)
        return phase.plan_at(step), phase.masking

    def changes_at(self, step: int) -> bool:
        """Whether plan or masking of this step are others than those of the step before."""
        return step > 0 and self.at(step) != self.at(step - 1)

    @property
    def owner_sets(self) -> tuple[tuple[int, ...], ...]:
        """Each owner set of all phases once, the world first; rotations add none."""
        sets = (owners for phase in self.phases for owners in phase.plan.distinct_owner_sets)
        return tuple(dict.fromkeys(sets))


def schedule_from_config(
    sdp: SDPConfig, world_size: int, num_blocks: int, total_steps: int | None
) -> Schedule:
    """The phases that the ``sdp`` section of a run config describes.

    A phase ends at the step nearest to its share of the budget. One that comes to no step is left
    out where the budget has fewer steps than the schedule has phases.

    :param total_steps: optimizer steps of the budget; None: unknown, and the one phase of a config
        without ``sdp.schedule`` never ends.
    :raises ConfigError: there is a schedule but no budget, a phase comes to no step, or a plan is
        impossible.
    """
    plans = phase_plans(sdp, world_size, num_blocks)
    if total_steps is None and sdp.schedule is not None:
        raise ConfigError(
            "sdp.schedule: phases end at shares of the budget, but there is none; give one in the "
            "training section, or in a loop of your own total_num_steps to initialize"
        )
    phases: list[Phase] = []
    start = 0
    stops = phase_stops(sdp, total_steps)
    for i, ((until, values), plan, stop) in enumerate(zip(sdp.phases(), plans, stops, strict=True)):
        if stop > start:
            phases.append(
                Phase(start, stop, plan, values.masking, values.rotate_every, values.seed)
            )
            start = stop
        elif total_steps is not None and total_steps >= len(plans):
            raise ConfigError(
                f"sdp.schedule[{i}].until = {float(until):g}: of {total_steps} steps the phase "
                f"would end at step {stop}, where it begins; make it longer, or remove it"
            )
    return Schedule(tuple(phases))


def phase_stops(sdp: SDPConfig, total_steps: int | None) -> tuple[int, ...]:
    """The optimizer steps after which each of ``sdp.phases()`` ends, rounded half upwards."""
    if total_steps is None:
        return (ENDLESS,) * len(sdp.phases())
    return tuple(math.floor(until * total_steps + Fraction(1, 2)) for until, _ in sdp.phases())


def phase_plans(sdp: SDPConfig, world_size: int, num_blocks: int) -> tuple[Plan, ...]:
    """The plan of each of ``sdp.phases()``; raises like make_plan, with the phase's keys."""
    plans = []
    for i, (_, values) in enumerate(sdp.phases()):
        try:
            plans.append(plan_from_config(values, world_size, num_blocks))
        except ConfigError as error:
            if sdp.schedule is None:
                raise
            own = sdp.schedule[i].given()
            raise ConfigError(_in_phase(str(error), f"sdp.schedule[{i}]", tuple(own))) from None
    return tuple(plans)


def _in_phase(message: str, path: str, names: Sequence[str]) -> str:
    """An error about the ``sdp`` section with the paths of what a phase names itself."""
    renamed = message
    for name in names:
        renamed = renamed.replace(f"sdp.{name}", f"{path}.{name}")
    return renamed if renamed != message else f"{path}: {message}"

"""What a run of the study costs a rank, by the closed forms of the library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from benchmarks._study_cases import KINDS, WORLD_SIZE, Run, size_of
from sdp_llm.config import parse_config
from sdp_llm.plan import Schedule, schedule_from_config
from sdp_llm.plan.cost import MemoryCost
from sdp_llm.plan.schedule_cost import schedule_cost
from sdp_llm.plan.size import CostSetup

STAGES = (0, 2)


@dataclass(frozen=True)
class RunCost:
    """Closed forms of a run on 8 ranks, fp32 and AdamW, micro-batches of one sample.

    Attributes:
        parameters: of the whole model.
        flops: of a rank in the whole run, mean over the ranks.
        memory: by ZeRO stage, of the phase and rank that need most.
        sent: bytes by ZeRO stage, of a rank in the whole run, mean over the ranks; also what
            travels when the plan changes.
    """

    parameters: int
    flops: float
    memory: Mapping[int, MemoryCost]
    sent: Mapping[int, int]


def run_schedule(run: Run) -> Schedule:
    """The phases of a run."""
    case = run.case
    sdp = parse_config({"sdp": {**KINDS[case.kind], "seed": run.seed}}).sdp
    return schedule_from_config(sdp, WORLD_SIZE, case.model.blocks, case.steps())


def run_cost(run: Run) -> RunCost:
    """The cost of a run."""
    size, schedule = size_of(run.case.model), run_schedule(run)
    setup = CostSetup(backend="nccl", accumulation=run.case.samples)
    costs = {
        stage: schedule_cost(size, schedule, replace(setup, stage=stage)).whole for stage in STAGES
    }
    steps = schedule.total_steps
    return RunCost(
        size.numel,
        costs[0].compute.mean * run.case.tokens() / WORLD_SIZE,
        {stage: cost.memory for stage, cost in costs.items()},
        {stage: cost.traffic.mean * steps for stage, cost in costs.items()},
    )

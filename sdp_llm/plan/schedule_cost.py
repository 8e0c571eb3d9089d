"""What the phases of a schedule cost a rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sdp_llm.config import SDPConfig
from sdp_llm.errors import ConfigError
from sdp_llm.plan.change_cost import changes_per_step
from sdp_llm.plan.cost import ComputeCost, Cost, TrafficCost, rank_traffic, sdp_cost
from sdp_llm.plan.schedule import Phase, Schedule, phase_plans
from sdp_llm.plan.size import CostSetup, ModelSize
from sdp_llm.plan.tables import GIB


@dataclass(frozen=True)
class ScheduleCost:
    """The cost of each phase, in their order.

    Attributes:
        phases: one for each phase; what ranks send when the plan changes, at its beginning and in
            its rotations, is spread over its steps.
        most: index of the phase whose rank that needs most memory needs most.
        whole: memory of that phase; traffic and compute in the mean over the steps.
    """

    phases: tuple[Cost, ...]
    most: int
    whole: Cost


def schedule_cost(size: ModelSize, schedule: Schedule, setup: CostSetup) -> ScheduleCost:
    """The costs under a schedule; raises like ``sdp_cost``.

    :param setup: its masking is replaced by each phase's.
    """
    costs = tuple(_phase_cost(size, schedule, phase, setup) for phase in schedule.phases)
    totals = [cost.memory.total for cost in costs]
    most = totals.index(max(totals))
    steps = [phase.stop - phase.start for phase in schedule.phases]

    def mean(values: list[float]) -> float:
        return sum(n * value for n, value in zip(steps, values, strict=True)) / sum(steps)

    whole = replace(
        costs[most],
        traffic=TrafficCost(
            round(mean([cost.traffic.mean for cost in costs])),
            round(mean([cost.traffic.maximum for cost in costs])),
        ),
        compute=ComputeCost(
            mean([cost.compute.mean for cost in costs]),
            mean([cost.compute.maximum for cost in costs]),
        ),
    )
    return ScheduleCost(costs, most, whole)


def _phase_cost(size: ModelSize, schedule: Schedule, phase: Phase, setup: CostSetup) -> Cost:
    setup = replace(setup, masking=phase.masking)
    cost = sdp_cost(size, phase.plan, setup)
    changes = changes_per_step(size, schedule, phase, setup)
    if not any(changes):
        return cost
    sent = [rank_traffic(size, phase.plan, setup, rank) + s for rank, s in enumerate(changes)]
    return replace(cost, traffic=TrafficCost(round(sum(sent) / len(sent)), round(max(sent))))


def mean_flops_per_token(
    size: ModelSize, sdp: SDPConfig, world_size: int, setup: CostSetup
) -> float:
    """Operations per token in the mean over the ranks and, by their shares, over the phases.

    It needs no budget: from this the steps of a budget in FLOPs follow.

    :raises ConfigError: when the plan of a phase is impossible.
    """
    mean, start = 0.0, 0.0
    plans = phase_plans(sdp, world_size, len(size.blocks))
    for (until, values), plan in zip(sdp.phases(), plans, strict=True):
        cost = sdp_cost(size, plan, replace(setup, masking=values.masking))
        mean += (float(until) - start) * cost.compute.mean
        start = float(until)
    return mean


def check_memory_limit(schedule: Schedule, cost: ScheduleCost, limit_gib: float) -> None:
    """Check that every phase is predicted to fit ``sdp.memory_limit_gib``.

    :raises ConfigError: names the phase that needs most, and what it is predicted to need.
    """
    need = cost.whole.memory.total / GIB
    if need <= limit_gib:
        return
    phase = schedule.phases[cost.most]
    subject = f"the run ({phase})"
    if len(schedule.phases) > 1:
        steps = f"steps {phase.start + 1:,} to {phase.stop:,}"
        subject = f"phase {cost.most + 1} of {len(schedule.phases)} ({phase}, {steps})"
    raise ConfigError(
        f"sdp.memory_limit_gib = {limit_gib:g}: {subject} is predicted to need {need:.4g} GiB on a "
        "rank; lower the coverage or train_micro_batch_size_per_gpu, use "
        "model.gradient_checkpointing, or raise the limit"
    )

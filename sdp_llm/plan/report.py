"""The card of a run: who owns what, what that does to the averages, and what it costs a rank."""

# The symbols are those of the design; ruff takes the Greek rho for a p.
# ruff: noqa: RUF001

from __future__ import annotations

import textwrap

from sdp_llm.plan.analysis import PlanAnalysis, analyze
from sdp_llm.plan.assignment import Plan
from sdp_llm.plan.cost import Cost, trained_numel
from sdp_llm.plan.peers import peer_cost
from sdp_llm.plan.phase_table import phase_table
from sdp_llm.plan.render import render_ownership
from sdp_llm.plan.schedule import Phase, Schedule
from sdp_llm.plan.schedule_cost import ScheduleCost, schedule_cost
from sdp_llm.plan.size import CostSetup, ModelSize
from sdp_llm.plan.tables import GIB, number, table, unit_for

WIDTH = 100  # characters
SHOWN_PEERS = ("DDP", "ZeRO-2", "ZeRO-3")
MEMORY_ROWS = ("weights", "gradients", "optimizer", "transient", "activations")

_ABOUT_LAMBDA = (
    "λ bounds the squared distance of the masked averages from the full average, in units of the "
    "ranks' mean squared deviation, when ranks deviate alike in every block: 0 is plain data "
    "parallelism. Where every block has as many owners and every rank as many blocks, λ = 1 means "
    "that the ranks fall apart into groups, and ρ = 1 - λ is the spectral gap of the walk rank → "
    "block → rank, how fast what ranks share spreads. Both are this project's own normalisation "
    "of Proposition 1 of arXiv 2507.09029."
)


def run_report(
    schedule: Schedule,
    size: ModelSize,
    setup: CostSetup,
    *,
    model: str,
    memory_limit_gib: float | None = None,
) -> str:
    """Everything that is known about a run before it starts, for a terminal of 100 columns.

    :param schedule: who owns what, when.
    :param size: the model at the run's micro-batch and sequence length.
    :param setup: stage, dtypes and so on; its masking is replaced by each phase's.
    :param model: the model's name.
    :param memory_limit_gib: shown beside what is predicted; None: there is none.
    :returns: Lines joined by newlines, without a newline at the end.
    :raises ValueError: the model and the plan differ in depth.
    """
    cost = schedule_cost(size, schedule, setup)
    sdp = cost.whole
    costs = {"SDP": sdp}
    if sdp.least_memory != sdp.memory:
        costs = {"SDP most": sdp, "SDP least": sdp}
    costs |= {peer: peer_cost(size, schedule.world_size, setup, peer) for peer in SHOWN_PEERS}
    are_several = len(schedule.phases) > 1
    parts = [
        _headline(schedule, size, setup, model),
        *([phase_table(schedule, cost)] if are_several else []),
        *plan_parts(schedule, size),
        "\n".join(textwrap.wrap(_ABOUT_LAMBDA, WIDTH)),
        _memory_table(costs, f"rank in phase {cost.most + 1}" if are_several else "rank"),
        *([] if memory_limit_gib is None else [_limit_line(cost, memory_limit_gib)]),
        _step_table(costs, "one rank, mean of the steps" if are_several else "one rank"),
        "\n".join(textwrap.wrap(_assumptions(schedule, size, setup), WIDTH)),
    ]
    return "\n\n".join(parts)


def plan_parts(schedule: Schedule, size: ModelSize | None = None) -> list[str]:
    """Who owns what in each phase, and, where the model's size is known, what that does."""
    parts: list[str] = []
    shown: dict[Plan, int] = {}
    for i, phase in enumerate(schedule.phases, 1):
        plan = phase.plan
        if len(schedule.phases) > 1:
            same = f", the plan of phase {shown[plan]}" if plan in shown else ""
            parts.append(f"phase {i}: {phase}{same}")
        if plan not in shown:
            parts.append(render_ownership(plan))
            if size is not None:
                parts.append(_analysis_lines(phase, analyze(plan, size.block_numel)))
        shown.setdefault(plan, i)
    return parts


def _headline(schedule: Schedule, size: ModelSize, setup: CostSetup, model: str) -> str:
    dtypes = {2: "bf16", 4: "fp32"}
    ranks, blocks = schedule.world_size, len(size.blocks)
    tokens = ranks * setup.accumulation * size.micro_batch * size.sequence_length
    plural = "es" if setup.accumulation > 1 else ""
    checkpointing = ", gradient checkpointing" if setup.gradient_checkpointing else ""
    masking = f"{schedule.phases[0].masking} masking, " if len(schedule.phases) == 1 else ""
    return "\n".join(
        (
            f"{model}: {size.numel / 1e6:,.1f} M parameters, {blocks} blocks, "
            f"{dtypes[setup.weight_bytes]} weights, {dtypes[setup.reduction_bytes]} reductions",
            _trained_line(schedule, size),
            f"{masking}ZeRO stage {setup.stage} inside owner sets{checkpointing}",
            f"{tokens:,} tokens per step = {ranks} ranks x {setup.accumulation} "
            f"micro-batch{plural} x {size.micro_batch} samples x {size.sequence_length} tokens",
        )
    )


def _trained_line(schedule: Schedule, size: ModelSize) -> str:
    numels = [
        trained_numel(size, phase.plan, rank)
        for phase in schedule.phases
        for rank in range(schedule.world_size)
    ]
    low, high = (f"{numel / 1e6:,.1f}" for numel in (min(numels), max(numels)))
    shares = dict.fromkeys(f"{numel / size.numel:.1%}" for numel in (min(numels), max(numels)))
    return (
        f"a rank trains {low if low == high else f'{low} to {high}'} M of them "
        f"({' to '.join(shares)})"
    )


def _analysis_lines(phase: Phase, analysis: PlanAnalysis) -> str:
    low, high = analysis.owned_share_min, analysis.owned_share_max
    share = f"{float(low):.1%}" if low == high else f"{float(low):.1%} to {float(high):.1%}"
    load = "  ".join(str(blocks) for blocks in analysis.load)
    gap = "none: coverage or load is uneven"
    if analysis.spectral_gap is not None:
        gap = f"{analysis.spectral_gap:.4f}"
    rows = {
        "coverage": f"{analysis.coverage} of the free blocks; a rank owns {share} of all blocks",
        "load": f"{load}  free blocks, by rank",
        "connectivity": "all ranks are linked by shared free blocks"
        if analysis.connected
        else "DISCONNECTED: some ranks share no free block, directly or through others",
        "turns": f"{analysis.turns} of {phase.plan.num_blocks} blocks' collectives wait for each "
        f"other (at least {max(analysis.load) + len(phase.plan.pinned)}, as many as a rank owns)",
        "owner sets": f"{analysis.distinct_owner_sets} distinct ones of free blocks "
        f"(at most {phase.plan.world_size} when balanced), each with a process group",
    }
    if phase.rotate_every:
        rows["rotation"] = (
            "the free blocks are permuted among these owner sets, of which the picture shows the "
            f"first assignment; steps between: {phase.rotate_every:,}"
        )
    rows |= {
        "λ": f"{analysis.lam:.4f}, at least {analysis.lam_lower_bound:.4f} for any plan of this "
        "coverage",
        "ρ": gap,
    }
    hanging = " " * 14
    return "\n".join(
        textwrap.fill(text, WIDTH, initial_indent=f"{name:<14}", subsequent_indent=hanging)
        for name, text in rows.items()
    )


def _memory_table(costs: dict[str, Cost], whose: str) -> str:
    memories = {
        name: cost.least_memory if name == "SDP least" else cost.memory
        for name, cost in costs.items()
    }
    unit, divisor = unit_for(max(memory.total for memory in memories.values()))
    rows = [
        (row, [number(getattr(memory, row) / divisor) for memory in memories.values()])
        for row in MEMORY_ROWS
    ]
    rows.append(("total", [number(memory.total / divisor) for memory in memories.values()]))
    return table(f"memory of one {whose}, {unit}", list(memories), rows)


def _limit_line(cost: ScheduleCost, limit_gib: float) -> str:
    need = cost.whole.memory.total / GIB
    verdict = "fits" if need <= limit_gib else "DOES NOT FIT"
    return (
        f"limit         {limit_gib:g} GiB on a rank (sdp.memory_limit_gib); "
        f"{number(need)} GiB are predicted: {verdict}"
    )


def _step_table(costs: dict[str, Cost], whose: str) -> str:
    """Traffic and compute, mean over the ranks and, where it differs, of the most loaded."""
    shown = {name: cost for name, cost in costs.items() if name != "SDP least"}
    names = ["SDP" if name == "SDP most" else name for name in shown]
    traffic = [cost.traffic for cost in shown.values()]
    compute = [cost.compute for cost in shown.values()]
    unit, divisor = unit_for(max(sent.maximum for sent in traffic))
    rows = [(f"sent per step, {unit}", [number(sent.mean / divisor) for sent in traffic])]
    if any(sent.mean != sent.maximum for sent in traffic):
        rows.append(("  most loaded rank", [number(sent.maximum / divisor) for sent in traffic]))
    name, scale = ("G", 1e9) if max(flops.maximum for flops in compute) >= 1e9 else ("M", 1e6)
    rows.append((f"{name}FLOPs per token", [number(flops.mean / scale) for flops in compute]))
    if any(flops.mean != flops.maximum for flops in compute):
        rows.append(("  most loaded rank", [number(flops.maximum / scale) for flops in compute]))
    return table(f"traffic and compute of {whose}", names, rows)


def _assumptions(schedule: Schedule, size: ModelSize, setup: CostSetup) -> str:
    moves = ""
    if len(schedule.phases) > 1 or schedule.phases[0].rotate_every:
        moves = " What ranks send when the plan changes is counted, spread over the steps."
    moments = f"{setup.moment_bytes} bytes of moments per parameter"
    loss = ""
    if size.loss_activations > size.recomputed_activations:
        unit, divisor = unit_for(size.loss_activations)
        loss = (
            f" Activations include {number(size.loss_activations / divisor)} {unit} that the loss "
            "needs while it is computed (training.loss_chunk)."
        )
    return (
        f"Predicted for all columns with fp32 gradients, {moments}, the same batch and, on "
        f"{setup.backend}, buffers in transit at their largest. The total adds peaks that need not "
        "coincide. FLOPs are forward and backward, attention counted in full (not halved for its "
        "causal mask). DDP and ZeRO are predicted at their best: least possible traffic, buffers "
        f"no larger than needed.{loss}{moves}"
    )

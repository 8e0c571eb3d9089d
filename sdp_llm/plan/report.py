"""The card of a run: who owns what, what that does to the averages, and what it costs a rank."""

# The symbols are those of the design; ruff takes the Greek rho for a p.
# ruff: noqa: RUF001

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from sdp_llm.plan.analysis import PlanAnalysis, analyze
from sdp_llm.plan.assignment import Plan
from sdp_llm.plan.cost import Cost, sdp_cost
from sdp_llm.plan.peers import peer_cost
from sdp_llm.plan.render import render_ownership
from sdp_llm.plan.size import CostSetup, ModelSize

WIDTH, LABEL_WIDTH = 100, 31  # characters
SHOWN_PEERS = ("DDP", "ZeRO-2", "ZeRO-3")
MEMORY_ROWS = ("weights", "gradients", "optimizer", "transient", "activations")
MIB, GIB = 2**20, 2**30

_ABOUT_LAMBDA = (
    "λ bounds the squared distance of the masked averages from the full average, in units of the "
    "ranks' mean squared deviation, when ranks deviate alike in every block: 0 is plain data "
    "parallelism. Where every block has as many owners and every rank as many blocks, λ = 1 means "
    "that the ranks fall apart into groups, and ρ = 1 - λ is the spectral gap of the walk rank → "
    "block → rank, how fast what ranks share spreads. Both are this project's own normalisation "
    "of Proposition 1 of arXiv 2507.09029."
)


def plan_report(plan: Plan, size: ModelSize, setup: CostSetup, *, model: str) -> str:
    """Everything that is known about a run before it starts, for a terminal of 100 columns.

    :param plan: who owns what.
    :param size: the model at the run's micro-batch and sequence length.
    :param setup: masking, stage, dtypes and so on.
    :param model: the model's name.
    :returns: Lines joined by newlines, without a newline at the end.
    :raises ValueError: the model and the plan differ in depth.
    """
    analysis = analyze(plan, size.block_numel)
    sdp = sdp_cost(size, plan, setup)
    costs = {"SDP": sdp}
    if sdp.least_memory != sdp.memory:
        costs = {"SDP most": sdp, "SDP least": sdp}
    costs |= {peer: peer_cost(size, plan.world_size, setup, peer) for peer in SHOWN_PEERS}
    parts = [
        _headline(plan, size, setup, model),
        render_ownership(plan),
        _analysis_lines(plan, analysis),
        "\n".join(textwrap.wrap(_ABOUT_LAMBDA, WIDTH)),
        _memory_table(costs),
        _step_table(costs),
        "\n".join(textwrap.wrap(_assumptions(setup), WIDTH)),
    ]
    return "\n\n".join(parts)


def _headline(plan: Plan, size: ModelSize, setup: CostSetup, model: str) -> str:
    dtypes = {2: "bf16", 4: "fp32"}
    tokens = plan.world_size * setup.accumulation * size.micro_batch * size.sequence_length
    plural = "es" if setup.accumulation > 1 else ""
    checkpointing = ", gradient checkpointing" if setup.gradient_checkpointing else ""
    return "\n".join(
        (
            f"{model}: {size.numel / 1e6:,.1f} M parameters, {plan.num_blocks} blocks, "
            f"{dtypes[setup.weight_bytes]} weights, {dtypes[setup.reduction_bytes]} reductions",
            f"{setup.masking} masking, ZeRO stage {setup.stage} inside owner sets{checkpointing}",
            f"{tokens:,} tokens per step = {plan.world_size} ranks x {setup.accumulation} "
            f"micro-batch{plural} x {size.micro_batch} samples x {size.sequence_length} tokens",
        )
    )


def _analysis_lines(plan: Plan, analysis: PlanAnalysis) -> str:
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
        "owner sets": f"{analysis.distinct_owner_sets} distinct ones of free blocks "
        f"(at most {plan.world_size} when balanced), each with a process group",
        "λ": f"{analysis.lam:.4f}, at least {analysis.lam_lower_bound:.4f} for any plan of this "
        "coverage",
        "ρ": gap,
    }
    hanging = " " * 14
    return "\n".join(
        textwrap.fill(text, WIDTH, initial_indent=f"{name:<14}", subsequent_indent=hanging)
        for name, text in rows.items()
    )


def _memory_table(costs: dict[str, Cost]) -> str:
    memories = {
        name: cost.least_memory if name == "SDP least" else cost.memory
        for name, cost in costs.items()
    }
    unit, divisor = _unit(max(memory.total for memory in memories.values()))
    rows = [
        (row, [_number(getattr(memory, row) / divisor) for memory in memories.values()])
        for row in MEMORY_ROWS
    ]
    rows.append(("total", [_number(memory.total / divisor) for memory in memories.values()]))
    return _table(f"memory of one rank, {unit}", list(memories), rows)


def _step_table(costs: dict[str, Cost]) -> str:
    """Traffic and compute, mean over the ranks and, where it differs, of the most loaded."""
    shown = {name: cost for name, cost in costs.items() if name != "SDP least"}
    names = ["SDP" if name == "SDP most" else name for name in shown]
    traffic = [cost.traffic for cost in shown.values()]
    compute = [cost.compute for cost in shown.values()]
    unit, divisor = _unit(max(sent.maximum for sent in traffic))
    rows = [(f"sent per step, {unit}", [_number(sent.mean / divisor) for sent in traffic])]
    if any(sent.mean != sent.maximum for sent in traffic):
        rows.append(("  most loaded rank", [_number(sent.maximum / divisor) for sent in traffic]))
    name, scale = ("G", 1e9) if max(flops.maximum for flops in compute) >= 1e9 else ("M", 1e6)
    rows.append((f"{name}FLOPs per token", [_number(flops.mean / scale) for flops in compute]))
    if any(flops.mean != flops.maximum for flops in compute):
        rows.append(("  most loaded rank", [_number(flops.maximum / scale) for flops in compute]))
    return _table("traffic and compute of one rank", names, rows)


def _assumptions(setup: CostSetup) -> str:
    moments = f"{setup.moment_bytes} bytes of moments per parameter"
    return (
        f"Predicted for all columns with fp32 gradients, {moments}, the same batch and, on "
        f"{setup.backend}, buffers in transit at their largest. The total adds peaks that need not "
        "coincide. FLOPs are forward and backward, attention counted in full (not halved for its "
        "causal mask). DDP and ZeRO are predicted at their best: least possible traffic, buffers "
        "no larger than needed."
    )


def _table(title: str, names: Sequence[str], rows: Sequence[tuple[str, list[str]]]) -> str:
    left = max(LABEL_WIDTH, len(title))
    width = max(10, *(len(text) for text in [*names, *(c for _, cells in rows for c in cells)]))
    lines = [f"{title:<{left}}" + "".join(f"  {name:>{width}}" for name in names)]
    lines.append("-" * len(lines[0]))
    for label, cells in rows:
        lines.append(f"{label:<{left}}" + "".join(f"  {cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def _unit(largest: float) -> tuple[str, int]:
    return ("GiB", GIB) if largest >= 10 * GIB else ("MiB", MIB)


def _number(value: float) -> str:
    """Three digits, or all of the integer part."""
    decimals = 0 if value >= 100 or value == 0 else 1 if value >= 10 else 2
    return f"{value:,.{decimals}f}" if value == 0 or value >= 0.01 else f"{value:.1e}"

"""What a schedule costs, and how it is shown."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest

from sdp_llm.config import SDPConfig, parse_config
from sdp_llm.errors import ConfigError
from sdp_llm.plan import Plan, Schedule, make_plan, schedule_from_config
from sdp_llm.plan.change_cost import changes_per_step
from sdp_llm.plan.cost import TrafficCost, sdp_cost
from sdp_llm.plan.report import run_report
from sdp_llm.plan.schedule_cost import check_memory_limit, mean_flops_per_token, schedule_cost
from sdp_llm.plan.size import BlockSize, CostSetup, ModelSize, UnitSize

BLOCKS, MIB = 8, 2**20
SIZE = ModelSize(
    units=(
        UnitSize(None, 4 * MIB, MIB),
        *(UnitSize(b, 2 * MIB, MIB) for b in range(BLOCKS)),
        UnitSize(None, 4 * MIB, MIB),
    ),
    blocks=(BlockSize(2 * MIB, 30 * MIB, 20 * MIB),) * BLOCKS,
    shared_matmul_numel=4 * MIB,
    attention_width=64,
    sequence_length=128,
    micro_batch=4,
    shared_activations=50 * MIB,
)
SETUP = CostSetup(stage=1, weight_bytes=2, reduction_bytes=2)
PHASES = [
    {"until": 0.25, "rotate_every": 10},
    {"until": 0.75, "coverage": 1},
    {"until": 1, "masking": "backward"},
]


def sdp_with(phases: list[dict[str, object]] | None, **values: object) -> SDPConfig:
    return parse_config({"sdp": {"coverage": "1/2", "schedule": phases, **values}}).sdp


def three_phases(steps: int = 2000) -> Schedule:
    return schedule_from_config(sdp_with(PHASES), 4, BLOCKS, steps)


def test_each_phase_costs_what_its_plan_costs() -> None:
    half, full = (make_plan(4, BLOCKS, coverage=Fraction(c)) for c in ("1/2", "1"))
    expected = [
        sdp_cost(SIZE, half, SETUP),
        sdp_cost(SIZE, full, SETUP),
        sdp_cost(SIZE, half, replace(SETUP, masking="backward")),
    ]
    schedule = three_phases()
    for i, phase in enumerate(schedule.phases):
        changes = changes_per_step(SIZE, schedule, phase, SETUP)
        still = expected[i].traffic
        assert still.mean == still.maximum
        sent = TrafficCost(
            round(still.mean + sum(changes) / 4), round(still.maximum + max(changes))
        )
        expected[i] = replace(expected[i], traffic=sent)
    cost = schedule_cost(SIZE, schedule, SETUP)
    assert cost.phases == tuple(expected)
    assert cost.most == 1
    assert cost.whole.memory == expected[1].memory
    weights = (0.25, 0.5, 0.25)
    for found, parts in (
        (cost.whole.traffic.mean, [c.traffic.mean for c in expected]),
        (cost.whole.traffic.maximum, [c.traffic.maximum for c in expected]),
        (cost.whole.compute.mean, [c.compute.mean for c in expected]),
        (cost.whole.compute.maximum, [c.compute.maximum for c in expected]),
    ):
        mean = sum(w * part for w, part in zip(weights, parts, strict=True))
        assert found == pytest.approx(mean, abs=0.5)
    of_shares = mean_flops_per_token(SIZE, sdp_with(PHASES), 4, SETUP)
    assert of_shares == pytest.approx(cost.whole.compute.mean)


def test_the_cost_of_one_phase_is_that_of_its_plan() -> None:
    sdp = sdp_with(None)
    for steps in (100, None):
        cost = schedule_cost(SIZE, schedule_from_config(sdp, 4, BLOCKS, steps), SETUP)
        assert cost.phases == (cost.whole,)
    assert mean_flops_per_token(SIZE, sdp, 4, SETUP) == cost.whole.compute.mean


def test_rotations_cost_what_their_phase_costs_and_what_moves() -> None:
    schedule = schedule_from_config(sdp_with(None, rotate_every=1), 4, BLOCKS, 50)
    plans: set[Plan] = {schedule.at(step)[0] for step in range(50)}
    assert len(plans) > 10
    [cost] = schedule_cost(SIZE, schedule, SETUP).phases
    [still] = {sdp_cost(SIZE, plan, SETUP) for plan in plans}
    assert cost.traffic.mean > still.traffic.mean
    assert cost == replace(still, traffic=cost.traffic)


def test_the_phase_that_needs_most_is_named() -> None:
    schedule = three_phases()
    cost = schedule_cost(SIZE, schedule, SETUP)
    need = cost.whole.memory.total / 2**30
    check_memory_limit(schedule, cost, need)
    with pytest.raises(ConfigError) as caught:
        check_memory_limit(schedule, cost, need * 0.99)
    message = str(caught.value)
    assert f"sdp.memory_limit_gib = {need * 0.99:g}: phase 2 of 3 (coverage 1, forward" in message
    assert "steps 501 to 1,500) is predicted to need" in message
    assert f"{need:.4g} GiB" in message


def test_the_card_has_a_row_for_each_phase() -> None:
    schedule = three_phases(2_000_000)
    cost = schedule_cost(SIZE, schedule, SETUP)
    card = run_report(schedule, SIZE, SETUP, model="small", memory_limit_gib=0.1)
    lines = card.splitlines()
    assert max(len(line) for line in lines) <= 100
    start = next(i for i, line in enumerate(lines) if line.startswith("phase  steps"))
    rows = [line.split() for line in lines[start + 3 : start + 8]]
    memory = [f"{c.memory.total / MIB:.0f}" for c in cost.phases]
    sent = [f"{c.traffic.mean / MIB:.1f}" for c in cost.phases]
    assert rows[0][:7] == ["1", "1", "to", "500,000", "1/2", "forward", "every"]
    assert rows[0][7:10] == ["10", memory[0], sent[0]]
    assert rows[1][:9] == ["2", "500,001", "to", "1,500,000", "1", "forward", "never", *(
        memory[1],
        sent[1],
    )]  # fmt: skip
    assert rows[2][4:8] == ["1/2", "backward", "never", memory[2]]
    assert rows[3] == ["most", memory[1]]
    assert rows[4][:2] == ["mean", f"{cost.whole.traffic.mean / MIB:.1f}"]
    assert "phase 3: coverage 1/2, backward masking, the plan of phase 1" in lines
    assert sum(line.startswith("rank 0 ") for line in lines) == 2
    assert any(line.startswith("memory of one rank in phase 2, MiB") for line in lines)
    assert any(
        line.startswith("limit         0.1 GiB") and "DOES NOT FIT" in line for line in lines
    )
    assert "What ranks send when the plan changes is counted, spread over the steps." in " ".join(
        lines
    )


def test_the_card_of_one_phase_has_no_table_of_phases() -> None:
    schedule = schedule_from_config(sdp_with(None, rotate_every=10), 4, BLOCKS, 100)
    card = run_report(schedule, SIZE, SETUP, model="small", memory_limit_gib=16)
    assert "phase" not in card
    assert "steps between: 10" in " ".join(card.split())
    assert "predicted: fits" in card
    plain = schedule_from_config(sdp_with(None), 4, BLOCKS, 100)
    card = run_report(plain, SIZE, SETUP, model="small")
    assert not any(line.startswith(("rotation", "limit")) for line in card.splitlines())

"""What ranks send when the plan changes, counted element by element."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from sdp_llm.config import parse_config
from sdp_llm.plan import Plan, make_plan, schedule_from_config
from sdp_llm.plan.change_cost import change_traffic, changes_per_step
from sdp_llm.plan.size import CostSetup, ModelSize, UnitSize

BLOCKS, NUMEL = 6, 24  # elements of a block, divisible by every number of owners
SIZE = ModelSize(
    (UnitSize(None, 100, 100), *(UnitSize(b, NUMEL, NUMEL) for b in range(BLOCKS))), (), 0, 0, 0, 0
)
PLANS = {
    "half": make_plan(4, BLOCKS, owners_per_block=2),
    "random": make_plan(4, BLOCKS, owners_per_block=2, strategy="random", seed=3),
    "single": make_plan(4, BLOCKS, owners_per_block=1, pinned_first=0),
    "three": make_plan(4, BLOCKS, owners_per_block=3, strategy="cyclic"),
    "full": make_plan(4, BLOCKS, owners_per_block=4),
}


def holders(owners: Sequence[int], element: int, stage: int) -> Sequence[int]:
    """The ranks that optimise an element of a block."""
    return owners if stage == 0 else [owners[element // (NUMEL // len(owners))]]


def counted(old: Plan, new: Plan, stage: int) -> int:
    """The elements of masters that all ranks together send."""
    return sum(
        rank not in holders(old.owner_sets[b], element, stage)
        for b in range(BLOCKS)
        if old.owner_sets[b] != new.owner_sets[b]
        for element in range(NUMEL)
        for rank in holders(new.owner_sets[b], element, stage)
    )


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("old", PLANS)
@pytest.mark.parametrize("new", PLANS)
def test_masters_and_moments_go_to_who_lacks_them(old: str, new: str, stage: int) -> None:
    before, after = PLANS[old], PLANS[new]
    setup = CostSetup(stage=stage, weight_bytes=0, moment_bytes=8)  # nothing but these
    sent = change_traffic(SIZE, (before, "forward"), (after, "forward"), setup)
    assert sum(sent) == 12 * counted(before, after, stage)
    if old == new:
        assert sent == [0.0] * 4


@pytest.mark.parametrize("stage", [0, 1])
def test_weights_are_gathered_by_new_owners_and_delivered_to_all_others(stage: int) -> None:
    half = PLANS["half"]
    setup = CostSetup(stage=stage, weight_bytes=2)
    to_backward = change_traffic(SIZE, (half, "forward"), (half, "backward"), setup)
    to_forward = change_traffic(SIZE, (half, "backward"), (half, "forward"), setup)
    blocks = [sum(half.owns(rank, b) for b in half.free_blocks) for rank in range(4)]
    gathered = [2 * NUMEL * count * (0.5 if stage else 0.0) for count in blocks]
    assert to_forward == gathered
    # Two owners send each of two other ranks a half.
    delivered = [2 * NUMEL * count for count in blocks]
    assert to_backward == [a + b for a, b in zip(gathered, delivered, strict=True)]


def test_changes_are_spread_over_the_steps_of_their_phase() -> None:
    phases = [{"until": 0.5, "rotate_every": 10}, {"until": 1, "coverage": 1}]
    sdp = parse_config({"sdp": {"coverage": "1/2", "schedule": phases}}).sdp
    schedule = schedule_from_config(sdp, 4, BLOCKS, 80)
    setup = CostSetup(stage=1)
    at = [schedule.at(step) for step in (0, 10, 20, 30, 40)]
    moved = [change_traffic(SIZE, at[i], at[i + 1], setup) for i in range(4)]
    first, last = (changes_per_step(SIZE, schedule, phase, setup) for phase in schedule.phases)
    for rank in range(4):
        assert first[rank] == pytest.approx(sum(moved[i][rank] for i in range(3)) / 40)
        assert last[rank] == pytest.approx(moved[3][rank] / 40)


def test_a_run_without_an_end_sends_what_its_rotations_do() -> None:
    sdp = parse_config({"sdp": {"coverage": "1/2", "rotate_every": 5}}).sdp
    endless = schedule_from_config(sdp, 4, BLOCKS, None)
    long = schedule_from_config(sdp, 4, BLOCKS, 5000)
    setup = CostSetup(stage=1)
    found = [changes_per_step(SIZE, run, run.phases[0], setup) for run in (endless, long)]
    assert found[0] == pytest.approx(found[1], rel=0.01)
    assert min(found[0]) > 0

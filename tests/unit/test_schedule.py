"""Phases and rotations: where they begin and end, what they keep, and what is refused."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import pytest

from sdp_llm.config import parse_config
from sdp_llm.errors import ConfigError
from sdp_llm.plan import Plan, Schedule, make_plan, plan_from_config, schedule_from_config
from sdp_llm.plan.schedule import ENDLESS

WORLD_SIZE, BLOCKS = 4, 10


def schedule_of(
    phases: list[dict[str, Any]] | None, total_steps: int | None, **sdp: Any
) -> Schedule:
    config = parse_config({"sdp": {**sdp, "schedule": phases}}).sdp
    return schedule_from_config(config, WORLD_SIZE, BLOCKS, total_steps)


def bounds(schedule: Schedule) -> list[tuple[int, int]]:
    return [(phase.start, phase.stop) for phase in schedule.phases]


def message_of(phases: list[dict[str, Any]], total_steps: int | None, **sdp: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        schedule_of(phases, total_steps, **sdp)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_a_schedule_one_plan_is_that_of_the_section() -> None:
    config = parse_config({"sdp": {"masking": "backward", "seed": 3}}).sdp
    plan = plan_from_config(config, WORLD_SIZE, BLOCKS)
    for total, stop in ((7, 7), (None, ENDLESS)):
        schedule = schedule_from_config(config, WORLD_SIZE, BLOCKS, total)
        assert bounds(schedule) == [(0, stop)]
        assert all(schedule.at(step) == (plan, "backward") for step in range(10))
        assert not any(schedule.changes_at(step) for step in range(10))


def test_a_phase_overrides_what_it_names_only() -> None:
    schedule = schedule_of(
        [
            {"until": 0.25, "coverage": 1},
            {"until": "1/2", "masking": "backward", "owners_per_block": 3, "seed": 7},
            {"until": 0.75, "strategy": "cyclic", "pinned_first": 2, "pinned_last": 0},
            {"until": 1, "owner_sets": [[0, 1, 2, 3]] * 9 + [[2]], "rotate_every": 5},
        ],
        total_steps=40,
        coverage="1/2",
        rotate_every=2,
        seed=1,
    )
    full, backward, cyclic, explicit = schedule.phases
    assert bounds(schedule) == [(0, 10), (10, 20), (20, 30), (30, 40)]
    assert full.plan == make_plan(4, BLOCKS, coverage=Fraction(1), seed=1)
    assert backward.plan == make_plan(4, BLOCKS, owners_per_block=3, seed=7)
    assert cyclic.plan == make_plan(
        4, BLOCKS, coverage=Fraction(1, 2), strategy="cyclic", seed=1, pinned_first=2, pinned_last=0
    )
    assert explicit.plan.pinned == tuple(range(9))
    assert [phase.masking for phase in schedule.phases] == ["forward", "backward", *["forward"] * 2]
    assert [phase.rotate_every for phase in schedule.phases] == [2, 2, 2, 5]
    assert [phase.seed for phase in schedule.phases] == [1, 7, 1, 1]


def test_phases_follow_each_other_and_the_last_goes_on() -> None:
    schedule = schedule_of([{"until": 0.5}, {"until": 1, "coverage": 1}], 10)
    half, full = (phase.plan for phase in schedule.phases)
    assert [schedule.at(step)[0] for step in (0, 4, 5, 9, 10, 99)] == [half, half, *[full] * 4]
    assert [step for step in range(12) if schedule.changes_at(step)] == [5]


def test_a_change_of_masking_alone_is_a_change() -> None:
    schedule = schedule_of([{"until": 0.5}, {"until": 1, "masking": "backward"}], 10)
    assert schedule.at(4)[0] == schedule.at(5)[0]
    assert [step for step in range(12) if schedule.changes_at(step)] == [5]


@pytest.mark.parametrize(
    ("until", "total", "expected"),
    [
        ([0.5], 5, [(0, 3), (3, 5)]),  # half a step upwards
        ([0.5], 7, [(0, 4), (4, 7)]),
        (["1/3", "2/3"], 10, [(0, 3), (3, 7), (7, 10)]),
        ([0.29], 100, [(0, 29), (29, 100)]),  # 28.999999999999996 in floating point
        ([0.1], 1_000_000_007, [(0, 100_000_001), (100_000_001, 1_000_000_007)]),
        ([0.3, 0.6], 2, [(0, 1), (1, 2)]),  # fewer steps than phases: those without steps go
        ([0.4], 1, [(0, 1)]),
        ([0.5], 1, [(0, 1)]),
    ],
)
def test_shares_become_steps(until: list[Any], total: int, expected: list[tuple[int, int]]) -> None:
    phases = [{"until": share} for share in [*until, 1]]
    assert bounds(schedule_of(phases, total)) == expected


def test_rotations_permute_the_free_blocks_and_nothing_else() -> None:
    schedule = schedule_of(None, None, rotate_every=3, seed=5)
    plan = schedule.phases[0].plan
    rotations = [schedule.at(step)[0] for step in range(0, 60, 3)]
    assert rotations[0] == plan
    assert len(set(rotations)) > 10
    for rotated in rotations:
        assert rotated.pinned == plan.pinned
        assert all(len(rotated.owner_sets[block]) == WORLD_SIZE for block in plan.pinned)
        assert Counter(rotated.owner_sets) == Counter(plan.owner_sets)
        assert [rotated.load(r) for r in range(4)] == [plan.load(r) for r in range(4)]
        assert set(rotated.distinct_owner_sets) <= set(schedule.owner_sets)
    changes = [step for step in range(60) if schedule.changes_at(step)]
    assert set(changes) <= set(range(3, 60, 3))
    assert len(changes) > 15, "two draws in a row are seldom the same"


def test_no_rotation_comes_after_the_last_step() -> None:
    # It would give the final validation and the export a plan under which nothing was trained.
    schedule = schedule_of(None, 6, rotate_every=3)
    assert [step for step in range(12) if schedule.changes_at(step)] == [3]
    assert schedule.at(6) == schedule.at(5)


def test_rotations_are_the_same_for_the_same_seed_alone() -> None:
    def rotation(seed: int, step: int) -> Plan:
        return schedule_of(None, None, rotate_every=1, seed=seed, strategy="cyclic").at(step)[0]

    assert rotation(1, 4) == rotation(1, 4)
    assert rotation(1, 4).owner_sets != rotation(2, 4).owner_sets
    # As every machine and every version must draw them, or a run would resume under other masks.
    free = schedule_of(None, None, rotate_every=1, owners_per_block=1, strategy="cyclic").at(1)[0]
    assert free.owner_sets[1:-1] == ((0,), (0,), (3,), (2,), (1,), (2,), (1,), (3,))


def test_each_phase_rotates_from_its_own_start() -> None:
    schedule = schedule_of([{"until": 0.3}, {"until": 1, "seed": 2}], 10, rotate_every=2)
    second = schedule.phases[1]
    assert second.start == 3
    assert schedule.at(3)[0] == schedule.at(4)[0] == second.plan
    assert schedule.at(5)[0] != second.plan
    assert schedule.at(2)[0] != schedule.phases[0].plan


def test_owner_sets_of_all_phases_begin_with_the_world() -> None:
    phases = [{"until": 0.5, "owners_per_block": 1}, {"until": 1, "owners_per_block": 2}]
    sets = schedule_of(phases, 10).owner_sets
    assert sets[0] == (0, 1, 2, 3)
    assert len(set(sets)) == len(sets) == 1 + 4 + 4
    assert [len(owners) for owners in sets] == [4, 1, 1, 1, 1, 2, 2, 2, 2]


def test_rotating_at_full_coverage_changes_nothing() -> None:
    schedule = schedule_of(None, None, coverage=1, rotate_every=1)
    assert not any(schedule.changes_at(step) for step in range(20))


def test_a_phase_without_steps_is_refused() -> None:
    phases = [{"until": 0.5}, {"until": 0.504}, {"until": 1}]
    message = message_of(phases, 100)
    assert "sdp.schedule[1].until = 0.504: of 100 steps" in message
    assert "step 50, where it begins; make it longer, or remove it" in message
    assert bounds(schedule_of(phases, 1000)) == [(0, 500), (500, 504), (504, 1000)]


def test_a_schedule_needs_a_budget() -> None:
    assert "total_num_steps" in message_of([{"until": 1}], None)


@pytest.mark.parametrize(
    ("phase", "sdp", "expected"),
    [
        ({"coverage": "1/3"}, {}, "sdp.schedule[1].coverage = 1/3: coverage times the world"),
        ({"owners_per_block": 9}, {}, "sdp.schedule[1].owners_per_block = 9: must be in 1..4"),
        ({"owner_sets": [[0, 1, 2, 3]]}, {}, "sdp.schedule[1].owner_sets"),
        ({"pinned_first": 12}, {}, "sdp.schedule[1].pinned_first = 12, sdp.pinned_last = 1:"),
        ({"seed": 2}, {"coverage": "1/3"}, "sdp.schedule[1]: sdp.coverage = 1/3: coverage times"),
    ],
)
def test_an_impossible_plan_names_its_phase(
    phase: dict[str, Any], sdp: dict[str, Any], expected: str
) -> None:
    phases = [{"until": 0.5, "coverage": 1}, {"until": 1, **phase}]
    assert message_of(phases, 10, **sdp).startswith(expected)


def test_the_sections_own_coverage_may_be_impossible_where_no_phase_has_it() -> None:
    phases = [{"until": 0.5, "coverage": 1}, {"until": 1, "coverage": "1/4"}]
    assert len(schedule_of(phases, 10, coverage="1/3").phases) == 2

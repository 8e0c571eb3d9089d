"""The order in which ranks launch their reductions, without processes."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from sdp_llm.plan import Plan, make_plan
from sdp_llm.sharding.cursor import LaunchCursor
from sdp_llm.subnetwork.adapter import ModelLayout, UnitLayout, empty_model, model_layout
from tests.distributed.tiny import llama

# World size, blocks, owners per free block, strategy.
PLANS = [
    (n, blocks, p, strategy)
    for n, blocks in ((2, 4), (3, 7), (4, 6), (4, 10), (6, 9), (8, 12))
    for p in sorted({1, 2, n // 2, n - 1, n})
    if 1 <= p <= n
    for strategy in ("balanced", "cyclic", "random")
]
# Elements per unit: whole units, several pieces per block, one parameter per piece.
SPLITS = (None, 3000, 1)


def _layouts(blocks: int) -> list[ModelLayout]:
    models = [empty_model(llama(is_tied, blocks)) for is_tied in (False, True)]
    return [model_layout(model, split) for model in models for split in SPLITS]


def _owners(plan: Plan, unit: UnitLayout) -> tuple[int, ...]:
    everyone = tuple(range(plan.world_size))
    return everyone if unit.block is None else plan.owner_sets[unit.block]


def _launches(owned: list[tuple[int, UnitLayout]], generator: random.Random) -> list[int]:
    """Global unit indices as a rank launches them, under a random order of arrival.

    Any gradient may come at any time, and one in ten never comes.
    """
    cursor = LaunchCursor([len(unit.parameters) for _, unit in owned])
    arrivals = [(u, i) for u, (_, unit) in enumerate(owned) for i in range(len(unit.parameters))]
    generator.shuffle(arrivals)
    there = {arrival for arrival in arrivals if generator.random() > 0.1}
    launched: list[int] = []
    for u, i in arrivals:
        if (u, i) in there:
            launched += cursor.arrive(u, i)
    launched += cursor.finish()
    assert cursor.finish() == []
    for u, (_, unit) in enumerate(owned):
        expected = [i for i in range(len(unit.parameters)) if (u, i) not in there]
        assert cursor.missing(u) == expected
    return [owned[u][0] for u in launched]


@pytest.mark.parametrize("blocks", sorted({plan[1] for plan in PLANS}))
def test_ranks_agree_on_what_they_share(blocks: int) -> None:
    generator = random.Random(blocks)
    layouts = _layouts(blocks)
    for n, _, p, strategy in (plan for plan in PLANS if plan[1] == blocks):
        plan = make_plan(n, blocks, owners_per_block=p, strategy=strategy)
        for layout in layouts:
            units = list(enumerate(layout.units))
            owners = {u: frozenset(_owners(plan, unit)) for u, unit in units}
            launches = []
            for rank in range(n):
                owned = [(u, unit) for u, unit in units if rank in owners[u]]
                launches.append(_launches(owned, generator))
                assert launches[-1] == [u for u, _ in reversed(owned)]
            for a, b in combinations(range(n), 2):
                shared = [[u for u in launches[r] if owners[u] >= {a, b}] for r in (a, b)]
                assert shared[0] == shared[1]
                assert shared[0], "the shared parameters at least"


def test_a_complete_unit_waits_for_the_units_after_it() -> None:
    cursor = LaunchCursor([1, 2, 1])
    assert cursor.arrive(0, 0) == []
    assert cursor.arrive(2, 0) == [2]
    assert cursor.arrive(1, 1) == []
    assert cursor.arrive(1, 0) == [1, 0]
    assert cursor.finish() == []


def test_backward_order_launches_each_unit_when_it_is_complete() -> None:
    cursor = LaunchCursor([2, 2, 2])
    launched = [cursor.arrive(u, i) for u in (2, 1, 0) for i in (1, 0)]
    assert launched == [[], [2], [], [1], [], [0]]


def test_second_arrival_is_an_error_until_the_next_pass() -> None:
    cursor = LaunchCursor([2])
    cursor.arrive(0, 1)
    with pytest.raises(RuntimeError, match="two gradients"):
        cursor.arrive(0, 1)
    cursor.reset()
    assert cursor.arrive(0, 1) == []
    assert cursor.missing(0) == [0]


def test_split_units_cover_every_parameter_once() -> None:
    whole, *split = _layouts(6)[:3]
    for layout in split:
        assert len(layout.units) > len(whole.units)
        assert list(layout.parameters) == list(whole.parameters)
        assert [u.block for u in layout.units if u.block is not None] == sorted(
            u.block for u in layout.units if u.block is not None
        )

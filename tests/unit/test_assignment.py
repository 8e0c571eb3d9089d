"""Plans: exact coverage, even load, connection, determinism, and each error once."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import pytest

from sdp_llm.errors import ConfigError
from sdp_llm.plan import Plan, analyze, make_plan
from sdp_llm.plan.strategies import cyclic_sets

STRATEGIES = ("balanced", "cyclic", "random")
FINGERPRINTS = {
    "balanced": "3e6139d251775f59",
    "cyclic": "42f2121a89576749",
    "random": "32a64f4e45323d24",
}
SIZES = [
    (n, num_free, p)
    for n in (1, 2, 3, 4, 6, 8, 12)
    for num_free in (1, 2, 5, 22)
    for p in sorted({1, 2, n // 2, n - 1, n})
    if 1 <= p <= n
]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("seed", [0, 7])
def test_every_plan_is_even_and_exact(strategy: str, seed: int) -> None:
    for n, num_free, p in SIZES:
        plan = make_plan(n, num_free + 2, owners_per_block=p, strategy=strategy, seed=seed)
        free_sets = [plan.owner_sets[block] for block in plan.free_blocks]
        assert plan.free_blocks == tuple(range(1, num_free + 1))
        assert all(len(set(owners)) == len(owners) == p for owners in free_sets)
        assert all(list(owners) == sorted(owners) for owners in free_sets)
        assert all(set(owners) <= set(range(n)) for owners in free_sets)
        assert plan.owner_sets[0] == plan.owner_sets[-1] == tuple(range(n))
        load = [plan.load(rank) for rank in range(n)]
        assert sum(load) == num_free * p
        assert max(load) - min(load) <= 1, (n, num_free, p)
        assert len(set(free_sets)) <= n
        if strategy == "balanced":
            assert analyze(plan).connected == ((p - 1) * num_free >= n - 1), (n, num_free, p)


@pytest.mark.parametrize(
    ("n", "num_free", "p"),
    [(16, 5, 4), (16, 6, 4), (9, 4, 3), (15, 7, 3), (31, 10, 4), (30, 29, 2), (30, 40, 2)],
)
def test_balanced_is_connected_with_hardly_enough_blocks(n: int, num_free: int, p: int) -> None:
    assert (p - 1) * num_free >= n - 1
    assert analyze(make_plan(n, num_free + 2, owners_per_block=p)).connected
    assert not analyze(make_plan(n, (n - 2) // (p - 1) + 2, owners_per_block=p)).connected


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_same_arguments_give_the_same_plan(strategy: str) -> None:
    for n, num_blocks, p in [(4, 6, 3), (8, 24, 4), (12, 10, 6)]:
        plans = [
            make_plan(n, num_blocks, owners_per_block=p, strategy=strategy, seed=5)
            for _ in range(2)
        ]
        assert plans[0] == plans[1]


@pytest.mark.parametrize("sizes", [(4, 6, 2), (8, 10, 4), (8, 22, 4), (16, 30, 8), (12, 20, 4)])
def test_balanced_beats_the_other_strategies(sizes: tuple[int, int, int]) -> None:
    n, num_free, p = sizes

    def lam(strategy: str, seed: int = 0) -> float:
        plan = make_plan(n, num_free + 2, owners_per_block=p, strategy=strategy, seed=seed)
        return analyze(plan).lam

    assert lam("balanced") <= lam("cyclic") + 1e-9
    assert lam("balanced") <= min(lam("random", seed) for seed in range(20)) + 1e-9


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("n", "num_free", "p"),
    [(8, 6, 4), (8, 10, 2), (8, 22, 4), (16, 22, 4), (32, 22, 16), (9, 7, 3)],
)
def test_blocks_in_a_row_do_not_wait_for_each_other(
    strategy: str, n: int, num_free: int, p: int
) -> None:
    # As many as have owners at all: a rank is in one of their collectives at a time.
    plan = make_plan(n, num_free + 2, owners_per_block=p, strategy=strategy)
    sets = [plan.owner_sets[block] for block in plan.free_blocks]
    for first in range(0, num_free, n // p):
        deal = sets[first : first + n // p]
        assert len({rank for owners in deal for rank in owners}) == len(deal) * p
    analysis = analyze(plan)
    assert analysis.turns == max(analysis.load) + 2


def test_balanced_reaches_the_lower_bound_where_each_pair_of_ranks_can_share_equally() -> None:
    # 7 ranks, 7 blocks of 3 owners: the lines of the Fano plane.
    analysis = analyze(make_plan(7, 7, owners_per_block=3, pinned_first=0, pinned_last=0))
    assert analysis.lam == pytest.approx(analysis.lam_lower_bound, abs=1e-9)


@pytest.mark.parametrize("sizes", [(64, 80, 16), (1024, 96, 512)])
def test_large_plans_are_even_and_connected(sizes: tuple[int, int, int]) -> None:
    n, num_blocks, p = sizes
    plan = make_plan(n, num_blocks, owners_per_block=p)
    analysis = analyze(plan)
    assert max(analysis.load) - min(analysis.load) <= 1
    assert analysis.connected
    assert analysis.distinct_owner_sets <= n
    assert analysis.lam < 0.5


def test_cyclic_slides_and_shifts_by_one_rank_per_lap() -> None:
    assert cyclic_sets(4, 5, 2) == ((0, 1), (2, 3), (1, 2), (0, 3), (2, 3))
    assert cyclic_sets(5, 3, 2) == ((0, 1), (2, 3), (0, 4))


def test_seed_changes_random_plans_only_through_the_seed() -> None:
    plans = {make_plan(8, 12, owners_per_block=4, strategy="random", seed=s) for s in range(5)}
    assert len({plan.owner_sets for plan in plans}) == 5


def test_plans_do_not_change_between_versions() -> None:
    # A run resumes with the plan that its config gives: a changed plan must be deliberate.
    plans = {s: make_plan(8, 12, coverage=Fraction(1, 2), strategy=s) for s in STRATEGIES}
    assert {name: plan.fingerprint() for name, plan in plans.items()} == FINGERPRINTS


def test_plan_properties() -> None:
    plan = make_plan(3, 4, owner_sets=[[2, 0, 1], [1, 0], [2], [0, 1]])
    assert plan == Plan(3, ((0, 1, 2), (0, 1), (2,), (0, 1)), (0,), "explicit", 0)
    assert plan.num_blocks == 4
    assert plan.free_blocks == (1, 2, 3)
    assert plan.owns(2, 2)
    assert not plan.owns(2, 1)
    assert plan.owned_blocks(0) == (0, 1, 3)
    assert [plan.load(rank) for rank in range(3)] == [2, 2, 1]
    assert plan.distinct_owner_sets == ((0, 1, 2), (0, 1), (2,))
    assert plan.coverage == Fraction(5, 9)


def test_world_set_comes_first_without_pinned_blocks() -> None:
    plan = make_plan(4, 6, owners_per_block=2, pinned_first=0, pinned_last=0)
    assert plan.pinned == ()
    assert plan.distinct_owner_sets[0] == (0, 1, 2, 3)


def test_coverage_one_gives_every_block_to_all_and_still_pins() -> None:
    for strategy, n in itertools.product(STRATEGIES, (1, 4)):
        plan = make_plan(n, 5, coverage=Fraction(1), strategy=strategy)
        assert plan.owner_sets == (tuple(range(n)),) * 5
        assert plan.pinned == (0, 4)
        assert plan.coverage == 1


def test_all_blocks_may_be_pinned_with_coverage_one() -> None:
    plan = make_plan(4, 2, coverage=Fraction(1))
    assert plan.free_blocks == ()
    assert plan.coverage == 1
    assert plan.distinct_owner_sets == ((0, 1, 2, 3),)


def test_coverage_and_owners_per_block_mean_the_same() -> None:
    assert make_plan(4, 8, coverage=Fraction(1, 2)) == make_plan(4, 8, owners_per_block=2)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_ranks_of_a_node_own_what_the_node_owns(strategy: str) -> None:
    shape: dict[str, Any] = {"strategy": strategy, "seed": 3, "pinned_first": 2}
    nodes = make_plan(6, 12, owners_per_block=4, **shape)
    plan = make_plan(24, 12, owners_per_block=16, ranks_per_node=4, **shape)
    assert plan.pinned == nodes.pinned
    assert plan.coverage == nodes.coverage
    for rank in range(24):
        assert plan.owned_blocks(rank) == nodes.owned_blocks(rank // 4)
    assert all(list(owners) == sorted(owners) for owners in plan.owner_sets)
    assert plan.fingerprint() != make_plan(24, 12, owners_per_block=16, **shape).fingerprint()
    assert make_plan(24, 12, coverage=Fraction(2, 3), ranks_per_node=4, **shape) == plan


def test_fingerprint_sees_world_size_and_owner_sets_only() -> None:
    plan = make_plan(4, 8, owners_per_block=2)
    explicit = make_plan(4, 8, owner_sets=plan.owner_sets, seed=3)
    assert plan.fingerprint() == explicit.fingerprint()
    assert plan.fingerprint() != make_plan(4, 8, owners_per_block=3).fingerprint()
    assert plan.fingerprint() != make_plan(4, 9, owners_per_block=2).fingerprint()


def _error(world_size: int, num_blocks: int, **kwargs: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        make_plan(world_size, num_blocks, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("n", "coverage", "fix"),
    [
        (4, Fraction(1, 3), "use 1/4 or 1/2"),
        (4, Fraction(1, 8), "use 1/4"),
        (4, Fraction(0), "use 1/4"),
        (4, Fraction(-1, 2), "use 1/4"),
        (4, Fraction(5, 4), "use 1"),
        (3, Fraction(5, 6), "use 2/3 or 1"),
    ],
)
def test_coverage_that_is_no_whole_number_of_owners(n: int, coverage: Fraction, fix: str) -> None:
    message = _error(n, 8, coverage=coverage)
    assert message.startswith(f"sdp.coverage = {coverage}: ")
    assert message.endswith(fix)


def test_one_rank_needs_coverage_one() -> None:
    message = _error(1, 8, coverage=Fraction(1, 2))
    assert message.startswith("sdp.coverage = 1/2: ")
    assert "`--set sdp.coverage=1`, or start more ranks" in message


@pytest.mark.parametrize(("owners", "fix"), [(0, "use 1"), (5, "use 4, or start more ranks")])
def test_owners_per_block_outside_the_world(owners: int, fix: str) -> None:
    message = _error(4, 8, owners_per_block=owners)
    assert message.startswith(f"sdp.owners_per_block = {owners}: ")
    assert message.endswith(fix)


@pytest.mark.parametrize("ranks_per_node", [0, -1, 3, 16])
def test_nodes_that_do_not_divide_the_world(ranks_per_node: int) -> None:
    message = _error(8, 8, owners_per_block=4, ranks_per_node=ranks_per_node)
    assert message.startswith(f"sdp.ranks_per_node = {ranks_per_node}: ")
    assert "must divide the world size 8" in message


@pytest.mark.parametrize(
    ("given", "fix"),
    [
        ({"coverage": Fraction(1, 4)}, "not 2; use 4 (coverage 1/2), or sdp.ranks_per_node = 1"),
        ({"owners_per_block": 6}, "use 4 (coverage 1/2) or 8 (coverage 1), or sdp.ranks_per_node"),
    ],
)
def test_owners_that_are_no_whole_nodes(given: dict[str, Any], fix: str) -> None:
    message = _error(8, 8, ranks_per_node=4, **given)
    assert message.startswith(f"sdp.{next(iter(given))} = ")
    assert fix in message


@pytest.mark.parametrize(
    "kwargs", [{}, {"coverage": Fraction(1), "owners_per_block": 4}, {"coverage": Fraction(1, 2)}]
)
def test_exactly_one_way_to_say_who_owns_what(kwargs: dict[str, Any]) -> None:
    sets = {"owner_sets": [[0, 1, 2, 3]] * 8} if kwargs.keys() == {"coverage"} else {}
    message = _error(4, 8, **kwargs, **sets)
    assert "sdp.coverage" in message
    assert "sdp.owners_per_block" in message
    assert "sdp.owner_sets" in message
    assert "exactly one" in message


def test_unknown_strategy() -> None:
    message = _error(4, 8, owners_per_block=2, strategy="ballanced")
    assert message.startswith("sdp.strategy = 'ballanced': ")
    assert "balanced, cyclic, random" in message


@pytest.mark.parametrize("key", ["pinned_first", "pinned_last"])
def test_negative_pinned_count(key: str) -> None:
    assert _error(4, 8, owners_per_block=2, **{key: -1}).startswith(f"sdp.{key} = -1: ")


def test_more_pinned_than_blocks() -> None:
    message = _error(4, 3, owners_per_block=2, pinned_first=2, pinned_last=2)
    assert "sdp.pinned_first = 2, sdp.pinned_last = 2: " in message
    assert "3 blocks" in message


def test_nothing_left_to_cover() -> None:
    message = _error(4, 2, coverage=Fraction(1, 2))
    assert message.startswith("sdp.coverage = 1/2: ")
    assert "none to cover" in message


def test_rank_without_a_block() -> None:
    message = _error(8, 3, owners_per_block=2, pinned_first=0, pinned_last=0)
    assert message.startswith("sdp.owners_per_block = 2: ")
    assert "at least 3 owners" in message
    assert make_plan(8, 3, owners_per_block=3, pinned_first=0, pinned_last=0).load(7) == 1


@pytest.mark.parametrize(
    ("owner_sets", "text"),
    [
        ([[0, 1]], "1 lists: must be one list of ranks for each of the 2 blocks"),
        ([[0, 1], []], "sdp.owner_sets[1] = []: a block needs an owner"),
        ([[0, 1], [0, 0]], "sdp.owner_sets[1] = [0, 0]: names a rank twice"),
        ([[0, 1], [0, 2]], "sdp.owner_sets[1] = [0, 2]: rank 2 contradicts the world size 2"),
        ([[0, 1], [-1]], "rank -1 contradicts the world size 2"),
        ([[0], [0]], "gives no block to rank 1 of world size 2"),
    ],
)
def test_wrong_explicit_owner_sets(owner_sets: list[list[int]], text: str) -> None:
    message = _error(2, 2, owner_sets=owner_sets)
    assert message.startswith("sdp.owner_sets")
    assert text in message


def test_world_and_model_must_not_be_empty() -> None:
    assert _error(0, 4, coverage=Fraction(1)).startswith("world size = 0: ")
    assert _error(1, 0, coverage=Fraction(1)).startswith("num_hidden_layers = 0: ")

"""A bit that is flipped on one rank is found on all of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sdp_llm.sharding.replicas import differing_units
from tests.distributed.pool import Pool
from tests.distributed.tiny import Case, build, forward_backward

Pools = Callable[[int], Pool]

Camps = dict[str, list[list[int]]]


def job(case: Case, culprit: int, unit: str, steps: int = 2) -> tuple[Camps, Camps, Camps]:
    """Run on a rank: what differs after some steps, after a bit was flipped, and flipped back."""
    engine = build(case, steps + 1)
    for step in range(steps):
        forward_backward(engine, step)
        engine.step()  # the weights may still be arriving
    before = differing_units(engine.sharded)
    [found] = [u for u in engine.sharded.units if u.layout.name == unit] or [None]

    def flip() -> None:
        if found is not None and engine.sharded.subnetwork.rank == culprit:
            found.flat[-1 - found.flat.numel() + found.layout.numel :][:1].view(
                torch.int16 if case.is_bf16 else torch.int32
            ).bitwise_xor_(1)

    flip()
    flipped = differing_units(engine.sharded)
    flip()
    return before, flipped, differing_units(engine.sharded)


MORE = [
    (Case(), 1, "head"),
    (Case(stage=0, is_bf16=True), 3, "embedding"),
    (Case(is_tied=True), 0, "embedding"),
    (Case(extra=(("sdp", {"coverage": "1/2", "rotate_every": 1}),)), 2, "block 5"),
    (Case(bucket=3000), 1, "block 0[1]"),
]


@pytest.mark.parametrize(
    ("case", "culprit", "unit"),
    [
        (Case(stage=1, masking="backward", is_bf16=True), 2, "block 2"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE),
    ],
    ids=str,
)
def test_a_flipped_bit_is_found(case: Case, culprit: int, unit: str, pools: Pools) -> None:
    others = [rank for rank in range(4) if rank != culprit]
    for before, flipped, after in pools(4).run(job, case, culprit, unit):
        assert before == {}
        assert flipped == {unit: [others, [culprit]]}
        assert after == {}


@pytest.mark.slow
def test_two_owners_are_named_both(pools: Pools) -> None:
    """Neither can be told from the other."""
    case = Case()
    plan = pools(4).run(owners_of, case, 2)[0]
    for _, flipped, _ in pools(4).run(job, case, plan[1], "block 2"):
        assert flipped == {"block 2": [[plan[0]], [plan[1]]]}


def owners_of(case: Case, block: int) -> tuple[int, ...]:
    return build(case).plan.owner_sets[block]

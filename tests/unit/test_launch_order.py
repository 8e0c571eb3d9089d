"""The order in which ranks launch their reductions, without processes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from sdp_llm.plan import Plan, make_plan
from sdp_llm.sharding.collectives import Pending
from sdp_llm.sharding.cursor import LaunchCursor
from sdp_llm.sharding.reducer import GradientReducer
from sdp_llm.sharding.unit import Unit
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


@dataclass(frozen=True)
class Group:
    """The owners of one unit."""

    unit: str
    owners: tuple[int, ...]

    def size(self) -> int:
        return len(self.owners)


@dataclass
class Recorder:
    """A communicator that sends nothing and notes what would be on a rank's one stream.

    ``events`` has beside what is issued what is waited for.
    """

    dtype: torch.dtype = torch.float32
    issued: list[tuple[str, Group]] = field(default_factory=list)
    events: list[tuple[str, str]] = field(default_factory=list)

    def received_numel(self, numel: int, group: Group) -> int:
        return numel // group.size()

    def reduce_scatter(self, send: Tensor, received: Tensor, group: Group) -> Any:
        return [received], self._issue("reduce-scatter", group)

    def all_gather(self, full: Tensor, group: Group) -> Pending:
        return self._issue("all-gather", group)

    def _issue(self, what: str, group: Group) -> Pending:
        self.issued.append((what, group))
        self.events.append((what, group.unit))
        return Pending(lambda: self.events.append((f"end of {what}", group.unit)))


def _record(plan: Plan, rank: int, stage: int, under_way: int, overlap: bool = True) -> Recorder:
    """What a rank issues in one backward pass, through the reducer itself."""
    model = empty_model(llama(False, plan.num_blocks))
    units = []
    for layout in model_layout(model).units:
        owners = _owners(plan, layout)
        if rank in owners:
            group: Any = Group(layout.name, owners) if len(owners) > 1 else None
            device = torch.device("cpu")
            made = {"rank": rank, "stage": stage, "dtype": torch.float32, "device": device}
            units.append(Unit(layout, None, owners=owners, group=group, **made))  # type: ignore[arg-type]
    recorder = Recorder()
    given = {"stage": stage, "under_way": under_way, "overlap": overlap}
    reducer = GradientReducer(units, model, recorder, **given)  # type: ignore[arg-type]
    reducer.begin(reduce=True)
    reducer.finish()
    return recorder


def _run(streams: Sequence[list[tuple[str, Group]]]) -> None:
    """Run collectives as NCCL does: each begins when it is the first on all its ranks' streams."""
    left = [stream[::-1] for stream in streams]
    while any(left):
        heads = [stream[-1] if stream else None for stream in left]
        ready = [h for h in heads if h and all(heads[rank] == h for rank in h[1].owners)]
        assert ready, f"each waits for another: {heads}"
        for rank in ready[0][1].owners:
            left[rank].pop()


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("under_way", [1, 2, 3])
def test_one_stream_per_rank_never_waits_for_ever(stage: int, under_way: int) -> None:
    for n, blocks, p in ((4, 8, 2), (8, 12, 4), (8, 24, 2)):
        plan = make_plan(n, blocks, owners_per_block=p)
        streams = [_record(plan, rank, stage, under_way).issued for rank in range(n)]
        assert all(len(stream) > p for stream in streams)
        _run(streams)


def test_stage_0_waits_for_a_gather_when_the_next_reduction_ends() -> None:
    events = _record(make_plan(2, 3, owners_per_block=2), 0, stage=0, under_way=1).events
    after, before = _names(events, "all-gather")[:2]
    start = events.index(("all-gather", after))
    assert events[start : start + 5] == [
        ("all-gather", after),
        ("reduce-scatter", before),
        ("end of all-gather", after),
        ("end of reduce-scatter", before),
        ("all-gather", before),
    ]
    assert _names(events, "end of all-gather") == _names(events, "all-gather")


def test_without_overlap_nothing_is_under_way_beside_another() -> None:
    plan = make_plan(2, 3, owners_per_block=2)
    events = _record(plan, 0, stage=0, under_way=1, overlap=False).events
    assert events[1::2] == [(f"end of {what}", unit) for what, unit in events[::2]]


def _names(events: Sequence[tuple[str, str]], what: str) -> list[str]:
    return [unit for kind, unit in events if kind == what]


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

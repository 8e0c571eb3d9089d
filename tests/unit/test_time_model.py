"""The model of step time: its limits, and its bytes against the closed forms of traffic."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from math import inf

import pytest

from benchmarks._time_model import Cluster, peer_step_time, sdp_step_time
from sdp_llm.plan import make_plan
from sdp_llm.plan.cost import rank_flops_per_token, rank_traffic
from sdp_llm.plan.peers import PEERS, UNSHARDED, peer_cost
from sdp_llm.plan.size import BlockSize, CostSetup, ModelSize, UnitSize

SIZE = ModelSize(
    units=(UnitSize(None, 480, 480), *(UnitSize(b, 240, 120) for b in range(8))),
    blocks=(BlockSize(200),) * 8,
    shared_matmul_numel=480,
    attention_width=8,
    sequence_length=16,
    micro_batch=2,
)
TOKENS = 16 * 2  # of one micro-batch
HALF = make_plan(8, 8, coverage=Fraction(1, 2))
WHOLE = make_plan(8, 8, coverage=Fraction(1))
# A byte per second on all links, and nothing hides: seconds are bytes.
BYTES = Cluster(8, 1.0, 1.0, flops=1e6, overlap=0.0)
SETUPS = [
    CostSetup(masking, stage, w, r, accumulation, checkpointing)
    for masking in ("forward", "backward")
    for stage in (0, 1, 2)
    for w, r in ((4, 4), (2, 4))
    for accumulation in (1, 3)
    for checkpointing in (False, True)
]


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_bytes_are_those_of_the_closed_forms(setup: CostSetup) -> None:
    w, r = setup.weight_bytes, setup.reduction_bytes
    shared, block = 7 / 8 * (480 + 2 * 240), 3 / 4 * 240
    sent = (2 * r, r, setup.accumulation * r)[setup.stage] * (shared + 3 * block)
    if setup.masking == "forward":
        sent += (w if setup.stage else 0) * (shared + 3 * block)
        assert sent == max(rank_traffic(SIZE, HALF, setup, rank) for rank in range(8))
    else:
        # All ranks take part in the delivery of every block: gathers of other blocks wait for it.
        sent += (w if setup.stage else 0) * (shared + 6 * block) + w * 6 * 240
    time = sdp_step_time(SIZE, HALF, setup, BYTES)
    assert time.communication == pytest.approx(sent)
    assert time.exposed == time.communication
    for peer in PEERS:
        cost = peer_cost(SIZE, 8, setup, peer)
        assert peer_step_time(SIZE, 8, setup, BYTES, peer).communication == cost.traffic.mean


def test_owners_wait_for_others_that_are_busy() -> None:
    """Any two of three pairs of ranks share one: 6 blocks in turn, though a rank has 4."""
    everyone = range(3)
    plan = make_plan(3, 8, owner_sets=[everyone, *[[0, 1], [1, 2], [0, 2]] * 2, everyone])
    time = sdp_step_time(SIZE, plan, CostSetup(), BYTES)
    assert time.communication == pytest.approx(8 * (2 / 3 * (480 + 2 * 240) + 6 * 1 / 2 * 240))


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_with_infinite_links_only_compute_is_left(setup: CostSetup) -> None:
    cluster = replace(BYTES, inner_bandwidth=inf, outer_bandwidth=inf)
    flops = max(rank_flops_per_token(SIZE, HALF, setup, rank) for rank in range(8))
    time = sdp_step_time(SIZE, HALF, setup, cluster)
    assert (time.communication, time.exposed) == (0, 0)
    assert time.total == pytest.approx(setup.accumulation * TOKENS * flops / 1e6)
    for peer in PEERS:
        dense = peer_cost(SIZE, 8, setup, peer).compute.mean
        total = peer_step_time(SIZE, 8, setup, cluster, peer).total
        assert total == pytest.approx(setup.accumulation * TOKENS * dense / 1e6)


@pytest.mark.parametrize("overlap", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("stage", "peer"), [(0, "DDP"), (1, "ZeRO-1"), (2, "ZeRO-2")])
def test_full_coverage_differs_from_the_peer_by_hiding_the_gather(
    stage: int, peer: str, overlap: float
) -> None:
    setup = CostSetup("forward", stage, 2, 2, accumulation=3)
    cluster = Cluster(4, 3e4, 1e4, flops=1e6, overlap=overlap)
    ours = sdp_step_time(SIZE, WHOLE, setup, cluster)
    theirs = peer_step_time(SIZE, 8, setup, cluster, peer)
    for name in ("compute", "communication"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name))
    # What hides behind the first forward pass, a third of a micro-batch's compute: all of the
    # gather or as much as it can.
    forward = 2 * SIZE.shared_matmul_numel + sum(
        2 * block.matmul_numel + 4 * SIZE.attention_width * SIZE.sequence_length
        for block in SIZE.blocks
    )
    gather = 2 * 7 / 8 * SIZE.numel / cluster.rate(range(8)) if stage else 0
    hidden = min(gather, overlap * forward * TOKENS / cluster.flops)
    assert ours.exposed == pytest.approx(theirs.exposed - hidden)
    assert ours.total == pytest.approx(theirs.total - hidden)


@pytest.mark.parametrize("name", ["inner_bandwidth", "outer_bandwidth", "flops", "overlap"])
def test_nothing_gets_slower_with_faster_parts(name: str) -> None:
    setup = CostSetup("backward", 2, 2, 2, accumulation=2)
    base = Cluster(4, 3e3, 1e3, flops=1e6, overlap=0.25)
    totals = []
    for factor in (0.5, 1, 2, 4):
        cluster = replace(base, **{name: factor * getattr(base, name)})
        times = [sdp_step_time(SIZE, HALF, setup, cluster)]
        times += [peer_step_time(SIZE, 8, setup, cluster, peer) for peer in PEERS]
        totals.append([time.total for time in times])
    for slower, faster in pairwise(totals):
        assert all(a >= b for a, b in zip(slower, faster, strict=True))
    if name != "inner_bandwidth":  # all sets of this plan, and the world, span both nodes
        assert totals[0][0] > totals[-1][0]


def test_what_hides_behind_which_pass() -> None:
    """By hand: one micro-batch of 2 s forward and 4 s backward, 3 s for each element's byte."""
    forward = TOKENS * (2 * (480 + 8 * 200) + 8 * 4 * 8 * 16)
    sent = 7 / 8 * SIZE.numel
    cluster = Cluster(8, sent / 3, 1.0, flops=forward / 2)
    setup = CostSetup(weight_bytes=1, reduction_bytes=1, accumulation=2)
    backward = 4.0
    exposed = {
        "DDP": 6 - backward,  # once per step
        "ZeRO-1": 0 + 3,  # the gather waits for the optimizer
        "ZeRO-2": 0 + 3,
        "ZeRO-3": 2 * (3 - 2) + 2 * (6 - backward),
        UNSHARDED: 2 * (3 - 2),
    }
    for peer, seconds in exposed.items():
        time = peer_step_time(SIZE, 8, setup, cluster, peer)
        assert time.compute == pytest.approx(2 * (2 + 4))
        assert time.exposed == pytest.approx(seconds), peer


def test_the_rate_of_an_owner_set() -> None:
    cluster = Cluster(4, 100.0, 10.0, flops=1.0)
    assert cluster.rate([0, 1, 2]) == cluster.rate([5]) == 100
    assert cluster.rate([3, 4]) == 10
    assert cluster.rate([0, 1, 4, 5]) == 20
    assert cluster.rate([0, 1, 2, 3, 4]) == 10  # one ring, through the node with one member
    assert cluster.rate(range(8)) == 40
    assert replace(cluster, shares_links=False).rate(range(8)) == 10
    assert replace(cluster, inner_bandwidth=15.0).rate(range(8)) == 15


def test_where_nodes_share_links_owner_sets_of_whole_nodes_are_faster() -> None:
    """Half of each node's ranks drive half of its links: nothing is won. Half of the nodes do."""
    setup = CostSetup(weight_bytes=2, reduction_bytes=2)
    cluster = Cluster(2, inf, 100.0, flops=inf, overlap=0.0)
    # Blocks 0 and 1 of ranks {0, 2}, 2 and 3 of {1, 3}: one member on each of the two nodes.
    everyone = range(4)
    spread = make_plan(4, 8, owner_sets=[everyone, *[[0, 2], [1, 3]] * 3, everyone])
    by_node = make_plan(4, 8, coverage=Fraction(1, 2), ranks_per_node=2)
    dense = peer_step_time(SIZE, 4, setup, cluster, "DDP").total
    across = sdp_step_time(SIZE, spread, setup, cluster).total
    within = sdp_step_time(SIZE, by_node, setup, cluster).total
    shared, block = 3 / 4 * (480 + 2 * 240), 240
    assert dense == pytest.approx(4 * (shared + 3 / 4 * 6 * block) / 200)
    assert across == pytest.approx(4 * (shared / 200 + 1 / 2 * 3 * block / 100))
    assert within == pytest.approx(4 * shared / 200)  # both owners of a block in one node
    assert within < across < dense


def test_what_cannot_be_is_an_error() -> None:
    with pytest.raises(ValueError, match="8 blocks: the plan has 4"):
        sdp_step_time(SIZE, make_plan(4, 4, coverage=Fraction(1)), CostSetup(), BYTES)
    with pytest.raises(ValueError, match="stage = 3"):
        sdp_step_time(SIZE, HALF, CostSetup(stage=3), BYTES)
    with pytest.raises(ValueError, match="peer = 'ZeRO-4'"):
        peer_step_time(SIZE, 8, CostSetup(), BYTES, "ZeRO-4")
    with pytest.raises(ValueError, match="outer_bandwidth = 0: must be positive"):
        Cluster(8, 1.0, 0, flops=1.0)
    with pytest.raises(ValueError, match=r"overlap = 1.5: must be a share"):
        Cluster(8, 1.0, 1.0, flops=1.0, overlap=1.5)

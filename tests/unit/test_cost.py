"""The closed forms against counts by hand, rank by rank and message by message."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest

from sdp_llm.config import parse_config
from sdp_llm.plan import Plan, make_plan
from sdp_llm.plan.cost import (
    MemoryCost,
    dense_flops_per_token,
    rank_flops_per_token,
    rank_memory,
    rank_traffic,
    sdp_cost,
    steps_for_dense_flops,
)
from sdp_llm.plan.peers import PEERS, UNSHARDED, peer_cost
from sdp_llm.plan.size import BlockSize, CostSetup, ModelSize, UnitSize, setup_from_config

EMBEDDING, BLOCK, HEAD = 480, 240, 720
SETUPS = [
    CostSetup(masking, stage, w, r, accumulation)
    for masking in ("forward", "backward")
    for stage in (0, 1, 2)
    for w, r in ((4, 4), (2, 2), (2, 4))
    for accumulation in (1, 3)
]
EVEN = make_plan(4, 8, coverage=Fraction(1, 2))
UNEVEN = make_plan(3, 4, owner_sets=[[0, 1, 2], [0, 1], [2], [0, 2]])
PLANS = [EVEN, UNEVEN, make_plan(6, 8, owners_per_block=3), make_plan(2, 4, owners_per_block=2)]


def _model(num_blocks: int) -> ModelSize:
    """All sizes are multiples of 1 to 6, so that every shard is whole."""
    blocks = [UnitSize(b, BLOCK, 120) for b in range(num_blocks)]
    return ModelSize(
        units=(UnitSize(None, EMBEDDING, 480), *blocks, UnitSize(None, HEAD, 700)),
        blocks=(BlockSize(200, 1000, 600),) * num_blocks,
        shared_matmul_numel=700,
        attention_width=8,
        sequence_length=16,
        micro_batch=2,
        shared_activations=5000,
        recomputed_activations=70,
    )


def _parameters_by_owners(plan: Plan) -> Counter[tuple[int, ...]]:
    """How many parameters each set of ranks trains."""
    found = Counter({tuple(range(plan.world_size)): EMBEDDING + HEAD})
    for owners in plan.owner_sets:
        found[owners] += BLOCK
    return found


@pytest.mark.parametrize("setup", SETUPS, ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_model_state_counted_by_owner_set(plan: Plan, setup: CostSetup) -> None:
    size = _model(plan.num_blocks)
    per_master = 8 if setup.weight_bytes == 4 else 12
    for rank in range(plan.world_size):
        weights = gradients = optimizer = Fraction(0)
        for owners, count in _parameters_by_owners(plan).items():
            part = Fraction(count, len(owners))
            if rank in owners:
                gradients += 4 * (part if setup.stage == 2 else count)
                optimizer += per_master * (count if setup.stage == 0 else part)
            if rank in owners or setup.masking == "backward":
                weights += setup.weight_bytes * count
        memory = rank_memory(size, plan, setup, rank)
        counted = (memory.weights, memory.gradients, memory.optimizer)
        assert counted == (weights, gradients, optimizer)


def _messages(plan: Plan, setup: CostSetup) -> list[Fraction]:
    """Bytes that each rank sends, message by message between pairs of ranks."""
    sent = [Fraction(0)] * plan.world_size
    for owners, count in _parameters_by_owners(plan).items():
        shard = Fraction(count, len(owners))
        for sender in owners:
            for receiver in range(plan.world_size):
                if receiver == sender:
                    continue
                if receiver in owners:
                    reductions = setup.accumulation if setup.stage == 2 else 1
                    sent[sender] += reductions * setup.reduction_bytes * shard
                    gathered = setup.reduction_bytes if setup.stage == 0 else setup.weight_bytes
                    sent[sender] += gathered * shard
                elif setup.masking == "backward":
                    sent[sender] += setup.weight_bytes * shard
    return sent


@pytest.mark.parametrize("setup", SETUPS, ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_traffic_counted_message_by_message(plan: Plan, setup: CostSetup) -> None:
    size = _model(plan.num_blocks)
    expected = _messages(plan, setup)
    for rank, sent in enumerate(expected):
        assert rank_traffic(size, plan, setup, rank) == pytest.approx(float(sent), rel=1e-12)
    traffic = sdp_cost(size, plan, setup).traffic
    assert traffic.mean == round(sum(expected) / len(expected))
    assert traffic.maximum == round(max(expected))


@pytest.mark.parametrize(("stage", "accumulation"), [(0, 1), (0, 3), (1, 1), (1, 3), (2, 1)])
def test_backward_masking_sends_the_designs_closed_form(stage: int, accumulation: int) -> None:
    """At stages 0 and 1, `2fS + qK + fB` elements in the mean over the ranks."""
    n, p = 4, 2
    S, B = EMBEDDING + HEAD + 2 * BLOCK, 6 * BLOCK
    f, q, K = Fraction(n - 1, n), Fraction(p - 1, p), Fraction(p, n) * B
    setup = CostSetup("backward", stage, accumulation=accumulation)
    elements = Fraction(sdp_cost(_model(8), EVEN, setup).traffic.mean, 4)
    assert elements == 2 * f * S + q * K + f * B


def test_backward_masking_at_stage_2_reduces_in_every_micro_batch() -> None:
    S, B, A = EMBEDDING + HEAD + 2 * BLOCK, 6 * BLOCK, 3
    f, q, K = Fraction(3, 4), Fraction(1, 2), Fraction(B, 2)
    setup = CostSetup("backward", 2, accumulation=A)
    elements = Fraction(sdp_cost(_model(8), EVEN, setup).traffic.mean, 4)
    assert elements == A * (f * S + q * K) + f * S + f * B


@pytest.mark.parametrize("masking", ["forward", "backward"])
@pytest.mark.parametrize(("w", "r"), [(4, 4), (2, 2), (2, 4)])
@pytest.mark.parametrize(("stage", "peer"), [(0, "DDP"), (1, "ZeRO-1"), (2, "ZeRO-2")])
def test_full_coverage_costs_what_the_peer_costs(
    stage: int, peer: str, w: int, r: int, masking: str
) -> None:
    plan, size = make_plan(4, 8, coverage=Fraction(1)), _model(8)
    setup = CostSetup(masking, stage, w, r, accumulation=3)
    ours, theirs = sdp_cost(size, plan, setup), peer_cost(size, 4, setup, peer)
    assert ours.memory.model_state == theirs.memory.model_state
    assert ours.memory.activations == theirs.memory.activations
    assert ours.traffic == theirs.traffic
    assert ours.compute == theirs.compute


def test_literals_of_one_example() -> None:
    """bf16 at stage 2 on 4 ranks, 2 of 6 free blocks' worth of shards; all worked out by hand.

    A rank owns 1200 parameters outside the blocks, 2 pinned and 3 of 6 free blocks of 240: 2400
    parameters; its shards are 1680/4 + 720/2 = 780.
    """
    setup = CostSetup("forward", 2, weight_bytes=2, reduction_bytes=2, accumulation=3)
    cost = sdp_cost(_model(8), EVEN, setup)
    assert cost.memory == cost.least_memory
    assert cost.memory.weights == 2 * 2400
    assert cost.memory.gradients == 4 * 780
    assert cost.memory.optimizer == 12 * 780
    # Block 7 comes in while the head's buffers are under way on gloo: one parameter's gradient
    # and what is collected, then what the head sent and received (the slices of the three other
    # owners), one of them in fp32 to be added.
    head_under_way = 2 * 720 + 2 * 540 + 4 * 180
    head_launched = 2 * 700 + 2 * 720 + 2 * 540
    assert cost.memory.transient == max(head_launched, 2 * 120 + 2 * 240 + head_under_way)
    assert cost.memory.activations == 5000 + 70 + 5 * 1000
    assert cost.memory.total == 4800 + 3120 + 9360 + cost.memory.transient + 10070
    # 3 reductions and a gather of (3/4) 1680 + (1/2) 720 = 1620 elements of 2 bytes.
    assert cost.traffic.mean == cost.traffic.maximum == 4 * 1620 * 2
    # The head's matrix, and five blocks of matrices and attention 12 x 8 x 16.
    assert cost.compute.mean == 6 * 700 + 5 * (6 * 200 + 12 * 8 * 16)


def test_frozen_blocks_cost_activations_and_their_gradients() -> None:
    size = _model(8)
    setup = CostSetup("backward")
    flops = rank_flops_per_token(size, EVEN, setup, 0)
    assert flops == 6 * 700 + 5 * 6 * 200 + 3 * 4 * 200 + 8 * 12 * 8 * 16
    memory = rank_memory(size, EVEN, setup, 0)
    assert memory.activations == 5070 + 5 * 1000 + 3 * 600
    assert memory.weights == 4 * size.numel


def test_checkpointing_adds_a_forward_pass_of_each_block() -> None:
    size, plan = _model(8), make_plan(4, 8, coverage=Fraction(1))
    setup = CostSetup(gradient_checkpointing=True)
    flops = rank_flops_per_token(size, plan, setup, 0)
    assert flops == 6 * 700 + 8 * (8 * 200 + 16 * 8 * 16)
    assert dense_flops_per_token(size, setup) == flops


@pytest.mark.parametrize("stage", [0, 1])
def test_fp32_gradients_are_sent_from_their_place(stage: int) -> None:
    fp32 = rank_memory(_model(8), EVEN, CostSetup(stage=stage), 0)
    narrow = rank_memory(_model(8), EVEN, CostSetup(stage=stage, reduction_bytes=2), 0)
    # The head: its largest gradient, what gloo receives, and the bf16 copy that is sent.
    assert fp32.transient == 4 * 700 + 4 * 540
    assert narrow.transient == 4 * 700 + 2 * 540 + 2 * 720
    # Waited for at once, a slice in fp32 is there as well, or at stage 0 a second copy.
    setup = CostSetup(stage=stage, reduction_bytes=2, overlap=False)
    waited = rank_memory(_model(8), EVEN, setup, 0)
    assert waited.transient == 4 * 700 + 2 * 540 + 2 * 720 + (4 * 180 if stage else 2 * 720)


def test_stage_0_gathers_the_unit_before_while_the_embedding_is_reduced() -> None:
    blocks = tuple(UnitSize(b, 240, 100) for b in range(8))
    size = replace(_model(8), units=(UnitSize(None, 720, 700), *blocks))
    plan = make_plan(2, 8, coverage=Fraction(1))
    memory = rank_memory(size, plan, CostSetup(stage=0, weight_bytes=2, reduction_bytes=2), 0)
    # Its largest gradient, a copy of the block's, and what the embedding sends and receives.
    assert memory.transient == 2 * 700 + 2 * 240 + 2 * 720 + 2 * 360


def test_nccl_receives_only_the_shard() -> None:
    setup = CostSetup(stage=2, overlap=False, backend="nccl")
    memory = rank_memory(_model(8), EVEN, setup, 0)
    assert memory.transient == 4 * 700 + 4 * 720 + 4 * 180


@pytest.mark.parametrize("max_piece", [240, 120])
def test_overlap_keeps_the_unit_under_way_while_the_next_is_collected(max_piece: int) -> None:
    """Where blocks are the largest units, whole or split in two."""
    pieces = [UnitSize(b, max_piece, 100) for b in range(8) for _ in range(240 // max_piece)]
    size = replace(_model(8), units=(UnitSize(None, 8, 4), *pieces, UnitSize(None, 8, 4)))
    plan = make_plan(4, 8, coverage=Fraction(1))
    launched = 4 * max_piece * 3 // 4  # received: the slices of three others
    alone = rank_memory(size, plan, CostSetup(stage=2, overlap=False), 0)
    assert alone.transient == 4 * 100 + 4 * 240 + launched
    overlapped = rank_memory(size, plan, CostSetup(stage=2), 0)
    assert overlapped.transient == 4 * 100 + 4 * 240 + 4 * max_piece + launched


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_reductions_under_way_keep_their_buffers(stage: int) -> None:
    """bf16, 8 blocks of 240: what is received from one other, and what is sent."""
    blocks = tuple(UnitSize(b, 240, 100) for b in range(8))
    size = replace(_model(8), units=(UnitSize(None, 8, 4), *blocks, UnitSize(None, 8, 4)))
    plan = make_plan(2, 8, coverage=Fraction(1))

    def transient(under_way: int) -> int:
        setup = CostSetup(stage=stage, weight_bytes=2, reduction_bytes=2, under_way=under_way)
        return rank_memory(size, plan, setup, 0).transient

    # At stage 0 they go one by one.
    each = 2 * 120 + 2 * 240 if stage else 0
    assert [transient(k + 1) - transient(k) for k in (1, 2, 3)] == [each] * 3


def test_units_with_one_owner_need_no_buffers_and_no_messages() -> None:
    plan = make_plan(1, 8, coverage=Fraction(1))
    cost = sdp_cost(_model(8), plan, CostSetup(stage=2))
    assert cost.traffic.maximum == 0
    assert cost.memory.transient == 4 * 700


def test_the_most_and_the_least_loaded_rank() -> None:
    cost = sdp_cost(_model(4), UNEVEN, CostSetup())
    totals = [rank_memory(_model(4), UNEVEN, CostSetup(), rank).total for rank in range(3)]
    assert (cost.least_memory.total, cost.memory.total) == (min(totals), max(totals))
    assert min(totals) < max(totals)
    assert cost.compute.mean < cost.compute.maximum


@pytest.mark.parametrize("w", [2, 4])
def test_peers_per_parameter(w: int) -> None:
    n, A, P = 4, 3, _model(8).numel
    setup = CostSetup(weight_bytes=w, reduction_bytes=w, accumulation=A)
    master = 0 if w == 4 else 4
    state = {
        "DDP": w + 4 + master + 8,
        "ZeRO-1": w + 4 + (master + 8) / n,
        "ZeRO-2": w + 4 / n + (master + 8) / n,
        "ZeRO-3": (w + 4 + master + 8) / n,
        "FSDP2": (4 + 4 + 8) / n,
        UNSHARDED: (4 + 4 + 8) / n,
    }
    elements = {"DDP": 2, "ZeRO-1": 2, "ZeRO-2": A + 1, "ZeRO-3": 3 * A, "FSDP2": 3 * A}
    elements |= {UNSHARDED: 2 * A}
    for peer in PEERS:
        cost = peer_cost(_model(8), n, setup, peer)
        assert cost.memory.model_state == pytest.approx(state[peer] * P)
        assert cost.traffic.mean == pytest.approx(w * elements[peer] * (n - 1) / n * P)
        assert cost.memory.activations == 5070 + 8 * 1000
    assert peer_cost(_model(8), n, setup, "ZeRO-3").memory.transient == 4 * w * 720


@pytest.mark.parametrize(("w", "r"), [(4, 4), (2, 2), (2, 4)])
def test_without_resharding_weights_are_gathered_once_and_whole(w: int, r: int) -> None:
    setup = CostSetup(weight_bytes=w, reduction_bytes=r, accumulation=3)
    size = _model(8)
    kept, resharded = (peer_cost(size, 4, setup, peer) for peer in (UNSHARDED, "FSDP2"))
    assert UNSHARDED == "FSDP2, no resharding"
    assert kept.memory.model_state == resharded.memory.model_state == 4 * size.numel
    assert kept.memory.transient == w * size.numel + 2 * r * 720
    assert kept.traffic.mean == 3 * (r + w) * 3 * size.numel / 4
    assert resharded.traffic.mean == 3 * (r + 2 * w) * 3 * size.numel / 4
    assert kept.compute == resharded.compute


def test_steps_for_dense_flops() -> None:
    assert steps_for_dense_flops(1000, 50.0, 100.0) == 2000
    assert steps_for_dense_flops(100, 60.0, 100.0) == 167
    assert steps_for_dense_flops(1, 100.0, 1.0) == 1
    with pytest.raises(ValueError, match="must all be positive"):
        steps_for_dense_flops(0, 1.0, 1.0)


def test_setup_from_config() -> None:
    raw = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    setup = setup_from_config(parse_config(raw), 3, "nccl")
    assert setup == CostSetup("forward", 1, 2, 2, 3, backend="nccl")
    raw |= {
        "communication_data_type": "fp32",
        "optimizer": {"type": "RMSprop", "params": {"lr": 1}},
    }
    assert setup_from_config(parse_config(raw), 3, "nccl") == replace(
        setup, reduction_bytes=4, moment_bytes=4
    )


@pytest.mark.parametrize(
    ("optimizer", "moment_bytes"),
    [
        ({"type": "AdamW"}, 8),
        ({"type": "SGD"}, 0),
        ({"type": "SGD", "params": {"momentum": 0.9}}, 4),
        ({"type": "RMSprop", "params": {"momentum": 0.9, "centered": True}}, 12),
        ({"type": "Adagrad"}, 4),
    ],
)
def test_moments_of_each_optimizer(optimizer: dict[str, object], moment_bytes: int) -> None:
    raw = {"optimizer": {**optimizer, "params": {"lr": 0.1, **optimizer.get("params", {})}}}  # type: ignore[dict-item]
    assert setup_from_config(parse_config(raw), 1, "gloo").moment_bytes == moment_bytes


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="7 blocks: the plan has 8"):
        sdp_cost(_model(7), EVEN, CostSetup())
    with pytest.raises(ValueError, match="stage = 3"):
        sdp_cost(_model(8), EVEN, CostSetup(stage=3))
    with pytest.raises(ValueError, match="peer = 'ZeRO-4'"):
        peer_cost(_model(8), 4, CostSetup(), "ZeRO-4")


def test_total_is_the_sum() -> None:
    assert MemoryCost(1, 20, 300, 4000, 50000).model_state == 321
    assert MemoryCost(1, 20, 300, 4000, 50000).total == 54321

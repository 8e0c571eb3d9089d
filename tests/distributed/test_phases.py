"""Runs whose plan and masking change."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from benchmarks.allocations import AllocationTracker
from sdp_llm.engine import SDPEngine
from sdp_llm.errors import ConfigError
from sdp_llm.evaluation import Evaluation
from sdp_llm.initialization import initialize
from sdp_llm.loss import summed_loss, target_count
from sdp_llm.plan import Plan, make_plan
from sdp_llm.plan.change_cost import change_traffic
from sdp_llm.plan.size import CostSetup, ModelSize, UnitSize
from sdp_llm.sharding.unit import Unit
from tests.distributed.compare import assembled, whole
from tests.distributed.pool import Pool
from tests.distributed.test_checkpoint import state, steps
from tests.distributed.test_families import FAMILIES, _config
from tests.distributed.test_oracle import check_against_simulation
from tests.distributed.tiny import (
    Case,
    batch,
    build,
    forward_backward,
    my_slice,
    run_config,
    weights,
)

Pools = Callable[[int], Pool]
BUDGET = 5  # steps


def scheduled(*phases: dict[str, Any], **sdp: Any) -> tuple[tuple[str, Any], ...]:
    """The extra of a case whose plan changes."""
    return (("sdp", {"owners_per_block": 2, **sdp, "schedule": [*phases]}),)


# -- the arithmetic -------------------------------------------------------------------------------

SCHEDULES = {
    "rotating, full": scheduled({"until": 0.6, "rotate_every": 1}, {"until": 1, "coverage": 1}),
    "backward": scheduled({"until": 0.4}, {"until": 1, "masking": "backward", "rotate_every": 2}),
    "full, backward, single": scheduled(
        {"until": 0.2, "coverage": 1},
        {"until": 0.6, "masking": "backward", "owners_per_block": 3, "pinned_first": 0},
        {"until": 1, "owners_per_block": 1, "strategy": "random", "rotate_every": 1},
    ),
    "scaled, backward": scheduled(
        {"until": 0.6, "rotate_every": 1},
        {"until": 1, "masking": "backward"},
        residual_scale="inverse_coverage",
    ),
}
RUNS = [("rotating, full", Case(stage=2, is_tied=True))]
MORE_RUNS = [
    (name, Case(stage=stage, accumulation=accumulation, is_tied=is_tied))
    for name in ("rotating, full", "backward", "full, backward, single")
    for stage in (0, 1, 2)
    for accumulation, is_tied in ((1, True), (3, False))
]
MORE_RUNS += [
    ("backward", Case(stage=1, accumulation=3, is_bf16=True, communication="fp32")),
    ("full, backward, single", Case(stage=2, bucket=1500, overlap=False)),
    ("scaled, backward", Case(stage=1, accumulation=3, residual_scale="inverse_coverage")),
    ("rotating, full", Case(stage=1, optimizer="SGD")),
    ("backward", Case(stage=2, optimizer="Adagrad", clip=0.0)),
    ("rotating, full", Case(stage=0, optimizer="RMSprop")),
    (
        "full, backward, single",
        Case(extra=(("model", {"config": "given", "gradient_checkpointing": True}),), eos_id=2),
    ),
]


def _check_run(name: str, case: Case, pools: Pools) -> None:
    check_against_simulation(case.with_(extra=case.extra + SCHEDULES[name]), pools(4))


@pytest.mark.parametrize(("name", "case"), RUNS, ids=str)
def test_a_scheduled_run_equals_the_simulation(name: str, case: Case, pools: Pools) -> None:
    _check_run(name, case, pools)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), MORE_RUNS, ids=str)
def test_more_scheduled_runs_equal_the_simulation(name: str, case: Case, pools: Pools) -> None:
    _check_run(name, case, pools)


# -- what moves, and what does not ----------------------------------------------------------------


def route(original: Plan) -> list[tuple[Plan, str]]:
    """Through plans of all kinds and back."""
    uneven = [[0, 1, 2, 3], [1], [0, 2, 3], [3], [0, 1], [0, 1, 2]]
    return [
        (make_plan(4, 6, owners_per_block=2, seed=5, strategy="random"), "forward"),
        (make_plan(4, 6, owners_per_block=4), "forward"),
        (make_plan(4, 6, owners_per_block=1, pinned_first=0), "backward"),
        (make_plan(4, 6, owners_per_block=3, strategy="cyclic"), "backward"),
        (make_plan(4, 6, owner_sets=uneven), "forward"),
        (make_plan(4, 6, owner_sets=uneven[::-1]), "backward"),
        (original, "forward"),
    ]


def there_and_back(case: Case, count: int) -> dict[str, Any]:
    """Run on a rank: train, change the plan many times, train on; and train without changes."""
    engine = build(case)
    steps(engine, 0, count)
    objects = (engine.optimizer, engine.basic_optimizer, engine.lr_scheduler, engine.module)
    seen = [(state(engine), weights(engine))]
    sent = []
    for plan, masking in route(engine.plan):
        sent_before = engine.sharded.communicator.bytes_sent
        engine.change_plan(plan, masking)
        sent.append(engine.sharded.communicator.bytes_sent - sent_before)
        assert (engine.plan, engine.sharded.subnetwork.masking) == (plan, masking)
        seen.append((state(engine), weights(engine)))
    now = (engine.optimizer, engine.basic_optimizer, engine.lr_scheduler, engine.module)
    assert all(map(lambda a, b: a is b, objects, now))
    straight = build(case)
    steps(straight, 0, count)
    for each in (engine, straight):
        steps(each, count, 2)
    units = [(unit.block, unit.numel) for unit in engine.sharded.subnetwork.layout.units]
    return {
        "seen": seen,
        "sent": sent,
        "units": units,
        "changed": weights(engine),
        "straight": weights(straight),
    }


SCHEDULER = {"type": "WarmupCosineLR", "params": {"total_num_steps": 8, "warmup_num_steps": 2}}
MOVES = [
    (Case(stage=2, is_bf16=True, bucket=3000, extra=(("scheduler", SCHEDULER),)), 2),
]
MORE_MOVES = [
    (Case(stage=0), 2),
    (Case(stage=1, is_tied=True), 2),
    (Case(stage=2), 2),
    (Case(stage=0, is_bf16=True, overlap=False), 2),
    (Case(stage=2), 0),
    (Case(stage=1, optimizer="Adagrad"), 0),
    (Case(stage=1, optimizer="SGD"), 2),
    (Case(stage=2, optimizer="RMSprop", is_bf16=True), 1),
]


def _check_moves(case: Case, count: int, pools: Pools) -> None:
    results = pools(4).run(there_and_back, case, count)
    before = whole([found["seen"][0][1] for found in results])
    like = {name: torch.from_numpy(value) for name, value in before.items()}
    kinds = {kind for found in results for kind in found["seen"][0][0]}
    assert "master" in kinds
    for i, (plan, masking) in enumerate(route(make_plan(4, 6, owners_per_block=2)), 1):
        held = whole([found["seen"][i][1] for found in results])
        assert held.keys() == before.keys()
        for name, value in before.items():
            np.testing.assert_array_equal(held[name], value, err_msg=f"{i}: {name}")
        for rank, found in enumerate(results):
            blocks = {int(n.split(".")[2]) for n in found["seen"][i][1] if ".layers." in n}
            is_whole = masking == "backward"
            assert blocks == ({*range(6)} if is_whole else {*plan.owned_blocks(rank)})
        for kind in kinds:
            old, _ = assembled([found["seen"][0][0][kind] for found in results], like)
            new, counts = assembled([found["seen"][i][0][kind] for found in results], like)
            for name, value in old.items():
                np.testing.assert_array_equal(new[name], value, err_msg=f"{i}: {kind} {name}")
                owners = plan.owner_sets[int(name.split(".")[2])] if ".layers." in name else "0123"
                assert (counts[name] == (len(owners) if case.stage == 0 else 1)).all()
    for found in results:
        for name, value in found["straight"].items():
            np.testing.assert_array_equal(found["changed"][name], value, err_msg=name)
    if case.optimizer == "AdamW" and count > 0:
        _check_bytes(case, results)


def _check_bytes(case: Case, results: list[dict[str, Any]]) -> None:
    """What the ranks sent in each change is the closed form, but for the padding of gathers."""
    units = tuple(UnitSize(block, numel, numel) for block, numel in results[0]["units"])
    size = ModelSize(units, (), 0, 0, 0, 0)
    setup = CostSetup(stage=case.stage, weight_bytes=2 if case.is_bf16 else 4)
    half = make_plan(4, 6, owners_per_block=2)
    stops = [(half, "forward"), *route(half)]
    padding = setup.weight_bytes * 4 * len(units)
    for i, (old, new) in enumerate(pairwise(stops)):
        expected = change_traffic(size, old, new, setup)
        for rank, found in enumerate(results):
            assert 0 <= found["sent"][i] - expected[rank] <= padding, (i, rank)


@pytest.mark.parametrize(("case", "count"), MOVES, ids=str)
def test_masters_and_moments_move_bit_for_bit(case: Case, count: int, pools: Pools) -> None:
    """By global name, from every plan to the next; and training goes on as if nothing was."""
    _check_moves(case, count, pools)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "count"), MORE_MOVES, ids=str)
def test_more_masters_and_moments_move(case: Case, count: int, pools: Pools) -> None:
    _check_moves(case, count, pools)


def untouched(case: Case) -> tuple[int, list[str], list[str], int]:
    """Run on a rank: what of a rotation that swaps two blocks is another object, or is sent."""
    engine = build(case)
    steps(engine, 0, 1)
    plan = engine.plan
    sets = list(plan.owner_sets)
    other = next(b for b in plan.free_blocks[1:] if sets[b] != sets[1])
    sets[1], sets[other] = sets[other], sets[1]
    engine.wait_for_weights()
    parameters = dict(engine.module.named_parameters())
    units = {unit.layout.name: unit for unit in engine.sharded.units}
    sent = engine.sharded.communicator.bytes_sent
    engine.change_plan(make_plan(4, 6, owner_sets=sets), "forward")
    after = {unit.layout.name: unit for unit in engine.sharded.units}
    changed = [name for name in {**units, **after} if units.get(name) is not after.get(name)]
    now = dict(engine.module.named_parameters())
    others = [name for name in parameters if now.get(name) is not parameters[name]]
    sent = engine.sharded.communicator.bytes_sent - sent
    moved = sum(u.numel for u in engine.sharded.subnetwork.layout.units if u.block in (1, other))
    return other, changed, others, sent * dist.get_world_size() // (4 * moved)


def test_what_keeps_its_owners_is_left_alone(pools: Pools) -> None:
    for other, changed, parameters, sent in pools(4).run(untouched, Case(stage=1)):
        assert set(changed) <= {"block 1", f"block {other}"}
        assert {name.split(".")[2] for name in parameters} <= {"1", str(other)}
        # Of two units: masters, two moments, and the weights' all-gather, of which a half is sent.
        assert sent <= 4


# -- memory ---------------------------------------------------------------------------------------


def _units() -> set[int]:
    """Those that have storage."""
    gc.collect()
    return {id(u) for u in gc.get_objects() if type(u) is Unit and "_flat" in vars(u)}


def _hooks(engine: SDPEngine) -> int:
    absent = [m for block in engine.sharded.subnetwork.absent.values() for m in block.modules()]
    modules = [*engine.module.modules(), *absent]
    return sum(
        len(module._forward_pre_hooks) + len(module._state_dict_pre_hooks) for module in modules
    ) + sum(len(p._post_accumulate_grad_hooks or ()) for p in engine.module.parameters())


def rotate_often(case: Case, times: int) -> dict[str, Any]:
    """Run on a rank: steps that each end in a rotation; what is alive before each, what meanwhile.

    The graph of every step, which knows the parameters of then, is kept.
    """
    others, graphs = _units(), []
    tracker = AllocationTracker()
    found: dict[str, Any] = {"alive": [], "beyond": [], "hooks": [], "groups": []}
    with tracker:
        engine = build(case)
        change = engine.change_plan

        def watched(plan: Plan, masking: str) -> None:
            engine.wait_for_weights()
            # Not after the change: gloo's threads may hold the buffers of the last collective yet.
            before = tracker.live.total()
            found["alive"].append(before)
            tracker.reset_peaks()
            change(plan, masking)
            engine.wait_for_weights()
            found["beyond"].append(tracker.total_peak - max(before, tracker.live.total()))
            found["hooks"].append(_hooks(engine))
            found["groups"].append(len(engine.sharded.groups))

        engine.change_plan = watched  # type: ignore[method-assign]
        for step in range(times):
            graphs.append(summed_loss(engine, my_slice(step)) / 36)
            engine.backward(graphs[-1], scale_wrt_gas=False)
            engine.step()
    found["changes"] = sum(map(engine.schedule.changes_at, range(1, times + 1)))
    owned = engine.sharded.owned
    assert _units() - others == {id(unit) for unit in engine.sharded.units}
    assert len(engine.basic_optimizer.state) == sum(len(unit.slices) for unit in owned)
    assert set(engine.param_names) == {*engine.module.parameters()}
    unit = next(u for u in owned if u.layout.block is not None)
    states = [engine.basic_optimizer.state[s.tensor].values() for s in unit.slices]
    tensors = [unit.flat, unit.grad, *(tensor for state in states for tensor in state)]
    if case.is_bf16:
        tensors.append(unit.master)
    return found | {"unit": sum(tensor.nbytes for tensor in tensors)}


ROTATING = (("sdp", {"owners_per_block": 2, "rotate_every": 1}),)


def _check_memory(case: Case, times: int, pools: Pools) -> None:
    for found in pools(4).run(rotate_often, case.with_(extra=ROTATING), times):
        assert len(found["alive"]) == found["changes"] > times / 2
        assert len({*found["hooks"]}) == len({*found["groups"]}) == 1
        assert max(found["beyond"]) <= found["unit"]
        # A scalar here and there: the counts of steps and what Python has not freed yet.
        assert max(found["alive"]) - min(found["alive"]) < found["unit"] / 20


def test_memory_does_not_grow(pools: Pools) -> None:
    _check_memory(Case(stage=2, is_bf16=True), 5, pools)


@pytest.mark.slow
@pytest.mark.parametrize("is_bf16", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_memory_does_not_grow_in_many_changes(stage: int, is_bf16: bool, pools: Pools) -> None:
    _check_memory(Case(stage=stage, is_bf16=is_bf16), 25, pools)


# -- evaluation, export and checkpoints in every phase --------------------------------------------

WALK = scheduled(
    {"until": 0.2, "rotate_every": 0},
    {"until": 0.4, "seed": 3, "strategy": "random"},
    {"until": 0.6, "masking": "backward", "owners_per_block": 3},
    {"until": 0.8, "coverage": 1},
    {"until": 1, "owners_per_block": 1},
)


def in_every_phase(family: str, folder: str) -> list[tuple[Evaluation, bool, dict[str, Any]]]:
    """Run on a rank: train, and evaluate and export after each step."""
    case = Case(extra=WALK, clip=0.0)
    engine = initialize(_config(family), run_config(case), total_num_steps=BUDGET)[0]
    seen = []
    for step in range(BUDGET):
        forward_backward(engine, step)
        engine.step()
        evaluation = engine.evaluate(my_slice(9), micro_batch=2)
        engine.save_pretrained(f"{folder}/{step}")
        is_training = all(module.training for module in engine.module.modules())
        seen.append((evaluation, is_training, weights(engine)))
    return seen


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_and_export_in_every_phase(family: str, pools: Pools, tmp_path: Path) -> None:
    results = pools(4).run(in_every_phase, family, str(tmp_path))
    tokens = batch(9, 4)
    for step in range(BUDGET):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / str(step), dtype=torch.float32)
        exported = dict(model.named_parameters())
        stored = whole([found[step][2] for found in results])
        assert exported.keys() == stored.keys()
        for name, value in stored.items():
            np.testing.assert_array_equal(exported[name].numpy(), value, err_msg=name)
        loss = summed_loss(model.eval(), tokens).item() / target_count(tokens)
        for evaluation, is_training, _ in (found[step] for found in results):
            assert evaluation.loss == pytest.approx(loss, abs=1e-5)
            assert is_training, "blocks that were streamed in evaluation train again"


TWO_PHASES = scheduled(
    {"until": 0.4, "rotate_every": 1}, {"until": 1, "masking": "backward", "owners_per_block": 3}
)
SAVED = Case(stage=1, is_bf16=True, extra=(*TWO_PHASES, ("scheduler", SCHEDULER)))


def saved_in_phases(case: Case, folder: str) -> dict[str, Any]:
    """Run on a rank: save right after the change, and in the background before it; train on."""
    engine = build(case, BUDGET)
    found: dict[str, Any] = {}
    steps(engine, 0, 1)
    found["before"] = state(engine)
    pending = engine.save_checkpoint_in_background(folder, tag="before")
    steps(engine, 1, 1)
    pending.finish()
    engine.save_checkpoint(folder, tag="after")
    found["after"], found["plan"] = state(engine), (engine.plan, "backward")
    found["seen"], found["weights"] = steps(engine, 2, 3), weights(engine)
    return found


def resumed_in_phases(case: Case, folder: str, tag: str) -> dict[str, Any]:
    """Run on a rank: load into a fresh engine, and train to the end."""
    engine = build(case, BUDGET)
    engine.load_checkpoint(folder, tag=tag)
    found: dict[str, Any] = {"state": state(engine), "loaded": weights(engine)}
    done = engine.global_steps
    found["plan"] = (engine.plan, engine.sharded.subnetwork.masking)
    assert found["plan"] == engine.schedule.at(done)
    found["seen"], found["weights"] = steps(engine, done, BUDGET - done), weights(engine)
    return found


def test_a_checkpoint_resumes_in_its_phase(pools: Pools, tmp_path: Path) -> None:
    """Bit for bit on the same ranks; on fewer, with their own plan of that phase, it goes on."""
    saved = pools(4).run(saved_in_phases, SAVED, str(tmp_path))
    resumed = {
        tag: pools(4).run(resumed_in_phases, SAVED, str(tmp_path), tag)
        for tag in ("before", "after")
    }
    for tag, results in resumed.items():
        moment, done = ("before", 1) if tag == "before" else ("after", 2)
        for found, expected in zip(results, saved, strict=True):
            assert (found["plan"] == expected["plan"]) == (tag != "before")
            for kind, slices in expected[moment].items():
                for mine, other in zip(found["state"][kind], slices, strict=True):
                    assert mine[:3] == other[:3]
                    np.testing.assert_array_equal(mine[3], other[3], err_msg=f"{tag} {kind}")
            assert found["seen"][-3:] == expected["seen"], tag
            assert len(found["seen"]) == BUDGET - done
            for name, value in expected["weights"].items():
                np.testing.assert_array_equal(found["weights"][name], value, err_msg=name)
    two = SAVED.with_(world_size=2, extra=(*scheduled(
        {"until": 0.4}, {"until": 1, "masking": "backward", "owners_per_block": 1}
    ), ("scheduler", SCHEDULER)))  # fmt: skip
    fewer = pools(2).run(resumed_in_phases, two, str(tmp_path), "after")
    before = whole([found["loaded"] for found in resumed["after"]])
    for found in fewer:
        assert found["plan"] == (make_plan(2, 6, owners_per_block=1), "backward")
        assert found["loaded"].keys() == before.keys()
        for name, value in before.items():
            np.testing.assert_array_equal(found["loaded"][name], value, err_msg=name)
        assert len(found["seen"]) == 3


# -- what is refused ------------------------------------------------------------------------------


def refused() -> list[str]:
    """Run on a rank: the errors of changes that are refused, then a step."""
    engine = build(Case(2, owners_per_block=1, accumulation=3))
    swapped = [[1 - engine.plan.owner_sets[block][0]] for block in engine.plan.free_blocks]
    other = make_plan(2, 6, owner_sets=[[0, 1], *swapped, [0, 1]])
    mine = other if dist.get_rank() == 0 else engine.plan
    engine.backward(summed_loss(engine, my_slice(0)[:1]))
    calls = [
        (other, "forward"),  # now, between two passes of a step
        (make_plan(4, 6, owners_per_block=2), "forward"),
        (make_plan(2, 5, owners_per_block=1), "forward"),
        (other, "sideways"),
        (mine, "forward"),
    ]
    errors = []
    for plan, masking in calls:
        try:
            engine.change_plan(plan, masking)
        except ConfigError as error:
            errors.append(str(error))
        engine.zero_grad()
    before = weights(engine)
    steps(engine, 0, 1)
    after = weights(engine)
    assert all(not np.array_equal(after[name], value) for name, value in before.items())
    return errors


def test_a_change_that_cannot_be_is_refused_and_nothing_changes(pools: Pools) -> None:
    for errors in pools(2).run(refused):
        expected = [
            "rank 0: change_plan: gradients are accumulated",
            "rank 0: change_plan: the plan is for 4 ranks and 6 blocks, the run has 2 and 6",
            "rank 0: change_plan: the plan is for 2 ranks and 5 blocks",
            "rank 0: change_plan: masking = 'sideways': must be one of forward, backward",
            "change_plan: the plan on ranks [1] differs from rank 0's",
        ]
        assert len(errors) == len(expected)
        for error, start in zip(errors, expected, strict=True):
            assert error.startswith(start)
            assert "\n" not in error


def schedule_without_budget() -> str:
    """Run on a rank: the error of a schedule without ``total_num_steps``."""
    try:
        build(Case(2, extra=scheduled({"until": 1})))
    except ConfigError as error:
        return str(error)
    return ""


def test_a_schedule_needs_a_budget(pools: Pools) -> None:
    for message in pools(2).run(schedule_without_budget):
        assert message.startswith("sdp.schedule: ")
        assert "total_num_steps" in message

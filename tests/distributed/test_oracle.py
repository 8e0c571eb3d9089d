"""The distributed run equals the single-process simulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from sdp_llm.config import parse_config
from sdp_llm.loss import NextTokenLoss
from sdp_llm.plan import Plan, schedule_from_config
from sdp_llm.simulation import Simulation
from tests.distributed.compare import assembled, distance, to_numpy, whole
from tests.distributed.pool import Pool
from tests.distributed.tiny import SAMPLES_PER_RANK, Case, batch, llama, run_config, train

STEPS = 5


def _simulation(case: Case, plan: Plan) -> Simulation:
    def optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return getattr(torch.optim, case.optimizer)(groups, **case.optimizer_params)

    return Simulation(
        llama(case.is_tied),
        plan,
        optimizer,
        masking=case.masking,
        seed=7,
        max_norm=case.clip,
        dtype=torch.bfloat16 if case.is_bf16 else torch.float32,
        loss=NextTokenLoss(case.eos_id),  # never in pieces
        residual_scale=case.residual_scale,
    )


def check_against_simulation(case: Case, pool: Pool) -> None:
    """At every step, whatever plan the case's schedule has then."""
    sdp = parse_config(run_config(case)).sdp
    schedule = schedule_from_config(sdp, case.world_size, 6, STEPS)
    plan, masking = schedule.at(0)
    traces = pool.run(train, case, STEPS)
    free, same_state = _simulation(case, plan), _simulation(case, plan)
    for step in range(STEPS):
        plan, masking = schedule.at(step)
        for simulation in (free, same_state):
            simulation.change_plan(plan, masking)
        entries = [trace[step] for trace in traces]
        stored = whole([entry["weights"] for entry in entries])
        start, _ = assembled([entry["masters"] for entry in entries], same_state.masters)
        for name, master in same_state.masters.items():
            given = torch.from_numpy(start[name]).view(master.shape)
            master.data.copy_(given)
            weight = same_state.model.get_parameter(name).data.copy_(given)
            np.testing.assert_array_equal(stored[name], weight.float().numpy(), err_msg=name)
        tokens = batch(step, case.world_size, case.eos_id)
        losses = same_state.accumulate(tokens, SAMPLES_PER_RANK // case.accumulation)
        expected = to_numpy(
            {n: m.grad for n, m in same_state.masters.items() if m.grad is not None}
        )
        found, counts = assembled([entry["gradients"] for entry in entries], same_state.masters)
        for unit in same_state.layout.units:
            owners = case.world_size
            if unit.block is not None:
                owners = len(plan.owner_sets[unit.block])
            for spec in unit.parameters:
                copies = owners if case.stage == 0 else 1
                assert (counts[spec.name] == copies).all(), spec.name
            names = [spec.name for spec in unit.parameters]
            assert distance({n: found[n] for n in names}, {n: expected[n] for n in names}) < 1e-6, (
                f"gradient of {unit.name} at step {step}"
            )
        np.testing.assert_allclose([entry["loss"] for entry in entries], losses, rtol=1e-6)
        norm = np.sqrt(sum(np.square(e.astype(np.float64)).sum() for e in expected.values()))
        for entry in entries:
            assert entry["norm"] == pytest.approx(norm, rel=1e-6)
        free.step(tokens, SAMPLES_PER_RANK // case.accumulation)
    end, _ = assembled([trace[STEPS]["masters"] for trace in traces], free.masters)
    assert distance(end, to_numpy(free.masters)) < 1e-5


CASES = [Case(4, masking, stage) for masking in ("forward", "backward") for stage in (0, 1, 2)]
CASES += [
    Case(4, "forward", 2, accumulation=3, is_tied=True),
    Case(4, "backward", 1, accumulation=3, is_tied=True),
    Case(4, "forward", 0, owners_per_block=3, accumulation=3),
    Case(4, "backward", 2, owners_per_block=3, accumulation=3),
    Case(2, "forward", 2, owners_per_block=1, accumulation=3),
    Case(2, "backward", 1, owners_per_block=1, accumulation=3),
    Case(loss_chunk=5, is_tied=True, accumulation=3),
]
MORE_CASES = [
    Case(4, masking, stage, 2, accumulation, is_tied)
    for masking in ("forward", "backward")
    for stage in (0, 1, 2)
    for accumulation, is_tied in ((1, True), (3, False), (3, True))
]
MORE_CASES += [
    Case(world_size, masking, stage, owners, accumulation=3)
    for masking in ("forward", "backward")
    for stage in (0, 1, 2)
    for world_size, owners in ((4, 1), (4, 3), (2, 1))
]
MORE_CASES += [
    Case(4, masking, stage, owners, accumulation=3, is_tied=True)
    for masking in ("forward", "backward")
    for stage in (0, 1, 2)
    for owners in (1, 3)
]
MORE_CASES += [
    Case(2, masking, stage, owners, accumulation)
    for masking in ("forward", "backward")
    for stage in (0, 1, 2)
    for owners, accumulation in ((1, 1), (2, 1), (2, 3))
]
CASES += [
    Case(overlap=False),
    Case(stage=1, overlap=False),
    Case(bucket=3000, under_way=3),
    Case(stage=1, bucket=1500, masking="backward"),
    Case(clip=0.0),
    Case(extra=(("model", {"config": "given", "gradient_checkpointing": True}),)),
    Case(eos_id=2, accumulation=3),
    Case(loss_chunk=7, masking="backward", eos_id=2, stage=1),
    Case(stage=0, owners_per_block=4),
    Case(optimizer="SGD"),
    Case(optimizer="RMSprop", stage=1),
]
MORE_CASES += [
    Case(
        eos_id=2,
        masking="backward",
        extra=(("model", {"config": "given", "gradient_checkpointing": True}),),
    ),
    Case(optimizer="Adagrad"),
    Case(optimizer="Adam", stage=0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_run_equals_simulation(case: Case, pools: Callable[[int], Pool]) -> None:
    check_against_simulation(case, pools(case.world_size))


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in MORE_CASES if c not in CASES], ids=str)
def test_more_runs_equal_simulation(case: Case, pools: Callable[[int], Pool]) -> None:
    check_against_simulation(case, pools(case.world_size))

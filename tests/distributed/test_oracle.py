"""The distributed run equals the single-process simulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from sdp_llm.plan import Plan, make_plan
from sdp_llm.simulation import Simulation
from tests.distributed.pool import Pool
from tests.distributed.tiny import SAMPLES_PER_RANK, Case, batch, llama, train

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
    )


def _assembled(parts: list[list[tuple[str, int, int, np.ndarray]]], like: dict[str, Any]) -> Any:
    """Whole tensors from the ranks' slices, and how many ranks hold each element."""
    values = {name: np.zeros(master.numel(), np.float32) for name, master in like.items()}
    counts = {name: np.zeros(master.numel(), int) for name, master in like.items()}
    for slices in parts:
        for name, start, stop, value in slices:
            values[name][start:stop] = value
            counts[name][start:stop] += 1
    return values, counts


def _distance(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The norm of the difference over the norm, of all tensors together."""
    difference = sum(np.square(found[n].ravel() - expected[n].ravel()).sum() for n in expected)
    return float(np.sqrt(difference / sum(np.square(e).sum() for e in expected.values())))


def _whole(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The union of what the ranks store; who stores the same stores equal bits."""
    whole: dict[str, np.ndarray] = {}
    for part in parts:
        for name, value in part.items():
            np.testing.assert_array_equal(whole.setdefault(name, value), value, err_msg=name)
    return whole


def _numpy(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


def check_against_simulation(case: Case, pool: Pool) -> None:
    plan = make_plan(case.world_size, 6, owners_per_block=case.owners_per_block)
    traces = pool.run(train, case, STEPS)
    free, same_state = _simulation(case, plan), _simulation(case, plan)
    for step in range(STEPS):
        entries = [trace[step] for trace in traces]
        start = _whole([entry["weights"] for entry in entries])
        with torch.no_grad():
            for name, master in same_state.masters.items():
                master.copy_(torch.from_numpy(start[name]))
        tokens = batch(step, case.world_size)
        losses = same_state.accumulate(tokens, SAMPLES_PER_RANK // case.accumulation)
        expected = _numpy({n: m.grad for n, m in same_state.masters.items() if m.grad is not None})
        found, counts = _assembled([entry["gradients"] for entry in entries], same_state.masters)
        for unit in same_state.layout.units:
            owners = case.world_size
            if unit.block is not None:
                owners = len(plan.owner_sets[unit.block])
            for spec in unit.parameters:
                copies = owners if case.stage == 0 else 1
                assert (counts[spec.name] == copies).all(), spec.name
            names = [spec.name for spec in unit.parameters]
            assert (
                _distance({n: found[n] for n in names}, {n: expected[n] for n in names}) < 1e-6
            ), f"gradient of {unit.name} at step {step}"
        np.testing.assert_allclose([entry["loss"] for entry in entries], losses, rtol=1e-6)
        norm = np.sqrt(sum(np.square(e.astype(np.float64)).sum() for e in expected.values()))
        for entry in entries:
            assert entry["norm"] == pytest.approx(norm, rel=1e-6)
        free.step(tokens, SAMPLES_PER_RANK // case.accumulation)
    end = _whole([trace[STEPS]["weights"] for trace in traces])
    assert _distance(end, _numpy(free.masters)) < 1e-5


CASES = [
    Case(4, masking, stage, owners, accumulation, is_tied)
    for masking in ("forward", "backward")
    for stage in (0, 1, 2)
    for owners in (1, 2, 3)
    for accumulation in (1, 3)
    for is_tied in (False, True)
    if owners == 2 or accumulation == 3
]
CASES += [
    Case(2, masking, stage, owners, accumulation)
    for masking in ("forward", "backward")
    for stage in (0, 1, 2)
    for owners in (1, 2)
    for accumulation in (1, 3)
]
CASES += [
    Case(overlap=False),
    Case(stage=1, overlap=False),
    Case(bucket=3000),
    Case(stage=1, bucket=1500, masking="backward"),
    Case(clip=0.0),
    Case(stage=0, owners_per_block=4),
    Case(optimizer="SGD"),
    Case(optimizer="Adagrad"),
    Case(optimizer="RMSprop", stage=1),
    Case(optimizer="Adam", stage=0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_run_equals_simulation(case: Case, pools: Callable[[int], Pool]) -> None:
    check_against_simulation(case, pools(case.world_size))

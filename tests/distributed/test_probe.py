"""How alike the owners' gradients are, against every owner's gradient of the simulation."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import Tensor

from sdp_llm.config import parse_config
from sdp_llm.loss import summed_loss, target_count
from sdp_llm.plan import Plan, schedule_from_config
from sdp_llm.sharding.probe import GradientProbe
from sdp_llm.simulation import Simulation
from sdp_llm.subnetwork.adapter import UnitLayout, empty_model, model_layout
from tests.distributed.pool import Pool
from tests.distributed.tiny import Case, batch, build, llama, my_slice, run_config, weights

Results = dict[str, tuple[float, float | None]]


def probed(case: Case) -> Results:
    """Run on a rank: one step, its last micro-batch probed."""
    engine = build(case)
    mine = my_slice(0)
    parts = mine.chunk(case.accumulation)
    for i, part in enumerate(parts):
        is_last = i + 1 == len(parts)
        probe = GradientProbe(engine.sharded)
        engine.probe_gradients(probe if is_last else None)
        loss = summed_loss(engine, part) / target_count(mine)
        engine.backward(loss, scale_wrt_gas=False)
        if not is_last:
            engine.step()
    found = probe.results()
    engine.step()
    return found


def own_gradients(case: Case, plan: Plan) -> list[dict[str, Tensor]]:
    """Each worker's gradient by parameter, of what it reduces last: 0 where it has none."""
    simulation = Simulation(
        llama(case.is_tied), plan, torch.optim.SGD, masking=case.masking, seed=7
    )
    parameters = dict(simulation.model.named_parameters())
    found = []
    for rank, samples in enumerate(batch(0, case.world_size).chunk(case.world_size)):
        parts = samples.chunk(case.accumulation)
        with simulation.worker(rank):
            # At stage 2 every micro-batch is reduced by itself.
            for part in parts[-1:] if case.stage == 2 else parts:
                (summed_loss(simulation.model, part) / target_count(samples)).backward()
        found.append(
            {
                name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for name, p in parameters.items()
            }
        )
        for parameter in parameters.values():
            parameter.grad = None
    return found


def expected_cosine(unit: UnitLayout, owned: list[dict[str, Tensor]]) -> float | None:
    """The mean over all pairs, each computed by torch."""
    flat = [torch.cat([g[s.name].flatten() for s in unit.parameters]).double() for g in owned]
    pairs = [torch.cosine_similarity(a, b, dim=0).item() for a, b in combinations(flat, 2)]
    return sum(pairs) / len(pairs) if pairs else None


CASES = [
    Case(),
    Case(masking="backward", stage=1, accumulation=3),
    Case(stage=2, accumulation=3, is_tied=True, under_way=3),
    Case(stage=0, owners_per_block=3, bucket=3000),
    Case(2, owners_per_block=1, overlap=False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_mean_cosine_is_that_of_all_pairs(case: Case, pools: Callable[[int], Pool]) -> None:
    schedule = schedule_from_config(parse_config(run_config(case)).sdp, case.world_size, 6, None)
    plan, _ = schedule.at(0)
    gradients = own_gradients(case, plan)
    layout = model_layout(empty_model(llama(case.is_tied)), case.bucket)
    results = pools(case.world_size).run(probed, case)
    assert all(result == results[0] for result in results)
    assert list(results[0]) == [unit.name for unit in layout.units]
    for unit in layout.units:
        owners = range(plan.world_size) if unit.block is None else plan.owner_sets[unit.block]
        _, cosine = results[0][unit.name]
        expected = expected_cosine(unit, [gradients[rank] for rank in owners])
        assert cosine == (None if expected is None else pytest.approx(expected, abs=2e-6))


def probed_and_not(case: Case) -> bool:
    """Run on a rank: whether two steps end in the same weights, one with a probe; and its norms."""
    ends = []
    for must_probe in (False, True):
        engine = build(case)
        for step in range(2):
            probe = GradientProbe(engine.sharded)
            engine.probe_gradients(probe if must_probe and step == 0 else None)
            loss = summed_loss(engine, my_slice(step)) / target_count(my_slice(step))
            engine.backward(loss, scale_wrt_gas=False)
            norms = [norm for norm, _ in probe.results().values()]
            engine.step()
            total = sum(norm**2 for norm in norms) ** 0.5
            assert total == pytest.approx(engine.get_global_grad_norm(), rel=1e-6)
        ends.append(weights(engine))
    return all((ends[0][name] == ends[1][name]).all() for name in ends[0])


def test_a_probe_changes_nothing_and_the_norms_are_those_of_the_step(
    pools: Callable[[int], Pool],
) -> None:
    assert all(pools(4).run(probed_and_not, Case()))

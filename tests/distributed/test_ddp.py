"""At coverage 1 the engine is torch's DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

from sdp_llm.engine import SDPEngine
from sdp_llm.initialization import initialize
from sdp_llm.loss import summed_loss, target_count
from tests.distributed.compare import distance, whole
from tests.distributed.pool import Pool
from tests.distributed.tiny import Case, forward_backward, llama, my_slice, run_config, weights

STEPS = 5


def _ddp_like(engine: SDPEngine, case: Case) -> tuple[Any, torch.optim.Optimizer]:
    """DDP from the engine's weights, with the same torch optimizer and groups."""
    model = LlamaForCausalLM(llama(case.is_tied))
    own = dict(model.named_parameters())
    with torch.no_grad():
        for unit in engine.sharded.units:
            for name, view in unit.views().items():
                own.pop(name).copy_(view)
    assert not own
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1]},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return DistributedDataParallel(model), torch.optim.AdamW(groups, **case.optimizer_params)


def train_both(case: Case) -> dict[str, Any]:
    """Run on a rank: ``(loss, norm)`` of every step, and the weights, of either."""
    engine, *_ = initialize(llama(case.is_tied), run_config(case))
    ddp, optimizer = _ddp_like(engine, case)
    found: dict[str, Any] = {"engine": [], "ddp": []}
    for step in range(STEPS):
        loss = forward_backward(engine, step)
        engine.step()
        found["engine"].append((loss, engine.get_global_grad_norm()))

        mine = my_slice(step)
        expected = summed_loss(ddp, mine) / target_count(mine)
        expected.backward()
        norm = torch.nn.utils.clip_grad_norm_(ddp.parameters(), case.clip)
        optimizer.step()
        optimizer.zero_grad()
        found["ddp"].append((expected.item(), norm.item()))
    found["engine weights"] = weights(engine)
    named = ddp.module.named_parameters()
    found["ddp weights"] = {name: p.detach().numpy().copy() for name, p in named}
    return found


CASES = [
    Case(n, "forward", stage, n, is_tied=is_tied)
    for n, is_tied in ((2, True), (4, False))
    for stage in (0, 1, 2)
]
CASES += [Case(4, "backward", 2, 4, accumulation=3), Case(2, "forward", 1, 2, clip=100.0)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_coverage_1_equals_ddp(case: Case, pools: Callable[[int], Pool]) -> None:
    results = pools(case.world_size).run(train_both, case)
    for found in results:
        np.testing.assert_allclose(found["engine"], found["ddp"], rtol=1e-6)
    norms = [norm for _, norm in results[0]["ddp"]]
    assert (min(norms) > case.clip) == (case.clip < 1), "what is meant to be clipped, is"
    engine_weights = whole([found["engine weights"] for found in results])
    ddp_weights = whole([found["ddp weights"] for found in results])
    assert engine_weights.keys() == ddp_weights.keys()
    assert distance(engine_weights, ddp_weights) < 1e-5

"""Documents that do not see each other: the whole model's loss where blocks travel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from sdp_llm.evaluation import Evaluation
from sdp_llm.loss import NextTokenLoss
from sdp_llm.plan import make_plan
from sdp_llm.simulation import Simulation
from tests.distributed.pool import Pool
from tests.distributed.tiny import Case, batch, build, llama, my_slice

EOS = 2
LOSSES = (NextTokenLoss(EOS), NextTokenLoss())


def evaluate(case: Case) -> list[Evaluation]:
    """Run on a rank: the loss with documents apart and across them, at once and in pieces."""
    engine = build(case)
    losses = [replace(loss, chunk=chunk) for chunk in (None, 5) for loss in LOSSES]
    return [engine.evaluate(my_slice(0, EOS), 2, loss) for loss in losses]


@pytest.mark.parametrize("masking", ["forward", "backward"])
def test_the_whole_models_loss_keeps_documents_apart(
    masking: str, pools: Callable[[int], Pool]
) -> None:
    plan = make_plan(4, 6, owners_per_block=2)
    make: Any = torch.optim.SGD
    tokens = batch(0, 4, EOS)
    apart, across = (
        Simulation(llama(), plan, make, seed=7, loss=loss).evaluate([tokens]) for loss in LOSSES
    )
    assert abs(apart - across) > 1e-4
    for results in pools(4).run(evaluate, Case(masking=masking)):
        assert [r.loss for r in results] == pytest.approx([apart, across] * 2, abs=1e-6)

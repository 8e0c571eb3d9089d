"""A run whose plan and masking change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.distributed.pool import Pool
from tests.distributed.test_oracle import check_against_simulation
from tests.distributed.tiny import Case

Pools = Callable[[int], Pool]


def scheduled(*phases: dict[str, Any], **sdp: Any) -> tuple[tuple[str, Any], ...]:
    """The extra of a case with a schedule; each phase is (steps of five until its end, keys)."""
    return (("sdp", {"owners_per_block": 2, **sdp, "schedule": [*phases]}),)


TO_FULL = scheduled({"until": 0.6, "rotate_every": 1}, {"until": 1, "coverage": 1})
BACKWARD = (
    {"until": 0.4},
    {"until": 0.8, "masking": "backward", "owners_per_block": 3},
    {"until": 1},
)
TO_BACKWARD = scheduled(*BACKWARD)
SCALE = "inverse_coverage"
SCALED = scheduled(*BACKWARD, residual_scale=SCALE)
SCHEDULES = {"full": TO_FULL, "backward": TO_BACKWARD, "scaled": SCALED}

CASES = [
    ("full", Case(stage=2, is_tied=True)),
    ("full", Case(stage=0, accumulation=3)),
    ("scaled", Case(stage=1, accumulation=3, residual_scale=SCALE)),
    ("backward", Case(stage=2, is_bf16=True, communication="fp32")),
]


@pytest.mark.parametrize(("name", "case"), CASES, ids=str)
def test_scheduled_run_equals_simulation(name: str, case: Case, pools: Pools) -> None:
    check_against_simulation(case.with_(extra=SCHEDULES[name]), pools(case.world_size))

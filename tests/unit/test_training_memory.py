"""Predicted and measured memory side by side; on ranks it is in tests/integration."""

from __future__ import annotations

from typing import Any

import pytest

from sdp_llm.plan.cost import MemoryCost
from sdp_llm.training.memory import PEAK, Compared, MemoryCheck, report

MIB = 2**20
PREDICTED = {"weights": 40 * MIB, "gradients": 20 * MIB, "optimizer": 40 * MIB}


class Fixed:
    """A prediction that is larger from step 3 on."""

    def memory(self, rank: int, step: int) -> MemoryCost:
        factor = 1 if step < 3 else 2
        return MemoryCost(**{n: factor * size for n, size in PREDICTED.items()}, **BUFFERS)


BUFFERS = {"transient": 5 * MIB, "activations": 25 * MIB}


def check(measured: dict[str, int], skipped: str = "..") -> tuple[list[str], list[dict[str, Any]]]:
    """What is said and logged in steps that are skipped (x) or not."""
    said: list[str] = []
    logged: list[dict[str, Any]] = []
    prediction: Any = Fixed()
    memory = MemoryCheck(prediction, 0, lambda: measured, said.append, logged.append)
    for step, mark in enumerate(skipped, 1):
        memory.after(step, mark == "x")
    return said, logged


def test_it_is_compared_once_after_the_second_step() -> None:
    said, logged = check(PREDICTED, "....")
    assert [line.split() for line in said if line.startswith(("weights", "model"))] == [
        ["weights", "40.0", "40.0", "1.000"],
        ["model", "state", "100", "100", "1.000"],
    ]
    assert said[0].startswith("memory after step 2, MiB")
    assert not any("warning" in line for line in said)
    assert logged == [
        {
            "step": 2,
            "memory/rank": 0,
            "memory/predicted": PREDICTED,
            "memory/measured": PREDICTED,
        }
    ]


def test_steps_that_were_skipped_made_no_moments() -> None:
    assert check(PREDICTED, "x.x") == ([], [])
    doubled = {name: 2 * size for name, size in PREDICTED.items()}
    said, logged = check(doubled, "x.x.")
    assert [entry["step"] for entry in logged] == [4]
    # After step 4 the plan of the fifth is there.
    assert not any("warning" in line for line in said)


@pytest.mark.parametrize(
    ("gradients", "is_off"), [(10, False), (30, False), (9, True), (31, True), (20, False)]
)
def test_more_than_a_tenth_is_a_warning(gradients: int, is_off: bool) -> None:
    said, _ = check({**PREDICTED, "gradients": gradients * MIB})
    warnings = [line for line in said if line.startswith("warning: ")]
    assert len(warnings) == is_off
    if gradients == 31:
        assert warnings == [
            "warning: model state of rank 0: 111 MiB instead of 100 MiB (+11%); "
            "sdp.memory_limit_gib goes by what is predicted"
        ]


def test_the_peak_is_compared_where_there_is_one() -> None:
    lines = report(
        Compared(3, {**PREDICTED, PEAK: 200 * MIB}, {**PREDICTED, PEAK: 150 * MIB}), step=2
    )
    assert ["peak", "of", "the", "allocator", "200", "150", "0.750"] in [x.split() for x in lines]
    assert "of rank 3, the furthest off" in lines
    [warning] = [line for line in lines if line.startswith("warning")]
    assert "peak of the allocator of rank 3: 150 MiB instead of 200 MiB (-25%)" in warning
    lines = report(Compared(3, dict(PREDICTED), dict(PREDICTED)), step=2)
    assert "activations and buffers cannot be measured on the CPU" in lines[-2]


def test_an_optimizer_without_state_divides_by_nothing() -> None:
    sizes: dict[str, float] = {**PREDICTED, "optimizer": 0}
    lines = report(Compared(0, sizes, sizes), step=2)
    assert ["optimizer", "0", "0", "-"] in [line.split() for line in lines]


def test_the_rank_that_is_furthest_off_counts() -> None:
    more = Compared(1, dict(PREDICTED), {**PREDICTED, "weights": 60 * MIB})
    less = Compared(2, {**PREDICTED, PEAK: MIB}, {**PREDICTED, PEAK: MIB / 2})
    assert more.difference == pytest.approx(0.2)
    assert less.difference == pytest.approx(0.5)

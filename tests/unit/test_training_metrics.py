"""The meter of one process; what it does over ranks is in tests/integration."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sdp_llm.training import metrics
from sdp_llm.training.metrics import Meter, memory


def test_the_mean_over_steps_and_workers() -> None:
    meter = Meter()
    meter.add(torch.tensor([1.0, 5.0]))
    meter.add(torch.tensor([3.0, 6.0]))
    result = meter.reduce()
    # Of two workers over two steps: means 2 and 5.5.
    assert (result.lowest_loss, result.loss, result.highest_loss) == (2.0, 3.75, 5.5)
    assert (result.lowest_rank, result.highest_rank, result.loss_std) == (0, 1, 1.75)
    assert result.steps == 2


def test_it_starts_anew() -> None:
    meter = Meter()
    for value in (1.0, 9.0):
        meter.add(torch.tensor([value]))
        result = meter.reduce()
        assert (result.loss, result.steps, result.seconds) == (value, 1, 0.0)


def test_only_the_time_in_steps_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock.now)
    meter = Meter()
    for seconds in (2.0, 3.0):
        clock.now += 50.0  # a validation, or writing the log
        meter.start()
        clock.now += seconds
        meter.pause()
        meter.add(torch.tensor([1.0]))
    assert meter.reduce().seconds == 5.0


def test_sums_do_not_lose_small_losses_of_long_stretches() -> None:
    meter = Meter()
    for _ in range(5000):
        meter.add(torch.tensor([2.1]))
    assert meter.reduce().loss == pytest.approx(torch.tensor(2.1).item(), rel=1e-12)


def test_memory_is_this_process_in_bytes() -> None:
    now, peak = memory()
    assert 50 * 2**20 < now <= peak < 2**38
    held = torch.ones(64 * 2**20)  # 256 MiB, touched
    assert memory()[0] - now > 200 * 2**20
    del held
    assert memory()[1] >= now + 200 * 2**20

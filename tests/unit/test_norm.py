"""The gradient norm of shards of real size."""

from __future__ import annotations

import math

import pytest
import torch

from sdp_llm.sharding.norm import global_norm, squared_norm


def test_the_norm_of_a_large_shard_is_exact() -> None:
    # In fp32 torch's CPU kernel would lose 1.5 % of it.
    size = 25_000_000
    shard = torch.full((size,), 0.1)
    exact = size * float(shard[0]) ** 2
    assert squared_norm(shard).item() == pytest.approx(exact, rel=1e-9)
    norm, counts = global_norm([shard[: size // 3], shard[size // 3 :]], None, flags=(True, False))
    assert norm == pytest.approx(math.sqrt(exact), rel=1e-9)
    assert counts == [1, 0]


def test_large_gradients_have_a_norm() -> None:
    norm, _ = global_norm([torch.full((4,), 1e30)], None)
    assert norm == pytest.approx(2e30)
    assert math.isnan(global_norm([torch.ones(4)], None, doubt=torch.tensor(math.nan))[0])

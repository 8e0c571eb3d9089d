"""The checksum of weights, and whose weights it finds to differ."""

from __future__ import annotations

import pytest
import torch

from sdp_llm.sharding import replicas
from sdp_llm.sharding.replicas import _disagreements, checksum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("position", [0, 1, 40, 99])
def test_every_bit_counts(dtype: torch.dtype, position: int) -> None:
    values = torch.randn(100, generator=torch.Generator().manual_seed(3)).to(dtype)
    before = checksum(values)
    words = values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
    for bit in range(8 * values.element_size()):
        mask = torch.tensor(1, dtype=torch.int64).bitwise_left_shift(bit).to(words.dtype)
        words[position] ^= mask
        assert checksum(values) != before, bit
        words[position] ^= mask
    assert checksum(values) == before


def test_the_order_counts() -> None:
    values = torch.arange(10.0)
    assert checksum(values) != checksum(values.flip(0))
    assert checksum(values) != checksum(values[:9])
    assert checksum(torch.zeros(3)) != checksum(-torch.zeros(3)), "minus zero has other bits"


def test_values_that_are_no_numbers_are_bits_too() -> None:
    values = torch.tensor([float("nan"), float("inf"), 1.0])
    assert checksum(values) == checksum(values.clone())


def test_it_is_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(1000)
    whole = checksum(values)
    monkeypatch.setattr(replicas, "_CHUNK", 7)
    assert checksum(values) == whole


def test_only_those_that_hold_a_unit_are_compared() -> None:
    holders = {"embedding": range(4), "block 0": (0, 2), "block 1": (1, 2, 3), "head": range(4)}
    checksums = [[5, 7, 0, 1], [5, 0, 8, 1], [5, 7, 9, 2], [5, 0, 8, 3]]
    assert _disagreements(holders, checksums) == {
        "block 1": [[1, 3], [2]],
        "head": [[0, 1], [2], [3]],
    }

"""Scratch memory goes round, and nothing is kept that does not fit."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from sdp_llm.sharding.buffers import Buffers

LIKE = torch.empty(0)


def test_what_fits_is_handed_out_again() -> None:
    buffers = Buffers()
    first, second = (buffers.take(8, LIKE, torch.float32) for _ in range(2))
    assert first is not second
    buffers.give(first)
    assert buffers.take(8, LIKE, torch.float32) is first


@pytest.mark.parametrize(("numel", "dtype"), [(9, torch.float32), (8, torch.bfloat16)])
def test_another_size_or_type_frees_what_was_given_back_before_it_allocates(
    numel: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers = Buffers()
    given = [buffers.take(8, LIKE, torch.float32) for _ in range(2)]
    alive = [weakref.ref(tensor) for tensor in given]
    while given:
        buffers.give(given.pop())
    seen = []
    empty = torch.empty

    def spy(*arguments: Any, **options: Any) -> torch.Tensor:
        seen.append([ref() is not None for ref in alive])
        return empty(*arguments, **options)

    monkeypatch.setattr(torch, "empty", spy)
    fresh = buffers.take(numel, LIKE, dtype)
    assert (fresh.numel(), fresh.dtype) == (numel, dtype)
    assert seen == [[False, False]]


def test_clear_frees_everything() -> None:
    buffers = Buffers()
    alive = weakref.ref(buffers.take(8, LIKE, torch.float32))
    assert alive() is None
    tensor = buffers.take(8, LIKE, torch.float32)
    alive = weakref.ref(tensor)
    buffers.give(tensor)
    del tensor
    assert alive() is not None
    buffers.clear()
    assert alive() is None

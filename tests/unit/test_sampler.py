"""The order of samples: a bijection per epoch, a pure function of seed and position."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sdp_llm.data.indexed import IndexedDataset, IndexedDatasetWriter
from sdp_llm.data.sampler import (
    PackedDataset,
    batch_for_rank,
    permute,
    rank_slice,
    samples_at,
    validation_samples,
)
from sdp_llm.errors import ConfigError


def packed(folder: Path, num_tokens: int, sequence_length: int) -> PackedDataset:
    """A corpus whose token at position i is i, cut into documents of 7."""
    with IndexedDatasetWriter(folder / "c", "uint16") as writer:
        for start in range(0, num_tokens, 7):
            writer.add_document(list(range(start, min(start + 7, num_tokens))))
    return PackedDataset(IndexedDataset(folder / "c"), sequence_length)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 15, 16, 17, 1000, 4097, 100_003])
def test_an_epoch_is_a_bijection(count: int) -> None:
    order = permute(np.arange(count), count, seed=3, epoch=0)
    assert np.array_equal(np.sort(order), np.arange(count))


def test_the_order_depends_on_seed_and_epoch_and_is_mixed() -> None:
    count = 5000
    identity = np.arange(count)
    orders = [permute(identity, count, s, e) for s, e in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    for i, order in enumerate(orders):
        assert np.mean(order == identity) < 0.01
        for other in orders[:i]:
            assert np.mean(order == other) < 0.01
        # Neighbours are unrelated: a random order has a mean distance of count / 3.
        assert np.abs(np.diff(order)).mean() == pytest.approx(count / 3, rel=0.05)
        assert abs(np.corrcoef(identity, order)[0, 1]) < 0.06


def test_the_order_is_frozen() -> None:
    # A run must resume in the same order with a later version of this code.
    frozen = [679, 344, 296, 944, 155, 305, 938, 427]
    assert samples_at(1234, 0, 8, 1000).tolist() == frozen


def test_huge_corpora_cost_nothing() -> None:
    count = 10**12
    order = samples_at(0, 7 * count - 5, 10, count)
    assert order.min() >= 0
    assert order.max() < count
    assert len(set(order.tolist())) == 10


@pytest.mark.parametrize("batch", [1, 3, 15, 25])
def test_any_cut_of_the_run_gives_the_same_samples(batch: int) -> None:
    whole = samples_at(5, 0, 75, 10)  # 7.5 epochs
    parts = [samples_at(5, step * batch, batch, 10) for step in range(75 // batch)]
    assert np.array_equal(np.concatenate(parts), whole)
    for epoch in range(7):
        assert sorted(whole[epoch * 10 : epoch * 10 + 10]) == list(range(10))


def test_samples_are_consecutive_and_overlap_by_one(tmp_path: Path) -> None:
    data = packed(tmp_path, 33, 8)
    assert len(data) == 4
    assert [data[k].tolist() for k in range(4)] == [list(range(8 * k, 8 * k + 9)) for k in range(4)]
    with pytest.raises(IndexError):
        data[4]
    assert len(packed_again(tmp_path, 9)) == 3  # 4 * 9 + 1 tokens would be needed for 4


def packed_again(folder: Path, sequence_length: int) -> PackedDataset:
    return PackedDataset(IndexedDataset(folder / "c"), sequence_length)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_batch_in_order_at_any_world_size(tmp_path: Path, world_size: int) -> None:
    data = packed(tmp_path, 8 * 30 + 1, 8)
    for consumed in (0, 8, 24, 28):  # the last two cross into the second epoch
        expected = data.batch(samples_at(9, consumed, 8, 30))
        parts = [batch_for_rank(data, 9, consumed, 8, r, world_size) for r in range(world_size)]
        assert all(p.shape == (8 // world_size, 9) and p.dtype == np.int64 for p in parts)
        assert np.array_equal(np.concatenate(parts), expected)


def test_rank_slice_is_contiguous() -> None:
    assert [rank_slice(12, r, 3) for r in range(3)] == [slice(0, 4), slice(4, 8), slice(8, 12)]


@pytest.mark.parametrize(("batch", "rank", "world"), [(10, 0, 4), (0, 0, 1), (4, 2, 2), (4, -1, 2)])
def test_rank_slice_refuses(batch: int, rank: int, world: int) -> None:
    with pytest.raises(ConfigError, match="must be"):
        rank_slice(batch, rank, world)


def test_a_corpus_that_is_too_small_is_refused(tmp_path: Path) -> None:
    data = packed(tmp_path, 33, 8)
    with pytest.raises(ConfigError, match="4 samples of 8 tokens are less than one global batch"):
        batch_for_rank(data, 0, 0, 5, 0, 1)
    with pytest.raises(ConfigError, match="33 tokens are less than one sample of 33"):
        packed_again(tmp_path, 33)
    with pytest.raises(ConfigError, match="sequence length 0"):
        packed_again(tmp_path, 0)
    assert len(packed_again(tmp_path, 32)) == 1


@pytest.mark.parametrize(("first", "count", "samples"), [(-1, 1, 5), (0, -1, 5), (0, 1, 0)])
def test_samples_at_refuses(first: int, count: int, samples: int) -> None:
    with pytest.raises(ValueError, match="num_samples"):
        samples_at(0, first, count, samples)


def test_validation_samples_are_spread_evenly(tmp_path: Path) -> None:
    data = packed(tmp_path, 8 * 10 + 1, 8)
    assert validation_samples(data, 4).tolist() == [0, 2, 5, 7]
    assert validation_samples(data, 100).tolist() == list(range(10))
    with pytest.raises(ConfigError, match="at least 1"):
        validation_samples(data, 0)

"""Blends of corpora: proportions, epochs, and one order at any cut and any world size."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from sdp_llm.data import (
    BlendedDataset,
    IndexedDataset,
    IndexedDatasetWriter,
    PackedDataset,
    batch_for_rank,
)
from sdp_llm.data.blend import BLOCK, interleave, samples_per_block
from sdp_llm.errors import ConfigError
from sdp_llm.training.summary import data_lines

LENGTH = 2


def corpus(folder: Path, number: int, samples: int, length: int = LENGTH) -> PackedDataset:
    """A corpus of which each token says its corpus and its sample: 1000 number + sample."""
    with IndexedDatasetWriter(folder / f"c{number}", "int32") as writer:
        ids = 1000 * number + np.arange(samples * length + 1) // length
        writer.add_document(ids)
    return PackedDataset(IndexedDataset(folder / f"c{number}"), length)


def blend(folder: Path, sizes: list[int], weights: list[float]) -> BlendedDataset:
    corpora = [corpus(folder, i, size) for i, size in enumerate(sizes)]
    return BlendedDataset(corpora, weights)


def sources(batch: np.ndarray) -> np.ndarray:
    """Which corpus each sample is from."""
    return batch[:, 0] // 1000


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ([1], [1000]),
        ([3, 1], [750, 250]),
        ([0.7, 0.2, 0.1], [700, 200, 100]),
        ([1, 1, 1], [334, 333, 333]),
        ([2, 1], [667, 333]),
        ([1, 1e-9], [999, 1]),
        ([1e-9, 1e300, 1e-9, 1e300], [1, 499, 1, 499]),
        # 2.5 is rounded up although it is not above one half: the sum decides.
        ([2.5, 997.5], [3, 997]),
    ],
)
def test_weights_become_samples_of_a_block(weights: list[float], counts: list[int]) -> None:
    assert samples_per_block(weights) == counts


def test_no_weight_is_further_off_than_one_sample() -> None:
    weights = np.random.default_rng(0).uniform(0.1, 1, 40).tolist()
    counts = samples_per_block(weights)
    assert sum(counts) == BLOCK
    for weight, count in zip(weights, counts, strict=True):
        assert abs(BLOCK * Fraction(weight) / sum(map(Fraction, weights)) - count) < 1


def test_a_block_has_a_place_for_every_corpus() -> None:
    assert samples_per_block([1] * BLOCK) == [1] * BLOCK
    with pytest.raises(ConfigError, match="1001 corpora: at most 1000"):
        samples_per_block([1] * (BLOCK + 1))


def test_corpora_alternate_evenly() -> None:
    assert interleave([2, 1, 1]).tolist() == [0, 1, 2, 0]
    counts = samples_per_block([5, 3, 1.5, 0.5])
    pattern = interleave(counts)
    for i, count in enumerate(counts):
        read = np.cumsum(pattern == i)
        assert read[-1] == count
        # At any place a corpus is less than two samples away from its proportion.
        assert np.abs(read - count / BLOCK * np.arange(1, BLOCK + 1)).max() < 2


def test_every_sample_of_a_corpus_comes_once_in_its_epoch(tmp_path: Path) -> None:
    sizes = [70, 130, 11]
    data = blend(tmp_path, sizes, [2, 5, 1])
    batch = data.read(4, 0, 2 * BLOCK + 77)
    for i, size in enumerate(sizes):
        ids = batch[sources(batch) == i, 0] - 1000 * i
        assert len(ids) > 2 * size, "the test reads several epochs"
        epochs = ids[: len(ids) // size * size].reshape(-1, size)
        np.testing.assert_array_equal(np.sort(epochs), np.arange(size)[None].repeat(len(epochs), 0))
        assert not np.array_equal(epochs[0], epochs[1])


@pytest.mark.parametrize("size", [1, 7, 60])
def test_any_cut_of_the_run_gives_the_same_samples(tmp_path: Path, size: int) -> None:
    data = blend(tmp_path, [70, 130, 500], [2, 5, 1])
    first = BLOCK - 100  # across the end of a block
    whole = data.read(9, 0, first + 420)[first:]
    parts = [data.read(9, first + start, size) for start in range(0, 420, size)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert data.read(9, first, 0).shape == (0, LENGTH + 1)


def test_far_into_a_run_costs_nothing_and_follows_the_proportions(tmp_path: Path) -> None:
    data = blend(tmp_path, [70, 130], [1, 3])
    batch = data.read(9, 10**15 + 3, BLOCK)
    assert np.bincount(sources(batch)).tolist() == [250, 750]
    assert data.positions(10**15).tolist() == [10**15 // 4, 3 * 10**15 // 4]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_batch_in_order_at_any_world_size(tmp_path: Path, world_size: int) -> None:
    data = blend(tmp_path, [70, 130], [1, 3])
    for consumed in (0, 992, 996, 1004):
        parts = [batch_for_rank(data, 9, consumed, 8, r, world_size) for r in range(world_size)]
        np.testing.assert_array_equal(np.concatenate(parts), data.read(9, consumed, 8))


def test_corpora_of_one_size_have_orders_of_their_own(tmp_path: Path) -> None:
    data = blend(tmp_path, [50, 50], [1, 1])
    batch = data.read(9, 0, 100)
    orders = [batch[sources(batch) == i, 0] - 1000 * i for i in range(2)]
    assert np.mean(orders[0] == orders[1]) < 0.2


def test_a_blend_of_one_is_that_corpus_alone(tmp_path: Path) -> None:
    alone = corpus(tmp_path, 0, 50)
    np.testing.assert_array_equal(
        BlendedDataset([alone], [7]).read(9, 40, 90), alone.read(9, 40, 90)
    )


def test_the_order_is_frozen(tmp_path: Path) -> None:
    # A run must resume in the same order with a later version of this code.
    batch = blend(tmp_path, [70, 130, 11], [2, 5, 1]).read(1234, 997, 8)
    assert batch[:, 0].tolist() == [1123, 0, 1026, 1078, 54, 1082, 1106, 2010]


def test_a_batch_must_not_read_a_sample_twice(tmp_path: Path) -> None:
    data = blend(tmp_path, [1000, 10], [99, 1])  # 10 of 1000 samples, 100 apart
    for fits in (1, 100, 901, 1000):
        data.require_batch(fits)
    with pytest.raises(ConfigError) as caught:
        data.require_batch(1010)
    message = str(caught.value)
    assert f"{tmp_path / 'c1'}: 10 samples of 2 tokens are less than its part of" in message
    assert "one global batch, 11 of 1010; use a larger corpus, a smaller weight" in message
    with pytest.raises(ConfigError, match="10 samples"):
        batch_for_rank(data, 0, 0, 1010, 0, 1)


@pytest.mark.parametrize("size", [1, 7, 64, 999, 1000, 1234])
def test_what_a_batch_needs_is_the_worst_of_all_places(tmp_path: Path, size: int) -> None:
    data = blend(tmp_path, [900, 900, 900], [5, 3, 2])
    needed = max((data.positions(g + size) - data.positions(g))[0] for g in range(BLOCK))
    BlendedDataset([corpus(tmp_path, 3, needed), *data.corpora[1:]], [5, 3, 2]).require_batch(size)
    if needed > 1:
        less = BlendedDataset([corpus(tmp_path, 4, needed - 1), *data.corpora[1:]], [5, 3, 2])
        with pytest.raises(ConfigError, match=f"{needed} of {size}"):
            less.require_batch(size)


def test_negative_ranges_and_mixed_lengths_are_refused(tmp_path: Path) -> None:
    data = blend(tmp_path, [70, 130], [1, 3])
    for first, count in [(-1, 2), (0, -1)]:
        with pytest.raises(ValueError, match="must not be negative"):
            data.read(0, first, count)
    with pytest.raises(ValueError, match="one sequence length"):
        BlendedDataset([corpus(tmp_path, 5, 9), corpus(tmp_path, 6, 9, length=3)], [1, 1])


def test_the_card_shows_each_corpus(tmp_path: Path) -> None:
    data = blend(tmp_path, [70, 130], [1, 3])
    assert data_lines(data, 2 * BLOCK) == [
        f"data        {tmp_path / 'c0'}: share 25.0%, 70 samples of 2 tokens; "
        "this run reads 500 (7.14 epochs)",
        f"            {tmp_path / 'c1'}: share 75.0%, 130 samples of 2 tokens; "
        "this run reads 1,500 (11.54 epochs)",
    ]
    assert data_lines(data.corpora[0], 35) == [
        "data        70 samples of 2 tokens; this run reads 35 (0.50 epochs)"
    ]

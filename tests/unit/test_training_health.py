"""What counts as a spike, and where a sample lies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sdp_llm.data import BlendedDataset, IndexedDataset, IndexedDatasetWriter, PackedDataset
from sdp_llm.training.health import FEWEST, is_spike


def test_a_spike_is_measured_by_the_median() -> None:
    before = [2.0] * FEWEST
    assert is_spike(3.1, before, 1.5)
    assert not is_spike(3.0, before, 1.5)
    assert not is_spike(99.0, before[1:], 1.5), "too few to have a median"
    noisy = [2.0] * FEWEST + [50.0] * (FEWEST - 1)
    assert is_spike(3.1, noisy, 1.5), "spikes before do not hide it"
    assert not is_spike(float("nan"), before, 1.5)


def corpus(prefix: Path, lengths: list[int], first_id: int = 0) -> PackedDataset:
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        position = first_id
        for length in lengths:
            writer.add_document(np.arange(position, position + length))
            position += length
    return PackedDataset(IndexedDataset(prefix), 4)


LENGTHS = [3, 0, 0, 7, 1, 12, 0, 9, 30]


def test_the_document_of_every_token(tmp_path: Path) -> None:
    dataset = corpus(tmp_path / "c", LENGTHS).dataset
    expected = np.repeat(np.arange(len(LENGTHS)), LENGTHS).tolist()
    assert [dataset.document_of(i) for i in range(dataset.num_tokens)] == expected
    for outside in (-1, dataset.num_tokens):
        with pytest.raises(IndexError):
            dataset.document_of(outside)


@pytest.mark.parametrize("first", [0, 5, 990])
def test_what_is_located_is_what_is_read(first: int, tmp_path: Path) -> None:
    a, b = corpus(tmp_path / "a", LENGTHS), corpus(tmp_path / "b", [20] * 9, first_id=1000)
    for data in (a, BlendedDataset([a, b], [2, 1])):
        for row, place in zip(data.read(7, first, 20), data.locate(7, first, 20), strict=True):
            source = a if place.prefix == a.dataset.prefix else b
            np.testing.assert_array_equal(row, source[place.sample])
            documents = range(place.first_document, place.last_document + 1)
            tokens = np.concatenate([source.dataset.document(d) for d in documents])
            assert row[0] in source.dataset.document(place.first_document)
            assert row[-1] in source.dataset.document(place.last_document)
            assert set(row.tolist()) <= set(tokens.tolist())


def test_a_place_reads_well(tmp_path: Path) -> None:
    data = corpus(tmp_path / "c", [3, 30])
    [first] = [str(p) for p in data.locate(0, 0, 8) if p.sample == 0]
    [other] = [str(p) for p in data.locate(0, 0, 8) if p.sample == 3]
    assert first == f"sample 0 of {tmp_path / 'c'} (documents 0 to 1)"
    assert other == f"sample 3 of {tmp_path / 'c'} (document 1)"

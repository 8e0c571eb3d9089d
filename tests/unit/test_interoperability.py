"""Corpora from Megatron are read here, and those written here are read there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sdp_llm.data import IndexedDataset, IndexedDatasetWriter, PackedDataset
from sdp_llm.errors import ConfigError
from tests import megatron_format
from tests.megatron_format import CODES, Contents

# Documents of one and of several sequences, empty ones of both, and one without any sequence.
DOCUMENTS = [[[5, 6, 7]], [[1], [], [2, 3, 4], [9]], [[]], [], [[8, 7], [6]], [[100]]]


def flat(documents: list[list[list[int]]]) -> list[list[int]]:
    """The ids of each document."""
    return [[i for ids in document for i in ids] for document in documents]


@pytest.mark.parametrize("modes", [False, True])
@pytest.mark.parametrize("dtype", CODES)
def test_what_megatron_writes_is_read_here(tmp_path: Path, dtype: str, modes: bool) -> None:
    count = sum(len(document) for document in DOCUMENTS)
    given = Contents(DOCUMENTS, dtype, [i % 2 for i in range(count)] if modes else None)
    megatron_format.write(tmp_path / "corpus", given)
    assert megatron_format.read(tmp_path / "corpus", modes) == given, "the format's own round trip"
    data = IndexedDataset(tmp_path / "corpus")
    assert data.dtype == np.dtype(dtype)
    assert data.num_documents == len(DOCUMENTS)
    expected = flat(DOCUMENTS)
    assert [data.document(i).tolist() for i in range(len(DOCUMENTS))] == expected
    stream = [i for ids in expected for i in ids]
    assert data.tokens(0, data.num_tokens).tolist() == stream
    samples = PackedDataset(data, 4)
    assert [samples[k].tolist() for k in range(len(samples))] == [stream[:5], stream[4:9]]


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_what_is_written_here_is_read_by_megatron(tmp_path: Path, dtype: str) -> None:
    largest = 65499 if dtype == "uint16" else 2**31 - 1
    documents = [[3, 1, 2], [], [largest], list(range(500))]
    with IndexedDatasetWriter(tmp_path / "ours", dtype) as writer:
        for ids in documents:
            writer.add_document(ids)
    found = megatron_format.read(tmp_path / "ours")
    assert found == Contents([[ids] for ids in documents], dtype, None)
    megatron_format.write(tmp_path / "theirs", found)
    for suffix in (".bin", ".idx"):
        ours, theirs = ((tmp_path / f"{name}{suffix}").read_bytes() for name in ("ours", "theirs"))
        assert ours == theirs


def test_a_corpus_goes_through_both_and_stays_the_same(tmp_path: Path) -> None:
    given = Contents(DOCUMENTS, "int32", None)
    megatron_format.write(tmp_path / "first", given)
    data = IndexedDataset(tmp_path / "first")
    with IndexedDatasetWriter(tmp_path / "second", data.dtype) as writer:
        for i in range(data.num_documents):
            writer.add_document(data.document(i))
    assert flat(megatron_format.read(tmp_path / "second").documents) == flat(DOCUMENTS)


@pytest.mark.parametrize("extra", [1, 3])
def test_modes_are_for_every_sequence_or_for_none(tmp_path: Path, extra: int) -> None:
    megatron_format.write(tmp_path / "corpus", Contents([[[1], [2]]], "int32", None))
    with (tmp_path / "corpus.idx").open("ab") as stream:
        stream.write(bytes(extra))
    with pytest.raises(ConfigError, match="bytes where its header describes"):
        IndexedDataset(tmp_path / "corpus")

"""The Megatron indexed format: bytes against a hand-packed layout, and every refusal."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from sdp_llm.data import indexed
from sdp_llm.data.indexed import IndexedDataset, IndexedDatasetWriter, best_dtype
from sdp_llm.errors import ConfigError

DOCUMENTS = [[5, 6, 7], [], [65000], [1, 2]]


def write(prefix: Path, documents: list[list[int]], dtype: str = "uint16") -> None:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for ids in documents:
            writer.add_document(ids)


def hand_packed_index(code: int, lengths: list[int], pointers: list[int], docs: list[int]) -> bytes:
    """The layout from its description alone; shares nothing with the writer."""
    return (
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", 1)
        + struct.pack("<B", code)
        + struct.pack("<Q", len(lengths))
        + struct.pack("<Q", len(docs))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(pointers)}q", *pointers)
        + struct.pack(f"<{len(docs)}q", *docs)
    )


@pytest.mark.parametrize(("dtype", "code", "width"), [("uint16", 8, 2), ("int32", 4, 4)])
def test_bytes_are_megatrons(tmp_path: Path, dtype: str, code: int, width: int) -> None:
    write(tmp_path / "c", DOCUMENTS, dtype)
    pointers = [0, 3 * width, 3 * width, 4 * width]
    assert (tmp_path / "c.idx").read_bytes() == hand_packed_index(
        code, [3, 0, 1, 2], pointers, [0, 1, 2, 3, 4]
    )
    letter = "H" if width == 2 else "i"
    assert (tmp_path / "c.bin").read_bytes() == struct.pack(f"<6{letter}", 5, 6, 7, 65000, 1, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.bin", "c.idx"]


def test_reads_what_others_wrote(tmp_path: Path) -> None:
    # Two documents, the first of two sequences, in a type the writer of this project never picks.
    index = hand_packed_index(5, [2, 1, 2], [0, 16, 24], [0, 2, 3])
    (tmp_path / "c.idx").write_bytes(index)
    (tmp_path / "c.bin").write_bytes(struct.pack("<5q", 10, 11, 12, 13, 14))
    data = IndexedDataset(tmp_path / "c")
    assert (data.num_documents, data.num_tokens, data.dtype) == (2, 5, np.dtype("int64"))
    assert data.document(0).tolist() == [10, 11, 12]
    assert data.document(1).tolist() == [13, 14]
    assert data.tokens(1, 4).tolist() == [11, 12, 13]


def test_round_trip(tmp_path: Path) -> None:
    write(tmp_path / "corpus-v1.5", DOCUMENTS)
    data = IndexedDataset(tmp_path / "corpus-v1.5")
    assert [data.document(i).tolist() for i in range(data.num_documents)] == DOCUMENTS
    assert data.tokens(0, data.num_tokens).tolist() == [5, 6, 7, 65000, 1, 2]
    assert data.tokens(0, 1).dtype == np.int64
    for start, stop in [(-1, 2), (0, 7), (3, 2)]:
        with pytest.raises(IndexError):
            data.tokens(start, stop)
    for index in (-1, 4):
        with pytest.raises(IndexError):
            data.document(index)


def test_an_index_is_written_and_checked_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "whole", DOCUMENTS)
    for rows in (1, 2, 3):
        monkeypatch.setattr(indexed, "_ROWS", rows)
        write(tmp_path / f"{rows}", DOCUMENTS)
        assert (tmp_path / f"{rows}.idx").read_bytes() == (tmp_path / "whole.idx").read_bytes()
        assert IndexedDataset(tmp_path / f"{rows}").num_tokens == 6
        torn = hand_packed_index(8, [2, 2, 2], [0, 4, 8], [0, 2, 1, 3])
        (tmp_path / "torn.idx").write_bytes(torn)
        (tmp_path / "torn.bin").write_bytes(bytes(12))
        with pytest.raises(ConfigError, match="do not cover its sequences in order"):
            IndexedDataset(tmp_path / "torn")


def test_an_empty_corpus_is_valid(tmp_path: Path) -> None:
    write(tmp_path / "c", [])
    data = IndexedDataset(tmp_path / "c")
    assert (data.num_documents, data.num_tokens) == (0, 0)
    assert data.tokens(0, 0).shape == (0,)


def test_best_dtype_has_megatrons_limit() -> None:
    assert best_dtype(65499) == np.uint16
    assert best_dtype(65500) == np.int32


def test_nothing_appears_before_close_or_after_an_exception(tmp_path: Path) -> None:
    writer = IndexedDatasetWriter(tmp_path / "c", "uint16")
    writer.add_document([1])
    assert not (tmp_path / "c.bin").exists()
    assert not (tmp_path / "c.idx").exists()
    writer.abort()
    with pytest.raises(ValueError, match="do not fit"):
        write(tmp_path / "c", [[1], [70000]])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ids", [[65536], [-1], [1.5], [[1, 2]]])
def test_ids_that_do_not_fit_are_refused(tmp_path: Path, ids: list[int]) -> None:
    writer = IndexedDatasetWriter(tmp_path / "c", "uint16")
    with pytest.raises(ValueError, match="ids"):
        writer.add_document(ids)
    writer.abort()


def test_the_writer_refuses_float_and_existing_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="float32"):
        IndexedDatasetWriter(tmp_path / "c", "float32")
    write(tmp_path / "c", DOCUMENTS)
    with pytest.raises(ConfigError, match="exists"):
        IndexedDatasetWriter(tmp_path / "c", "uint16")


def corrupt_magic(data: bytearray) -> None:
    data[0] = 0


def corrupt_version(data: bytearray) -> None:
    data[9] = 2


def corrupt_dtype(data: bytearray) -> None:
    data[17] = 6


def corrupt_count(data: bytearray) -> None:
    data[18] += 1


def corrupt_length(data: bytearray) -> None:
    data[34] += 1


def corrupt_documents(data: bytearray) -> None:
    data[-8] = 9


def truncate(data: bytearray) -> None:
    del data[-1]


def truncate_header(data: bytearray) -> None:
    del data[20:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (corrupt_magic, "MMIDIDX"),
        (corrupt_version, "version 2"),
        (corrupt_dtype, "dtype code 6"),
        (corrupt_count, "bytes where"),
        (corrupt_length, "back to back"),
        (corrupt_documents, "documents do not cover"),
        (truncate, "bytes where"),
        (truncate_header, "not a Megatron index"),
    ],
)
def test_a_corrupt_index_is_refused(tmp_path: Path, damage: object, message: str) -> None:
    write(tmp_path / "c", DOCUMENTS)
    data = bytearray((tmp_path / "c.idx").read_bytes())
    assert callable(damage)
    damage(data)
    (tmp_path / "c.idx").write_bytes(data)
    with pytest.raises(ConfigError, match=message) as caught:
        IndexedDataset(tmp_path / "c")
    check_error(caught.value, tmp_path / "c.idx")


@pytest.mark.parametrize("change", [-1, 1])
def test_a_bin_of_another_size_is_refused(tmp_path: Path, change: int) -> None:
    write(tmp_path / "c", DOCUMENTS)
    data = (tmp_path / "c.bin").read_bytes()
    (tmp_path / "c.bin").write_bytes(data[:change] if change < 0 else data + b"x")
    with pytest.raises(ConfigError, match="truncated") as caught:
        IndexedDataset(tmp_path / "c")
    check_error(caught.value, tmp_path / "c.bin")


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_missing_file_is_named(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "c", DOCUMENTS)
    (tmp_path / f"c.{suffix}").unlink()
    with pytest.raises(ConfigError, match="no such file") as caught:
        IndexedDataset(tmp_path / "c")
    check_error(caught.value, tmp_path / f"c.{suffix}")


def check_error(error: ConfigError, path: Path) -> None:
    assert str(path) in str(error)
    assert "python data_prep/tokenize_fineweb.py" in str(error)
    assert "\n" not in str(error)

"""The records of JSON lines and text files: what is kept of rows and files that are not whole."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pytest

from data_prep import _reading
from data_prep._reading import Document, UnreadableFile, Unusable, decode_record, read_records
from data_prep._source import find_source


def read(path: Path, column: str = "text") -> tuple[list[Document], str | None]:
    """The documents of a file, and why it could not be read to its end."""
    source = find_source(str(path), None)
    [file] = source.files
    documents: list[Document] = []
    try:
        for record in read_records(source, file, column, 1000):
            documents.append(decode_record(record, file, column))
    except UnreadableFile as error:
        return documents, str(error)
    return documents, None


def rows(*values: object) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def test_a_row_without_the_column_is_left_out_wherever_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(rows({"id": 1}, [], {"text": "one"}, {"id": 2}, {"text": None}))
    missing = Unusable.NO_COLUMN
    expected = [missing, Unusable.MALFORMED, "one", missing, Unusable.EMPTY]
    assert read(path) == (expected, None)


@pytest.mark.parametrize(
    ("written", "named"),
    [
        (rows({"id": 1, "body": "x"}, {"url": 3, "id": 4}), "id, body, url;"),
        (rows({f"k{i}": i for i in range(60)}, {"z": 0}), "k18, k19, ...;"),
    ],
)
def test_a_file_of_other_columns_is_an_error_that_names_them(
    tmp_path: Path, written: str, named: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(written)
    documents, failure = read(path)
    assert documents == [Unusable.NO_COLUMN] * 2
    assert failure is not None
    assert failure.startswith("no column 'text', it has ")
    assert named in failure


def test_a_wrong_column_is_known_after_the_first_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not after the hours that it may take to read the whole file."""
    monkeypatch.setattr(_reading, "_FIRST_OBJECTS", 3)
    path = tmp_path / "a.jsonl"
    path.write_text(rows(*[{"body": 1}] * 3, {"text": "one"}))
    documents, failure = read(path)
    assert documents == [Unusable.NO_COLUMN] * 2
    assert failure == "no column 'text', it has body; set --text_column"
    path.write_text(rows(*[{"body": 1}] * 2, [], {"text": "one"}, *[{"body": 1}] * 3))
    documents, failure = read(path)
    assert (len(documents), failure) == (7, None)


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_is_not_json_lines(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "a.json"
    for count in (2, 100):  # the latter is longer than a record may be
        path.write_text(json.dumps([{"text": "x" * 20}] * count, indent=indent))
        documents, failure = read(path)
        assert documents == []
        assert failure is not None
        assert "one JSON array, not JSON lines" in failure
        assert "`jq -c '.[]' " in failure


def packed(path: Path, data: bytes) -> int:
    """Write ``data`` as the suffix says; returns how many bytes that takes."""
    if path.suffix == ".gz":
        return path.write_bytes(gzip.compress(data))
    with pa.CompressedOutputStream(str(path), "zstd") as stream:
        stream.write(data)
    return path.stat().st_size


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("count", [3, 6000])
def test_what_comes_before_the_break_of_a_packed_file_is_kept(
    tmp_path: Path, suffix: str, count: int
) -> None:
    """Here little more than a checksum is missing."""
    path = tmp_path / f"a.jsonl.{suffix}"
    texts = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(count)]
    size = packed(path, rows(*({"text": text} for text in texts)).encode())
    assert read(path) == (texts, None)
    with path.open("r+b") as stream:
        stream.truncate(size - 5)
    documents, failure = read(path)
    assert documents == texts[: len(documents)]
    lost = (count - len(documents)) * len(rows({"text": texts[0]}))
    # zstd unpacks blocks of 128 KiB, the last of which is cut.
    assert lost <= (0 if suffix == "gz" else 128 << 10)
    assert failure is not None
    assert failure.startswith(f"cannot be read as json, {'gzip' if suffix == 'gz' else 'zstd'}: ")


def test_a_file_without_objects_has_no_columns_to_name(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("x\n")
    assert read(path) == ([Unusable.MALFORMED], None)

"""The benchmark of tokenize_fineweb, on a few documents."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks._text import read_texts, repeated, write_texts
from benchmarks.tokenization import default_workers, main
from tests.conftest import ROOT
from tests.integration import corpora


@pytest.mark.slow
def test_the_benchmark_measures_speed_and_memory(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = corpora.write_jsonl(tmp_path / "in.jsonl", corpora.texts(50))
    output = tmp_path / "results" / "tokenization.json"
    # As a person runs it: a file named like a module of Python's would be found in its place.
    command = [sys.executable, "benchmarks/tokenization.py", "--workers", "1", "--repeats", "1"]
    command += ["--source", str(source), "--tokenizer", str(tokenizer_folder)]
    command += ["--output", str(output)]
    command += ["--formats", "jsonl", "--megabytes", "0.2", "--memory_megabytes", "0"]
    command += ["--row_group_megabytes", "0.2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert [(entry["case"], entry["workers"]) for entry in result["speed"]] == [
        ("bare: encode_batch_fast", 1),
        ("bare: tokenizer(texts)", 1),
        ("tokenize_fineweb, jsonl", 1),
    ]
    reference, _, pipeline = result["speed"]
    (bare,), (whole,) = reference["repeats"], pipeline["repeats"]
    warm_up = len("word0word1")
    assert whole["text_bytes"] == bare["text_bytes"] + warm_up
    assert bare["text_bytes"] == pytest.approx(200_000, abs=100)
    assert reference["of_bare_times_workers"] == reference["cpu_of_bare_at_once"] == 1.0
    rates = [run["text_bytes"] / run["seconds"] for run in (whole, bare)]
    assert pipeline["of_bare_times_workers"] == pytest.approx(rates[0] / rates[1])
    assert whole["workers"] == 1
    assert 0 < whole["cpu_seconds"] < whole["seconds"] * 1.5 + 0.1
    (memory,) = result["memory"]
    assert memory["file"] == "parquet, one row group"
    assert 10e6 < memory["worker_start"] <= memory["worker_peak"] < 2e9
    assert {"hardware", "versions", "commit", "command"} <= result.keys()
    assert "tokenizers" in result["versions"]
    assert "| tokenize_fineweb, jsonl" in output.with_suffix(".md").read_text()


def test_wrong_input_is_one_line(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = corpora.write_jsonl(tmp_path / "in.jsonl", corpora.texts(5))
    (tmp_path / "bad.parquet").write_text("<html>")
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    before = sorted(tmp_path.iterdir())
    cases: list[tuple[Path, list[str], str]] = [
        (source, ["--megabytes", "0.1", "--workers", "1", "2"], "--megabytes 0.1: "),
        (source, ["--megabytes", "0"], "--megabytes 0: must be above 0"),
        (source, ["--workers", "1", "0"], "--workers 0: must be at least 1"),
        (source, ["--repeats", "0"], "--repeats 0: must be at least 1"),
        (tmp_path / "bad.parquet", [], "cannot be read as parquet"),
        (tmp_path / "empty.jsonl", [], "no text"),
    ]
    for path, more, message in cases:
        options = ["--source", path, "--tokenizer", tokenizer_folder, "--output", tmp_path / "o"]
        assert main([*map(str, options), *more]) == 2, message
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("tokenization: error: ")
        assert message in error
    assert sorted(tmp_path.iterdir()) == before


def test_copies_differ(tmp_path: Path) -> None:
    texts = ["one text", "another é"]
    copies = list(repeated(texts, 200, "0"))
    size = sum(len(text.encode()) for text in copies)
    assert 200 <= size < 200 + 16
    assert len(set(copies) | set(repeated(texts, 200, "1"))) == 2 * len(copies)
    write_texts(tmp_path / "a.parquet", iter(copies), 3)
    write_texts(tmp_path / "b.parquet", iter(copies))
    write_texts(tmp_path / "c.jsonl", iter(copies))
    groups = [pq.read_metadata(tmp_path / f"{name}.parquet").num_row_groups for name in "ab"]
    assert groups == [-(-len(copies) // 3), 1]
    for name in ("a.parquet", "b.parquet", "c.jsonl"):
        assert read_texts(str(tmp_path / name)) == copies


@pytest.mark.parametrize(
    ("cores", "expected"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_workers_up_to_the_cores(cores: int, expected: list[int]) -> None:
    assert default_workers(cores) == expected

"""The benchmark of tokenize_fineweb, on a few documents."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks._text import read_texts, repeated, write_jsonl, write_parquet
from benchmarks.tokenization import default_workers, main
from tests.conftest import ROOT
from tests.integration import corpora


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
    assert 0 < whole["cpu_seconds"] < whole["seconds"] * 1.5 + 0.1
    (memory,) = result["memory"]
    assert memory["file"] == "parquet, one row group"
    assert 10e6 < memory["worker_start"] <= memory["worker_peak"] < 2e9
    assert {"hardware", "versions", "commit", "command"} <= result.keys()
    assert "tokenizers" in result["versions"]
    assert "| tokenize_fineweb, jsonl" in output.with_suffix(".md").read_text()


def test_too_little_text_is_refused(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = corpora.write_jsonl(tmp_path / "in.jsonl", corpora.texts(5))
    options = ["--source", source, "--tokenizer", tokenizer_folder, "--output", tmp_path / "o"]
    more = ["--megabytes", "0.1", "--workers", "1", "2"]
    assert main([*map(str, options), *more]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("tokenization: error: --megabytes 0.1: ")
    assert list(tmp_path.iterdir()) == [source]


def test_copies_differ(tmp_path: Path) -> None:
    texts = ["one text", "another é"]
    copies = list(repeated(texts, 200, "0"))
    size = sum(len(text.encode()) for text in copies)
    assert 200 <= size < 200 + 16
    assert len(set(copies) | set(repeated(texts, 200, "1"))) == 2 * len(copies)
    write_parquet(tmp_path / "a.parquet", iter(copies), 3)
    write_parquet(tmp_path / "b.parquet", iter(copies), None)
    write_jsonl(tmp_path / "c.jsonl", iter(copies))
    for name in ("a.parquet", "b.parquet", "c.jsonl"):
        assert read_texts(str(tmp_path / name)) == copies


@pytest.mark.parametrize(
    ("cores", "expected"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_workers_up_to_the_cores(cores: int, expected: list[int]) -> None:
    assert default_workers(cores) == expected

"""The data scripts on a dataset of a hub that answers badly."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from data_prep.train_tokenizer import decoded_form
from tests.integration.corpora import hashes, manifest, script, texts, train_texts
from tests.integration.hub import DROPPED, REVISION, Fault, Faults, HubServer
from tests.integration.test_tokenize import write_parquet

README = """---
configs:
- config_name: sample-x
  data_files: [{split: train, path: sample/x/*}]
---
"""
AT_ONCE = Fault(429, {"Retry-After": "0"})


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    (folder / "README.md").write_text(README)
    (folder / "sample" / "x").mkdir(parents=True)
    for number in range(2):
        documents = [f"{text} {number}" for text in texts(40)]
        write_parquet(folder / "sample" / "x" / f"{number:03d}.parquet", documents)
    lines = [json.dumps({"text": f"{text} 2"}) for text in texts(40)]
    (folder / "sample" / "x" / "002.jsonl").write_text("\n".join(lines))
    return folder


def run(
    tmp_path: Path,
    repository: Path,
    tokenizer: Path,
    faults: Faults,
    more: Sequence[object] = (),
    code: int = 0,
    newest: str = REVISION,
) -> tuple[CompletedProcess[str], HubServer]:
    """Tokenize the dataset; waits are cut short."""
    with HubServer(repository, faults=faults, newest=newest) as hub:
        environment = {**os.environ, **hub.environment(tmp_path / "home", longest_sleep=0.02)}
        made = script("tokenize_fineweb", "--source", "org/name", "--name", "sample-x",
                      "--tokenizer", tokenizer, "--output", tmp_path / "o", "--workers", 1,
                      "--validation_fraction", 0, *more, env=environment)  # fmt: skip
    assert made.returncode == code, made.stderr
    return made, hub


def test_the_same_tokens_as_from_the_disk(
    tmp_path: Path, repository: Path, tokenizer_folder: Path
) -> None:
    faults: Faults = {
        "GET */api/datasets/org/name/revision/*": [503],
        "GET */000.parquet": [AT_ONCE, 503, DROPPED],
        "GET */001.parquet": [500, 502, 503, 504, AT_ONCE, 503, 503],
        "GET */002.jsonl": [DROPPED, 429],
    }
    made, hub = run(tmp_path, repository, tokenizer_folder, faults)
    expected = [decoded_form(f"{text} {number}") for number in range(3) for text in texts(40)]
    assert train_texts(tmp_path / "o", tokenizer_folder) == expected
    assert manifest(tmp_path / "o")["settings"]["revision"] == REVISION
    # huggingface_hub names what it waits for, and when it gives up, we do.
    assert f"HTTP Error 429 thrown while requesting GET {hub.url}" in made.stderr
    waiting = [line for line in made.stderr.splitlines() if "waiting 5 s for the hub" in line]
    assert any("001.parquet" in line for line in waiting)
    # Nothing is asked twice without need: the list of files travels with the source.
    assert hub.count("GET */tree/*") <= 2
    # The dataset has had a commit since; what is made of the one before is that all the same.
    made, _ = run(tmp_path, repository, tokenizer_folder, {}, newest="f" * 40)
    assert "complete already" in made.stdout
    made, _ = run(tmp_path / "later", repository, tokenizer_folder, {}, newest="f" * 40)
    assert manifest(tmp_path / "later" / "o")["settings"]["revision"] == "f" * 40


def test_a_commit_that_the_hub_has_no_longer_is_told(
    tmp_path: Path, repository: Path, tokenizer_folder: Path
) -> None:
    (tmp_path / "o.partial").mkdir()
    settings = {"source": "org/name", "revision": "e" * 40}
    state = json.dumps({"settings": settings})
    (tmp_path / "o.partial" / "state.json").write_text(state)
    made, _ = run(tmp_path, repository, tokenizer_folder, {}, code=2)
    assert f"at commit {'e' * 40}, with which --output was begun; for the newest" in made.stderr


@pytest.mark.slow
def test_a_hub_that_stays_away(tmp_path: Path, repository: Path, tokenizer_folder: Path) -> None:
    faults = {"GET */001.parquet": itertools.repeat(503)}
    made, _ = run(tmp_path, repository, tokenizer_folder, faults, code=1)
    error = made.stderr.splitlines()[-1]
    assert error.startswith("tokenize_fineweb: error: the hub did not give hf://")
    assert "001.parquet" in error
    assert "the same command goes on from there" in made.stderr
    made, _ = run(tmp_path, repository, tokenizer_folder, {}, newest="f" * 40)
    assert "going on after 45 documents" in made.stdout
    assert manifest(tmp_path / "o")["settings"]["revision"] == REVISION
    assert manifest(tmp_path / "o")["documents_read"] == 3 * 45
    assert len(hashes(tmp_path / "o")) == 5


def test_a_tokenizer_from_the_hub(tmp_path: Path, repository: Path) -> None:
    with HubServer(repository, faults={"GET */000.parquet": [503]}) as hub:
        environment = {**os.environ, **hub.environment(tmp_path / "home", longest_sleep=0.02)}
        made = script("train_tokenizer", "--input", "org/name", "--name", "sample-x",
                      "--vocab_size", 400, "--output", tmp_path / "t", env=environment)  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "read 131 documents" in made.stderr  # of 135; the others are kept for the round trip
    assert (tmp_path / "t" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("more", "faults", "message"),
    [
        (["--name", "nope"], {}, "BuilderConfig 'nope' not found. Available: ['sample-x']"),
        (["--source", "org/other"], {}, "--source org/other: no such file, and not readable"),
    ],
)
def test_wrong_names_are_one_line(
    tmp_path: Path,
    repository: Path,
    tokenizer_folder: Path,
    more: list[object],
    faults: Faults,
    message: str,
) -> None:
    made, _ = run(tmp_path, repository, tokenizer_folder, faults, more, code=2)
    assert message in made.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("o*"))

"""tokenize_fineweb is killed at any moment, and goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from data_prep import _corpus, _encoding, _pieces, tokenize_fineweb
from data_prep._common import locked_folder
from tests.conftest import ROOT
from tests.integration.corpora import hashes, manifest, texts, tokenize, train_texts, write_jsonl
from tests.integration.test_tokenize import write_parquet

SPLIT = ("--validation_fraction", 0.2)


def write_source(folder: Path, files: int, documents: int) -> Path:
    """Some files of both kinds, with duplicates among them and a broken one."""
    folder.mkdir()
    for number in range(files):
        own = [f"{text} {number % 3}" for text in texts(documents)]
        if number % 2:
            write_parquet(folder / f"{number:02d}.parquet", own, rows=documents // 4)
        else:
            write_jsonl(folder / f"{number:02d}.jsonl", own)
    (folder / "03.parquet").write_text("<html>")
    return folder


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code catches it, and nothing is cleaned up."""


@pytest.mark.parametrize("moment", range(10))
def test_a_run_goes_on_from_any_state(
    tmp_path: Path,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    moment: int,
) -> None:
    source = write_source(tmp_path / "in", 6, 40)
    monkeypatch.setattr(_pieces, "PIECE_BYTES", 900)
    assert tokenize(source, tokenizer_folder, tmp_path / "whole", *SPLIT) == 1
    encode, save, count = _encoding.encode_piece, _corpus.GrowingCorpus.save, 0
    encoded: list[str] = []

    def encode_or_die(encoder: object, source: object, piece: _pieces.Piece, folder: Path) -> None:
        nonlocal count
        count += 1
        if count == 2 * moment + 2:
            raise Killed
        encoded.append(piece.name)
        encode(encoder, source, piece, folder)  # type: ignore[arg-type]

    def save_or_not(corpus: _corpus.GrowingCorpus) -> None:
        if count % 3 == 0:  # what was appended since is more than the state says
            save(corpus)

    monkeypatch.setattr(_encoding, "encode_piece", encode_or_die)
    monkeypatch.setattr(_corpus.GrowingCorpus, "save", save_or_not)
    monkeypatch.setattr(_corpus, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(tokenize_fineweb, "remove_own", lambda path: None)
    with pytest.raises(Killed):
        tokenize(source, tokenizer_folder, tmp_path / "o", *SPLIT)
    monkeypatch.undo()
    monkeypatch.setattr(_pieces, "PIECE_BYTES", 900)
    again: list[str] = []

    def note_piece(encoder: object, source: object, piece: _pieces.Piece, folder: Path) -> None:
        if not (folder / f"{piece.name}.json").exists():
            again.append(piece.name)
        encode(encoder, source, piece, folder)  # type: ignore[arg-type]

    monkeypatch.setattr(_encoding, "encode_piece", note_piece)
    assert tokenize(source, tokenizer_folder, tmp_path / "o", *SPLIT) == 1
    assert hashes(tmp_path / "o") == hashes(tmp_path / "whole")
    assert not (tmp_path / "o.partial").exists()
    assert not set(again) & set(encoded)  # nothing that was finished is done again
    if moment > 2:
        assert "going on after" in capsys.readouterr().out


def test_the_disk_holds_the_output_and_what_is_under_way(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(tmp_path / "in", 6, 40)
    monkeypatch.setattr(_pieces, "PIECE_BYTES", 900)
    monkeypatch.setattr(_corpus, "_SAVE_SECONDS", 0.0)
    append, most = _corpus.GrowingCorpus.append, 0

    def count(corpus: _corpus.GrowingCorpus, *arguments: Any) -> None:
        nonlocal most
        most = max(most, len(list(corpus.pieces.glob("*.json"))))
        append(corpus, *arguments)

    monkeypatch.setattr(_corpus.GrowingCorpus, "append", count)
    assert tokenize(source, tokenizer_folder, tmp_path / "o", *SPLIT) == 1
    assert most == 1  # a single process has one piece under way


@pytest.mark.parametrize("action", ["write_index", "sync_tree", "remove_own"])
def test_a_run_ends_from_any_state(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", texts(200))
    assert tokenize(source, tokenizer_folder, tmp_path / "whole", *SPLIT) == 0

    def die(*arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(tokenize_fineweb, "remove_own", lambda path: None)
        patched.setattr(_corpus, action, die)
        with pytest.raises(Killed):
            tokenize(source, tokenizer_folder, tmp_path / "o", *SPLIT)
    assert tokenize(source, tokenizer_folder, tmp_path / "o", *SPLIT) == 0
    assert hashes(tmp_path / "o") == hashes(tmp_path / "whole")
    assert not (tmp_path / "o.partial").exists()


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (OSError("full"), 1)])
def test_what_ends_a_run_at_its_checksums_says_how_to_go_on(
    tmp_path: Path,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", texts(20))

    def fail(path: Path) -> str:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(_corpus, "sha256_of", fail)
        assert tokenize(source, tokenizer_folder, tmp_path / "o", *SPLIT) == status
    assert "keeps what is done; the same command goes on from there" in capsys.readouterr().err
    assert tokenize(source, tokenizer_folder, tmp_path / "o", *SPLIT) == 0


def test_the_corpus_takes_its_name_and_is_not_copied(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", texts(20))
    made: list[int] = []
    monkeypatch.setattr(_corpus, "sync_tree", lambda folder: made.append(folder.stat().st_ino))
    assert tokenize(source, tokenizer_folder, tmp_path / "o", *SPLIT) == 0
    assert [(tmp_path / "o").stat().st_ino] == made


def command(source: Path, tokenizer: Path, output: Path, workers: int) -> list[str]:
    arguments = ["--source", source, "--tokenizer", tokenizer, "--output", output, *SPLIT]
    arguments += ["--workers", workers]
    return [sys.executable, "data_prep/tokenize_fineweb.py", *map(str, arguments)]


def start(command: list[str]) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def kill_and_go_on(folder: Path, tokenizer: Path, rounds: int, files: int) -> int:
    """Kill runs at random moments until each has finished; return how many died."""
    source = write_source(folder / "in", files, 3000)
    whole = folder / "whole"
    begin = time.monotonic()
    assert start(command(source, tokenizer, whole, 1)).wait() == 1
    seconds = time.monotonic() - begin
    rng = random.Random(1)
    killed = 0
    for number in range(rounds):
        output = folder / f"o{number}"
        limits = [rng.uniform(0.5, 1.1) * seconds for _ in range(2)]
        for limit in (*limits, None):
            process = start(command(source, tokenizer, output, rng.choice([1, 2, 3])))
            try:
                assert process.communicate(timeout=limit)[1] is not None
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                killed += 1
        # 1 for the broken file; or 0 for a run that was killed after its last action.
        assert process.returncode in (0, 1)
        assert hashes(output) == hashes(whole)
        assert not output.with_name(f"{output.name}.partial").exists()
    return killed


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path, tokenizer_folder: Path) -> None:
    assert kill_and_go_on(tmp_path, tokenizer_folder, rounds=16, files=24) >= 20


def test_workers_end_with_a_killed_run(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        documents = [f"{text} {number}" for text in texts(70_000)]
        write_jsonl(tmp_path / "in" / f"{number}.jsonl", documents)
    process = start(command(tmp_path / "in", tokenizer_folder, tmp_path / "o", 2))
    pieces = tmp_path / "o.partial" / "pieces"
    deadline = time.monotonic() + 60
    while not list(pieces.glob("*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    gone, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    assert len(gone) >= 2


def test_other_settings_do_not_go_on(
    tmp_path: Path,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, output = write_jsonl(tmp_path / "in.jsonl", texts(300)), tmp_path / "o"
    monkeypatch.setattr(_pieces, "PIECE_BYTES", 900)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(_corpus.GrowingCorpus, "finish", full)
        assert tokenize(source, tokenizer_folder, output, *SPLIT) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "the same command goes on from there" in error
    with monkeypatch.context() as patched:
        patched.setattr(_corpus.GrowingCorpus, "finish", full)
        patched.setattr(_corpus.GrowingCorpus, "close", _corpus.GrowingCorpus.save)
        assert tokenize(source, tokenizer_folder, output, *SPLIT) == 1
    capsys.readouterr()
    assert tokenize(source, tokenizer_folder, output, "--validation_fraction", 0.3) == 2
    error = capsys.readouterr().err
    assert "was begun with validation_fraction = 0.2, now it is 0.3" in error
    assert tokenize(source, tokenizer_folder, output, *SPLIT) == 0
    capsys.readouterr()
    # Complete: the same command has nothing to do, another one does not overwrite.
    assert tokenize(source, tokenizer_folder, output, *SPLIT) == 0
    assert "complete already" in capsys.readouterr().out
    assert tokenize(source, tokenizer_folder, output, "--validation_fraction", 0.3) == 2
    assert "now it is 0.3" in capsys.readouterr().err
    # A corpus from before a setting was noted.
    noted = (output / "manifest.json").read_text()
    older = json.loads(noted)
    del older["settings"]["eos_id"]
    (output / "manifest.json").write_text(json.dumps(older))
    assert tokenize(source, tokenizer_folder, output, *SPLIT) == 0
    (output / "manifest.json").write_text(noted)
    # The same pieces, but another of them ends documents.
    shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    settings = tmp_path / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token": "<s>"}))
    assert tokenize(source, tmp_path / "tokenizer", output, *SPLIT) == 2
    assert "was begun with eos_id = 2, now it is 1" in capsys.readouterr().err
    # Of thousands of files the one that differs is named.
    size = source.stat().st_size
    source.write_text(source.read_text() + "\n")
    assert tokenize(source, tokenizer_folder, output, *SPLIT) == 2
    names = f'files[0] = ["in.jsonl", {size}], now it is ["in.jsonl", {size + 1}]; give the same'
    assert f"was begun with {names}" in capsys.readouterr().err
    assert (
        len(train_texts(output, tokenizer_folder))
        == manifest(output)["splits"]["train"]["documents"]
    )


def test_two_runs_do_not_write_the_same_folder(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", texts(5))
    with locked_folder(tmp_path / "o"):
        assert tokenize(source, tokenizer_folder, tmp_path / "o") == 2
    assert "another run is writing" in capsys.readouterr().err


def test_a_state_beyond_its_files_is_an_error(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write_jsonl(tmp_path / "in.jsonl", texts(50)), tmp_path / "o"
    assert tokenize(source, tokenizer_folder, output) == 0
    described = manifest(output)
    (tmp_path / "o.partial" / "complete").mkdir(parents=True)
    (tmp_path / "o.partial" / ".data_prep").touch()
    state = {key: described[key] for key in ("settings", "dropped", "failed_files", "splits")}
    state |= {"read": described["documents_read"], "file_number": 0, "part": 1}
    (tmp_path / "o.partial" / "state.json").write_text(json.dumps(state))
    output.rename(tmp_path / "elsewhere")
    capsys.readouterr()
    assert tokenize(source, tokenizer_folder, output) == 2
    assert "shorter than" in capsys.readouterr().err

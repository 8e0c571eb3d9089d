"""inspect_data.py on whole, damaged and foreign token files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from data_prep import inspect_data
from sdp_llm.data.indexed import IndexedDataset, IndexedDatasetWriter
from sdp_llm.files import sha256_of

ROOT = Path(__file__).resolve().parents[2]
EOS, ESCAPE, NEWLINE, REVERSE, WIDE = 0, 1, 2, 3, 4
PIECES = ["</s>", "\x1b[2J\x07red", "two\nlines\ttab", "\u202egnp", "世界"]
PIECES += [f"word{i}" for i in range(len(PIECES), 40)]
VALIDATION = [[9, 9, EOS]]


def one_word(documents: int) -> list[list[int]]:
    """Documents that differ in their one word."""
    return [[5 + i, EOS] for i in range(documents)]


@dataclass
class Corpus:
    """A folder of token files, its manifest and its tokenizer."""

    folder: Path
    manifest: dict[str, Any]
    tokenizer: Path

    def save(self) -> Path:
        (self.folder / "manifest.json").write_text(json.dumps(self.manifest))
        return self.folder


def write_split(prefix: Path, documents: Sequence[Sequence[int]]) -> dict[str, int]:
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for ids in documents:
            writer.add_document(list(ids))
    tokens = [token for ids in documents for token in ids]
    return {
        "documents": len(documents),
        "tokens": len(tokens),
        "utf8_bytes": 3 * len(tokens),
        "largest_id": max(tokens, default=-1),
        "longest_document": max(map(len, documents), default=0),
    }


def save_tokenizer(folder: Path, pieces: Sequence[str]) -> Path:
    """A tokenizer whose tokens decode to ``pieces``, with a space between."""
    # Not at the top: a checkout may have a folder of this name, and then it would sort elsewhere.
    from tokenizers import Tokenizer, models

    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), PIECES)


def make(folder: Path, tokenizer: Path, train: Sequence[Sequence[int]]) -> Corpus:
    folder.mkdir()
    splits = {"train": train, "validation": VALIDATION}
    counts = {
        split: write_split(folder / f"{split}_text_document", documents)
        for split, documents in splits.items()
    }
    manifest = {
        "format": "megatron-mmap-indexed",
        "format_version": 2,
        "settings": {"source": "org/name", "name": "sample-x", "revision": "abc123"},
        "tokenizer": {
            "path": str(tokenizer),
            "sha256": sha256_of(tokenizer / "tokenizer.json"),
            "vocab_size": len(PIECES),
            "eos_id": EOS,
        },
        "dtype": "uint16",
        "documents_read": 1234,
        "dropped": {"duplicate": 3, "empty": 1},
        "failed_files": [{"file": "x/7.parquet", "error": "ArrowInvalid: no footer"}],
        "splits": counts,
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in sorted(folder.iterdir())
        },
    }
    corpus = Corpus(folder, manifest, tokenizer)
    corpus.save()
    return corpus


@pytest.fixture
def corpus(tmp_path: Path, tokenizer: Path) -> Corpus:
    return make(tmp_path / "data", tokenizer, one_word(21))


Captured = pytest.CaptureFixture[str]


def inspected(capsys: Captured, *arguments: object) -> tuple[int, str, list[str]]:
    """Status, standard output, and the error lines."""
    status = inspect_data.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, [line for line in err.splitlines() if "error:" in line]


def test_a_whole_corpus(corpus: Corpus, capsys: Captured) -> None:
    status, out, errors = inspected(capsys, corpus.folder)
    assert (status, errors) == (0, [])
    assert re.search(r"^train +21 +42 +126 +3\.000 +2\.0 +2 +uint16$", out, re.MULTILINE)
    assert re.search(r"^validation +1 +3 +9 +3\.000 +3\.0 +3 +uint16$", out, re.MULTILINE)
    assert "org/name, sample-x, abc123" in out
    assert "1,234 documents" in out
    assert "3 duplicate, 1 empty" in out
    assert "x/7.parquet: ArrowInvalid: no footer" in out
    shown = re.findall(r"^train, document (\d+), 2 tokens\n    (.*)$", out, re.MULTILINE)
    assert shown == [("0", "word5 </s>"), ("10", "word15 </s>"), ("20", "word25 </s>")]
    assert "sizes, counts and SHA-256 agree" in out
    assert "document 0" not in inspected(capsys, corpus.folder, "--documents", 0)[1]
    assert inspected(capsys, corpus.folder, "--documents", 50)[1].count("train, document") == 21


def test_lengths_fall_into_powers_of_two(tmp_path: Path, tokenizer: Path, capsys: Captured) -> None:
    lengths = [0, 1, 2, 3, 3, 4, 7, 8, 33]
    corpus = make(tmp_path / "data", tokenizer, [[5] * length for length in lengths])
    _, out, _ = inspected(capsys, corpus.folder / "train_text_document", "--documents", 0)
    found = re.findall(r"^ +(\d+)(?: to (\d+))? +(\d+) +([\d.]+)% .*? ([\d.]+)%", out, re.MULTILINE)
    total = sum(lengths)
    expected = []
    for low, high in [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63)]:
        inside = [length for length in lengths if low <= length <= high]
        shares = (len(inside) / len(lengths), sum(inside) / total)
        label = (str(low), "" if low == high else str(high))
        expected.append((*label, str(len(inside)), *(f"{100 * share:.2f}" for share in shares)))
    assert found == expected
    assert "██████████" in out


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


@pytest.mark.parametrize("file", ["train_text_document.bin", "validation_text_document.idx"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [(flip, "SHA-256"), (cut, "bytes"), (Path.unlink, "no such file")],
)
def test_damage_is_one_line(
    corpus: Corpus, capsys: Captured, file: str, damage: Any, message: str
) -> None:
    damage(corpus.folder / file)
    status, out, errors = inspected(capsys, corpus.folder)
    # A flipped bit of an index may also make it unreadable, which is a second thing to say.
    assert status == 1
    assert "agree" not in out
    assert all(line.startswith(f"inspect_data: error: {corpus.folder / file}") for line in errors)
    assert message in errors[-1]
    assert len(errors) == 1 + (damage is flip and file.endswith(".idx"))
    if damage is flip and file.endswith(".bin"):
        assert inspected(capsys, corpus.folder, "--no_verify")[0] == 0
    else:
        assert inspected(capsys, corpus.folder, "--no_verify")[0] == 1


def test_every_damaged_file_is_named(corpus: Corpus, capsys: Captured) -> None:
    for path in corpus.folder.glob("*.bin"):
        cut(path)
    for path in corpus.folder.glob("*.idx"):
        path.unlink()
    status, _, errors = inspected(capsys, corpus.folder)
    assert status == 1
    assert len(errors) == 4
    for name in corpus.manifest["files"]:
        assert sum(f"{corpus.folder / name}: " in line for line in errors) == 1


def test_counts_are_compared_with_the_index(corpus: Corpus, capsys: Captured) -> None:
    corpus.manifest["splits"]["train"]["tokens"] += 1
    corpus.manifest["splits"]["train"]["longest_document"] = 7
    corpus.manifest["dtype"] = "int32"
    status, _, errors = inspected(capsys, corpus.save(), "--no_verify")
    assert status == 1
    train, validation = errors
    assert "train_text_document.idx" in train
    assert "tokens 42, not 43; longest_document 2, not 7; dtype uint16, not int32" in train
    assert "documents" not in train.split("counts: ")[1]
    assert validation.endswith("counts: dtype uint16, not int32")


def test_foreign_corpora(tmp_path: Path, tokenizer: Path, capsys: Captured) -> None:
    write_split(tmp_path / "b.v1", one_word(3))
    write_split(tmp_path / "a", one_word(2))
    for where in (tmp_path / "b.v1", tmp_path / "b.v1.bin", tmp_path / "b.v1.idx"):
        status, out, errors = inspected(capsys, where)
        assert (status, errors) == (0, [])
        assert "nothing to verify against" in out
        assert "give --tokenizer" in out
        assert re.search(r"^b\.v1 +3 +6 +n/a +n/a +2\.0 +2 +uint16$", out, re.MULTILINE)
    status, out, _ = inspected(capsys, tmp_path, "--tokenizer", tokenizer)
    assert status == 0
    assert re.search(r"^a +2 .*\nb\.v1 +3 ", out, re.MULTILINE)
    assert "a, document 1, 2 tokens\n    word6 </s>" in out
    (tmp_path / "model.bin").touch()  # what else lies there is left alone
    cut(tmp_path / "a.bin")
    status, out, errors = inspected(capsys, tmp_path)
    assert (status, len(errors)) == (1, 1)
    assert str(tmp_path / "a.bin") in errors[0]
    assert "b.v1" in out


def test_one_split_of_a_corpus_has_its_manifest(corpus: Corpus, capsys: Captured) -> None:
    flip(corpus.folder / "train_text_document.bin")
    status, out, _ = inspected(capsys, corpus.folder / "validation_text_document")
    assert status == 0
    assert "agree" in out
    assert inspected(capsys, corpus.folder / "train_text_document")[0] == 1
    write_split(corpus.folder / "other", one_word(1))
    assert "nothing to verify" in inspected(capsys, corpus.folder / "other")[1]


def test_no_document_drives_the_terminal(tmp_path: Path, tokenizer: Path, capsys: Captured) -> None:
    corpus = make(tmp_path / "data", tokenizer, [[ESCAPE, NEWLINE, REVERSE, WIDE, EOS]])
    corpus.manifest["failed_files"] = [{"file": "\x1b[2Ja", "error": "b\rc"}]
    corpus.manifest["settings"]["source"] = "\x9b31m"
    corpus.manifest["dropped"] = {"\x07": 1}
    corpus.manifest["splits"]["train"]["tokens"] = 1
    corpus.folder = corpus.folder.rename(tmp_path / "\x1b[31mdata")
    assert inspect_data.main([str(corpus.save())]) == 1
    both = "".join(capsys.readouterr())
    assert all(c.isprintable() or c == "\n" for c in both)
    assert "\\x1b[2Ja: b\\rc" in both
    assert "    \\x1b[2J\\x07red two\n    lines   tab \\u202egnp 世界 </s>\n" in both


def test_excerpts_are_short(
    tmp_path: Path, tokenizer: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = make(tmp_path / "data", tokenizer, [[9] * 100_000, [NEWLINE] * 300])
    read, ranges = IndexedDataset.tokens, []

    def tokens(self: IndexedDataset, start: int, stop: int) -> Any:
        ranges.append((start, stop))
        return read(self, start, stop)

    monkeypatch.setattr(IndexedDataset, "tokens", tokens)
    _, out, _ = inspected(capsys, corpus.folder)
    assert ranges == [(0, 400), (100_000, 100_300)]  # a document may be as large as the corpus
    first, second = re.findall(r"^train, document.*\n((?:    .*\n)+)", out, re.MULTILINE)
    assert len(first) < 600
    assert first.endswith(" ...\n")
    assert len(second.splitlines()) == 12
    assert second.endswith(" ...\n")


def test_the_tokenizer_has_to_be_the_right_one(
    corpus: Corpus, tokenizer: Path, tmp_path: Path, capsys: Captured
) -> None:
    other = save_tokenizer(tmp_path / "other", PIECES[:2])
    status, _, [error] = inspected(capsys, corpus.folder, "--tokenizer", other)
    assert status == 2
    assert "not the one that made the corpus" in error
    write_split(tmp_path / "foreign", one_word(1))
    status, _, [error] = inspected(capsys, tmp_path / "foreign", "--tokenizer", other)
    assert status == 1
    assert "foreign.bin: document 0 has ids from 0 to 5, the tokenizer has 2" in error
    # One that has moved or changed since is no reason to fail: there is more to see.
    for path, note in ((tmp_path / "gone", "is not here"), (other, "has changed")):
        corpus.manifest["tokenizer"]["path"] = str(path)
        status, out, errors = inspected(capsys, corpus.save())
        assert (status, errors) == (0, [])
        assert f"No document shown: {path} {note}; give --tokenizer" in out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "'settings'"),
        ('{"format_version": 1, "sha256": {}}', "'settings'"),
    ],
)
def test_a_manifest_of_something_else(
    corpus: Corpus, capsys: Captured, content: str, message: str
) -> None:
    (corpus.folder / "manifest.json").write_text(content)
    status, _, [error] = inspected(capsys, corpus.folder)
    assert status == 2
    assert message in error


@pytest.mark.parametrize(
    ("key", "value"), [("splits", {"train": 3}), ("dropped", {"empty": "x"}), ("files", None)]
)
def test_an_edited_manifest(corpus: Corpus, capsys: Captured, key: str, value: object) -> None:
    corpus.manifest[key] = value
    status, _, [error] = inspected(capsys, corpus.save())
    assert status == 2
    assert repr(key) in error


def test_wrong_input(tmp_path: Path, corpus: Corpus, capsys: Captured) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        ((tmp_path / "none",), "no such folder"),
        ((tmp_path / "empty",), "no .idx file"),
        ((corpus.folder, "--documents", -1), "--documents -1"),
    ]:
        status, _, [error] = inspected(capsys, *arguments)
        assert status == 2
        assert message in error


def test_output_that_nobody_reads_is_no_error(tmp_path: Path, tokenizer: Path) -> None:
    corpus = make(tmp_path / "data", tokenizer, [[WIDE, EOS]])
    command = f"{sys.executable} data_prep/inspect_data.py {corpus.folder}"
    made = subprocess.run(
        ["bash", "-c", f"{command} | true; exit ${{PIPESTATUS[0]}}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert made.returncode == 141
    assert "error" not in made.stderr


def test_the_command_in_any_locale(tmp_path: Path, tokenizer: Path) -> None:
    corpus = make(tmp_path / "data", tokenizer, [[WIDE, EOS]])
    made = subprocess.run(
        [sys.executable, "data_prep/inspect_data.py", str(corpus.folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert made.returncode == 0, made.stderr
    assert "\\u4e16\\u754c </s>" in made.stdout
    assert "verifying" in made.stderr

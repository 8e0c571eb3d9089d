"""The corpora of a run: every token id is checked, and the manifest is believed where it fits."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdp_llm.config import DataConfig
from sdp_llm.data import IndexedDataset, IndexedDatasetWriter, PackedDataset, vocabulary
from sdp_llm.data.manifest import read_manifest
from sdp_llm.data.vocabulary import id_outside
from sdp_llm.errors import ConfigError
from sdp_llm.training import corpora
from sdp_llm.training.corpora import (
    blend,
    check_ids,
    check_tokenizer_of,
    open_training,
    open_validation,
)

NAME = "train_text_document"
TOKENS = 1000


def write(prefix: Path, ids: Any, dtype: str = "uint16") -> PackedDataset:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        writer.add_document(ids)
    return PackedDataset(IndexedDataset(prefix), 4)


def with_one(position: int, value: int) -> Any:
    ids = np.arange(TOKENS) % 10
    ids[position] = value
    return ids


def note(folder: Path, **changes: Any) -> None:
    """The manifest of the corpus in ``folder``, as data_prep writes it."""
    sizes = {f"{NAME}{s}": (folder / f"{NAME}{s}").stat().st_size for s in (".bin", ".idx")}
    notes = {
        "splits": {"train": {"largest_id": 9}},
        "files": {name: {"bytes": size} for name, size in sizes.items()},
        "tokenizer": {"eos_id": 2, "sha256": "ab" * 32},
    }
    (folder / "manifest.json").write_text(json.dumps(notes | changes))


# -- ids ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 1, 499, 500, TOKENS - 1])
@pytest.mark.parametrize("value", [10, -1])
def test_one_wrong_id_anywhere_is_found(
    tmp_path: Path, position: int, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "_SLICE", 7)
    corpus = write(tmp_path / "c", with_one(position, value), "int32")
    assert id_outside(corpus.dataset, 10, 0, TOKENS) == value
    assert id_outside(corpus.dataset, 11, 0, TOKENS) == (None if value == 10 else -1)
    with pytest.raises(ConfigError) as caught:
        check_ids({"data.train = 3": corpus}, 10, "model.json", None, 1)
    message = f"data.train = 3: has token id {value}, but vocab_size = 10 in model.json; use the"
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_ranks_read_every_token_between_them(tmp_path: Path, world_size: int) -> None:
    for position in (0, 249, 250, 332, 333, 334, 666, 667, 749, 750, TOKENS - 1):
        corpus = write(tmp_path / f"{position}", with_one(position, 10))
        found = 0
        for rank in range(world_size):
            try:
                check_ids({"key": corpus}, 10, "model.json", rank, world_size)
            except ConfigError:
                found += 1
        assert found == 1, position


@pytest.mark.parametrize("damage", ["nothing", "files", "splits", "json", "list", "size", "true"])
def test_the_manifest_is_believed_where_it_fits(tmp_path: Path, damage: str) -> None:
    corpus = write(tmp_path / NAME, with_one(500, 10))
    note(tmp_path)
    if damage in ("files", "splits"):
        note(tmp_path, **{damage: {}})
    elif damage == "true":
        note(tmp_path, splits={"train": {"largest_id": True}})
    elif damage == "size":
        write_again = with_one(500, 10)[:-1]
        for suffix in (".bin", ".idx"):
            (tmp_path / f"{NAME}{suffix}").unlink()
        corpus = write(tmp_path / NAME, write_again)
    elif damage == "json":
        (tmp_path / "manifest.json").write_text('{"splits')
    elif damage == "list":
        (tmp_path / "manifest.json").write_text("[]")
    if damage == "nothing":  # it says 9, and no token is read
        check_ids({"key": corpus}, 10, "model.json", None, 1)
        with pytest.raises(ConfigError, match="has token id 9, but vocab_size = 9"):
            check_ids({"key": corpus}, 9, "model.json", 1, 2)
        return
    assert read_manifest(tmp_path / NAME).largest_id is None
    with pytest.raises(ConfigError, match="has token id 10"):
        check_ids({"key": corpus}, 10, "model.json", None, 1)


def test_reading_a_large_corpus_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write(tmp_path / NAME, [1] * TOKENS)
    monkeypatch.setattr(corpora, "_LONG", 2 * TOKENS)
    check_ids({"key": corpus}, 10, "model.json", None, 1)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(corpora, "_LONG", 2 * TOKENS - 1)
    for rank in range(3):
        check_ids({"key": corpus}, 10, "model.json", rank, 3)
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("key: has no manifest.json that fits it; reading all 1,000 tokens")
    note(tmp_path)
    check_ids({"key": corpus}, 10, "model.json", None, 1)
    assert capsys.readouterr().out == ""


# -- the tokenizer --------------------------------------------------------------------------------


def test_the_tokenizer_is_the_one_of_the_corpus(tmp_path: Path) -> None:
    corpus = write(tmp_path / NAME, [1] * TOKENS)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    check_tokenizer_of({"key": corpus}, str(folder), 2)  # neither says
    (folder / "tokenizer.json").write_text("{}")
    check_tokenizer_of({"key": corpus}, str(folder), 2)  # the corpus does not say
    note(tmp_path)
    with pytest.raises(ConfigError) as caught:
        check_tokenizer_of({'data.train["x"]': corpus}, str(folder), 2)
    message = str(caught.value)
    for part in (f'data.tokenizer = "{folder}"', 'data.train["x"]', "abababababab…", "name the"):
        assert part in message
    note(tmp_path, tokenizer={"sha256": hashlib.sha256(b"{}").hexdigest()})
    check_tokenizer_of({"key": corpus}, str(folder), 2)


def test_the_tokenizer_ends_documents_as_the_corpus_does(tmp_path: Path) -> None:
    """The file that names the end is not the one with the SHA-256."""
    corpus = write(tmp_path / NAME, [1] * TOKENS)
    note(tmp_path)
    check_tokenizer_of({"key": corpus}, str(tmp_path), 2)
    check_tokenizer_of({"key": corpus}, str(tmp_path), None)
    with pytest.raises(ConfigError, match="its end-of-sequence id is 0, but key was made with 2;"):
        check_tokenizer_of({"key": corpus}, str(tmp_path), 0)


# -- blends ---------------------------------------------------------------------------------------


def test_each_corpus_of_a_blend_is_named_with_what_is_wrong(tmp_path: Path) -> None:
    good, short = str(tmp_path / "good"), str(tmp_path / "short")
    write(Path(good), [1] * TOKENS)
    write(Path(short), [1] * 9)
    for name, file, content, message in (
        ("none", None, b"", "no such file"),
        ("cut", "bin", b"x", "truncated"),
        ("foreign", "idx", b"x" * 60, "not a Megatron index"),
        ("tiny", "", b"", "3 tokens are less than one sample of 4"),
    ):
        prefix = tmp_path / name
        if name == "tiny":
            with IndexedDatasetWriter(prefix, "uint16") as writer:
                writer.add_document([1, 1, 1])
        elif file:
            write(prefix, [1] * TOKENS)
            (tmp_path / f"{name}.{file}").write_bytes(content)
        data = DataConfig({good: 1, str(prefix): 2}, 4)
        with pytest.raises(ConfigError) as caught:
            open_training(data)
        assert str(caught.value).startswith(f'data.train["{prefix}"]: {prefix}')
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    data = DataConfig({good: 1, short: 1}, 4, validation=short)
    opened = open_training(data)
    assert list(opened) == [f'data.train["{good}"]', f'data.train["{short}"]']
    assert list(open_validation(data)) == [f'data.validation = "{short}"']
    assert open_validation(DataConfig(good, 4)) == {}
    assert blend(data, list(opened.values()), 4).usage(4)[1].prefix == short
    with pytest.raises(ConfigError) as caught:
        blend(data, list(opened.values()), 8)
    message = str(caught.value)
    assert message.startswith(f"data.train: {short}: 2 samples of 4 tokens are less than its part")
    assert "4 of 8; use a larger corpus" in message


def test_too_many_corpora_are_refused(tmp_path: Path) -> None:
    prefix = tmp_path / "c"
    corpus = write(prefix, [1] * TOKENS)
    data = DataConfig({f"{prefix}{i}": 1.0 for i in range(1001)}, 4)
    with pytest.raises(ConfigError, match="1001 corpora: at most 1000") as caught:
        blend(data, [corpus] * 1001, 4)
    assert str(caught.value).startswith("data.train: 1001")

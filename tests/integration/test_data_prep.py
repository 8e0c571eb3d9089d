"""The data scripts as a person runs them: text to tokenizer to token files and back."""

from __future__ import annotations

import io
import json
import pickle
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece

from data_prep import inspect_data, python_corpus, tokenize_fineweb, train_tokenizer
from data_prep._common import is_own, new_output
from data_prep._encoding import Encoder
from data_prep._pieces import Limits
from data_prep._source import find_source
from data_prep._tokenizer import encode_plain, load_tokenizer
from sdp_llm.errors import ConfigError
from tests.integration.conftest import execute
from tests.integration.corpora import HARD, decoded, manifest, script, texts, tokenize, write_jsonl
from tests.integration.test_tokenize import write_parquet


def test_the_scripts_from_python_to_tokens(tmp_path: Path) -> None:
    corpus, tokenizer, output = tmp_path / "py.jsonl", tmp_path / "tok", tmp_path / "data"
    made = script("python_corpus", "--output", corpus, "--max_megabytes", 0.3)
    assert made.returncode == 0, made.stderr
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    assert 0.3e6 <= sum(len(row["text"].encode()) for row in rows) < 1e6
    assert len({row["source"] for row in rows}) == len(rows) > 20
    made = script("train_tokenizer", "--input", corpus, "--vocab_size", 1024, "--output", tokenizer)
    assert made.returncode == 0, made.stderr
    made = script("tokenize_fineweb", "--source", corpus, "--tokenizer", tokenizer,
                  "--output", output, "--validation_fraction", 0.2)  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "tokens/s" in made.stderr
    got = [
        t
        for s in tokenize_fineweb.SPLITS
        for t in decoded(output / f"{s}_text_document", tokenizer)
    ]
    assert sorted(got) == sorted(train_tokenizer.decoded_form(row["text"]) for row in rows)


def test_the_corpus_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        made = script("python_corpus", "--output", tmp_path / name, "--max_megabytes", 0.1)
        assert made.returncode == 0, made.stderr
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    made = script("python_corpus", "--output", tmp_path / "a")
    assert made.returncode == 2
    assert "exists and is not overwritten" in made.stderr


def test_the_tokenizer_follows_llama(tokenizer_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    assert len(tokenizer) == 400
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token is None
    assert tokenizer.convert_tokens_to_ids("<0x00>") == 3
    assert tokenizer("the text")["input_ids"] == encode_plain(tokenizer, ["the text"])[0]
    assert "<0x0A>" in tokenizer.tokenize("a\nb")
    digits = [piece.strip("▁") for piece in tokenizer.tokenize("1234")]
    assert [d for d in digits if d] == ["1", "2", "3", "4"]


def test_text_cannot_spell_the_separator() -> None:
    # Models of others may have "</s" as a piece: one merge away from the name of eos.
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(f"{c}</s" for c in order) + " >" for order in ["abc", "bca"]),
        model_writer=model, model_type="bpe", vocab_size=270, byte_fallback=True,
        split_by_unicode_script=False, unk_id=0, bos_id=1, eos_id=2, minloglevel=2,
    )  # fmt: skip
    tokenizer = train_tokenizer.to_transformers(model.getvalue())
    assert "</s" in tokenizer.get_vocab()
    for ids in encode_plain(tokenizer, ["a</s>b", "</s>", "a<s>b"]):
        assert min(ids) > tokenizer.eos_token_id


def test_a_worker_gets_the_tokenizer_without_transformers(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    encoder = Encoder(tokenizer_folder, Limits(1000))
    expected = encoder.encode(HARD)  # which changes settings that are not sent
    sent = pickle.dumps(Encoder(tokenizer_folder, Limits(1000)))
    (tmp_path / "encoder").write_bytes(sent)
    code = (
        "import pickle, sys; encoder = pickle.load(open(sys.argv[1], 'rb')); "
        f"print(encoder.encode({HARD!r}) == {expected!r}, "
        "[name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = execute(sys.executable, "-c", code, tmp_path / "encoder")
    assert done.stdout == "True []\n", done.output


@pytest.mark.parametrize("largest", [500, 70_000, 2**31])
def test_ids_with_gaps(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str], largest: int
) -> None:
    """A piece that every text has gets an id beyond the number of pieces."""
    folder, output = tmp_path / "t", tmp_path / "o"
    shutil.copytree(tokenizer_folder, folder)
    described = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    moved = Encoder(folder, Limits(1000)).encode(texts(1))[-1][0]
    [piece] = [piece for piece, number in vocabulary.items() if number == moved]
    vocabulary[piece] = largest
    (folder / "tokenizer.json").write_text(json.dumps(described))
    source = write_jsonl(tmp_path / "in.jsonl", texts(9))
    status = tokenize(source, folder, output, "--validation_fraction", 0)
    if largest == 2**31:
        assert status == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"--tokenizer {folder}: gives {piece!r} the id 2147483648, " in line
        return
    assert status == 0
    assert manifest(output)["tokenizer"]["vocab_size"] == largest + 1
    assert manifest(output)["splits"]["train"]["largest_id"] == largest
    expected = [train_tokenizer.decoded_form(text) for text in texts(9)]
    assert decoded(output / "train_text_document", folder) == expected
    capsys.readouterr()
    assert inspect_data.main([str(output)]) == 0
    assert "damaged" not in capsys.readouterr().err


@pytest.mark.parametrize(("size", "message"), [(90_000, "yields at most"), (100, "bytes and")])
def test_an_impossible_vocabulary_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int, message: str
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", texts(50))
    arguments = ["--input", str(source), "--output", str(tmp_path / "t")]
    assert train_tokenizer.main([*arguments, "--vocab_size", str(size)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"train_tokenizer: error: --vocab_size {size}: ")
    assert message in last
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_a_long_document_is_trained_on(tmp_path: Path, suffix: str) -> None:
    """It is one line, longer than sentencepiece reads, and nothing else has its word."""
    documents = [*texts(300), "zebra " * 400_000]
    source = tmp_path / f"in.{suffix}"
    if suffix == "txt":
        source.write_text("\n\n".join(text for text in documents if "\n" not in text))
    elif suffix == "jsonl":
        write_jsonl(source, documents)
    else:
        write_parquet(source, documents)
    output = tmp_path / "t"
    arguments = ["--input", str(source), "--vocab_size", "400", "--output", str(output)]
    assert train_tokenizer.main(arguments) == 0
    assert "▁zebra" in load_tokenizer(output).get_vocab()


def test_of_many_files_some_are_read_from_all_over(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(200):
        write_jsonl(tmp_path / "in" / f"{number:03d}.jsonl", [f"{number} " + "word " * 200] * 9)
    source = find_source(str(tmp_path / "in"), None)
    training, held_out = train_tokenizer.sample_documents([source], "text", 100_000)
    numbers = sorted({int(text.split()[0]) for text in (*training, *held_out)})
    assert sum(map(len, training)) == pytest.approx(100_000, rel=0.02)
    assert 30 < len(numbers) < 60
    assert max(b - a for a, b in pairwise([0, *numbers, 199])) < 15


def test_what_a_tokenizer_is_not_trained_on_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_tokenizer, "_MAX_RECORD", 5000)
    source = write_jsonl(tmp_path / "in.jsonl", [*texts(300), "x" * 6000, "", None, " "])
    options = ["--vocab_size", "400", "--output", str(tmp_path / "t")]
    assert train_tokenizer.main(["--input", str(source), *options]) == 0
    assert "train_tokenizer: left out: 1 too_long, 3 empty" in capsys.readouterr().err
    write_jsonl(source, ["", "x" * 6000])
    options[-1] = str(tmp_path / "other")
    assert train_tokenizer.main(["--input", str(source), *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"no text in {source}; left out: 1 empty, 1 too_long" in error


def test_an_output_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    output, kept = tmp_path / "o", tmp_path / "kept"
    with new_output(output) as made:
        made.mkdir()
        (made / "left.by.a.killed.run").touch()
        shutil.copytree(made.parent, kept)
        shutil.rmtree(made)
        made.touch()
    assert output.is_file()
    output.unlink()
    kept.rename(tmp_path / "o.partial")
    with new_output(output) as made:
        made.mkdir()
        (made / "x").touch()
        assert not output.exists()
        with pytest.raises(ConfigError, match="another run"), new_output(output):
            pass
    assert [path.name for path in output.iterdir()] == ["x"]
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


def test_what_was_begun_before_there_was_a_mark_goes_on(tmp_path: Path) -> None:
    (tmp_path / "state.json").touch()
    assert not is_own(tmp_path)
    (tmp_path / "pieces").mkdir()
    assert is_own(tmp_path)


@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_what_a_person_calls_partial_is_left_alone(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    source, output = write_jsonl(tmp_path / "in.jsonl", texts(300)), tmp_path / "o"
    partial, precious = tmp_path / "o.partial", tmp_path / "o.partial" / "pieces" / "precious"
    if kind == "file":
        precious = partial
    elif kind == "link":
        partial.symlink_to(tmp_path / "elsewhere")
    precious.parent.resolve().mkdir(parents=True, exist_ok=True)
    precious.write_text("mine")
    output_is = ["--output", str(output)]
    size = ["--vocab_size", "400"]
    for status in (
        tokenize(source, tokenizer_folder, output),
        train_tokenizer.main(["--input", str(source), *size, *output_is]),
        python_corpus.main(["--max_megabytes", "0.1", *output_is]),
    ):
        assert status == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 3
    for line in errors:
        assert f"--output {output}: " in line
        assert str(partial) in line
    # Nor is it taken for what a killed run left beside its output.
    assert tokenize(source, tokenizer_folder, tmp_path / "elsewhere.o") == 0
    (tmp_path / "elsewhere.o").rename(output)
    assert tokenize(source, tokenizer_folder, output) == 0
    assert "complete already" in capsys.readouterr().out
    assert precious.read_text() == "mine"


@contextmanager
def no_files_above(size: int) -> Iterator[None]:
    """Writing fails beyond ``size`` bytes of a file, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_one_line_that_says_where(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write_jsonl(tmp_path / "in.jsonl", texts(300)), tmp_path / "o"
    source_is, output_is = ["--input", str(source)], ["--output", str(output)]
    for run in (
        lambda: tokenize(source, tokenizer_folder, output),
        lambda: train_tokenizer.main([*source_is, "--vocab_size", "400", *output_is]),
        lambda: python_corpus.main(["--max_megabytes", "0.1", *output_is]),
    ):
        with no_files_above(3000):
            assert run() == 1
        errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert len(errors) == 1
        assert "File too large" in errors[0]
        assert f"{output}.partial" in errors[0]
        assert not list(tmp_path.glob("o*"))

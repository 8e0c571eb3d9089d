"""The data scripts as a person runs them: text to tokenizer to token files and back."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece

from data_prep import _encoding, tokenize_fineweb, train_tokenizer
from data_prep._common import encode_plain, load_tokenizer, new_folder, sha256_of
from sdp_llm.data import IndexedDataset
from sdp_llm.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
LINE = "the model reads a long text and learns which word comes next in many small steps"
WORDS = LINE.split()
# What a tokenizer, a JSON reader or a file format could get wrong.
HARD = [
    "é naïve 世界 😀",
    "tab\there\n\n  indented",
    "markup </s> <s> <unk>",
    "x\u2581y",
    "  two spaces",
]


def texts(count: int) -> list[str]:
    """Distinct short documents."""
    body = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(9)) + f" {i}" for i in range(count)]
    return HARD + body


def write_jsonl(path: Path, documents: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return path


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"data_prep/{name}.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def decoded(prefix: Path, tokenizer_folder: Path) -> list[str]:
    """Read every document back with the tokenizer; each must end with its one eos."""
    tokenizer, data = load_tokenizer(tokenizer_folder), IndexedDataset(prefix)
    documents = []
    for index in range(data.num_documents):
        ids = data.document(index).tolist()
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in ids[:-1]
        assert tokenizer.bos_token_id not in ids
        documents.append(tokenizer.decode(ids[:-1]))
    return documents


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    source = write_jsonl(folder / "text.jsonl", texts(300))
    arguments = ["--input", str(source), "--vocab_size", "400", "--output", str(folder / "t")]
    assert train_tokenizer.main(arguments) == 0
    return folder / "t"


def tokenize(source: object, tokenizer: Path, output: Path, *more: object) -> int:
    arguments = ["--source", source, "--tokenizer", tokenizer, "--output", output]
    arguments += ["--workers", 1, *more]
    return tokenize_fineweb.main([str(a) for a in arguments])


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


def test_documents_come_back_in_order(tmp_path: Path, tokenizer_folder: Path) -> None:
    documents = texts(50)
    bad: list[object] = [None, "", " \n ", "\ud800"]
    source = write_jsonl(tmp_path / "in.jsonl", [*documents, *bad[:3]])
    assert tokenize(source, tokenizer_folder, tmp_path / "o", "--validation_fraction", 0) == 0
    expected = [train_tokenizer.decoded_form(text) for text in documents]
    assert decoded(tmp_path / "o" / "train_text_document", tokenizer_folder) == expected
    manifest = json.loads((tmp_path / "o" / "manifest.json").read_text())
    data = IndexedDataset(tmp_path / "o" / "train_text_document")
    assert manifest["splits"]["train"] == {
        "documents": len(documents),
        "tokens": data.num_tokens,
        "utf8_bytes": sum(len(text.encode()) for text in documents),
    }
    assert (manifest["dropped"], manifest["documents_read"]) == ({"empty": 3}, len(documents) + 3)
    assert manifest["dtype"] == "uint16"
    assert manifest["tokenizer"]["sha256"] == sha256_of(tokenizer_folder / "tokenizer.json")
    for name, digest in manifest["sha256"].items():
        assert sha256_of(tmp_path / "o" / name) == digest
    assert len(manifest["sha256"]) == 4
    encoded = _encoding.Encoder(tokenizer_folder, 0.0).encode(["ok", *bad, 5])
    assert encoded.dropped == {"empty": 3, "invalid_unicode": 1, "not_text": 1}
    assert len(encoded.lengths) == 1


def test_every_format_gives_the_same_tokens(tmp_path: Path, tokenizer_folder: Path) -> None:
    documents = [text for text in texts(30) if "\n" not in text]
    plain = write_jsonl(tmp_path / "a.jsonl", documents)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "c.txt").write_text("\n\n".join(documents))
    table = pa.table(
        {"id": list(range(len(documents))), "text": pa.array(documents, pa.large_string())}
    )
    pq.write_table(table, tmp_path / "d [1].parquet", row_group_size=7)
    files: dict[str, list[str]] = {}
    for source in ("a.jsonl", "b.jsonl.gz", "c.txt", "d [1].parquet", "a*.jsonl"):
        output = tmp_path / f"out{len(files)}"
        assert tokenize(tmp_path / source, tokenizer_folder, output) == 0, source
        files[source] = [sha256_of(p) for p in sorted(output.glob("*_document.*"))]
    assert len({tuple(hashes) for hashes in files.values()}) == 1


def test_workers_do_not_change_the_output(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", texts(100))
    monkeypatch.setattr(_encoding, "_CHUNK_DOCUMENTS", 9)
    monkeypatch.setattr(_encoding, "_CHUNKS_IN_THIS_PROCESS", 0)
    for workers in (1, 3):
        more = ["--workers", workers, "--validation_fraction", 0.3]
        assert tokenize(source, tokenizer_folder, tmp_path / str(workers), *more) == 0
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert len(names) == 5
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


def test_the_split_is_a_property_of_the_text(tmp_path: Path, tokenizer_folder: Path) -> None:
    few, many = texts(200), list(reversed(texts(400)))
    held_out = {}
    for name, documents in (("few", few), ("many", many)):
        source = write_jsonl(tmp_path / f"{name}.jsonl", documents)
        more = ["--validation_fraction", 0.2]
        assert tokenize(source, tokenizer_folder, tmp_path / name, *more) == 0
        prefix = tmp_path / name / "validation_text_document"
        held_out[name] = set(decoded(prefix, tokenizer_folder))
    forms = {train_tokenizer.decoded_form(text) for text in few}
    assert held_out["few"] == held_out["many"] & forms
    assert 20 < len(held_out["few"]) < 62  # 41 expected of 205, standard deviation 5.7


def test_max_documents(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", texts(30))
    assert tokenize(source, tokenizer_folder, tmp_path / "o", "--max_documents", 7) == 0
    assert json.loads((tmp_path / "o" / "manifest.json").read_text())["documents_read"] == 7


def test_wrong_input_is_one_line(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_jsonl(tmp_path / "in.jsonl", texts(5))
    (tmp_path / "bad.parquet").write_text("<html>503</html>")
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "sp").mkdir()
    (tmp_path / "sp" / "tokenizer.model").write_bytes(b"")
    (tmp_path / "file").write_text("")
    output, tok = tmp_path / "o", tokenizer_folder
    cases: list[tuple[tuple[object, ...], str]] = [
        ((tmp_path / "none.jsonl", tok, output), "none.jsonl: no such file"),
        ((tmp_path / "notes.md", tok, output), "notes.md: unknown suffix"),
        ((tmp_path / "bad.parquet", tok, output), "bad.parquet: cannot be read as parquet"),
        ((tmp_path / "empty.jsonl", tok, output), "1 documents and no text"),
        ((good, tok, output, "--text_column", "body"), "no column 'body', it has text"),
        ((good, tmp_path / "none", output), "train_tokenizer.py"),
        ((good, tmp_path / "sp", output), "--from_model"),
        ((good, tok, tmp_path / "sp"), "exists and is not overwritten"),
        ((good, tok, tmp_path / "file" / "o"), "cannot be written"),
        ((good, tok, output, "--validation_fraction", 1), "--validation_fraction 1.0"),
        ((good, tok, output, "--workers", 0), "--workers 0"),
    ]
    for arguments, message in cases:
        source, tokenizer, folder, *more = arguments
        assert tokenize(source, Path(str(tokenizer)), Path(str(folder)), *more) == 2, message
        lines = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
        assert len(lines) == 1, lines
        assert lines[0].startswith("tokenize_fineweb: error: ")
        assert message in lines[0]
        assert not output.exists()
        assert not output.with_name("o.partial").exists()


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


def test_an_output_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    output = tmp_path / "o"
    (tmp_path / "o.partial").mkdir()
    (tmp_path / "o.partial" / "left.by.a.killed.run").touch()
    with new_folder(output) as folder:
        (folder / "x").touch()
        assert not output.exists()
        with pytest.raises(ConfigError, match="another run"), new_folder(output):
            pass
    assert [path.name for path in output.iterdir()] == ["x"]


def test_genuine_fineweb(tmp_path: Path, shared_data: Path) -> None:
    model, tokenizer = shared_data / "tokenizer" / "tokenizer.model", tmp_path / "tok"
    assert train_tokenizer.main(["--from_model", str(model), "--output", str(tokenizer)]) == 0
    source = shared_data / "fineweb" / "train.parquet"
    more = ["--max_documents", 50, "--validation_fraction", 0]
    assert tokenize(source, tokenizer, tmp_path / "o", *more) == 0
    expected = pq.read_table(source, columns=["text"]).slice(0, 50)["text"].to_pylist()
    got = decoded(tmp_path / "o" / "train_text_document", tokenizer)
    assert got == [train_tokenizer.decoded_form(text) for text in expected]
    rows = shared_data / "fineweb" / "schema_20rows.parquet"
    assert tokenize(rows, tokenizer, tmp_path / "rows") == 0

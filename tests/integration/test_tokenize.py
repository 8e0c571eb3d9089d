"""tokenize_fineweb on local files: what comes out, and what becomes of bad input."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import _pieces, tokenize_fineweb, train_tokenizer
from sdp_llm.data import IndexedDataset
from sdp_llm.data.indexed import IndexedDatasetWriter
from tests import megatron_format
from tests.integration.corpora import (
    HARD,
    decoded,
    hashes,
    manifest,
    script,
    texts,
    tokenize,
    train_texts,
    write_jsonl,
)

ALL_TRAIN = ("--validation_fraction", 0)


def forms(documents: list[str]) -> list[str]:
    """The documents as decoding gives them back."""
    return [train_tokenizer.decoded_form(text) for text in documents]


def write_parquet(path: Path, documents: list[str], rows: int = 7) -> Path:
    text = pa.array(documents, pa.large_string())
    table = pa.table({"id": list(range(len(documents))), "text": text})
    pq.write_table(table, path, row_group_size=rows)
    return path


def test_documents_come_back_in_order(tmp_path: Path, tokenizer_folder: Path) -> None:
    documents = texts(50)
    source = write_jsonl(tmp_path / "in.jsonl", documents)
    assert tokenize(source, tokenizer_folder, tmp_path / "o", *ALL_TRAIN) == 0
    assert train_texts(tmp_path / "o", tokenizer_folder) == forms(documents)
    data = IndexedDataset(tmp_path / "o" / "train_text_document")
    described = manifest(tmp_path / "o")
    assert described["splits"]["train"] == {
        "documents": len(documents),
        "tokens": data.num_tokens,
        "utf8_bytes": sum(len(text.encode()) for text in documents),
        "largest_id": int(data.tokens(0, data.num_tokens).max()),
        "longest_document": int(data.document_lengths().max()),
    }
    assert (described["documents_read"], described["dropped"]) == (len(documents), {})
    assert described["dtype"] == "uint16"
    tokenizer_file = hashes(tokenizer_folder)["tokenizer.json"]
    assert described["tokenizer"]["sha256"] == tokenizer_file
    written = hashes(tmp_path / "o", "*_document.*")
    assert {name: file["sha256"] for name, file in described["files"].items()} == written
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "o").glob("*_document.*")}
    assert {name: file["bytes"] for name, file in described["files"].items()} == sizes
    assert len(written) == 4
    # Another reader, written from the format's description alone, sees the same.
    foreign = megatron_format.read(tmp_path / "o" / "train_text_document")
    expected = [[data.document(index).tolist()] for index in range(data.num_documents)]
    assert (foreign.documents, foreign.dtype) == (expected, "uint16")
    # And the files are those that the writer of single documents makes.
    with IndexedDatasetWriter(tmp_path / "same", np.uint16) as writer:
        for index in range(data.num_documents):
            writer.add_document(data.document(index))
    for suffix in (".bin", ".idx"):
        again = (tmp_path / f"same{suffix}").read_bytes()
        assert (tmp_path / "o" / f"train_text_document{suffix}").read_bytes() == again


def test_what_is_no_text_is_counted(tmp_path: Path, tokenizer_folder: Path) -> None:
    long = "word " * 250_000
    lines = [json.dumps({"text": t}) for t in ["first", None, "", " \n ", 5, "\ud800", long]]
    lines += ["", "not json", '["a list"]', "[" * 100_000, '{"id": 1}', '{"text": "last", "x": {}}']
    data = "\n".join(lines).encode() + b'\n{"text": "bad \xff\xfe utf-8"}\n{"text": "no newline"}'
    (tmp_path / "in.jsonl").write_bytes(data)
    output = tmp_path / "o"
    more = [*ALL_TRAIN, "--max_document_megabytes", 1]
    assert tokenize(tmp_path / "in.jsonl", tokenizer_folder, output, *more) == 0
    assert train_texts(output, tokenizer_folder) == ["first", "last", "no newline"]
    described = manifest(output)
    assert described["dropped"] == {
        "empty": 3,
        "invalid_unicode": 2,
        "malformed_json": 3,
        "no_column": 1,
        "not_text": 1,
        "too_long": 1,
    }
    assert described["documents_read"] == 14
    assert described["failed_files"] == []


def test_a_line_without_end_is_not_held_in_memory(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pieces.Limits, "record_bytes", 1000)
    huge = json.dumps({"text": "x" * 5000})
    (tmp_path / "in.jsonl").write_text(f'{{"text": "a"}}\n{huge}\n{{"text": "b"}}\n{huge}')
    (tmp_path / "in.txt").write_text("c\n\n" + "y\n" * 3000 + "\nd")
    assert tokenize(tmp_path / "in.*", tokenizer_folder, tmp_path / "o", *ALL_TRAIN) == 0
    assert train_texts(tmp_path / "o", tokenizer_folder) == ["a", "b", "c", "d"]
    assert manifest(tmp_path / "o")["dropped"] == {"too_long": 3}


def test_every_format_gives_the_same_tokens(tmp_path: Path, tokenizer_folder: Path) -> None:
    documents = [text for text in texts(30) if "\n" not in text]
    plain = write_jsonl(tmp_path / "a.jsonl", documents)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    with pa.CompressedOutputStream(str(tmp_path / "c.jsonl.zst"), "zstd") as stream:
        stream.write(plain.read_bytes())
    (tmp_path / "d.txt").write_text("\n\n".join(documents))
    write_parquet(tmp_path / "e [1].parquet", documents)
    sources = ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.txt", "e [1].parquet", "a*.jsonl"]
    for number, source in enumerate(sources):
        output = tmp_path / f"out{number}"
        assert tokenize(tmp_path / source, tokenizer_folder, output) == 0, source
        files = hashes(output, "*_document.*")
        assert files == hashes(tmp_path / "out0", "*_document.*"), source


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    write_jsonl(tmp_path / "in" / "sub" / "a.jsonl", ["one"])
    write_parquet(tmp_path / "in" / "b.parquet", ["three", "four"])
    write_jsonl(tmp_path / "in" / "a.jsonl", ["two"])
    (tmp_path / "in" / "README.md").write_text("no text")
    assert tokenize(tmp_path / "in", tokenizer_folder, tmp_path / "o", *ALL_TRAIN) == 0
    got = train_texts(tmp_path / "o", tokenizer_folder)
    assert got == ["two", "three", "four", "one"]


def test_a_parquet_file_without_rows_has_no_documents(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    pq.ParquetWriter(tmp_path / "in" / "a.parquet", pa.schema([("text", pa.string())])).close()
    assert pq.read_metadata(tmp_path / "in" / "a.parquet").num_row_groups == 0
    assert tokenize(tmp_path / "in", tokenizer_folder, tmp_path / "none") == 2
    assert "0 documents and no text" in capsys.readouterr().err
    write_parquet(tmp_path / "in" / "b.parquet", ["one", "two"])
    assert tokenize(tmp_path / "in", tokenizer_folder, tmp_path / "o", *ALL_TRAIN) == 0
    assert train_texts(tmp_path / "o", tokenizer_folder) == ["one", "two"]


def test_exact_duplicates_are_left_out(tmp_path: Path, tokenizer_folder: Path) -> None:
    write_jsonl(tmp_path / "1.jsonl", ["a", "b", "a", "c"])
    write_jsonl(tmp_path / "2.jsonl", ["c", "d", "b", "B"])
    assert tokenize(tmp_path / "*.jsonl", tokenizer_folder, tmp_path / "o", *ALL_TRAIN) == 0
    assert train_texts(tmp_path / "o", tokenizer_folder) == ["a", "b", "c", "d", "B"]
    assert manifest(tmp_path / "o")["dropped"] == {"duplicate": 3}
    more = [*ALL_TRAIN, "--no_dedup"]
    assert tokenize(tmp_path / "*.jsonl", tokenizer_folder, tmp_path / "all", *more) == 0
    assert train_texts(tmp_path / "all", tokenizer_folder) == list("abaccdbB")
    assert manifest(tmp_path / "all")["dropped"] == {}


@pytest.mark.parametrize("rows", [3, 1000])
def test_workers_and_pieces_do_not_change_the_output(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    documents = texts(100) + texts(10)
    write_parquet(tmp_path / "a.parquet", documents[:60], rows)
    write_jsonl(tmp_path / "b.jsonl", documents[60:])
    more = ["--validation_fraction", 0.3]
    assert tokenize(tmp_path / "[ab].*", tokenizer_folder, tmp_path / "1", *more) == 0
    for module in (_pieces, tokenize_fineweb):
        monkeypatch.setattr(module, "PIECE_BYTES", 700)
    more += ["--workers", 3]
    assert tokenize(tmp_path / "[ab].*", tokenizer_folder, tmp_path / "3", *more) == 0
    assert hashes(tmp_path / "1") == hashes(tmp_path / "3")
    assert len(hashes(tmp_path / "1")) == 5


def test_the_split_is_a_property_of_the_text(tmp_path: Path, tokenizer_folder: Path) -> None:
    few, many = texts(200), list(reversed(texts(400)))
    held_out = {}
    for name, documents in (("few", few), ("many", many)):
        source = write_jsonl(tmp_path / f"{name}.jsonl", documents)
        more = ["--validation_fraction", 0.2]
        assert tokenize(source, tokenizer_folder, tmp_path / name, *more) == 0
        prefix = tmp_path / name / "validation_text_document"
        held_out[name] = set(decoded(prefix, tokenizer_folder))
    assert held_out["few"] == held_out["many"] & set(forms(few))
    assert 20 < len(held_out["few"]) < 62  # 41 expected of 205, standard deviation 5.7


def test_max_documents(tmp_path: Path, tokenizer_folder: Path) -> None:
    documents: list[object] = [*HARD, None, "a", "a", "b", "c"]
    source = write_jsonl(tmp_path / "in.jsonl", documents)
    more = [*ALL_TRAIN, "--max_documents", 9]
    assert tokenize(source, tokenizer_folder, tmp_path / "o", *more) == 0
    assert train_texts(tmp_path / "o", tokenizer_folder) == [*forms(HARD), "a", "b"]
    described = manifest(tmp_path / "o")
    assert described["documents_read"] == 9
    assert described["dropped"] == {"duplicate": 1, "empty": 1}


def truncated_parquet(path: Path) -> None:
    write_parquet(path, texts(40))
    path.write_bytes(path.read_bytes()[:-100])


def corrupt_row_group(path: Path) -> None:
    """The last of four row groups does not unpack."""
    write_parquet(path, [f"row {i}" for i in range(20)], rows=5)
    offset = pq.read_metadata(path).row_group(3).column(1).data_page_offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 40] = b"\xff" * 40
    path.write_bytes(data)


def truncated_gzip(path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": rng.bytes(300).hex()}) for _ in range(2000)]
    path.write_bytes(gzip.compress("\n".join(lines).encode())[:-1000])


@pytest.mark.parametrize(
    ("name", "make", "at_least"),
    [
        ("page.parquet", lambda path: path.write_text("<html>503</html>"), 0),
        ("empty.parquet", lambda path: path.touch(), 0),
        ("cut.parquet", truncated_parquet, 0),
        ("corrupt.parquet", corrupt_row_group, 15),
        ("cut.jsonl.gz", truncated_gzip, 1500),
        ("page.jsonl.gz", lambda path: path.write_text("<html>503</html>"), 0),
        ("page.jsonl.zst", lambda path: path.write_text("<html>503</html>"), 0),
        ("columns.jsonl", lambda path: path.write_text('{"body": "x"}\n{"id": "y"}'), 0),
        ("array.json", lambda path: path.write_text('[{"text": "x"}, {"text": "y"}]'), 0),
        ("numbers.parquet", lambda path: pq.write_table(pa.table({"text": [1]}), path), 0),
    ],
)
def test_a_broken_file_does_not_stop_the_others(
    tmp_path: Path,
    tokenizer_folder: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    make: Callable[[Path], None],
    at_least: int,
) -> None:
    (tmp_path / "in").mkdir()
    make(tmp_path / "in" / name)
    write_jsonl(tmp_path / "in" / "a.jsonl", ["good before"])
    write_parquet(tmp_path / "in" / "z.parquet", ["good after"])
    assert tokenize(tmp_path / "in", tokenizer_folder, tmp_path / "o", *ALL_TRAIN) == 1
    errors = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert len(errors) == 1
    assert errors[0].startswith("tokenize_fineweb: error: ")
    assert name in errors[0]
    got = train_texts(tmp_path / "o", tokenizer_folder)
    assert (got[0], got[-1]) == ("good before", "good after")
    assert len(got) >= 2 + at_least
    assert [failed["file"] for failed in manifest(tmp_path / "o")["failed_files"]] == [name]
    # As often as one asks.
    assert tokenize(tmp_path / "in", tokenizer_folder, tmp_path / "o", *ALL_TRAIN) == 1
    assert errors[0] in capsys.readouterr().err


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
        ((tmp_path / "sp", tok, output), "no .parquet, .jsonl or .txt file in this folder"),
        ((tmp_path / "bad.parquet", tok, output), "bad.parquet: cannot be read as parquet"),
        ((tmp_path / "empty.jsonl", tok, output), "1 documents and no text"),
        ((good, tok, output, "--text_column", "body"), "no column 'body', it has text"),
        ((good, tmp_path / "none", output), "train_tokenizer.py"),
        ((good, tmp_path / "sp", output), "--from_model"),
        ((good, tok, tmp_path / "sp"), "exists and is not overwritten"),
        ((good, tok, tmp_path / "file" / "o"), "cannot be written"),
        ((good, tok, output, "--validation_fraction", 1), "--validation_fraction 1.0"),
        ((good, tok, output, "--workers", 0), "--workers 0"),
        ((good, tok, output, "--max_document_megabytes", 0), "--max_document_megabytes 0"),
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


def test_a_source_without_text_says_what_it_has(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(
        '{"text": ""}\n{"text": 1}\n{"text": " "}\n{"id": 1}\nx'
    )
    (tmp_path / "in" / "b.parquet").touch()
    assert tokenize(tmp_path / "in", tokenizer_folder, tmp_path / "o") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "5 documents and no text in column 'text': " in line
    for reason in ("2 empty", "1 not_text", "1 no_column", "1 malformed_json"):
        assert reason in line
    assert "b.parquet: cannot be read as parquet" in line
    (tmp_path / "empty.jsonl").touch()
    assert tokenize(tmp_path / "empty.jsonl", tokenizer_folder, tmp_path / "o") == 2
    assert "0 documents and no text in column 'text': the files are" in capsys.readouterr().err


def test_an_output_within_the_source_is_refused(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", texts(5))
    (tmp_path / "link").symlink_to(folder)
    for source, output in ((folder, folder / "o"), (folder, tmp_path / "link" / "sub" / "o")):
        assert tokenize(source, tokenizer_folder, output) == 2
        refused = f"--output {output}: lies within --source {source}, "
        assert refused in capsys.readouterr().err.splitlines()[-1]
        arguments = ["--input", str(source), "--vocab_size", "400", "--output", str(output)]
        assert train_tokenizer.main(arguments) == 2
        assert f"lies within --input {source}, " in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in folder.iterdir()] == ["a.jsonl"]
    # A glob that does not match what is written can be read again.
    for _ in range(2):
        assert tokenize(folder / "*.jsonl", tokenizer_folder, folder / "o", *ALL_TRAIN) == 0
    assert "complete already" in capsys.readouterr().out


def test_the_disk_is_checked_before_the_start(
    tmp_path: Path,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", texts(500))
    usage = tokenize_fineweb.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(tokenize_fineweb.shutil, "disk_usage", lambda path: usage)
    assert tokenize(source, tokenizer_folder, tmp_path / "o") == 2
    captured = capsys.readouterr()
    assert "needs" in captured.err
    assert "1 kB are free" in captured.err
    assert "about 505 documents" in captured.out
    assert "16 bytes a document: 8.08 kB" in captured.out
    assert not list(tmp_path.glob("o*"))
    # How much a packed source will take is not known well enough to refuse it.
    packed = tmp_path / "in.jsonl.gz"
    packed.write_bytes(gzip.compress(source.read_bytes()))
    assert tokenize(packed, tokenizer_folder, tmp_path / "o") == 0
    assert "tokenize_fineweb: warning: --output" in capsys.readouterr().err


def test_an_output_that_is_a_dangling_link_is_refused_before_any_work(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write_jsonl(tmp_path / "in.jsonl", texts(5)), tmp_path / "o"
    output.symlink_to(tmp_path / "none")
    assert tokenize(source, tokenizer_folder, output) == 2
    captured = capsys.readouterr()
    [error] = captured.err.splitlines()
    assert f"--output {output}: exists and is not overwritten" in error
    assert captured.out == ""
    assert not (tmp_path / "o.partial").exists()


def test_the_estimate_is_close(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for source in (
        write_jsonl(tmp_path / "in.jsonl", texts(900)),
        write_parquet(tmp_path / "in.parquet", texts(900)),
    ):
        output = tmp_path / source.suffix[1:]
        assert tokenize(source, tokenizer_folder, output) == 0
        line = capsys.readouterr().out.splitlines()[0]
        documents, tokens = line.split("about ")[1].split(" documents and ")
        counts = manifest(output)["splits"].values()
        total = sum(c["tokens"] for c in counts)
        assert float(documents) == pytest.approx(905, rel=0.1)
        assert float(tokens.split()[0]) * 1e6 == pytest.approx(total, rel=0.1, abs=1e5)


def test_genuine_fineweb(tmp_path: Path, shared_data: Path) -> None:
    model, tokenizer = shared_data / "tokenizer" / "tokenizer.model", tmp_path / "tok"
    assert train_tokenizer.main(["--from_model", str(model), "--output", str(tokenizer)]) == 0
    source = shared_data / "fineweb" / "train.parquet"
    more = [*ALL_TRAIN, "--max_documents", 50]
    assert tokenize(source, tokenizer, tmp_path / "o", *more) == 0
    expected = pq.read_table(source, columns=["text"]).slice(0, 50)["text"].to_pylist()
    assert train_texts(tmp_path / "o", tokenizer) == forms(expected)
    rows = shared_data / "fineweb" / "schema_20rows.parquet"
    assert tokenize(rows, tokenizer, tmp_path / "rows") == 0


@pytest.mark.slow
def test_all_genuine_documents_come_back(tmp_path: Path, shared_data: Path) -> None:
    model, tokenizer = shared_data / "tokenizer" / "tokenizer.model", tmp_path / "tok"
    assert train_tokenizer.main(["--from_model", str(model), "--output", str(tokenizer)]) == 0
    fineweb = shared_data / "fineweb"
    for name, source in (
        ("train", fineweb / "train.parquet"),
        ("schema", fineweb / "schema_20rows.parquet"),
        ("web", shared_data / "openwebtext_1000.jsonl"),
    ):
        made = script("tokenize_fineweb", "--source", source, "--tokenizer", tokenizer,
                      "--output", tmp_path / name, *ALL_TRAIN, "--no_dedup")  # fmt: skip
        assert made.returncode == 0, made.stderr
        if source.suffix == ".parquet":
            expected = pq.read_table(source, columns=["text"])["text"].to_pylist()
        else:
            expected = [json.loads(line)["text"] for line in source.read_text().splitlines()]
        assert train_texts(tmp_path / name, tokenizer) == forms(expected)

"""Corpora that are wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.wrong.scene import Scene, Wrong, changes_of, check, copied_corpus, run

REMAKE = "make the corpus again with `python data_prep/tokenize_fineweb.py`"


def damaged(name: str, damage: Callable[[Path, Path], object], *words: str) -> Wrong:
    """A corpus of which a file is not what it was; ``damage`` gets the .bin and the .idx."""

    def provoke(scene: Scene) -> None:
        prefix = copied_corpus(scene, "corpus")
        damage(Path(f"{prefix}.bin"), Path(f"{prefix}.idx"))
        overrides = changes_of(("data.train={folder}/corpus",), scene)
        check(scene.tiny.config, overrides, world_size=2)

    return Wrong("data", name, provoke, ('data.train = "{folder}/corpus"', *words))


def overwrite(path: Path, at: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + len(content)] = content
    path.write_bytes(data)


CASES = [
    run(
        "data",
        "missing corpus",
        ("data.train={folder}/none",),
        *('data.train = "{folder}/none"', "none.bin: no such file", REMAKE),
    ),
    run(
        "data",
        "missing validation corpus",
        ("data.validation={folder}/none",),
        *('data.validation = "{folder}/none"', "no such file", REMAKE),
    ),
    run(
        "data",
        "the name of a file instead of the prefix",
        ("data.train={folder}/low.bin",),
        *('data.train = "{folder}/low.bin"', "name the corpus without the suffix, as {folder}/low"),
    ),
    run(
        "data",
        "a folder instead of a prefix",
        ("data.train={tiny}/corpus",),
        *('data.train = "{tiny}/corpus"', "train_text_document"),
    ),
    damaged("only the .bin", lambda _, index: index.unlink(), "corpus.idx: no such file", REMAKE),
    damaged("only the .idx", lambda tokens, _: tokens.unlink(), "corpus.bin: no such file", REMAKE),
    damaged("tokens cut", lambda tokens, _: tokens.write_bytes(b"cut"), "truncated", REMAKE),
    damaged(
        "index cut", lambda _, index: overwrite(index, 18, b"\xff" * 7), "its header describes"
    ),
    damaged("no index", lambda _, index: index.write_bytes(b""), "not a Megatron index", REMAKE),
    damaged(
        "another magic",
        lambda _, index: overwrite(index, 0, b"MMIDID2"),
        *("corpus.idx: not a Megatron index", "MMIDIDX", REMAKE),
    ),
    damaged("another version", lambda _, index: overwrite(index, 9, b"\x07"), "version 7", REMAKE),
    damaged("tokens that are floats", lambda _, index: overwrite(index, 17, b"\x07"), "dtype code"),
    run(
        "data",
        "corpus of less than a batch",
        ("data.train={folder}/short",),
        *('data.train = "{folder}/short"', "one global batch of 8", "use a larger corpus"),
    ),
    run(
        "data",
        "corpus of less than a sample",
        ("data.validation={folder}/short", "data.sequence_length=64"),
        *('data.validation = "{folder}/short"', "50 tokens are less", "shorten the sequences"),
    ),
    run(
        "data",
        "corpus of less than its part of a batch",
        ('data.train={"{folder}/low": 1, "{folder}/less": 7}',),
        *("data.train: {folder}/less: 1 samples of 32 tokens", "7 of 8", "a smaller weight"),
    ),
    run(
        "data",
        "missing corpus in a blend",
        ('data.train={"{folder}/low": 1, "{folder}/none": 1}',),
        *('data.train["{folder}/none"]: {folder}/none.bin: no such file', REMAKE),
    ),
    run(
        "data",
        "weight of zero",
        ('data.train={"{folder}/low": 0}',),
        *('data.train["{folder}/low"] = 0: expected a weight > 0', "remove a corpus"),
    ),
    run(
        "data",
        "weight in quotes",
        ('data.train={"{folder}/low": "1"}',),
        *('data.train["{folder}/low"] = "1": expected a weight > 0',),
    ),
    run(
        "data",
        "a list of corpora",
        ('data.train=["{folder}/low"]',),
        *("data.train = ", "expected a path, or an object of paths and weights"),
    ),
    run(
        "data",
        "ids larger than the vocabulary",
        ("model.config={folder}/small",),
        *('data.train = "', "has token id", "vocab_size = 300", "use the tokenizer"),
    ),
    run(
        "data",
        "validation ids larger than the vocabulary",
        ("model.config={folder}/small", "data.train={folder}/low"),
        *('data.validation = "', "has token id", "vocab_size = 300", "use the tokenizer"),
    ),
    run(
        "data",
        "ids larger than the vocabulary in a blend",
        ('data.train={"{folder}/low": 1, "{folder}/high": 1}',),
        *('data.train["{folder}/high"]: has token id 400', "vocab_size = 320"),
    ),
    run(
        "data",
        "documents that end otherwise",
        ("data.train={folder}/low", "data.document_mask=true"),
        *("data.document_mask = true: document 0 of data.train", "id 2 of data.tokenizer"),
    ),
    run(
        "data",
        "too many workers",
        ("data.num_workers=100000",),
        *("data.num_workers = 100000", "use at most 256"),
    ),
]

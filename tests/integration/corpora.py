"""Small sources, tokenized, and read back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep import tokenize_fineweb
from data_prep._tokenizer import load_tokenizer
from sdp_llm.data import IndexedDataset
from sdp_llm.files import sha256_of
from tests.conftest import ROOT

_LINE = "the model reads a long text and learns which word comes next in many small steps"
_WORDS = _LINE.split()
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
    order = [" ".join(_WORDS[i * k % len(_WORDS)] for k in range(9)) for i in range(count)]
    return HARD + [f"{text} {i}" for i, text in enumerate(order)]


def write_jsonl(path: Path, documents: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return path


def script(name: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a data script as a person does."""
    command = [sys.executable, f"data_prep/{name}.py", *map(str, arguments)]
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120, **options}
    return subprocess.run(command, **options)


def tokenize(source: object, tokenizer: Path, output: Path, *more: object) -> int:
    """Run tokenize_fineweb in this process and return its status."""
    arguments = ["--source", source, "--tokenizer", tokenizer, "--output", output]
    arguments += ["--workers", 1, *more]
    return tokenize_fineweb.main([str(a) for a in arguments])


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


def train_texts(output: Path, tokenizer_folder: Path) -> list[str]:
    return decoded(output / "train_text_document", tokenizer_folder)


def manifest(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / "manifest.json").read_text())
    return content


def hashes(output: Path, pattern: str = "*") -> dict[str, str]:
    return {path.name: sha256_of(path) for path in sorted(output.glob(pattern))}
